"""Captions in a text file beside each image, as kohya's scripts keep them: room.jpg and room.txt or room.caption."""

import os
import re
from dataclasses import dataclass

from finetuning.cli import flag
from finetuning.data.images import EXTENSIONS
from finetuning.data.reading import DatasetError
from finetuning.data.samples import (
    CaptionFileArgs,
    Sample,
    caption_lines,
    existing_folder,
    place_in_split,
    split_folders,
    walk,
)

CAPTION_ENDINGS = (".caption", ".txt")  # the one that counts first


@dataclass
class SidecarArgs(CaptionFileArgs):
    """Sidecar files (kohya)"""

    class_captions: bool = flag(
        False, "an image without a caption file takes the class of its folder, <repeats>_<class>, for its caption"
    )


def read(path, args, findings):
    """Each image with its caption file; what lacks its other half is a fault, and named.

    Folders named train, validation, test (or the like) at the top are splits.
    """
    root = existing_folder(path)
    splits = split_folders(root, [entry.name for entry in root.iterdir() if entry.is_dir()])
    found = False
    for folder, names in walk(root, args.allow_outside_paths, findings):
        kohya = re.fullmatch(r"(\d+)_(.+)", folder.name)
        if kohya and int(kohya[1]) > 1:
            kind = "folders that kohya repeats N times an epoch (here every image counts once)"
            findings.notes[kind].append(str(folder.relative_to(root)))
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
    if not found and not findings.faults:
        raise DatasetError(f"there are no images in {root}")


def captioned(images, texts, root, args, findings, instead=()):
    """Yield (name, captions) of each image that has some; what lacks its other half is a fault, and named.

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
            findings.notes["images of one name in different formats, which share a caption file"].append(shown(image))
        for file in files[1:]:
            if file not in used:
                findings.notes["second caption files of an image, which are not read"].append(shown(file))
        used.update(files)
        captions = _captions(files[0], shown(files[0]), args, findings) if files else instead
        if captions:
            yield name, captions
        elif captions is not None:
            findings.faults["images without a caption file, or with an empty one"].append(shown(image))
    for file in texts.values():
        if file not in used:
            findings.faults["caption files without an image"].append(shown(file))


def _captions(file, shown, args, findings):
    """None where the file cannot be read, which is a fault of its own."""
    try:
        return caption_lines(file.read_bytes(), args.caption_lines)
    except UnicodeDecodeError:
        findings.faults["caption files that are not UTF-8 (save them again as UTF-8)"].append(shown)
    except OSError as error:
        findings.faults["caption files that cannot be read"].append(f"{shown} ({error.strerror})")
    return None
