"""The loss of a model on captioned images: the same rows, timesteps and noise every time, and a value for each row.

    images, rows = load_rows("datasets/shapes", model.tokenize, (64, 64))
    losses = row_losses(model, images, rows, NoiseSchedule.of(model.scheduler))

Two models measured on the same rows are compared row by row, which is far sharper than two means: most of the spread
of a diffusion loss comes from the timestep and the noise, and those are equal.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from finetuning.data.batch_sampler import SampleIndex
from finetuning.data.buckets import BucketArgs
from finetuning.data.cache import sampled
from finetuning.data.captions import CaptionArgs
from finetuning.data.findings import counted
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.reading import DatasetError, Findings, read_split
from finetuning.data.training_set import DataArgs, ImageDataset
from finetuning.data.transforms import Transform
from finetuning.diffusion.objective import NoiseArgs, NoiseDraws, diffusion_loss
from finetuning.rng import gaussian, python_random


@dataclass
class _DataFlags(BucketArgs, CaptionArgs, DataArgs):
    """What a set of images is made with: training's defaults."""


def chosen_rows(total, max_rows, seed):
    """The numbers of at most `max_rows` of `total` rows, chosen with the seed, in order."""
    return sorted(python_random(seed, "validation rows").sample(range(total), min(max_rows, total)))


def stratified_timesteps(count, timesteps, seed):
    """[count] timesteps that share the schedule evenly among them, shuffled with the seed."""
    strata = python_random(seed, "validation timesteps").sample(range(count), count)
    return [int((stratum + 0.5) / count * timesteps) for stratum in strata]


@torch.no_grad()
def row_losses(
    model, images, rows, schedule, args=None, *, seed=0, batch_size=4, device="cpu", autocast=nullcontext, only=None
):  # fmt: skip
    """The denoising loss of each of `rows`, float64 [rows], on the CPU.

    model     families.model.Model, on `device`
    images  an ImageDataset, `rows` are indices into it
    schedule  NoiseSchedule
    args      NoiseArgs; only the form of the loss counts, not what training does to it (offsets, perturbation, DREAM,
              weights), nor its prediction type, which is the schedule's
    autocast  makes the context that the denoiser runs in
    only      those of `rows` that are to be computed; none: all
    """
    args = args or NoiseArgs()
    plain = NoiseArgs(
        prediction_type=args.prediction_type, loss_type=args.loss_type, huber_c=args.huber_c, vlb_weight=0
    )
    timestep_of = dict(zip(rows, stratified_timesteps(len(rows), len(schedule), seed), strict=True))
    losses, was_training = {}, model.denoiser.training
    model.denoiser.eval()
    only = rows if only is None else only
    for part in images.of_one_size(only, batch_size):
        places = [SampleIndex(row, 0, 0, 1.0, True) for row in part]
        batch = images.collate([images[place] for place in places]).to(device)
        latents = sampled(model, *model.codec.posterior(batch.pixels), seed, batch)
        latents, conditioning = model.condition(batch, latents, seed)
        noise = gaussian(seed, "validation noise", 0, part, latents.shape[1:]).to(device)
        timesteps = torch.tensor([timestep_of[row] for row in part]).to(device)
        still = torch.zeros(1, device=device)
        predict = partial(model.denoiser, **conditioning)
        with autocast():
            found = diffusion_loss(predict, schedule, latents, NoiseDraws(noise, timesteps, still, still), plain)
        losses.update(zip(part, found.tolist(), strict=True))
    model.denoiser.train(was_training)
    return torch.tensor([losses[row] for row in only], dtype=torch.float64)


def load_rows(folder, tokenize, size, **which):
    """(ImageDataset, the numbers of some of its rows) of a folder with metadata.jsonl; `which` is for loss_rows.

    size   (height, width) in pixels; images are resized until they cover it, and the centre is taken

    The rows, captions and crops are those of training's validation loss with the same seed.
    """
    rows, chosen = loss_rows(folder, **which)
    height, width = size
    flags = _DataFlags(train_data_dir=str(folder), resolution=f"{height}x{width}", center_crop=True)
    seed = which.get("seed", 0)
    transform = Transform.of(flags, seed)
    return ImageDataset(rows, None, [tuple(size)] * len(rows), transform, tokenize, flags, seed), chosen


def loss_rows(folder, *, split=None, max_rows=256, seed=0, caption_column="text", say=print):
    """(Rows of a folder, the numbers of at most `max_rows` of them), whose images all open.

    split  "train", "validation" or "test"; none: validation, or the folder itself where it has no splits

    Raises DatasetError with all that is wrong with the rows.
    """
    findings = Findings()
    rows = read_split(folder, split, "validation", caption_column, findings)
    chosen = chosen_rows(len(rows), max_rows, seed)
    for row in (rows[number] for number in chosen):
        try:
            open_rgb(row.image)
        except UnreadableImage as error:
            findings.error("unreadable_image", row.origin, error)
    if findings.errors:
        raise DatasetError(
            f"{folder} has {counted(findings.count(), 'error')}: repair them, or leave those rows out of its metadata\n"
            f"{findings.report()}"
        )
    if findings.warnings:
        say(f"{folder}:\n{findings.report()}")
    if not rows:
        raise DatasetError(f"{folder} has no rows")
    return rows, chosen
