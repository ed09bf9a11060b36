"""What a sweep measures at each ratio: how much of the new was learned, and how much of the old was kept.

METRICS is the table: a line there, and one function.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tqdm.auto import tqdm

from finetuning.data.reading import DatasetError
from finetuning.diffusion.schedule import NoiseSchedule
from finetuning.evaluation.denoising import load_rows, row_losses
from finetuning.families.model import Model
from finetuning.families.model_args import ModelError
from finetuning.files import sha256
from finetuning.shapes.checker import right, share_in_chalk
from finetuning.shapes.scenes import parse


@dataclass(frozen=True)
class Metric:
    """A line of the table.

    prepare(args, blend, prompts_in, prompts_out) gives (measure, facts). measure(ratio, images_in, images_out)
    gives learned [rows] and kept [rows], float64, higher is better, the same rows at every ratio; the images stand by
    prompt and then by seed. Where it needs the weights it calls blend.set(ratio). `facts`, ready for JSON, are what the
    results depend on besides the images.
    """

    prepare: Callable
    learned: str  # the words for the axes
    kept: str


def measure_shapes(args, blend, prompts_in, prompts_out):
    """learned: share of an image's things in chalk; kept: shape and colour right. A row is a prompt, over all seeds.

    The prompts are captions of the shapes world, and the images are read by its checker.
    """
    scenes = [parse(prompt) for prompt in prompts_out for _ in args.seed]
    by_prompt = lambda values: torch.tensor(values, dtype=torch.float64).view(-1, len(args.seed)).mean(1)

    def measure(ratio, images_in, images_out):
        kept = [right(scene, image) for scene, image in zip(scenes, images_out, strict=True)]
        return by_prompt([share_in_chalk(image) for image in images_in]), by_prompt(kept)

    return measure, {"style": "chalk"}


def measure_loss(args, blend, prompts_in, prompts_out):
    """Minus the denoising loss of each row of --fit_dataset (learned) and of --retain_dataset (kept)."""
    pipeline, datasets, problems = blend.pipeline, [], []
    model = Model.of_pipeline(pipeline)
    own = model.denoiser.denoiser.config.sample_size * model.codec.factor
    size, seed = args.height_and_width or (own, own), args.seed[0]
    for folder in (args.fit_dataset, args.retain_dataset):
        try:
            datasets.append(load_rows(folder, model.tokenize, size, most=args.loss_rows, seed=seed, say=tqdm.write))
        except DatasetError as problem:
            problems.append(str(problem))
    if problems:
        raise ModelError("\n".join(problems))
    schedule, dtype, device = NoiseSchedule.of(pipeline.scheduler), pipeline.unet.dtype, pipeline.device
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    def measure(ratio, images_in, images_out):
        blend.set(ratio)
        how = {"seed": seed, "batch_size": args.batch_size, "device": device, "autocast": autocast}
        return [-row_losses(model, images, rows, schedule, **how) for images, rows in datasets]

    contents = [_content(*one) for one in datasets]
    return measure, {"size": list(size), "datasets": contents}


def _content(images, chosen):
    """{"rows": ..., "sha256": ...} of the rows that are measured: their images and captions."""
    digest = hashlib.sha256()
    for row in (images.rows[number] for number in chosen):
        digest.update(repr((sha256(row.image), row.captions)).encode())
    return {"rows": chosen, "sha256": digest.hexdigest()}


METRICS = {
    "loss": Metric(
        measure_loss, "learned: minus the loss on --fit_dataset", "kept: minus the loss on --retain_dataset"
    ),
    "shapes": Metric(measure_shapes, "learned: share of things in chalk", "kept: share right in shape and colour"),
}
