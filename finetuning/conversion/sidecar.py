"""Captions in text files: beside each image, as kohya keeps them (room.jpg and room.txt or room.caption), or in
a folder of their own (images/000.jpg and captions/000.txt); folders inside the two have the same names too.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from finetuning.cli import flag
from finetuning.data.findings import DatasetError
from finetuning.data.folders import existing_folder, split_folders, split_meant, walk
from finetuning.data.images import EXTENSIONS
from finetuning.data.samples import CaptionFileArgs, Sample, caption_lines

CAPTION_ENDINGS = (".caption", ".txt")  # the one that counts first


@dataclass
class SidecarArgs(CaptionFileArgs):
    """Sidecar files (kohya)"""

    class_captions: bool = flag(False, "images without a file have the class of their folder, <repeats>_<class>")


@dataclass
class ParallelArgs(CaptionFileArgs):
    """Parallel folders"""

    images_folder: str = flag("images", "parallel: name of the folder with the images", was=("pictures_folder",))
    captions_folder: str = flag("captions", "parallel: name of the folder with a text file for each")

    def problems(self):
        if self.images_folder == self.captions_folder:
            yield "--images_folder and --captions_folder are the same: convert `sidecar` reads such a folder"


def read(path, args, findings):
    """Each image with its caption file; what lacks its other half is an error.

    Folders named train, validation, test (or the like) at the top are splits.
    """
    root = existing_folder(path)
    splits = {folder.name: split for split, folder in split_folders(root).items()}
    found = False
    for folder, names in walk(root, args.allow_outside_paths, findings):
        kohya = re.fullmatch(r"(\d+)_(.+)", folder.name)
        if kohya and int(kohya[1]) > 1:
            findings.warn("repeats", folder.relative_to(root))
        images, texts = (
            {name: folder / name for name in names if os.path.splitext(name)[1].lower() in endings}
            for endings in (EXTENSIONS, CAPTION_ENDINGS)
        )
        instead = (kohya[2],) if args.class_captions and kohya else ()
        for name, captions in captioned(images, texts, root, args, findings, instead):
            inside = images[name].relative_to(root)
            split, below = place_in_split(inside, splits, findings)
            if below:
                found = True
                yield Sample(str(below), images[name], captions, str(inside), split)
    if not found and not findings.errors:
        raise DatasetError(f"there are no images in {root}")


def read_parallel(path, args, findings):
    """Each image with the caption file of its name; what lacks its other half is an error.

    Splits are folders named train, validation, test (or the like) above the two folders, or first thing inside them.
    """
    root = existing_folder(path)
    tops = [top for top in (root, *split_folders(root).values()) if (top / args.images_folder).is_dir()]
    missing = [str(root / args.images_folder)] if not tops else []
    missing += [str(folder) for top in tops if not (folder := top / args.captions_folder).is_dir()]
    if missing:
        fix = "name the two folders with --images_folder and --captions_folder"
        raise DatasetError(f"there is no folder {' or '.join(missing)}: {fix}")
    images, texts = (
        {str(inside): file for top in tops for inside, file in _files(top, name, endings, root, args, findings)}
        for name, endings in ((args.images_folder, EXTENSIONS), (args.captions_folder, CAPTION_ENDINGS))
    )
    if not images and not findings.errors:
        raise DatasetError(f"there are no images in {', '.join(str(top / args.images_folder) for top in tops)}")
    first = sorted({Path(name).parts[0] for name in images})
    splits = {name: split for name in first if (split := split_meant(name))}
    for split in splits.values():
        if len(same := [name for name in splits if splits[name] == split]) > 1:
            raise DatasetError(f"{root} has several folders for one split: {' and '.join(same)}: put them into one")
    for name, captions in captioned(images, texts, root, args, findings):
        split, below = place_in_split(Path(name), splits, findings)
        if below:
            yield Sample(str(below), images[name], captions, str(images[name].relative_to(root)), split)


def _files(top, name, endings, root, args, findings):
    """(path without the folder's name, file) of files with such endings: train/1.jpg is of train/images/1.jpg."""
    for folder, names in walk(top / name, args.allow_outside_paths, findings, root):
        inside = top.relative_to(root) / folder.relative_to(top / name)
        yield from ((inside / one, folder / one) for one in names if Path(one).suffix.lower() in endings)


def place_in_split(inside, splits, findings):
    """(split, path below its folder) of an image's path inside a source; `splits` {name of a folder: split}.

    The split is None where there are no such folders. Images beside them are for training; where train/ is one of
    them they are errors, and both are None.
    """
    first = inside.parts[0]
    if first in splits:
        return splits[first], inside.relative_to(first)
    if "train" in splits.values():
        findings.error("beside_splits", inside)
        return None, None
    return ("train" if splits else None), inside


def captioned(images, texts, root, args, findings, instead=()):
    """Yield (name, captions) of each image that has some; what lacks its other half is an error.

    `images` and `texts` are {name: file}. A caption file's name is that of its image, with or without the
    image's ending: 1.txt or 1.jpg.txt. `instead`: the captions of images without a file.
    """
    shown = lambda file: str(file.relative_to(root))
    of_image, used = {}, set()
    for name in sorted(texts, key=lambda name: CAPTION_ENDINGS.index(os.path.splitext(name)[1].lower())):
        of_image.setdefault(os.path.splitext(name)[0], []).append(texts[name])
    for name, image in images.items():
        files = of_image.get(os.path.splitext(name)[0], []) + of_image.get(name, [])
        if files and files[0] in used:
            findings.warn("shared_caption_file", shown(image))
        for file in files[1:]:
            if file not in used:
                findings.warn("second_caption_file", shown(file))
        used.update(files)
        captions = _captions(files[0], shown(files[0]), args, findings) if files else instead
        if captions:
            yield name, captions
        elif captions is not None:
            findings.error("no_caption_file", shown(image))
    for file in texts.values():
        if file not in used:
            findings.error("caption_file_alone", shown(file))


def _captions(file, shown, args, findings):
    """None where the file cannot be read, which is an error of its own."""
    try:
        return caption_lines(file.read_bytes(), args.caption_lines, shown, findings)
    except UnicodeDecodeError:
        findings.error("caption_not_utf8", shown)
    except OSError as error:
        findings.error("unreadable_caption_file", shown, error.strerror)
    return None
