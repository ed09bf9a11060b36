"""Any folder that training can read: metadata of all kinds, above or inside the splits, absolute names, links."""

import os
from itertools import chain, groupby
from pathlib import Path

from finetuning.data.images import EXTENSIONS
from finetuning.data.reading import SPLIT_NAMES, Findings, read_folder
from finetuning.data.samples import BESIDE_SPLITS, Sample, existing_folder, split_folders, walk


def read(path, args, findings):
    """The images of every split; a folder without splits has its images divided by content.

    Several rows of one image become one sample with the captions of all. Images beside the folders of splits are
    for training, unless train/ is there.
    """
    root = existing_folder(path)
    folders = split_folders(root, [entry.name for entry in root.iterdir() if entry.is_dir()])
    splits = set(folders.values())
    if folders and (beside := _beside(root, folders)):
        if "train" in splits:
            findings.faults[BESIDE_SPLITS] += beside
        splits.add("train")
    for split in [split for split in SPLIT_NAMES if split in splits] or ("train",):
        rows = read_folder(root, split, args.image_column, args.caption_column, args.allow_outside_paths, findings)
        for image, same in groupby(rows, key=lambda row: row.image):
            same = list(same)
            captions = tuple(dict.fromkeys(chain.from_iterable(row.captions for row in same)))
            name = _name(image, root, folders)
            yield Sample(name, image, captions, same[0].origin, split if folders else None)


def _beside(root, folders):
    """Names of the images that lie in none of the splits' folders."""
    return [
        str((folder / name).relative_to(root))
        for folder, names in walk(root, True, Findings())
        if folder == root or folder.relative_to(root).parts[0] not in folders
        for name in names
        if Path(name).suffix.lower() in EXTENSIONS
    ]


def _name(image, root, folders):
    """The path below the split's folder; for an image outside the root, the way there."""
    name = os.path.relpath(image, root)
    first, _, rest = name.partition(os.sep)
    return rest if rest and first in folders else name
