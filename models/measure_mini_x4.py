"""How well upscalers bring back what was made small: PSNR and SSIM against the truth, beside bicubic and Lanczos.

    python -m models.measure_mini_x4 --data build/mini-x4/data --model build/mini-x4/run --output_dir build/mini-x4

Reads the validation images of a dataset, 256 px; makes them four times smaller, and enlarges them again. Prints a table
with 95 % intervals of the difference to Lanczos, row by row; --output_dir gets upscaling.json and samples.png. LPIPS
joins where --lpips_trunk names AlexNet's weights.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from finetuning.evaluation.generation import dataset_rows
from finetuning.evaluation.grid import labelled_grid
from finetuning.evaluation.networks import lpips_network, lpips_of
from finetuning.evaluation.statistics import mean_of, paired_difference
from finetuning.families.generation import UpscalerArgs, back_projected, upscale
from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.rng import torch_generator

FACTOR, BATCH, SHOWN = 4, 8, 5


def psnr(image, truth):
    """Peak signal-to-noise ratio in dB; an exact image has that of an error of one level in one value."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(truth, np.float64)).mean()
    return 10 * np.log10(255**2 / max(error, 1 / np.asarray(truth).size))


def ssim(image, truth):
    """Structural similarity of the luminance, with a Gaussian window of 1.5 pixels (Wang et al. 2004)."""
    x, y = (np.asarray(one.convert("L"), np.float64) for one in (image, truth))
    blur = lambda values: gaussian_filter(values, 1.5, truncate=3.5)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(
        ((2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()
    )


def enlarged(model, small, captions, args):
    """The images of one upscaler."""
    pipeline = open_pipeline(model, scheduler="dpm++")
    found = []
    for start in range(0, len(small), BATCH):
        part = slice(start, start + BATCH)
        seeds = [torch_generator(0, "upscaled", number) for number in range(len(small))[part]]
        found += upscale(pipeline, small[part], captions[part], seeds, args, BATCH)
    return found


def table(report):
    """The figures of upscaling.json as Markdown."""
    lines = []
    for metric, by_name in report["metrics"].items():
        lines += ["", f"| {metric}, n = {report['rows']} | mean (95 % interval) | minus Lanczos |", "|---|---|---|"]
        for name, figures in by_name.items():
            cells = [f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for one in figures.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--noise_level", type=int, default=0)
    parser.add_argument("--back_projections", type=int, default=2)
    parser.add_argument("--lpips_trunk")
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    rows = dataset_rows(args.data, "validation", max_rows=args.rows)
    truth = [Image.open(row.image).convert("RGB") for row in rows]
    side = truth[0].width
    small = [image.resize((side // FACTOR,) * 2, Image.Resampling.BICUBIC) for image in truth]
    found = {
        name: [image.resize((side, side), getattr(Image.Resampling, name.upper())) for image in small]
        for name in ("bicubic", "lanczos")
    }
    how = UpscalerArgs(upscaler_steps=args.steps, upscaler_noise_level=args.noise_level)
    for model in args.model:
        found[model] = enlarged(model, small, [row.caption for row in rows], how)
        pairs = zip(found[model], small, strict=True)
        found[f"{model}, corrected"] = [back_projected(*pair, args.back_projections) for pair in pairs]
    metrics = {"PSNR": psnr, "SSIM": ssim}
    values = {
        metric: {name: [measure(*pair) for pair in zip(images, truth, strict=True)] for name, images in found.items()}
        for metric, measure in metrics.items()
    }
    if args.lpips_trunk:
        network, _ = lpips_network(args.lpips_trunk, "cpu")
        values["LPIPS"] = {name: lpips_of(network, images, truth) for name, images in found.items()}
    report = {"rows": len(rows), "steps": args.steps, "noise_level": args.noise_level}
    report |= {"back_projections": args.back_projections, "metrics": {}}
    for metric, by_name in values.items():
        report["metrics"][metric] = {
            name: {"mean": asdict(mean_of(own)), "minus lanczos": asdict(paired_difference(own, by_name["lanczos"]))}
            for name, own in by_name.items()
        }
    print(table(report))
    if args.output_dir:
        write_json(args.output_dir / "upscaling.json", report)
        columns = {
            "64 px": [one.resize((side, side), Image.Resampling.NEAREST) for one in small],
            **found,
            "truth": truth,
        }
        cells = [[own[row] for own in columns.values()] for row in range(len(rows[:SHOWN]))]
        labelled_grid(cells, [row.caption for row in rows[:SHOWN]], list(columns)).save(args.output_dir / "samples.png")


if __name__ == "__main__":
    main()
