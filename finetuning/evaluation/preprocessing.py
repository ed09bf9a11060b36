"""Images as the metrics see them: cut to a square, brought to one size, resized for Inception by a named protocol.

The resize changes FID (Parmar et al., arXiv 2104.11222), so there is one policy for all images of a report, and every
protocol is that of a known tool.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.evaluation.metrics import EvaluationError

POLICY = (
    "The centre square of every image, true or generated, is brought to the stated side by PIL's bicubic filter, "
    "antialiased; an image that has this side is left as it is."
)
INCEPTION_SIDE = 299


def matched(image, side):
    """The centre square of a PIL RGB image at side x side pixels, as POLICY says."""
    edge = min(image.size)
    left, top = ((length - edge) // 2 for length in image.size)
    square = image.crop((left, top, left + edge, top + edge))
    return square if edge == side else square.resize((side, side), Image.Resampling.BICUBIC)


def network_input(images, protocol):
    """What FID's Inception is given, float32 [n, 3, 299, 299].

    images  PIL RGB images or uint8 arrays [height, width, 3], all of one size
    protocol  "clean", of clean-fid: PIL's bicubic, antialiased, on each channel in floats; (x - 128) / 128
              "legacy", of pytorch-fid: torch's bilinear, without antialiasing; x / 127.5 - 1
              "tf", of torch-fidelity: TensorFlow 1's bilinear, without antialiasing; (x - 128) / 128
    """
    pixels = np.stack([np.asarray(image) for image in images])
    if protocol == "clean":
        return (torch.from_numpy(np.stack([_clean(one) for one in pixels])) - 128) / 128
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()  # [n, 3, height, width]
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    if protocol == "legacy":
        return 2 * F.interpolate(planes / 255, size=size, mode="bilinear", align_corners=False) - 1
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return (interpolate_bilinear_2d_like_tensorflow1x(planes, size=size, align_corners=False) - 128) / 128


class ImageFiles(Dataset):
    """Image files as uint8 arrays [side, side, 3], `matched`.

    One that cannot be read is an UnreadableImage in its place: raised, it would hide all the others behind it.
    """

    def __init__(self, paths, side):
        self.paths, self.side = list(paths), side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return np.asarray(matched(open_rgb(self.paths[index]), self.side))
        except UnreadableImage as problem:
            return problem


def read_images(paths, side, batch_size, workers, make=list, title="reading images"):
    """Yield make([uint8 array [side, side, 3], ...]) of `batch_size` images after another, made by the workers.

    After the first image that cannot be read nothing more is yielded, but all the others are tried. Raises
    EvaluationError that names them all. With workers, `make` must be a function that can be pickled.
    """
    problems = []
    loader = DataLoader(ImageFiles(paths, side), batch_size, num_workers=workers, collate_fn=partial(_made_of, make))
    for made, unreadable in tqdm(loader, desc=title, leave=False, delay=2):
        problems += unreadable
        if not problems:
            yield made
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise EvaluationError(f"{len(problems)} image(s) cannot be read; repair them or leave them out:\n{lines}")


def _made_of(make, items):
    unreadable = [str(item) for item in items if isinstance(item, UnreadableImage)]
    return (None if unreadable else make(items)), unreadable


def _clean(pixels):
    """uint8 [height, width, 3] -> float32 [3, 299, 299] in 0..255: quantising between would lose what is measured."""
    channels = [Image.fromarray(channel) for channel in np.moveaxis(pixels, 2, 0).astype(np.float32)]
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    return np.stack([np.asarray(one.resize(size, Image.Resampling.BICUBIC)) for one in channels]).clip(0, 255)
