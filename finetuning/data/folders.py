"""Folders of a dataset: which ones are splits, what lies below them, where links lead, what a folder holds instead."""

import os
from pathlib import Path

from finetuning.cli import first_few
from finetuning.data.findings import DatasetError
from finetuning.data.images import EXTENSIONS

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "eval", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}  # "val" -> "validation"
STATE_FILES = ("dataset_dict.json", "state.json")  # of `datasets`' save_to_disk
TABLES = (".parquet", ".arrow")
ARCHIVES = (".zip", ".rar", ".7z")
SHARDS = (".tar", ".parquet")
READ_TARS = (
    "training reads tars and Parquet files as they are with --streaming; `prepare_dataset.py convert webdataset` makes "
    "an image folder of tars"
)


def split_meant(name):
    """The split that a folder's name means, in any case: "Val" -> "validation"; None for any other name."""
    return SPLIT_OF.get(name.lower())


def split_folders(root):
    """{split: its folder} of the folders in a dataset that mean a split, in the order train, validation, test.

    Raises DatasetError where two folders with images mean the same split.
    """
    found = {split: [] for split in SPLIT_NAMES}
    for entry in sorted(Path(root).iterdir()):
        if (split := split_meant(entry.name)) and entry.is_dir():
            found[split].append(entry)
    for split, folders in found.items():
        if len(folders) > 1:
            found[split] = [folder for folder in folders if has_images(folder)] or folders[:1]
    if doubled := [folders for folders in found.values() if len(folders) > 1]:
        names = "; ".join(" and ".join(f"{folder.name}/" for folder in folders) for folders in doubled)
        raise DatasetError(f"{root} has several folders for one split: {names}: put their images into one")
    return {split: folders[0] for split, folders in found.items() if folders}


def existing_folder(path):
    """The folder as a Path. Raises DatasetError."""
    for problem in folder_problems("", path):
        raise DatasetError(problem.lstrip())
    return Path(path)


def folder_problems(flag, path):
    """Yield why what a flag names is no folder."""
    path = Path(path)
    ending = path.suffix.lower()
    advice = "unpack it and name the folder" if ending in ARCHIVES else READ_TARS if ending in SHARDS else ""
    if path.is_file():
        yield f"{flag} {path} is a file: {advice or 'name a folder'}"
    elif not path.is_dir():
        yield f"{flag} {path}: there is no such folder" + (f"; {READ_TARS}" if ending in SHARDS else "")


def walk(top, allow_outside_paths, findings, root=None):
    """Yield (folder, names of its files) from `top` down, sorted, without hidden ones.

    Links are followed; those that lead out of `root` (none: out of `top`) are errors, unless they are allowed.
    """
    root = root or top
    real_root, known = os.path.realpath(root), set()

    def stays(path):
        if allow_outside_paths or not path.is_symlink() or Path(os.path.realpath(path)).is_relative_to(real_root):
            return True
        findings.error("link_outside", path.relative_to(root))
        return False

    def is_file(path):
        if path.is_file():
            return True
        findings.error("dead_link", path.relative_to(root))
        return False

    if top != root and not stays(top):
        return
    unreadable = lambda error: findings.error("unreadable_folder", error.filename, error.strerror)
    for folder, below, files in os.walk(top, onerror=unreadable, followlinks=True):
        folder, real = Path(folder), os.path.realpath(folder)
        if real in known:  # a link that leads in a circle
            below.clear()
            continue
        known.add(real)
        files, below[:] = (
            sorted(name for name in names if not name.startswith(".") and stays(folder / name))
            for names in (files, below)
        )
        yield folder, [name for name in files if is_file(folder / name)]


def has_images(folder):
    """Whether there is an image somewhere below; stops at the first one."""
    return any(is_image_name(name) for _, _, names in os.walk(folder, followlinks=True) for name in names)


def is_image_name(name):
    """Whether a file's name ends as an image's does, in any case."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_saved_dataset(folder):
    """Whether a folder is one that `datasets` reads: what it saved, or Parquet or Arrow files with the images inside.

    Images with metadata are an image folder, whatever tables lie beside them.
    """
    folder = Path(folder)
    if any((folder / name).is_file() for name in STATE_FILES):
        return True
    images, metadata, tables = False, False, []
    for place, _, names in os.walk(folder):
        for name in names:
            if name.startswith("."):
                continue
            images = images or is_image_name(name)
            metadata = metadata or name in METADATA_NAMES
            if name.endswith(".tar") or (images and metadata):
                return False
            if name.endswith(TABLES) and name not in METADATA_NAMES:
                tables.append(Path(place, name))
    return bool(tables) and (not images or any(map(_holds_images, tables)))


def _holds_images(table):
    """Whether a table has a column of bytes, or of `datasets`' {bytes, path}."""
    import pyarrow
    import pyarrow.parquet

    try:
        if table.suffix == ".parquet":
            schema = pyarrow.parquet.read_schema(table)
        else:
            with pyarrow.OSFile(str(table)) as file:
                schema = pyarrow.ipc.open_stream(file).schema
    except (pyarrow.ArrowException, OSError):
        return False
    is_bytes = lambda kind: pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    inside = [child for field in schema for child in (getattr(field.type, "fields", None) or [field])]
    return any(is_bytes(field.type) for field in inside)


def what_else(folder):
    """What a folder without images holds in their place, as advice that may follow a message; "" where nothing."""
    entries = sorted(Path(folder).iterdir())
    if splits := [f"{entry.name}/" for entry in entries if split_meant(entry.name) and has_images(entry)]:
        return f"; it has {first_few(splits)} alone: what is trained on belongs beside it or into train/"
    found = {".zip": [], ".tar": []}
    for _, _, names in os.walk(folder):
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in found:
                found[ending].append(name)
    if found[".tar"]:
        return f"; it holds tars ({first_few(found['.tar'], 2)}): {READ_TARS}"
    if found[".zip"]:
        return f"; it holds zipped files ({first_few(found['.zip'], 2)}): unpack them first"
    return ""
