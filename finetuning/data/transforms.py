"""From an RGB image to the pixels that are trained on."""

from dataclasses import dataclass, replace

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from finetuning.rng import python_random, torch_generator

INTERPOLATIONS = [mode.value for mode in InterpolationMode]


@dataclass(frozen=True)
class Transform:
    """Resize the short side, crop, flip, scale to [-1, 1]. Crop and flip are drawn from (seed, epoch, row)."""

    height: int
    width: int
    center_crop: bool
    random_flip: bool
    interpolation: str
    random_resized_crop_scale: float | None
    seed: int

    @classmethod
    def of(cls, args, seed):
        """What the flags (training_set.DataArgs) ask for."""
        return cls(
            *args.size, args.center_crop, args.random_flip, args.image_interpolation_mode,
            args.random_resized_crop_scale, seed,
        )  # fmt: skip

    def __call__(self, image, epoch, row, may_mirror=True):
        """PIL RGB -> fp32 [3, height, width]."""
        mode = InterpolationMode(self.interpolation)
        size = [self.height, self.width]
        if self.random_resized_crop_scale is not None:
            image = F.resized_crop(image, *self._area(image, epoch, row), size, mode)
        else:
            image = self._cover(image, mode)
            spare_y, spare_x = image.height - self.height, image.width - self.width
            if self.center_crop:
                image = F.center_crop(image, size)
            else:
                rng = python_random(self.seed, "crop", epoch, row)
                image = F.crop(image, rng.randint(0, spare_y), rng.randint(0, spare_x), *size)
        return self._finish(image, may_mirror and self.flips(epoch, row))

    def at(self, size):
        """The same for another (height, width)."""
        height, width = size
        return replace(self, height=height, width=width)

    def flips(self, epoch, row):
        """Whether the row is mirrored in this epoch, if it may be."""
        return self.random_flip and python_random(self.seed, "flip", epoch, row).random() < 0.5

    def fixed(self, image, flip):
        """The centre crop, mirrored or not: what a cache keeps."""
        size = [self.height, self.width]
        return self._finish(F.center_crop(self._cover(image, InterpolationMode(self.interpolation)), size), flip)

    @staticmethod
    def _finish(image, flip):
        image = F.hflip(image) if flip else image
        return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True) * 2 - 1

    def _cover(self, image, mode):
        """The smallest size with the image's aspect that covers height x width."""
        factor = max(self.height / image.height, self.width / image.width)
        covering = [max(self.height, round(image.height * factor)), max(self.width, round(image.width * factor))]
        return F.resize(image, covering, mode)

    def _area(self, image, epoch, row):
        """(top, left, height, width) as torchvision draws them, from a generator of our own place in the run."""
        ratio = self.width / self.height
        chooser = RandomResizedCrop([self.height, self.width], (self.random_resized_crop_scale, 1.0), (ratio, ratio))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch_generator(self.seed, "crop area", epoch, row).get_state())
            area = chooser.make_params([image])
        return area["top"], area["left"], area["height"], area["width"]
