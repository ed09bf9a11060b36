"""The loss of a model on captioned images: the same rows, timesteps and noise every time, and a value for each row.

    losses = PipelineLoss(pipeline, "datasets/shapes")()

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
from finetuning.data.threads import in_order
from finetuning.data.training_set import DataArgs, ImageDataset
from finetuning.data.transforms import Transform
from finetuning.diffusion.objective import NoiseArgs, NoiseDraws, diffusion_loss
from finetuning.families.model import Model
from finetuning.rng import gaussian, python_random

SHOWN = 20  # errors of a kind that are listed


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
    images    an ImageDataset, `rows` are indices into it
    schedule  NoiseSchedule
    args      NoiseArgs, of which only the form of the loss counts: not offsets, perturbation, DREAM, weights
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


def load_rows(folder, tokenize, size, *, split=None, max_rows=256, seed=0, caption_column="text", say=print):
    """(ImageDataset, the numbers of at most `max_rows` of its rows) of a folder with metadata.jsonl.

    size  (height, width) in pixels, which images cover, cut in their centre. Other arguments: see read_rows.

    The rows, captions and crops are those of training's validation loss with the same seed. Raises DatasetError.
    """
    rows, chosen = read_rows(folder, split, "validation", caption_column, max_rows, seed, say)
    height, width = size
    flags = _DataFlags(train_data_dir=str(folder), resolution=f"{height}x{width}", center_crop=True)
    transform = Transform.of(flags, seed)
    return ImageDataset(rows, None, [tuple(size)] * len(rows), transform, tokenize, flags, seed), chosen


def read_rows(folder, split, usual, caption_column, max_rows, seed, say, one_caption=False):
    """(the rows of a split, the numbers of at most `max_rows` of them, none: all), as data.reading.read_split has them.

    Every chosen image is opened. `one_caption`: say where a row has more. Raises DatasetError with all that is wrong.
    """
    findings = Findings()
    rows = read_split(folder, split, usual, caption_column, findings)
    chosen = chosen_rows(len(rows), len(rows) if max_rows is None else max_rows, seed)
    open_all([(rows[number].origin, rows[number].image) for number in chosen], findings)
    if findings.errors:
        raise DatasetError(
            f"{folder} has {counted(findings.count(), 'error')}: repair them, or leave those rows out of its metadata\n"
            f"{findings.report(SHOWN)}"
        )
    if not rows:
        raise DatasetError(f"{folder} has no rows")
    for row in (rows[number] for number in chosen if one_caption):
        if len(row.captions) > 1:
            findings.warn("first_caption_used", row.origin)
    if findings.warnings:
        say(f"{folder}:\n{findings.report()}")
    return rows, chosen


def open_all(places, findings):
    """Open images [(what to call it, path)] on all cores; those that cannot be read become errors."""
    for (where, _), result in in_order(lambda place: open_rgb(place[1]), places, errors=UnreadableImage):
        if isinstance(result, UnreadableImage):
            findings.error("unreadable_image", where, result)


class PipelineLoss:
    """The denoising loss of a pipeline on rows of a folder, with the weights that it has when it is asked.

    size  (height, width) in pixels; none: the model's own. The other arguments are those of load_rows: the rows,
          timesteps and noise are the same for every pipeline with the same seed. Raises DatasetError.
    """

    def __init__(self, pipeline, folder, *, size=None, seed=0, **how):
        self.pipeline, self.seed, self.model = pipeline, seed, Model.of_pipeline(pipeline)
        side = self.model.family.side(self.model.components)
        self.size = size or (side, side)
        self.images, self.rows = load_rows(folder, self.model.tokenize, self.size, seed=seed, **how)

    def __call__(self, batch_size=4):
        """float64 [rows], on the CPU."""
        device, dtype = self.pipeline.device, self.model.denoiser.denoiser.dtype
        autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
        with self.model.encodes_in_fp32():
            return row_losses(
                self.model, self.images, self.rows, self.model.schedule, seed=self.seed, batch_size=batch_size,
                device=device, autocast=autocast,
            )  # fmt: skip
