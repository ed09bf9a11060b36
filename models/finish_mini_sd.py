"""Turn a finished run into models/mini-sd or mini-sdxl: fp16 files, averaged and raw weights, nothing of the run.

python -m models.finish_mini_sd --run build/mini-sd/run --output_dir models/mini-sd
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from finetuning.families.folders import components_of_index, pipeline_index


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only_average", action="store_true", help="leave the raw weights out")
    args = parser.parse_args()
    index = pipeline_index(args.run)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.run / "model_index.json", args.output_dir / "model_index.json")
    for component in components_of_index(index):
        target = args.output_dir / component
        shutil.rmtree(target, ignore_errors=True)
        raw = ("*.non_ema.safetensors",) if args.only_average else ()
        shutil.copytree(args.run / component, target, ignore=shutil.ignore_patterns(*raw))
        for path in target.glob("*.safetensors"):
            weights = {name: value.to(torch.float16) for name, value in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})
            path.chmod(0o644)
    total = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"{args.output_dir}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
