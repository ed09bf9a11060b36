"""From an RGB image to the pixels that are trained on: resize, crop, flip, scale to [-1, 1].

What is random is drawn first, from (seed, epoch, row) alone: `draw` needs no image. `apply` needs no randomness.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version

import torch

from finetuning.rng import python_random

# torchvision.transforms.InterpolationMode's values
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")

VERSION = 1  # raise it where images.open_rgb or `apply` gives other pixels: what is cached of them is made anew


@dataclass(frozen=True)
class Draw:
    """What is random in how one image is cut. The crop lies at `u` from the top and `v` from the left, each the share
    in [0, 1) of the room there is; None is the centre."""

    u: float | None = None
    v: float | None = None
    flip: bool = False
    area: float = 1.0  # share of the image's area that a random resized crop takes


@dataclass(frozen=True)
class Transform:
    """How images become pixels of one size."""

    height: int
    width: int
    center_crop: bool
    random_flip: bool
    interpolation: str
    random_resized_crop_scale: float | None
    seed: int
    crops: int | None = None  # how many random crops an image has, used in turn epoch by epoch; None: one each epoch

    @classmethod
    def of(cls, args, seed):
        """What the flags (training_set.DataArgs) ask for."""
        return cls(
            *args.size, args.center_crop, args.random_flip, args.image_interpolation_mode,
            args.random_resized_crop_scale, seed, args.cached_crops,
        )  # fmt: skip

    def at(self, size):
        """The same for another (height, width)."""
        height, width = size
        return replace(self, height=height, width=width)

    def draw(self, epoch, row, may_flip=True):
        """The Draw of a row in an epoch."""
        flip = may_flip and self.random_flip and python_random(self.seed, "flip", epoch, row).random() < 0.5
        if self.random_resized_crop_scale is None and self.center_crop:
            return Draw(flip=flip)
        rng = python_random(self.seed, "crop", self.crop_of(epoch), row)
        u, v, area = rng.random(), rng.random(), 1.0
        if self.random_resized_crop_scale is not None:
            area = rng.uniform(self.random_resized_crop_scale, 1.0)
        return Draw(u, v, flip, area)

    @property
    def different_crops(self):
        """How many ways there are to crop an image in the whole run; None: another one in each epoch."""
        return 1 if self.center_crop and self.random_resized_crop_scale is None else self.crops

    def crop_of(self, epoch):
        """Which of an image's crops the epoch has."""
        return epoch % self.different_crops if self.different_crops else epoch

    def facts(self, draw):
        """All that decides, besides the image file, what `apply` gives."""
        area = self.random_resized_crop_scale is not None
        return (VERSION, *_versions(), self.height, self.width, self.interpolation, area, draw)

    def apply(self, image, draw):
        """PIL RGB -> (fp32 [3, height, width] in [-1, 1], sizes).

        sizes  (original height, original width, crop top, crop left, height, width) in pixels, as SDXL takes them;
               the crop's place is in the resized image, and in the mirrored one where it is mirrored
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        mode, size = InterpolationMode(self.interpolation), [self.height, self.width]
        if self.random_resized_crop_scale is not None:
            box_height, box_width = self._box(image, draw.area)
            top, left = _offset(image.height - box_height, draw.u), _offset(image.width - box_width, draw.v)
            pixels = F.resized_crop(image, top, left, box_height, box_width, size, mode)
            factor = self.height / box_height
            top, left, spare = round(top * factor), round(left * factor), round((image.width - box_width) * factor)
        else:
            factor = max(self.height / image.height, self.width / image.width)
            # The smallest size with the image's aspect that covers height x width
            covering = [max(self.height, round(image.height * factor)), max(self.width, round(image.width * factor))]
            spare = covering[1] - self.width
            top, left = _offset(covering[0] - self.height, draw.u), _offset(spare, draw.v)
            pixels = F.crop(F.resize(image, covering, mode), top, left, *size)
        if draw.flip:
            pixels, left = F.hflip(pixels), spare - left
        sizes = (image.height, image.width, top, left, *size)
        return F.to_dtype(F.pil_to_tensor(pixels), torch.float32, scale=True) * 2 - 1, sizes

    def _box(self, image, area):
        """(height, width) of a crop with the target's aspect and this share of the image's area, as far as it fits."""
        width = (area * image.width * image.height * self.width / self.height) ** 0.5
        width = min(width, image.width, image.height * self.width / self.height)
        box = round(width * self.height / self.width), round(width)
        return tuple(min(max(side, 1), most) for side, most in zip(box, (image.height, image.width), strict=True))


@cache
def _versions():
    return tuple(version(name) for name in ("pillow", "pillow-heif", "torchvision"))


def _offset(spare, share):
    return round(spare / 2) if share is None else int(share * (spare + 1))
