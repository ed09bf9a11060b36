"""The dataset flags, the images and captions that are trained on, and their batches."""

import hashlib
import itertools
import signal
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from finetuning.cli import flag
from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.captions import chosen_caption, may_mirror, with_prefix
from finetuning.data.checking import read_checked
from finetuning.data.findings import counted
from finetuning.data.folders import folder_problems
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.reading import DatasetError
from finetuning.data.tensor_store import digest
from finetuning.data.transforms import INTERPOLATIONS, Transform
from finetuning.files import xxh3
from finetuning.rng import python_random


@dataclass
class DataArgs:
    """Dataset"""

    train_data_dir: str | None = flag(
        None, "image folder with metadata.jsonl ({file_name, text} a line); train/ if any", conflicts="dataset_name",
        reads=True,
    )  # fmt: skip
    dataset_name: str | None = flag(None, "dataset on the Hub, or a local folder as for --train_data_dir", reads=True)
    dataset_config_name: str | None = flag(None, "configuration of the Hub dataset")
    image_column: str = flag("image", "column of a Hub dataset that holds the image; in a folder, file_name")
    caption_column: str = flag("text", 'column or metadata key of the caption or list of captions; "none": no captions')
    max_train_samples: int | None = flag(None, "train on this many rows, drawn with the seed", min=1)
    on_bad_rows: str = flag(
        "error", "what to do with rows that cannot be trained on", choices=("error", "skip"), affects_result=False
    )
    check_images: str = flag(
        "full", "before the first step decode images to their end; or, in folders, read only headers (does not detect "
        "truncated files); or none: a million rows start at once, and a broken image stops the run when its turn comes",
        choices=("full", "header", "none"), affects_result=False, was="check_pictures",
    )  # fmt: skip
    allow_outside_paths: bool = flag(False, "let metadata and links reach images outside the dataset's folder")
    resolution: str = flag("512", "side of the training images in pixels, or HEIGHTxWIDTH")
    center_crop: bool = flag(False, "crop the centre (default: a random place)")
    cached_crops: int | None = flag(
        None, "crop each image in N random places, used in turn epoch by epoch, so that all can be cached (none: a new "
        "place in each epoch)", min=1, conflicts="center_crop",
    )  # fmt: skip
    random_flip: bool = flag(False, "mirror half of the images")
    random_resized_crop_scale: float | None = flag(
        None, "crop a random area of at least this share of the image (GLIDE's resize_ratio)", above=0, max=1
    )
    image_interpolation_mode: str = flag("lanczos", "how images are resized", choices=INTERPOLATIONS)
    proportion_empty_prompts: float = flag(
        0.0,
        "share of captions dropped for classifier-free guidance; 0.1 as SD 1.x was trained (GLIDE's uncond_p)",
        min=0,
        max=1,
    )
    train_batch_size: int = flag(16, "rows per process and forward pass", min=1)
    dataloader_num_workers: int = flag(
        0, "processes that decode images; 0: the training process does", min=0, affects_result=False
    )

    @property
    def size(self):
        """(height, width) in pixels."""
        sides = [int(side) for side in self.resolution.lower().split("x")]
        return (sides[0], sides[-1])

    def problems(self):
        if not (self.train_data_dir or self.dataset_name):
            yield "name a dataset: --train_data_dir FOLDER, or --dataset_name for one on the Hub"
        if self.train_data_dir and not getattr(self, "streaming", False):
            yield from folder_problems("--train_data_dir", self.train_data_dir)
        sides = self.resolution.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            yield f"--resolution {self.resolution} must be one side in pixels or HEIGHTxWIDTH, as 512 or 512x768"


@dataclass
class Batch:
    """One micro-batch. `weights` are each row's share of the optimizer step's loss; over the step they sum to 1."""

    pixels: torch.Tensor  # [batch, 3, height, width] in [-1, 1]
    tokens: dict  # {text encoder: [batch, tokens]}
    sizes: torch.Tensor  # [batch, 6] original height, width; crop top, left; height, width: as SDXL takes them
    weights: torch.Tensor  # [batch]
    captions: list  # [batch] text; "" where it was dropped
    rows: list  # [batch] index of each row
    step: int
    epoch: int
    ends_step: bool  # the last micro-batch of its optimizer step

    def pin_memory(self):
        """What the loader calls, so that copies to a GPU need not wait."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device):
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change):
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, tokens={name: change(ids) for name, ids in self.tokens.items()}, **moved)


class CaptionedImages(Dataset):
    """Images and captions by SampleIndex, so that every draw has its place in the run, and the batches made of them.

    Subclasses have `row_at(index)`, `transform_at(index)` and `open(row)`, the RGB image.
    """

    def __init__(self, transform, tokenize, args, seed):
        self.transform, self.tokenize, self.args, self.seed = transform, tokenize, args, seed
        self.skip_pixels = False  # set where cached latents stand in for the images

    def __getitem__(self, index):
        """(index, fp32 [3, height, width], sizes, caption)."""
        row = self.row_at(index)
        draw = self.transform_at(index).draw(index.epoch, index.row, self.may_flip(row))
        pixels, sizes = torch.empty(3, 0, 0), (0,) * 6
        if not self.skip_pixels:
            pixels, sizes = self.transform_at(index).apply(self.open(row), draw)
        return index, pixels, sizes, self.caption(row, index.epoch, index.row, draw.flip)

    def may_flip(self, row):
        """Whether the row's captions allow it."""
        return self.transform.random_flip and may_mirror(row.captions, self.args.flip_captions)

    def caption(self, row, epoch, number, flipped):
        """What the row is trained with in this epoch; "" where it is dropped."""
        rng = python_random(self.seed, "caption", epoch, number)
        if rng.random() < self.args.proportion_empty_prompts:
            return ""
        return chosen_caption(row.captions, flipped, self.args, rng)

    def collate(self, items):
        indices, pixels, sizes, captions = zip(*items, strict=True)
        return Batch(
            pixels=torch.stack(pixels),
            tokens=self.tokenize(captions),
            sizes=torch.tensor(sizes),
            weights=torch.tensor([index.weight for index in indices]),
            captions=list(captions),
            rows=[index.row for index in indices],
            step=indices[0].step,
            epoch=indices[0].epoch,
            ends_step=indices[0].ends_step,
        )

    def loader(self, sampler: BatchSampler, first_step, last_step, workers, pin_memory=False):
        """Micro-batches of the steps first_step <= step < last_step."""
        return DataLoader(
            self,
            batch_sampler=_Between(sampler, first_step, last_step),
            collate_fn=self.collate,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=pin_memory,
        )


class ImageDataset(CaptionedImages):
    """A dataset that is known as a whole: its rows, and the size (height, width) that each is trained at."""

    def __init__(self, rows, images, sizes, transform, tokenize, args, seed):
        super().__init__(transform, tokenize, args, seed)
        self.rows, self.images, self.sizes = rows, images, sizes

    def __len__(self):
        return len(self.rows)

    def row_at(self, index):
        return self.rows[index.row]

    def transform_at(self, index):
        return self.transform_of(index.row)

    def transform_of(self, number):
        return self.transform.at(self.sizes[number])

    def open(self, row):
        """The RGB image. Raises DatasetError where it cannot be read."""
        try:
            return open_rgb(row.image if isinstance(row.image, Path) else self.images[row.image])
        except UnreadableImage as error:  # one that --check_images did not look at, or that has changed since
            found_earlier = "--check_images full names all such before the start"
            raise DatasetError(f"{row.origin}: {error}; {found_earlier}") from error

    def image(self, number):
        """The RGB image of the row of this number."""
        return self.open(self.rows[number])

    def content(self, number):
        """A hash of the bytes of the row's file; of a Hub dataset's image the hash of its pixels."""
        row = self.rows[number]
        if isinstance(row.image, Path):
            return xxh3(row.image)
        image = self.open(row)
        return digest(image.size, image.tobytes())

    def draws(self, epoch, number):
        """The Draws that the row can have in this epoch: one, or that and its mirror image."""
        may_flip = self.may_flip(self.rows[number])
        draw = self.transform.draw(epoch, number, may_flip=False)
        return [replace(draw, flip=flip) for flip in (False, True)[: 1 + may_flip]]

    def is_mirrored(self, number, epoch):
        """Whether the row is mirrored in this epoch."""
        return self.transform.draw(epoch, number, self.may_flip(self.rows[number])).flip

    def fingerprint(self):
        """A hash of which rows there are, in which order, with which captions and buckets; images count by name."""
        digest, base_size = hashlib.sha256(), (self.transform.height, self.transform.width)
        for row, size in zip(self.rows, self.sizes, strict=True):
            name = row.image if isinstance(row.image, int) else row.image.name
            digest.update(repr((name, row.captions, *(() if size == base_size else size))).encode())
        return digest.hexdigest()

    def caption_prefix(self):
        """The words that all captions begin with, often a keyword that was put there to be learned; "" if none."""
        shared = None
        for text in (text for row in self.rows for text in row.captions):
            pairs = zip(text.split() if shared is None else shared, text.split(), strict=False)
            shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
            if not shared:
                break
        return with_prefix(" ".join(shared or []), self.args.caption_prefix)

    def describe(self, numbers, step=None):
        """The rows of these numbers for a message: where they stand and their first caption."""
        rows = (self.rows[number] for number in numbers)
        return "\n".join(f"  {row.origin}: {row.image} {row.captions[0]!r}" for row in rows)

    def summary(self):
        """How much there is, for a message."""
        return counted(len(self), "row")

    def of_one_size(self, rows, count):
        """Yield the rows in lists of at most `count`, the images of a list all of one size."""
        same = defaultdict(list)
        for row in rows:
            same[self.sizes[row]].append(row)
        for rows in same.values():
            yield from (rows[start : start + count] for start in range(0, len(rows), count))


@dataclass
class _Between:
    """What a DataLoader takes for a batch sampler: the micro-batches from one step to another."""

    sampler: BatchSampler
    first_step: int
    last_step: int

    def __iter__(self):
        return self.sampler.micro_batches(self.first_step, self.last_step)


def _leave_signals_to_the_run(_worker):
    """SIGTERM and Ctrl-C go to the whole process group: a loader that died of them would take the run's save along."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def load_images(args, tokenize, seed, validation_fraction=0.0, say=print, cache_dir=None):
    """(ImageDataset, the held-out one or None): read, checked, every problem named at once.

    args      DataArgs, CaptionArgs and BucketArgs
    tokenize  families.family.Tokenizers

    Raises DatasetError with the whole list where rows cannot be trained on and --on_bad_rows is error.
    """
    found = read_checked(args, tokenize.tokenizers.values(), seed, validation_fraction, cache_dir)
    found.findings.refuse("the dataset", args.on_bad_rows, say)
    if not found.rows:
        raise DatasetError("no row is left to train on")

    transform = Transform.of(args, seed)
    training = ImageDataset(found.rows, found.images, found.sizes, transform, tokenize, args, seed)
    if not found.held_out:
        return training, None
    plain = replace(transform, center_crop=True, random_flip=False, random_resized_crop_scale=None)
    as_they_are = replace(args, proportion_empty_prompts=0.0, shuffle_tags=False, keep_tokens=0)
    return training, ImageDataset(
        found.held_out, found.held_out_images, found.held_out_sizes, plain, tokenize, as_they_are, seed
    )
