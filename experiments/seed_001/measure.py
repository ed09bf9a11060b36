"""The table and the plots of README.md: the bound, and what images show at each guidance scale.

python experiments/seed_001/measure.py runs/seed_001
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from finetuning.data.batch_sampler import SampleIndex
from finetuning.diffusion.variational_bound import bound_term
from finetuning.evaluation.denoising import load_rows, stratified_timesteps
from finetuning.evaluation.grid import labelled_grid
from finetuning.families.generation import generate
from finetuning.families.model import Model
from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.rng import gaussian, torch_generator
from finetuning.shapes.checker import agrees
from models.measure_mini_sd import held_out_scenes

GUIDANCE = (0, 1, 2, 3, 6, 12)
PARTS = ("background", "color", "shape")
ROWS, STEPS, TIMESTEPS = 24, 12, 16  # images a model and scale, sampling steps, timesteps a row of the bound
HERE = Path(__file__).parent


@torch.no_grad()
def bound(pipeline, data):
    """(the variational bound in bits per dimension, the simple loss) on held-out rows: T times the mean term."""
    model = Model.of_pipeline(pipeline)
    images, rows = load_rows(data, model.tokenize, (32, 32), split="validation", max_rows=ROWS)
    terms, errors = [], []
    for row in rows:
        pixels, captions = images[SampleIndex(row, 0, 0, 1.0, True)][1], [images.rows[row].captions[0]] * TIMESTEPS
        original = pixels.expand(TIMESTEPS, -1, -1, -1)
        timesteps = torch.tensor(stratified_timesteps(TIMESTEPS, len(model.schedule), row))
        noise = gaussian(0, "bound", row, range(TIMESTEPS), pixels.shape)
        noisy = model.schedule.add_noise(original, noise, timesteps)
        text = model.family.encode_text(model.frozen_encoders, model.tokenize(captions))
        answer, variance = model.denoiser(noisy, timesteps, text=text).split(3, 1)
        terms.append(bound_term(model.schedule, original, noisy, answer, variance, timesteps).mean())
        errors.append((answer - noise).square().mean())
    return len(model.schedule) * torch.stack(terms).mean().item(), torch.stack(errors).mean().item()


def measured(run, scenes, data):
    """What README.md says of a run; kept beside it. Also writes the run's images at each scale."""
    kept = run / "measured.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    pipeline = open_pipeline(run)  # with the sampler that uses the learned variance
    known, shown = {}, []
    known["bound"], known["simple"] = bound(pipeline, data)
    for scale in GUIDANCE:
        # 0 is the model without its text; diffusers takes everything up to 1 for no guidance
        captions = [scene.caption if scale else "" for scene in scenes]
        generators = [torch_generator(0, "measure", number) for number in range(len(scenes))]
        images = list(
            generate(
                pipeline, captions, generators, batch_size=48, guidance_scale=float(scale), num_inference_steps=STEPS
            )
        )
        right = [agrees(*pair) for pair in zip(scenes, images, strict=True)]
        known[str(scale)] = {part: 100 * sum(one[part] for one in right) / len(right) for part in PARTS}
        shown.append(images[:6])
    rows = list(map(list, zip(*shown, strict=True)))
    labels = [scene.caption for scene in scenes[:6]]
    labelled_grid(rows, labels, [f"guidance {scale}" for scale in GUIDANCE], 96).save(run / "guidance.png")
    print(run.name, known, flush=True)
    write_json(kept, known)
    return known


def spread(values, form=".0f"):
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(folder):
    scenes = held_out_scenes(2 * ROWS)[0]
    runs = {
        loss: [measured(folder / f"{loss}-{seed}", scenes, folder / "data") for seed in (1, 2, 3)]
        for loss in ("hybrid", "simple")
    }
    print("| loss | bound, bits per dimension | squared error of the noise |\n|---|---|---|")
    for loss, own in runs.items():
        bounds, errors = ([one[name] for one in own] for name in ("bound", "simple"))
        print(f"| {loss} | {spread(bounds, '.2f')} | {spread(errors, '.4f')} |")
    heads = " | ".join(f"guidance {scale}" for scale in GUIDANCE)
    print(f"\n| loss, what is right | {heads} |\n" + "|---" * 7 + "|")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for axis, (loss, own) in zip(axes, runs.items(), strict=True):
        for part in PARTS:
            values = [[one[str(scale)][part] for one in own] for scale in GUIDANCE]
            print(f"| {loss}, {part} | " + " | ".join(f"{spread(value)} %" for value in values) + " |")
            (line,) = axis.plot(GUIDANCE, [sum(value) / len(value) for value in values], marker="o", label=part)
            axis.fill_between(GUIDANCE, [*map(min, values)], [*map(max, values)], alpha=0.15, color=line.get_color())
        axis.set(xlabel="guidance scale", title=f"{loss} loss: mean and range of three seeds", ylim=(-2, 102))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("right (%)")
    figure.savefig(HERE / "guidance.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
