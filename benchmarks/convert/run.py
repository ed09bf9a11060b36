"""How fast prepare_dataset.py convert is, beside a bare decode loop of the same files in the same run.

    PYTHONPATH=. python benchmarks/convert/run.py [--images 20000] [--rounds 1] [--workers N]

Makes JPEGs of 512 to 1024 pixels a side (some hundred files, hard-linked again and again under other names, so that
the disk is no limit) with a metadata.jsonl, then in alternation, each in a process of its own: decode every file and
throw the pixels away; convert with images linked; convert with --max_side 512, which encodes all of them anew.
Prints a Markdown table of medians.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from finetuning.conversion.imagefolder import read
from finetuning.conversion.writer import WritingArgs, write_dataset
from finetuning.data.reading import Findings

ENCODINGS = 200


def make_images(folder, count):
    """JPEGs with the detail of photos: smooth colours under fine noise."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for i in range(min(ENCODINGS, count)):
        width, height = (int(side) for side in random.integers(512, 1025, 2))
        smooth = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((width, height), 3)
        noisy = np.asarray(smooth, dtype=np.float32) + random.normal(0, 8, (height, width, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06}.jpg", quality=90)
    for i in range(ENCODINGS, count):
        os.link(folder / f"{i % ENCODINGS:06}.jpg", folder / f"{i:06}.jpg")
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for i in range(count):
            metadata.write(json.dumps({"file_name": f"{i:06}.jpg", "text": f"image number {i}"}) + "\n")


def decode(folder, threads):
    """The bare loop."""

    def load(path):
        with Image.open(path) as image:
            image.load()

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(load, sorted(folder.glob("*.jpg"))):
            pass


def convert(folder, threads, output, max_side):
    args = WritingArgs(output=str(output), workers=threads, max_side=max_side)
    args.image_column, args.caption_column, args.allow_outside_paths = "image", "text", False
    counts = write_dataset(read(folder, args, Findings()), args)
    if sum(counts.values()) != len(list(folder.glob("*.jpg"))):
        raise SystemExit(f"not all images were written: {counts}")


def measure(kind, folder, threads):
    """Run one kind in this process; prints its seconds, CPU seconds and peak memory in MiB."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as below:
        start, start_cpu = time.perf_counter(), time.process_time()
        if kind == "decode":
            decode(folder, threads)
        else:
            convert(folder, threads, Path(below) / "out", 512 if kind == "smaller" else None)
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    # not getrusage: its peak counts what the process that started this one had
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))


KINDS = {"decode": "decode only", "linked": "convert, linked", "smaller": "convert, --max_side 512"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], Path(args.measure[1]), args.workers)
    results = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as below:
        folder = Path(below) / "images"
        make_images(folder, args.images)
        for _ in range(args.rounds):
            for kind in KINDS:
                command = [sys.executable, __file__, "--workers", str(args.workers), "--measure", kind, str(folder)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                results[kind].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(results, args))


def table(results, args):
    median = {kind: statistics.median(one["seconds"] for one in runs) for kind, runs in results.items()}
    lines = [
        f"{args.images:,} JPEGs, 512 to 1024 pixels a side; {args.workers} threads; median of {args.rounds} rounds\n",
        "| | images/s | of the bare loop | CPU ms an image | peak RSS, MiB |",
        "|---|---|---|---|---|",
    ]
    for kind, name in KINDS.items():
        speed, share = args.images / median[kind], median["decode"] / median[kind]
        peak = max(one["peak"] for one in results[kind])
        work = statistics.median(one["cpu"] for one in results[kind]) / args.images * 1000
        lines.append(f"| {name} | {speed:.1f} | {share:.1%} | {work:.2f} | {peak:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
