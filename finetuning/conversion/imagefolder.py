"""Any folder that training can read: metadata of all kinds, above or inside the splits, absolute names, links."""

import os
from dataclasses import dataclass
from itertools import chain, groupby

from finetuning.cli import flag
from finetuning.data.findings import Findings
from finetuning.data.folders import SPLIT_NAMES, existing_folder, is_image_name, split_folders, walk
from finetuning.data.reading import read_folder
from finetuning.data.samples import Sample


@dataclass
class ColumnArgs:
    """Columns (imagefolder, hub)"""

    image_column: str = flag("image", "metadata key or column of the image, besides file_name")
    caption_column: str = flag("text", "metadata key or column of the caption or list of captions")


def read(path, args, findings):
    """The images of every split; a folder without splits has its images divided by content.

    Several rows of one image become one sample with the captions of all. Images beside the folders of splits are
    for training, unless train/ is there.
    """
    root = existing_folder(path)
    folders = {folder.name: split for split, folder in split_folders(root).items()}
    splits = set(folders.values())
    if folders and (beside := _beside(root, folders)):
        if "train" in splits:
            for name in beside:
                findings.error("beside_splits", name)
        splits.add("train")
    for split in [split for split in SPLIT_NAMES if split in splits] or ("train",):
        rows = read_folder(root, split, args.image_column, args.caption_column, args.allow_outside_paths, findings)
        for image, same in groupby(rows, key=lambda row: row.image):
            same = list(same)
            captions = tuple(dict.fromkeys(chain.from_iterable(row.captions for row in same)))
            name = os.path.relpath(image, root)  # for an image outside the root, the way there
            first, _, below = name.partition(os.sep)
            name = below if below and first in folders else name
            yield Sample(name, image, captions, same[0].origin, split if folders else None)


def _beside(root, folders):
    """Names of the images that lie in none of the splits' folders."""
    return [
        str((folder / name).relative_to(root))
        for folder, names in walk(root, True, Findings())
        if folder == root or folder.relative_to(root).parts[0] not in folders
        for name in names
        if is_image_name(name)
    ]
