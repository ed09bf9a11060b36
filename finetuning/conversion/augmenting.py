"""Altered copies of the training images, written beside them: mirrored, brighter or darker, cut, turned, noisy.

Training mirrors and crops by itself, anew in each epoch (--random_flip); copies on disk are for what it does not do,
and for other trainers. Only train/ grows. Validation and test are taken over as they are; a training image that
stands there too gets no copies, nor does a copy appear that would equal one of theirs.
"""

import hashlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from tqdm.auto import tqdm

from finetuning.cli import SEEDS, as_dict, flag
from finetuning.conversion import copying
from finetuning.conversion.copying import CopyArgs
from finetuning.conversion.writer import encoded, shortened
from finetuning.data.captions import MirrorArgs, may_mirror, swap_sides
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.threads import in_order
from finetuning.files import write_json
from finetuning.rng import python_random, torch_generator

WRITTEN = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP"}  # copies of others: PNG


@dataclass
class AugmentArgs(MirrorArgs, CopyArgs):
    """Altered copies"""

    alter: list[str] = flag(
        ["flip", "brightness"], "a copy of each training image for each of: flip, brightness, crop, rotate, noise, or "
        "several joined by + for one copy altered in all these ways",
    )  # fmt: skip
    copies: int = flag(1, "how many copies of each kind, each drawn anew", min=1)
    brightness: float = flag(0.3, "brighter or darker by up to this share, and at least half of it", above=0, below=1)
    crop: float = flag(0.1, "cut up to this share off height and width, and at least half of it", above=0, below=1)
    rotate: float = flag(
        5.0, "turn by up to so many degrees, and at least half; empty corners are cut off", above=0, below=45
    )
    noise: float = flag(0.02, "Gaussian noise of up to this deviation, at least half (white is 1)", above=0, below=1)
    seed: int = flag(0, "seed of the draws", **SEEDS)
    workers: int | None = flag(None, "threads that decode and encode (none: one a core)", min=1, affects_result=False)

    def problems(self):
        for kind in self.alter:
            unknown = [way for way in kind.split("+") if way not in WAYS]
            if unknown:
                yield f"--alter {kind}: {', '.join(map(repr, unknown))} is not one of {', '.join(WAYS)}"
        for kind, count in Counter("+".join(sorted(kind.split("+"))) for kind in self.alter).items():
            if count > 1 or len(set(kind.split("+"))) < len(kind.split("+")):
                yield f"--alter says {kind} twice: ask for more copies of a kind with --copies"
        if "flip" in self.alter and self.copies > 1:
            yield f"--copies {self.copies}: an image has one mirror image; join flip to another way, as flip+crop"


@dataclass(frozen=True)
class Copy:
    """An altered copy to be made."""

    name: str  # file name in train/
    kind: str  # "flip+crop"
    original: str  # file name in train/ of the image that it is made from
    number: int  # 1, 2, ... of its kind

    @property
    def is_mirrored(self):
        return "flip" in self.kind.split("+")


def augment(args: AugmentArgs, say=print):
    """Write the dataset with its copies; {split: how many images}.

    Raises DatasetError with every error that training would name, unless --on_bad_rows skip; nothing is written then.
    """
    findings = Findings()
    splits = copying.read_splits(args, findings)
    names = {split: copying.new_names(rows, split, args) for split, rows in splits.items()}
    plan = _planned(splits["train"], names["train"], args, findings)
    with copying.new_folder(args.output) as folder:
        done = _write_all_copies(folder / "train", splits, plan, args, findings)
        made = done["train"]
        splits = {split: [row for row in rows if row.image in done[split]] for split, rows in splits.items()}
        copying.accept(splits, args, findings, say)
        copied = [(copy, row) for row in splits["train"] for copy in made[row.image]]
        copies = [(copy.name, _row_of_copy(copy, row, args)) for copy, row in copied]
        copying.fill(folder, splits, names, args, copies)
        originals = {split: len(images) for split, images in done.items()}
        kinds = dict(Counter(copy.kind for copies in made.values() for copy in copies))
        settings = {name: value for name, value in as_dict(args).items() if name != "workers"}
        write_json(folder / "augmentation.json", {"settings": settings, "images": originals, "copies": kinds})
    return _counted(originals, kinds, args, say)


def _counted(originals, kinds, args, say):
    """Say what is written; {split: how many images}."""
    counts = originals | {"train": originals["train"] + sum(kinds.values())}
    summary = {split: f"{count} {split}" for split, count in counts.items()}
    summary["train"] += f" ({originals['train']}{''.join(f' + {count} {kind}' for kind, count in kinds.items())})"
    say(f"{args.output}: {', '.join(summary.values())}")
    if not counts.get("validation"):
        fix = "first divide the images (`prepare_dataset.py convert imagefolder`)"
        say(f"  - without a validation split, rows that --validation_fraction holds out have copies in train: {fix}")
    return counts


def altered(image, copy: Copy, args: AugmentArgs):
    """RGB -> RGB, in each way of the copy's kind; drawn from (seed, way, file name of the original, number)."""
    for way in copy.kind.split("+"):
        image = WAYS[way](image, getattr(args, way, None), args.seed, (copy.original, copy.number))
    return image


def _flip(image, _most, _seed, _place):
    return ImageOps.mirror(image)


def _brightness(image, most, seed, place):
    rng = python_random(seed, "augment brightness", *place)
    return ImageEnhance.Brightness(image).enhance(1 + rng.choice((-1, 1)) * _amount(rng, most))


def _crop(image, most, seed, place):
    rng = python_random(seed, "augment crop", *place)
    share = 1 - _amount(rng, most)
    height, width = max(1, round(share * image.height)), max(1, round(share * image.width))
    top, left = rng.randint(0, image.height - height), rng.randint(0, image.width - width)
    return image.crop((left, top, left + width, top + height))


def _rotate(image, most, seed, place):
    rng = python_random(seed, "augment rotate", *place)
    angle = rng.choice((-1, 1)) * _amount(rng, most)
    # The largest upright rectangle of the same aspect inside the turned image, less a pixel of blended border.
    cos, sin = math.cos(math.radians(angle)), abs(math.sin(math.radians(angle)))
    width, height = image.size
    share = min(width / (width * cos + height * sin), height / (width * sin + height * cos))
    inside_width, inside_height = (max(1, int(share * side) - 2) for side in (width, height))
    left, top = round((width - inside_width) / 2), round((height - inside_height) / 2)
    turned = image.rotate(angle, Image.Resampling.BICUBIC)
    return turned.crop((left, top, left + inside_width, top + inside_height))


def _noise(image, most, seed, place):
    deviation = _amount(python_random(seed, "augment noise", *place), most)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # [3, height, width], 0..255
    noise = torch.randn(values.shape, generator=torch_generator(seed, "augment noise values", *place))
    noisy = (values + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(noisy.permute(1, 2, 0).contiguous().numpy())


def _amount(rng, most):
    """At least half of the most: a copy that is hardly altered would be the same image twice."""
    return rng.uniform(most / 2, most)


WAYS = {"flip": _flip, "brightness": _brightness, "crop": _crop, "rotate": _rotate, "noise": _noise}


def _planned(rows, names, args, findings):
    """{image: [Copy, ...]}. Raises DatasetError where an image has the name of a copy already."""
    captions = defaultdict(list)
    for row in rows:
        captions[row.image] += row.captions
    kinds = [(kind, number) for kind in args.alter for number in range(1, args.copies + 1)]
    plan = {}
    for image, name in names.items():
        copies = [Copy(_copy_name(name, kind, number), kind, name, number) for kind, number in kinds]
        mirrors = may_mirror(captions[image], args.flip_captions)
        plan[image] = [copy for copy in copies if mirrors or not copy.is_mirrored]
        if len(plan[image]) < len(copies):
            findings.warn("not_mirrored", name)
    there = {name.lower() for name in names.values()}
    taken = [copy.name for copies in plan.values() for copy in copies if copy.name.lower() in there]
    if taken:
        named = ", ".join(taken[:3])
        raise DatasetError(f"{args.path} has images with the names of copies ({named}), as if augmented already")
    return plan


def _copy_name(name, kind, number):
    path = PurePosixPath(name)
    stem, ending = (path.stem, path.suffix) if path.suffix.lower() in WRITTEN else (path.name, ".png")
    return str(path.with_name(f"{shortened(stem)}~{kind}{number if number > 1 else ''}{ending}"))


def _row_of_copy(copy, row, args):
    swaps = copy.is_mirrored and args.flip_captions == "swap"
    return replace(row, captions=tuple(map(swap_sides, row.captions))) if swaps else row


def _write_all_copies(folder, splits, plan, args, findings):
    """{split: {image that can be read: what of it is kept}}: of train the copies that are written, else a digest."""
    digest = lambda image: _digest(open_rgb(image))
    apart = {name: rows for name, rows in splits.items() if name != "train"}
    digests = {name: _of_readable(digest, rows, args, findings) for name, rows in apart.items()}
    held_out = {one for of_split in digests.values() for one in of_split.values()}
    write = lambda image: _write_copies(image, plan[image], folder, held_out, args)
    made = _of_readable(write, splits["train"], args, findings)
    for copy in (copy for image in made for copy in plan[image] if copy not in made[image]):
        findings.warn("copy_left_out", copy.name)
    return {"train": made, **digests}


def _of_readable(work, rows, args, findings):
    """{image: work(image)} of the rows' images; those that cannot be read are errors."""
    results, origins = {}, {row.image: row.origin for row in rows}
    tries = in_order(work, origins, args.workers, UnreadableImage)
    for image, result in tqdm(tries, total=len(origins), leave=False, delay=2):
        if isinstance(result, UnreadableImage):
            findings.error("unreadable_image", origins[image], result)
        else:
            results[image] = result
    return results


def _write_copies(path, copies, folder, held_out, args):
    """The copies that are written: none that shows, before or after it is altered, an image of `held_out`."""
    image = open_rgb(path)
    original = _digest(image)
    if original in held_out:
        return []
    written = []
    for copy in copies:
        changed = altered(image, copy, args)
        digest = _digest(changed)
        if digest in held_out or digest == original:  # the mirror image of a symmetric image, say
            continue
        changed.info["icc_profile"] = image.info.get("icc_profile")  # it says what the pixels mean
        target = folder / copy.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(changed, WRITTEN[target.suffix.lower()]))
        written.append(copy)
    return written


def _digest(image):
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
