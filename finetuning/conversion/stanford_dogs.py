"""Stanford Dogs as it is published: 120 breeds, a folder each, split lists and bounding boxes; unpacked or as the tars.

PATH/
    Images/n02085620-Chihuahua/n02085620_7.jpg     or images.tar
    Annotation/n02085620-Chihuahua/n02085620_7     or annotation.tar: XML without an ending, needed for --crop_to_dogs
    train_list.mat, test_list.mat                  or lists.tar; without them an image's content decides on its split
"""

import io
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from xml.etree import ElementTree

import numpy as np

from finetuning.cli import flag
from finetuning.conversion.caption_text import template_problems
from finetuning.data.findings import DatasetError
from finetuning.data.folders import existing_folder, is_image_name, walk
from finetuning.data.samples import Sample
from finetuning.data.tars import members

LISTS = {"train": "train_list.mat", "test": "test_list.mat"}
TEMPLATE_WORDS = ("name", "a_name")


@dataclass
class StanfordDogsArgs:
    """Stanford Dogs"""

    dog_captions: list[str] = flag(["a photo of {a_name}"], 'captions; {name}: "Chihuahua", {a_name}: "a Chihuahua"')
    lower_case_breeds: bool = flag(False, "write every breed in small letters")
    use_lists: bool = flag(True, "split as train_list.mat and test_list.mat say, where they are there")
    crop_to_dogs: bool = flag(False, "cut each image to its bounding box, or to the box around all of its dogs")

    def problems(self):
        yield from template_problems("--dog_captions", self.dog_captions, TEMPLATE_WORDS)


def read(path, args, findings):
    """Each image with its breed for a caption, by folder and file name."""
    files = _files(existing_folder(path), args, findings)
    images = {name: file for name, file in files.items() if is_image_name(name)}
    if not images and not findings.errors:
        wanted = "folders such as Images/n02085620-Chihuahua with images nor images.tar"
        raise DatasetError(f"{path} has neither {wanted}: name the folder that holds them")
    splits = _splits(path, files, images, findings) if args.use_lists else {}
    for name, image in sorted(images.items()):
        if splits and name not in splits:
            findings.error("in_no_list", name)
            continue
        box = None
        if args.crop_to_dogs and not (box := _box(name, files, findings)):
            continue
        breed = name.parent.name.partition("-")[2].replace("_", " ")  # n02085936-Maltese_dog is "Maltese dog"
        breed = breed.lower() if args.lower_case_breeds else breed
        words = {"name": breed, "a_name": f"{'an' if breed[0].lower() in 'aeiou' else 'a'} {breed}"}
        captions = tuple(template.format(**words) for template in args.dog_captions)
        yield Sample(str(name), image, captions, str(name), splits.get(name), box)


def _files(root, args, findings):
    """{breed folder/file or list: Path or Member}, whatever the folders above are called."""
    paths = [folder / name for folder, names in walk(root, args.allow_outside_paths, findings) for name in names]
    found = [(str(file), file) for file in paths if file.suffix != ".tar"]
    for archive in (file for file in paths if file.suffix == ".tar"):
        found += members(archive, findings)
    files = {}
    for name, file in found:
        parts = PurePosixPath(name).parts
        in_breed = len(parts) > 1 and re.fullmatch(r"n\d{8}-.+", parts[-2]) and not parts[-1].startswith(".")
        if not in_breed and parts[-1] not in LISTS.values():
            continue
        short = PurePosixPath(*parts[-2:] if in_breed else parts[-1:])
        if short in files:
            findings.warn("there_twice", short)
        files.setdefault(short, file)
    return files


def _splits(path, files, images, findings):
    """{image: split}; empty where there are no lists."""
    missing = [name for name in LISTS.values() if PurePosixPath(name) not in files]
    if len(missing) == len(LISTS):
        return {}
    if missing:
        raise DatasetError(f"{path} has no {missing[0]}: add it, or split by content with --no-use_lists")
    from scipy.io import loadmat  # a slow import that other sources do not need

    splits = {}
    for split, name in LISTS.items():
        try:
            cells = loadmat(io.BytesIO(files[PurePosixPath(name)].read_bytes()), squeeze_me=True)["file_list"]
            listed = [PurePosixPath(cell) for cell in np.atleast_1d(cells).tolist()]
        except Exception as error:  # on broken files loadmat raises more than MatReadError
            raise DatasetError(f"{path}: {name} is no list of Stanford Dogs ({error})") from error
        for entry in listed:
            if splits.setdefault(entry, split) != split:
                findings.error("in_both_lists", entry)
            if entry not in images:
                findings.error("listed_not_there", f"{name}: {entry}")
    return splits


def _box(name, files, findings):
    """(left, top, right, bottom) around all dogs of an image; None, and an error, where the annotation has none."""
    if name.with_suffix("") not in files:
        findings.error("no_annotation", name)
        return None
    try:
        tree = ElementTree.fromstring(files[name.with_suffix("")].read_bytes())
        width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        boxes = [[int(box.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax")] for box in tree.iter("bndbox")]
        left, top, right, bottom = zip(*boxes, strict=True)
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        findings.error("bad_annotation", name.with_suffix(""), error)
        return None
    if len(boxes) > 1:
        findings.warn("several_dogs", name)
    around = (max(min(left), 0), max(min(top), 0), min(max(right), width), min(max(bottom), height))
    if around[0] >= around[2] or around[1] >= around[3]:
        findings.error("empty_box", name, ", ".join(map(str, around)))
        return None
    return around
