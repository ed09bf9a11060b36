"""Latents of the images: encoded at every step, or once before the first one and kept in memory."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from finetuning.cli import flag
from finetuning.data.transforms import Draw
from finetuning.rng import gaussian

ROWS_TOGETHER = 16  # fixed: how many rows are encoded at once decides the last bits, and a resumed run encodes again


@dataclass
class LatentArgs:
    """Latents"""

    cache_latents: bool = flag(
        False, "encode every image once, before the first step, and keep the latents in memory (0.13 MB an image at "
        "512 px, twice that with --random_flip); needs --center_crop",
    )  # fmt: skip

    def problems(self):
        if self.cache_latents and getattr(self, "random_resized_crop_scale", None) is not None:
            yield "--cache_latents keeps one crop of each image: leave --random_resized_crop_scale out"
        if self.cache_latents and not getattr(self, "center_crop", True):
            yield "--cache_latents keeps one crop of each image: add --center_crop"


def latent_source(args: LatentArgs, model, images, device):
    """What turns a batch into latents [batch, channels, height, width]: the cache, or the encoder itself."""
    return CachedLatents(model, images, args.seed, device) if args.cache_latents else OnTheFlyLatents(model, args.seed)


class OnTheFlyLatents:
    """Every batch through the autoencoder."""

    def __init__(self, model, seed):
        self.model, self.seed = model, seed

    def __call__(self, batch):
        return sampled(self.model, *self.model.codec.posterior(batch.pixels), self.seed, batch)


class CachedLatents:
    """The posterior's mean and deviation of every row, so that each step still draws its own sample of it.

    Images are mirrored before they are encoded: an autoencoder is not symmetric.
    """

    def __init__(self, model, images, seed, device):
        self.model, self.images, self.seed = model, images, seed
        flips = (False, True) if images.transform.random_flip else (False,)
        self.kept = {flip: self._encode_all(flip, device) for flip in flips}
        images.skip_pixels = True

    def __call__(self, batch):
        found = [self.kept[self.images.is_mirrored(row, batch.epoch)][row] for row in batch.rows]
        moments, sizes = zip(*found, strict=True)
        device = batch.weights.device
        batch.sizes = torch.tensor(sizes).to(device)
        mean, std = torch.stack(moments).to(device).unbind(1)
        return sampled(self.model, mean, std, self.seed, batch)

    def _encode_all(self, flip, device):
        """{row: (fp32 [2, channels, height, width] on the CPU, sizes)}."""
        kept = {}
        batches = list(self.images.of_one_size(range(len(self.images)), ROWS_TOGETHER))
        for rows in tqdm(batches, desc="encoding images once", leave=False, delay=2):
            cut = [self.images.transform_of(row).apply(self.images.image(row), Draw(flip=flip)) for row in rows]
            pixels = torch.stack([pixels for pixels, _ in cut]).to(device)
            moments = torch.stack(self.model.codec.posterior(pixels), 1).cpu()
            kept |= {row: (one, sizes) for row, one, (_, sizes) in zip(rows, moments, cut, strict=True)}
        return kept


def sampled(model, mean, std, seed, batch):
    """A sample of each row's posterior, drawn from (seed, step, row), scaled to unit variance."""
    noise = gaussian(seed, "posterior", batch.step, batch.rows, mean.shape[1:]).to(mean.device)
    return model.codec.scale(mean + std * noise)
