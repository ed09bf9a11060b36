"""How long a merge takes beside a plain copy of the same files, and how much memory: the table of README.md.

    PYTHONPATH=. python benchmarks/merge/run.py [--rounds 5] [--scratch FOLDER] [--dtypes fp32 fp16]

Makes two UNets of Stable Diffusion 1.5's layout with random weights, then measures in alternation, each kind in a
process of its own whose inputs are not in the page cache: a copy (both inputs are read, one is written, 16 MB at a
time), the copy with three more files written, and merges by finetuning/merging/merge_writer.py. All times include the
sync to the disk. Prints a Markdown table of medians for each dtype. Needs 5 times the size of a model of disk, 17 GB
for fp32.
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
from functools import partial
from pathlib import Path

import numpy as np
import torch

from finetuning.families.tensors import tensor_references
from finetuning.files import xxh3
from finetuning.merging.merge_writer import MergeTask, OutputTensor, write_files
from finetuning.merging.methods import weighted_sum

COPIED_AT_ONCE = 16_000_000  # bytes
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
NAMES = {"fp32": "F32", "fp16": "F16"}
RATIOS = (0.3, 0.1, 0.5, 0.7)
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
KINDS = {
    "copy": "copy",
    "merge": "merge, one ratio",
    "unhashed": "merge, one ratio, inputs not hashed",
    "copies": "copy and three more files written",
    "merges": "merge, four ratios in one pass",
}


# -- the files -------------------------------------------------------------------------------------------------------


def make_models(folder, dtype):
    """base, and tuned, which is 1 % away from it: random weights, tensor by tensor."""
    from diffusers import UNet2DConditionModel  # not in the processes that are measured

    with torch.device("meta"):
        state = UNet2DConditionModel(**SD15, attention_head_dim=8).state_dict()
    header, end = {}, 0
    for key, value in state.items():
        first, end = end, end + value.numel() * DTYPES[dtype].itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(value.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for name, change in (("base", 0), ("tuned", 2e-4)):
        generator = torch.Generator().manual_seed(0)
        with open(folder / f"{name}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for value in state.values():
                weights = 0.02 * torch.randn(value.numel(), generator=generator)
                weights += change * weights.roll(1) / 0.02
                file.write(weights.to(DTYPES[dtype]).numpy())


def drop_from_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- what is measured ------------------------------------------------------------------------------------------------


def copy(inputs, outputs):
    """Read all inputs, write what the last one holds into the first output and then into the others; sync them."""
    buffer = memoryview(bytearray(COPIED_AT_ONCE))
    files = [os.open(path, os.O_RDONLY) for path in inputs]
    targets = [os.open(path, os.O_WRONLY | os.O_CREAT, 0o666) for path in outputs]
    for offset in range(0, inputs[0].stat().st_size, COPIED_AT_ONCE):
        for file in files:
            count = os.preadv(file, [buffer], offset)
        for target in targets:
            os.pwrite(target, buffer[:count], offset)
    for descriptor in targets:
        os.fsync(descriptor)
    for descriptor in files + targets:
        os.close(descriptor)


def merge(inputs, outputs, hashed):
    """As merge_checkpoints.py does it, one output for each of RATIOS as far as there are outputs."""
    base, tuned = (tensor_references(path)[0] for path in inputs)
    ways = [(path, partial(weighted_sum, ratio=ratio)) for path, ratio in zip(outputs, RATIOS, strict=False)]
    tasks = [
        MergeTask(
            key, (one, tuned[key]), tuple(OutputTensor(path, key, one.dtype, one.shape, way) for path, way in ways)
        )
        for key, one in base.items()
    ]
    write_files(tasks, lambda hashes: {path: {"inputs": json.dumps(list(hashes.values()))} for path in outputs}, hashed)
    for path in outputs:  # as their manifest is made
        xxh3(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def check(inputs, output, ratio):
    """Elements of some tensors are what NumPy has in float64, within a unit in the last place of the larger input."""
    base, tuned, merged = (tensor_references(path)[0] for path in (*inputs, output))
    picker = np.random.default_rng(0)
    for key in picker.choice(list(merged), 40, replace=False):
        a, b, value = (one[key].read().double().numpy().reshape(-1) for one in (base, tuned, merged))
        kind = {torch.float32: np.float32, torch.float16: np.float16}[merged[key].dtype]
        expected = a + ratio * (b - a)
        ulp = np.spacing(np.maximum(np.abs(a), np.abs(b)).astype(kind)).astype(np.float64)
        if not (np.abs(value - expected) <= ulp).all():
            raise SystemExit(f"{output}: {key} differs from NumPy's float64 by more than a unit in the last place")


def measure(kind, folder):
    """Run one kind in this process; prints its seconds, memory in MB and what was read from the disk in GB."""
    inputs = [folder / "base.safetensors", folder / "tuned.safetensors"]
    with tempfile.TemporaryDirectory(dir=folder) as below:
        count = 4 if kind in ("copies", "merges") else 1
        outputs = [Path(below) / f"{number}.safetensors" for number in range(count)]
        for path in inputs:
            drop_from_cache(path)
        imported, read = memory("VmRSS"), read_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        start, start_cpu = time.perf_counter(), time.process_time()
        if kind.startswith("cop"):
            copy(inputs, outputs)
        else:
            merge(inputs, outputs, () if kind == "unhashed" else tuple(inputs))
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        peak, read = memory("VmHWM"), read_bytes() - read
        if not kind.startswith("cop"):
            check(inputs, outputs[0], RATIOS[0])
    print(json.dumps({"seconds": seconds, "cpu": cpu, "added": peak - imported, "peak": peak, "read": read / 1e9}))


def memory(name):
    """VmRSS or VmHWM of this process, in MB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def read_bytes():
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


# -- the table -------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where the files are made (none: the folder for temporary files)")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], Path(args.measure[1]))
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as below:
            make_models(Path(below), dtype)
            size = (Path(below) / "base.safetensors").stat().st_size / 1e9
            results = {kind: [] for kind in args.kinds}
            for _ in range(args.rounds):
                for kind in args.kinds:
                    command = [sys.executable, __file__, "--measure", kind, below]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    results[kind].append(json.loads(done.stdout.splitlines()[-1]))
        print(table(results, dtype, size, args.rounds), flush=True)


def table(results, dtype, size, rounds):
    median = {
        kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in results.items()
    }
    lines = [
        f"\n{dtype}, 2 x {size:.2f} GB, {os.cpu_count()} cores; median (least to most) of {rounds} rounds\n",
        "| | seconds | of the copy | CPU s | from disk, GB | peak RSS, MB | beyond the imports |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, one in median.items():
        share = f"{one['seconds'] / median['copy']['seconds']:.2f} x" if "copy" in median else ""
        seconds = [run["seconds"] for run in results[kind]]
        most = {key: max(run[key] for run in results[kind]) for key in ("peak", "added")}
        lines.append(
            f"| {KINDS[kind]} | {one['seconds']:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {share} | "
            f"{one['cpu']:.1f} | {one['read']:.2f} | {most['peak']:.0f} | +{most['added']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
