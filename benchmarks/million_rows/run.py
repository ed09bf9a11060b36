"""How long training takes to start on a folder of many rows, and how much memory: the table of README.md.

    python benchmarks/million_rows/run.py --rows 10000 100000 1000000

Makes folders of hard links to a few small images with a metadata.jsonl of that many rows, and loads each in a process
of its own as training does with --check_images none, up to the first batch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

LINKS_OF_ONE_FILE = 50_000  # ext4 takes 65,000

LOAD = """
import sys, time
from dataclasses import dataclass
from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.training_set import DataArgs, load_images
from finetuning.families.family import Tokenizers
from finetuning.families.table import DEFAULT_FAMILY
from finetuning.families.opening import open_tokenizer

@dataclass
class Args(BucketArgs, CaptionArgs, DataArgs): pass

def resident(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) / 1024

tokenize = Tokenizers({"text_encoder": open_tokenizer("models/mini-sd/tokenizer")}, DEFAULT_FAMILY)
before = resident("VmRSS")
start = time.perf_counter()
training, _ = load_images(Args(train_data_dir=sys.argv[1], resolution="64", check_images="none"), tokenize, 0)
training.fingerprint()
sampler = BatchSampler(len(training), micro_batch=16, accumulation=1, processes=1, process=0, seed=0)
next(iter(training.loader(sampler, 0, 10, workers=0)))
print(time.perf_counter() - start, resident("VmHWM") - before, resident("VmRSS") - before)
"""


def make(folder, count):
    """`count` images in train/, each with a caption."""
    (folder / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0)
    with open(folder / "train/metadata.jsonl", "w", encoding="utf-8") as metadata:
        for number in range(count):
            original = folder / f"{number // LINKS_OF_ONE_FILE}.jpg"
            if number % LINKS_OF_ONE_FILE == 0:
                Image.fromarray(pixels.integers(0, 256, (64, 64, 3), np.uint8)).save(original)
            name = f"{number:07d}.jpg"
            os.link(original, folder / "train" / name)
            text = f"a photo of thing number {number} on a wooden table, seen from above, in soft morning light"
            metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    print("| rows | until the first batch | memory at most | memory after |\n|---|---|---|---|")
    for count in parser.parse_args().rows:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count)
            command = [sys.executable, "-c", LOAD, folder]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."}
            )
            seconds, most, after = map(float, done.stdout.splitlines()[-1].split())
            print(f"| {count:,} | {seconds:.1f} s | +{most:.0f} MB | +{after:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
