"""Latents of the pictures: encoded at every step, or once before the first one and kept in memory."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from finetuning.cli import flag
from finetuning.draws import gaussian

ROWS_TOGETHER = 16  # fixed: how many rows are encoded at once decides the last bits, and a resumed run encodes again


@dataclass
class LatentArgs:
    """Latents"""

    cache_latents: bool = flag(
        False, "encode every picture once, before the first step, and keep the latents in memory (0.13 MB a picture at "
        "512 px, twice that with --random_flip); needs --center_crop or pictures that need no crop",
    )  # fmt: skip

    def problems(self):
        if self.cache_latents and getattr(self, "random_resized_crop_scale", None) is not None:
            yield "--cache_latents keeps one crop of each picture: leave --random_resized_crop_scale out"
        if self.cache_latents and not getattr(self, "center_crop", True):
            yield "--cache_latents keeps one crop of each picture: add --center_crop"


def latent_source(args: LatentArgs, model, pictures, seed, device):
    """What turns a batch into latents [batch, channels, height, width]: the cache, or the encoder itself."""
    return CachedLatents(model, pictures, seed, device) if args.cache_latents else FreshLatents(model, seed)


class FreshLatents:
    """Every batch through the autoencoder."""

    def __init__(self, model, seed):
        self.model, self.seed = model, seed

    def __call__(self, batch):
        mean, std = self.model.posterior(batch.pixels)
        return sampled(self.model, mean, std, self.seed, batch)


class CachedLatents:
    """The posterior's mean and deviation of every row, so that each step still draws its own sample of it.

    Pictures are mirrored before they are encoded: an autoencoder is not symmetric.
    """

    def __init__(self, model, pictures, seed, device):
        self.model, self.pictures, self.seed = model, pictures, seed
        flips = (False, True) if pictures.transform.random_flip else (False,)
        self.kept = {flip: self._encode_all(flip, device) for flip in flips}
        pictures.skip_pixels = True

    def __call__(self, batch):
        moments = [self.kept[self.pictures.is_mirrored(row, batch.epoch)][row] for row in batch.rows]
        mean, std = torch.stack(moments).to(batch.weights.device).unbind(1)
        return sampled(self.model, mean, std, self.seed, batch)

    def _encode_all(self, flip, device):
        """{row: fp32 [2, channels, height, width] on the CPU}."""
        kept = {}
        transform, picture = self.pictures.transform_of, self.pictures.picture
        batches = list(self.pictures.of_one_size(range(len(self.pictures)), ROWS_TOGETHER))
        for rows in tqdm(batches, desc="encoding pictures once", leave=False, delay=2):
            pixels = torch.stack([transform(row).fixed(picture(row), flip) for row in rows]).to(device)
            kept.update(zip(rows, torch.stack(self.model.posterior(pixels), 1).cpu(), strict=True))
        return kept


def sampled(model, mean, std, seed, batch):
    """A sample of each row's posterior, drawn from (seed, step, row), scaled to unit variance."""
    noise = gaussian(seed, "posterior", batch.step, batch.rows, mean.shape[1:]).to(mean.device)
    return model.scale_latents(mean + std * noise)
