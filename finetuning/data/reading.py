"""Read a folder of images with metadata, or a Hub dataset, into rows that are known to exist.

Hugging Face `datasets` refuses some layouts that people really have (absolute file names) and silently empties others
(metadata above train/), so local folders are read here; every doubt is counted and named instead of dropped.
"""

import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from finetuning.cli import first_few
from finetuning.data.findings import DatasetError, Findings, counted
from finetuning.data.folders import (
    METADATA_NAMES,
    SPLIT_NAMES,  # noqa: F401 (many take it from here)
    existing_folder,
    is_image_name,
    split_folders,
    split_meant,
    what_else,
)
from finetuning.data.images import EXTENSIONS, is_lfs_pointer
from finetuning.data.rows import Row, Rows

NEARLY_METADATA = re.compile(r"metadata\b.*\.(jsonl?|csv|txt|parquet)", re.IGNORECASE)


def read_split(folder, split, usual, caption_column, findings):
    """The rows of one split of a local folder, sorted by path.

    split  "train", "validation" or "test"; none: `usual`, or the folder itself where it has no splits

    Raises DatasetError where the split is not there.
    """
    there = split_folders(existing_folder(folder))
    wanted = split or (usual if there else "train")  # a folder without splits is read as its own train
    rows = read_folder(folder, wanted, "image", caption_column, False, findings)
    if rows is None:
        only = ", ".join(there) or "the folder itself"
        raise DatasetError(f"{folder} has no split {wanted}, only {only}{'' if there else what_else(folder)}")
    return rows


def read_folder(root, split, image_column, caption_column, allow_outside_paths, findings):
    """The rows of one split of a local folder, sorted by path; None where the folder has no such split.

    caption_column "none" reads images alone, each with an empty caption (unconditional training).
    """
    root = existing_folder(root)
    splits = split_folders(root)
    if split not in splits and split != "train":
        return None
    found = _SplitFolder(root, splits.get(split, root), allow_outside_paths)
    found.refuse_what_is_no_split()
    if split == "train" and found.base != root:
        inside = {os.path.realpath(path) for path in found.linked}
        for path in _Images(root, [found.base, *found.others]).images:
            if os.path.realpath(path) not in inside:
                findings.warn("beside_train", found.shown(path), train=found.base.name)
    if caption_column == "none":
        rows = Rows.of(found.uncaptioned_rows(findings))
    else:
        columns = (image_column, caption_column)
        rows = Rows.of(row for file in found.metadata_files() for row in found.rows(file, *columns, split, findings))
        for path, count in found.images.items():
            if count == 0:
                findings.error("unnamed_image", found.shown(path))
            elif count > 1:
                findings.warn("named_twice", found.shown(path))
    for path in sorted(found.dead):
        findings.error("dead_link", found.shown(path))
    for name in found.moved:
        findings.warn("moved", name)
    return rows if caption_column == "none" else rows.by_image()


def metadata_files(root):
    """The metadata files that the rows of a folder's splits come from, sorted: above the splits and inside them."""
    root = Path(root)
    splits = split_folders(root)
    bases = splits.values() if "train" in splits else {root, *splits.values()}
    return sorted({file for base in bases for file in _SplitFolder(root, base).metadata})


def read_hub(dataset, image_column, caption_column, findings, split=""):
    """The rows of a loaded Hugging Face dataset split; images stay in the dataset and are decoded when needed."""
    needed_columns(image_column, caption_column, dataset.column_names, "the dataset")
    refuse_no_images(dataset.features, image_column, "the dataset")
    captions = [""] * len(dataset) if caption_column == "none" else dataset[caption_column]
    rows = []
    for index, value in enumerate(captions):
        where = f"{split} row {index}".lstrip()
        texts = ("",) if caption_column == "none" else as_captions(value, where, caption_column)
        if texts:
            rows.append(Row(index, texts, where))
        else:
            findings.error("no_caption", where)
    return Rows.of(rows)


def needed_columns(image_column, caption_column, names, where):
    """The columns that are read of a table. Raises DatasetError where one is not there."""
    needed = [image_column] if caption_column == "none" else [image_column, caption_column]
    if missing := [name for name in needed if name not in names]:
        there = f"{where} has no column {' or '.join(missing)}, only {', '.join(names)}"
        raise DatasetError(f"{there}: name them with --image_column and --caption_column")
    return needed


def no_images(where, column, kind):
    return DatasetError(f"{where}: the column {column} holds {kind}, not images: name another with --image_column")


def refuse_no_images(features, column, where):
    """Text would be opened as a path on this machine, wherever the dataset comes from. Raises DatasetError."""
    kind = type(features[column]).__name__
    if kind != "Image":
        raise no_images(where, column, kind)


class _Images:
    """What lies below a folder, hidden files and folders and `others` left out. Paths are text."""

    def __init__(self, base, others):
        self.others, self.metadata = others, []
        self.linked, self.dead = set(), set()  # images that a link leads to, which may lie anywhere; links to nothing
        images = []
        left = [(str(base), os.path.islink(base), ())]
        while left:
            folder, through_link, above = left.pop()
            real = os.path.realpath(folder)
            if real in above or Path(folder) in others:
                continue  # a link that leads in a circle, or another split
            inside = "" if folder == "." else f"{folder}{os.sep}"
            for entry in _visible_entries(folder):
                path, is_linked = inside + entry.name, through_link or entry.is_symlink()
                if entry.is_dir():
                    left.append((path, is_linked, (*above, real)))
                elif entry.name in METADATA_NAMES:
                    self.metadata.append(Path(path))
                elif is_image_name(path):
                    if entry.is_file():
                        images.append(path)
                    elif entry.is_symlink():
                        self.dead.add(path)
                    if is_linked:
                        self.linked.add(path)
        self.images = dict.fromkeys(sorted(images), 0)  # {path: how many rows name it}, in the order of their paths


def _visible_entries(folder):
    """What lies in a folder, without what is hidden. Raises DatasetError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error}") from error


class _SplitFolder(_Images):
    """The images of one split, and which of them a metadata row means. `base` is its folder, perhaps `root` itself."""

    def __init__(self, root, base, allow_outside_paths=False):
        # The folders of other splits
        super().__init__(
            base, [one for one in root.iterdir() if split_meant(one.name) and one.is_dir() and one != base]
        )
        above = [root / name for name in METADATA_NAMES if base != root and (root / name).is_file()]
        self.metadata = sorted(self.metadata + above)
        self.root, self.base, self.allow_outside_paths = root, base, allow_outside_paths
        self.real_root = root.resolve()
        self.moved = []  # absolute names of another machine

    def shown(self, path):
        """A path for people."""
        return _shown(path, self.root)

    def refuse_what_is_no_split(self):
        """Raises DatasetError where there are no images, or where those of another split lie further below."""
        if not self.images:
            endings = ", ".join(sorted(EXTENSIONS))
            raise DatasetError(f"there are no images in {self.base} ({endings}){what_else(self.base)}")
        with_images = map(Path, {os.path.dirname(path) for path in self.images})
        for folder in sorted({above for one in with_images for above in (one, *one.parents)}):
            # To train on images/train beside images/test would be to train on both
            if self.base in folder.parents and split_meant(folder.name) in ("validation", "test"):
                fix = f"name the folder that holds the splits, {folder.parent}, or give {folder.name} another name"
                raise DatasetError(f"{folder} looks like a split that must not be trained on: {fix}")

    def metadata_files(self):
        """Raises DatasetError where there are none, with what may be meant instead."""
        if self.metadata:
            return self.metadata
        message = f"{self.base} has {counted(len(self.images), 'image')} but no {' or '.join(METADATA_NAMES)}"
        if near := sorted(entry.name for entry in self.base.iterdir() if NEARLY_METADATA.match(entry.name)):
            message += f"; {first_few(near)} is there: rename it, if it is that"
        endings = (".txt", ".caption")
        if beside := sum(Path(path).with_suffix(end).is_file() for path in self.images for end in endings):
            message += (
                f"; {counted(beside, 'caption file')} beside them: `prepare_dataset.py convert sidecar` reads them"
            )
        raise DatasetError(
            f'{message}. Write one line {{"file_name": "image.png", "text": "its caption"}} per image into '
            f"{self.base / METADATA_NAMES[0]}, or train without captions with --caption_column none"
        )

    def uncaptioned_rows(self, findings):
        """A row of an empty caption for each image."""
        for path in self.images:
            _, problem = self.permit(path)
            if problem:
                findings.error(problem, self.shown(path))
            else:
                yield Row(path, ("",), self.shown(path))

    def rows(self, file, image_column, caption_column, split, findings):
        """The rows of one metadata file."""
        # Metadata above the splits is read for each of them; what is wrong with it is reported once, for train.
        reported = findings if split == "train" or self.base in file.parents else Findings()
        folder, columns = str(file.parent), {}
        for where, record in read_records(file, self.root, reported):
            columns.update(dict.fromkeys(record))
            name = named_image(record, image_column)
            if name is None:
                reported.error("no_image_named", where)
                continue
            captions = as_captions(record.get(caption_column), where, caption_column)
            image, problem = self.find(name, folder)
            if problem == "another_split":
                continue
            if problem:
                hint = self.hint(name, folder) if problem == "image_missing" else ""
                reported.error(problem, where, f"{_printable(name)}{hint}")
                continue
            self.images[image] = self.images.get(image, 0) + 1  # one outside of the folder may be new
            if not captions:
                findings.error("no_caption", where, _printable(name))
            elif _printable("".join(captions)) != "".join(captions):
                findings.error("half_character", where, name)
            else:
                yield Row(image, captions, where)
        _check_columns(columns, image_column, caption_column, self.shown(file))

    def find(self, name, folder):
        """(path of the image that a row of metadata in `folder` means, None) or (None, code of the problem)."""
        plain = os.path.normpath(os.path.join(folder, name))
        if plain in self.images and plain not in self.linked:
            return plain, None  # nearly all names are such, and a dataset may have a million
        is_absolute = os.path.isabs(name) or PureWindowsPath(name).is_absolute()
        is_above = self.base not in (Path(folder), *Path(folder).parents)  # it may mean the images of any split
        places = [folder, str(self.base), *(map(str, self.others) if is_above else [])]
        for candidate in [name] if is_absolute else [os.path.join(place, name) for place in places]:
            candidate = os.path.normpath(candidate)
            if candidate in self.images or os.path.isfile(candidate):
                return self.permit(candidate)
            if candidate in self.dead:
                self.dead.discard(candidate)  # named here, by its row
                return None, "dead_link"
        if not is_absolute:
            return None, "image_missing"
        same_name = self.by_name[PureWindowsPath(name).name if "\\" in name else os.path.basename(name)]
        here = [path for path in same_name if path.startswith(folder + os.sep)]
        here = here or [path for path in same_name if path in self.images]
        if len(here) != 1:
            return None, "ambiguous_name" if here else "image_missing"
        (path,) = here
        if path not in self.images:
            return None, "another_split"
        self.moved.append(name)
        return path, None

    def permit(self, path):
        """(image, None) for a file that is there, or (None, code of the problem)."""
        if path in self.images and path not in self.linked:
            return path, None
        real = Path(path).resolve()
        if self.real_root not in real.parents:
            return (path, None) if self.allow_outside_paths else (None, "outside")
        if path in self.images:
            return path, None
        # The same file by another spelling (an absolute name through a link, say), or an image of another split.
        relative = self.root / real.relative_to(self.real_root)
        if str(relative) in self.images:
            return str(relative), None
        if not is_image_name(path):
            return None, "not_an_image"
        return None, "another_split" if any(other in relative.parents for other in self.others) else "hidden"

    def hint(self, name, folder):
        """Words that follow a name that is not there: what is meant perhaps; "" where nothing is near it."""
        inside = os.path.relpath(folder, self.root)
        plain = name.replace("\\", "/").removeprefix("./").strip()
        doubled = [plain.removeprefix(f"{above}/") for above in {inside, self.base.name, self.real_root.name}]
        near = set().union(*(self.by_plain_name.get(_plain(one), ()) for one in (plain, unquote(plain), *doubled)))
        if len(near) != 1:
            return ""
        (path,) = near
        meant = os.path.relpath(path, folder)
        reasons = {
            "write / in place of \\": "\\" in name,
            "there are spaces around the name": name.strip() != name,
            "write the name as it is, not as in an address": unquote(name) != name,
            "the two are written in different Unicode forms": _normalized(name) == _normalized(meant),
            "small and capital letters differ": name.casefold() == meant.casefold(),
            f"names count from {'the folder of the metadata' if inside == '.' else f'{inside}/'}": True,
        }
        return f": {_printable(meant)} is there; {next(why for why, applies in reasons.items() if applies)}"

    @cached_property
    def by_plain_name(self):
        """{name without case, in one Unicode form: paths} of this split's images, below the root and the split."""
        found = defaultdict(set)
        for path in self.images:
            for above in (self.root, self.base):
                found[_plain(os.path.relpath(path, above))].add(path)
        return found

    @cached_property
    def by_name(self):
        """{file name: paths} of all splits, for absolute names of another machine."""
        found = defaultdict(list)
        all_images = [path for one in (self, *(_Images(other, ()) for other in self.others)) for path in one.images]
        for path in dict.fromkeys(all_images):
            found[os.path.basename(path)].append(path)
        return found


# -- metadata files ----------------------------------------------------------------------------------------------------


def read_records(path, root, findings):
    """Yield (where, record) of a metadata file. Raises DatasetError naming the file where it cannot be read."""
    shown, number = _shown(path, root), 0
    if is_lfs_pointer(path):
        raise DatasetError(f"{shown} is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")
    read = {".csv": _csv_records, ".parquet": _parquet_records}.get(path.suffix, _json_records)
    try:
        for number, record in enumerate(read(path, shown), 1):
            where = f"{shown} {'line' if read is _json_records else 'row'} {number}"
            if isinstance(record, dict):
                yield where, record
            elif record:
                findings.error(record[0], where, *record[1:])
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (after line {number}: {error.reason}): save it again as UTF-8"
        raise DatasetError(f"{shown} {reason}") from error
    except (OSError, csv.Error) as error:
        raise DatasetError(f"{shown} cannot be read after row {number}: {error}") from error


# Each yields the records of a file: a dict, None for a blank line, or (code, reason) of what is wrong with a record


def _json_records(path, shown):
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith("["):
                raise DatasetError(f"{shown} is one JSON list: write one object on each line, without [ ] and commas")
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                yield "not_json", error
            else:
                yield record if isinstance(record, dict) or not line.strip() else ("not_json", "no object")


def _csv_records(path, shown):
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if len(names := reader.fieldnames or ()) == 1 and set(names[0]) & set(";\t|"):
            raise DatasetError(f"{shown} has one column, {names[0]!r}: save it again, separated by commas")
        for record in reader:
            yield ("too_many_fields",) if None in record else record


def _parquet_records(path, shown):
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{shown} cannot be read: {error}") from error


def _check_columns(columns, image_column, caption_column, shown):
    """A column that no record has is a problem of the whole file. Raises DatasetError listing those there are."""
    there = ", ".join(columns) or "nothing"
    if columns and not any(name in columns for name in _file_name_columns(image_column)):
        raise DatasetError(f'{shown}: it has {there}, and "file_name" is needed, or --image_column to name the column')
    if columns and caption_column not in columns:
        raise DatasetError(f"{shown} has no column {caption_column!r}, only {there}: name it with --caption_column")


def _file_name_columns(image_column):
    return ("file_name", f"{image_column}_file_name", image_column)


def named_image(record, image_column):
    """The file name that a metadata record gives, or None."""
    names = (record.get(key) for key in _file_name_columns(image_column))
    return next((name for name in names if isinstance(name, str) and name), None)


def as_captions(value, where, column):
    """The captions of a text or a list of texts, without empty ones. Raises DatasetError for anything else."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(text is None or isinstance(text, str) for text in values):
        raise DatasetError(f"{where}: {column!r} must be text or a list of texts, not {value!r}")
    return tuple(text.strip() for text in values if text and text.strip())


def _shown(path, root):
    inside = f"{root}{os.sep}"
    return _printable(str(path).removeprefix("" if str(root) == "." else inside))


def _printable(text):
    """The same text, or with \\ud83d for what is half a character: no terminal and no file takes those."""
    return text.encode("utf-8", "backslashreplace").decode()


def _normalized(name):
    return unicodedata.normalize("NFC", name)


def _plain(name):
    return _normalized(name).casefold()
