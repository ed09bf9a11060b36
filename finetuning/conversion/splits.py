"""The folders of splits in a source, for readers that walk it: which split an image belongs to."""

from finetuning.data import folders


def split_folders(root):
    """{name of a folder at the top of a source: the split that it means}. Raises DatasetError for two of one."""
    return {folder.name: split for split, folder in folders.split_folders(root).items()}


def place_in_split(inside, splits, findings):
    """(split, path below its folder) of an image's path inside a source that has these folders of splits.

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
