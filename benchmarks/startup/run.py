"""How long each script takes to answer `--help` and a misspelled flag, beside a bare `import torch`.

    python benchmarks/startup/run.py [--repeats 5]

Measures CPU seconds (user and system, all threads) of whole processes, in turns, so that a busy machine slows all of
them alike. Prints the medians, with the smallest and the largest, and the ratio to `import torch`; the limit is 1.5.
Exit status 1 where one is above it.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1.5
COMMANDS = {
    "caption_images.py": [], "evaluate_model.py": [], "generate_images.py": [], "merge_checkpoints.py": ["merge"],
    "prepare_dataset.py": ["convert"], "train_lora.py": [], "train_text_to_image.py": [],
}  # fmt: skip


def cpu_seconds(command):
    """CPU time of one process, user and system."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    asked = {"import torch": [sys.executable, "-c", "import torch"]}
    for script, words in COMMANDS.items():
        asked[f"{' '.join([script, *words])} --help"] = [sys.executable, script, *words, "--help"]
        asked[f"{' '.join([script, *words])} --no_such_flag"] = [sys.executable, script, *words, "--no_such_flag"]
    for command in asked.values():  # compiles, and reads the files once
        cpu_seconds(command)
    seconds = {name: [] for name in asked}
    for _ in range(repeats):
        for name, command in asked.items():
            seconds[name].append(cpu_seconds(command))

    bare = seconds["import torch"]
    print("| command | CPU seconds, median (smallest to largest) | times `import torch` |\n|---|---|---|")
    slow = []
    for name, times in seconds.items():
        ratio = statistics.median(time / torch for time, torch in zip(times, bare, strict=True))
        print(f"| `{name}` | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | {ratio:.2f} |")
        slow += [name] if ratio > LIMIT else []
    if slow:
        print(f"above {LIMIT} times `import torch`: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
