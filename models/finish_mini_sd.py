"""Turn a finished run into models/mini-sd: fp16 files, averaged and raw weights, nothing of the run.

python -m models.finish_mini_sd --run build/mini-sd/run --output_dir models/mini-sd
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    index = json.loads((args.run / "model_index.json").read_text(encoding="utf-8"))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.run / "model_index.json", args.output_dir / "model_index.json")
    for part in (name for name, value in index.items() if isinstance(value, list) and value[0]):
        target = args.output_dir / part
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(args.run / part, target)
        for path in target.glob("*.safetensors"):
            weights = {name: value.to(torch.float16) for name, value in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})
            path.chmod(0o644)
    total = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"{args.output_dir}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
