"""What an SDXL makes of the sizes and the crop that it is told: how sharp its images are, and where the scene lies.

    python -m models.measure_sizes --model models/mini-sdxl --output_dir build/mini-sdxl/sizes

Every image is generated from the same captions and noise; only what the UNet is told differs. Writes sizes.md and
sizes.png.
"""

import argparse
from pathlib import Path

import numpy as np
from accelerate import PartialState

from finetuning.evaluation.grid import labelled_grid
from finetuning.evaluation.statistics import mean_of, paired_difference
from finetuning.families.generation import generate
from finetuning.families.pipelines import open_pipeline
from finetuning.rng import torch_generator
from finetuning.shapes.checker import DIFFERS
from models.measure_mini_sd import held_out_scenes

# {what it is told: the pipeline's options}. A crop that begins further right shows the scene further left.
TOLD = {
    "64 x 64, not cropped": {},
    "an original of 48 x 48": {"original_size": (48, 48)},
    "an original of 32 x 32": {"original_size": (32, 32)},
    "an original of 16 x 16": {"original_size": (16, 16)},
    "cropped 16 pixels from the left": {"original_size": (64, 96), "crops_coords_top_left": (0, 16)},
    "cropped 16 pixels from the top": {"original_size": (96, 64), "crops_coords_top_left": (16, 0)},
}
MEASURES = ("sharpness", "x of the centre", "y of the centre")


def measures(image):
    """(mean absolute difference of neighbouring pixels in [0, 255], x and y of the middle of what is painted, or nan)
    of a PIL image."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    sharpness = np.mean([np.abs(np.diff(pixels, 2, axis=axis)).mean() for axis in (0, 1)])
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    painted = np.argwhere(np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > DIFFERS)
    y, x = painted.mean(axis=0) if len(painted) else (np.nan, np.nan)
    return float(sharpness), float(x), float(y)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=128, help="of one object each (default %(default)s)")
    args = parser.parse_args()
    pipeline = open_pipeline(args.model, device=PartialState().device)
    prompts = [scene.caption for scene in held_out_scenes(2 * args.captions)[0]]
    found, rows = {}, []
    for name, options in TOLD.items():
        generators = [torch_generator(0, "sizes", number) for number in range(len(prompts))]
        images = list(generate(pipeline, prompts, generators, batch_size=64, num_inference_steps=25, guidance_scale=3.0,
                               **options))  # fmt: skip
        found[name] = np.array([measures(image) for image in images])
        rows.append(images[:8])
    seen = np.isfinite(np.stack([*found.values()])).all(axis=(0, 2))  # captions of which every image shows something
    first, *others = found
    lines = [f"| told, n = {seen.sum()} | " + " | ".join(MEASURES) + " |", "|---" * (1 + len(MEASURES)) + "|"]
    cells = [f"{mean_of(values).value:.2f}" for values in found[first][seen].T]
    lines.append(f"| {first} | " + " | ".join(cells) + " |")
    for name in others:
        changes = [paired_difference(now, before) for now, before in zip(found[name][seen].T, found[first][seen].T,
                                                                         strict=True)]  # fmt: skip
        cells = [f"{one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f})" for one in changes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "sizes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labelled_grid(rows, list(TOLD), [], scale_to=128).save(args.output_dir / "sizes.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
