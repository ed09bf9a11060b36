"""Two folders side by side, images/000.jpg and captions/000.txt; folders inside them have the same names too."""

from dataclasses import dataclass
from pathlib import Path

from finetuning.cli import flag
from finetuning.conversion.sidecar import CAPTION_ENDINGS, captioned, place_in_split
from finetuning.data import folders
from finetuning.data.findings import DatasetError
from finetuning.data.folders import existing_folder, split_meant, walk
from finetuning.data.images import EXTENSIONS
from finetuning.data.samples import CaptionFileArgs, Sample


@dataclass
class ParallelArgs(CaptionFileArgs):
    """Parallel folders"""

    images_folder: str = flag("images", "parallel: name of the folder with the images", was=("pictures_folder",))
    captions_folder: str = flag("captions", "parallel: name of the folder with a text file for each")

    def problems(self):
        if self.images_folder == self.captions_folder:
            yield "--images_folder and --captions_folder are the same: convert `sidecar` reads such a folder"


def read(path, args, findings):
    """Each image with the caption file of its name; what lacks its other half is an error.

    Splits are folders named train, validation, test (or the like) above the two folders, or first thing inside them.
    """
    root = existing_folder(path)
    tops = [top for top in (root, *folders.split_folders(root).values()) if (top / args.images_folder).is_dir()]
    missing = [str(root / args.images_folder)] if not tops else []
    missing += [str(folder) for top in tops if not (folder := top / args.captions_folder).is_dir()]
    if missing:
        raise DatasetError(
            f"there is no folder {' or '.join(missing)}: name the two folders with --images_folder "
            "and --captions_folder"
        )
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
