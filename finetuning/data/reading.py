"""Read a folder of pictures with metadata, or a Hub dataset, into rows that are known to exist.

Hugging Face `datasets` refuses some layouts that people really have (absolute file names) and silently empties others
(metadata above train/), so local folders are read here; every doubt is counted and named instead of dropped.
"""

import csv
import io
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from finetuning.data.pictures import EXTENSIONS

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "eval", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Row:
    """One picture and its captions. `picture` is a path, or an index into a Hub dataset."""

    picture: Path | int
    captions: tuple[str, ...]
    origin: str  # where a person finds it: "train/metadata.jsonl line 12"


@dataclass
class Findings:
    """What is wrong (`faults`: the run stops or skips) and what is worth knowing (`notes`), by kind, with examples."""

    faults: dict = field(default_factory=lambda: defaultdict(list))
    notes: dict = field(default_factory=lambda: defaultdict(list))

    def count(self):
        """How many faults there are."""
        return sum(map(len, self.faults.values()))

    def report(self, shown=5):
        """Text: a line for each kind, the faults first."""
        lines = []
        for mark, kinds in (("x", self.faults), ("-", self.notes)):
            for kind, examples in kinds.items():
                more = f", and {len(examples) - shown} more" if len(examples) > shown else ""
                lines.append(f"  {mark} {len(examples)} {kind}: {'; '.join(examples[:shown])}{more}")
        return "\n".join(lines)


class DatasetProblem(ValueError):
    """A dataset that cannot be read as it stands; the message says what to do."""


def read_folder(root, split, image_column, caption_column, allow_outside_paths, findings):
    """The rows of one split of a local folder, sorted by path; None where the folder has no such split.

    caption_column "none" reads pictures alone, each with an empty caption (unconditional training).
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetProblem(f"there is no folder {root}")
    split_dirs = [root / name for name in SPLIT_NAMES[split] if (root / name).is_dir()]
    if not split_dirs and split != "train":
        return None
    base = split_dirs[0] if split_dirs else root
    every = [root / name for names in SPLIT_NAMES.values() for name in names]
    others = [folder for folder in every if folder.is_dir() and folder != base]
    pictures = [p for p in _walk(base) if not any(other in p.parents for other in others if other != base)]
    if not pictures:
        raise DatasetProblem(f"there are no pictures in {base} ({', '.join(sorted(EXTENSIONS))})")
    _refuse_nested_splits(base, pictures)
    resolver = _Resolver(root, base, others, pictures, allow_outside_paths)
    if caption_column == "none":
        return _uncaptioned(pictures, resolver, findings)

    metadata = _metadata_files(base, root, others)
    if not metadata:
        raise DatasetProblem(_no_metadata_message(base, pictures))
    rows, seen = [], defaultdict(int)
    for path in metadata:
        # Metadata above the splits is read for each of them; what is wrong with it is said once, for train.
        said = findings if split == "train" or base in path.parents else Findings()
        records = list(_records(path, root, said))
        _check_columns(records, image_column, caption_column, _shown(path, root))
        for where, record in records:
            name = _file_name(record, image_column)
            if name is None:
                said.faults["rows that name no picture"].append(where)
                continue
            captions = _as_captions(record.get(caption_column), where, caption_column)
            picture, trouble = resolver.find(name, path.parent)
            if trouble == "another split":
                continue
            if trouble:
                said.faults[trouble].append(f"{where} ({name})")
                continue
            seen[picture] += 1
            if not captions:
                findings.faults["rows with an empty caption"].append(f"{where} ({name})")
                continue
            rows.append(Row(picture, captions, where))
    for path in pictures:
        if path not in seen:
            findings.faults["pictures that no metadata row names"].append(_shown(path, root))
    for path, count in seen.items():
        if count > 1:
            findings.notes["pictures named by more than one row (all are kept)"].append(_shown(path, root))
    if resolver.moved:
        note = "absolute file names of another machine, read as the picture of that name in this folder"
        findings.notes[note] += resolver.moved
    return sorted(rows, key=lambda row: (str(row.picture), row.origin))


def _uncaptioned(pictures, resolver, findings):
    rows = []
    for path in pictures:
        _, trouble = resolver.permit(path)
        where = _shown(path, resolver.root)
        if trouble:
            findings.faults[trouble].append(where)
        else:
            rows.append(Row(path, ("",), where))
    return rows


def read_hub(dataset, image_column, caption_column, findings):
    """The rows of a loaded Hugging Face dataset split; pictures stay in the dataset and are decoded when needed."""
    needed = [image_column] if caption_column == "none" else [image_column, caption_column]
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise DatasetProblem(
            f"the dataset has no column {' or '.join(missing)}, only {', '.join(dataset.column_names)}: "
            "name them with --image_column and --caption_column"
        )
    kind = type(dataset.features[image_column]).__name__
    if kind != "Image":  # text would be opened as a path on this machine, wherever the dataset comes from
        raise DatasetProblem(f"the column {image_column} holds {kind}, not pictures: name another with --image_column")
    captions = [""] * len(dataset) if caption_column == "none" else dataset[caption_column]
    rows = []
    for index, value in enumerate(captions):
        texts = ("",) if caption_column == "none" else _as_captions(value, f"row {index}", caption_column)
        if texts:
            rows.append(Row(index, texts, f"row {index}"))
        else:
            findings.faults["rows with an empty caption"].append(f"row {index}")
    return rows


class _Resolver:
    """Finds the picture that a metadata row means, or says in words why not."""

    def __init__(self, root, base, others, pictures, allow_outside_paths):
        self.root, self.base, self.others, self.allow_outside_paths = root, base, others, allow_outside_paths
        self.real_root = root.resolve()
        self.pictures = set(pictures)
        self.by_name = defaultdict(list)
        for path in {*pictures, *(path for other in others for path in _walk(other))}:
            self.by_name[path.name].append(path)
        self.moved = []

    def find(self, name, folder):
        named = Path(name)
        is_absolute = named.is_absolute() or PureWindowsPath(name).is_absolute()
        is_above = self.base not in (folder, *folder.parents)  # such metadata may mean the pictures of any split
        places = [folder, self.base, *(self.others if is_above else [])]
        for candidate in [named] if is_absolute else [place / named for place in places]:
            candidate = Path(os.path.normpath(candidate))
            if candidate.is_file():
                return self.permit(candidate)
        if is_absolute:
            same_name = self.by_name[PureWindowsPath(name).name if "\\" in name else named.name]
            here = [path for path in same_name if folder in path.parents] or self.pictures.intersection(same_name)
            if len(here) == 1:
                (path,) = here
                if path not in self.pictures:
                    return None, "another split"
                self.moved.append(name)
                return path, None
            if here:
                return None, "absolute file names that fit several pictures of this folder (use relative names)"
        return None, "rows whose picture is not there"

    def permit(self, path):
        """(picture, None) for a file that is there, or (None, why not)."""
        real = path.resolve()
        if self.real_root not in real.parents:
            if self.allow_outside_paths:
                return path, None
            return None, "rows that reach outside the dataset's folder (--allow_outside_paths permits it)"
        if path in self.pictures:
            return path, None
        # The same file by another spelling (an absolute name through a link, say), or a picture of another split.
        relative = self.root / real.relative_to(self.real_root)
        if relative in self.pictures:
            return relative, None
        if path.suffix.lower() not in EXTENSIONS:
            return None, "rows that name a file that is not a picture"
        if any(other in relative.parents for other in self.others):
            return None, "another split"
        return None, "rows whose picture is hidden or outside the splits' folders"


def _refuse_nested_splits(base, pictures):
    """Train on images/train beside images/test would be training on both. Raises DatasetProblem."""
    kept_apart = {*SPLIT_NAMES["validation"], *SPLIT_NAMES["test"]}
    for path in pictures:
        for folder in path.relative_to(base).parents:
            if folder.name in kept_apart:
                raise DatasetProblem(
                    f"{base / folder} looks like a split that must not be trained on: name the folder that holds the "
                    f"splits, {base / folder.parent}, or give {folder.name} another name"
                )


def _walk(base):
    """Pictures below a folder in a stable order, without hidden files and folders."""
    found = []
    for folder, subfolders, files in os.walk(base, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(folder) / name
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return sorted(found)


def _metadata_files(base, root, others):
    """metadata.* in the split's folder, below it, and above it up to the root."""
    found = []
    for folder, subfolders, files in os.walk(base, followlinks=True):
        subfolders.sort()
        if not any(other == Path(folder) or other in Path(folder).parents for other in others if other != base):
            found += [Path(folder) / name for name in METADATA_NAMES if name in files]
    if base != root:
        found += [root / name for name in METADATA_NAMES if (root / name).is_file()]
    return sorted(found)


def _no_metadata_message(base, pictures):
    sidecars = sum(path.with_suffix(suffix).is_file() for path in pictures for suffix in (".txt", ".caption"))
    message = f"{base} has {len(pictures)} pictures but no {' or '.join(METADATA_NAMES)}"
    if sidecars:
        message += f"; {sidecars} captions stand in .txt/.caption files beside them, which have to be gathered first"
    return message + (
        '. Write one line {"file_name": "picture.png", "text": "its caption"} per picture into '
        f"{base / METADATA_NAMES[0]}, or train without captions with --caption_column none"
    )


def _records(path, root, findings):
    """Yield (where, record) of a metadata file. Raises DatasetProblem naming the file where it cannot be read."""
    shown = _shown(path, root)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise DatasetProblem(f"{shown} cannot be read: {error}") from error
        for number, record in enumerate(table.to_pylist(), 1):
            yield f"{shown} row {number}", record
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetProblem(f"{shown} is not UTF-8 ({error}): save it again as UTF-8") from error
    if path.suffix == ".csv":
        for number, record in enumerate(csv.DictReader(io.StringIO(text)), 1):
            if None in record:
                kind = "metadata rows with more fields than columns (a caption with a comma needs quotes)"
                findings.faults[kind].append(f"{shown} row {number}")
            else:
                yield f"{shown} row {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{shown} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            findings.faults["metadata lines that are not JSON"].append(f"{where}: {error}")
            continue
        if not isinstance(record, dict):
            findings.faults["metadata lines that are not JSON objects"].append(where)
            continue
        yield where, record


def _check_columns(records, image_column, caption_column, shown):
    """A column that no record has is a problem of the whole file. Raises DatasetProblem listing those there are."""
    columns = dict.fromkeys(key for _, record in records for key in record)
    there = ", ".join(columns) or "nothing"
    if records and not any(name in columns for name in _file_name_columns(image_column)):
        raise DatasetProblem(
            f'{shown} names no pictures: it has {there}, and "file_name" is needed '
            "(or name the column with --image_column)"
        )
    if records and caption_column not in columns:
        raise DatasetProblem(
            f"{shown} has no column {caption_column!r}, only {there}: "
            "name the captions' column with --caption_column, or add it"
        )


def _file_name_columns(image_column):
    return ("file_name", f"{image_column}_file_name", image_column)


def _file_name(record, image_column):
    names = (record.get(key) for key in _file_name_columns(image_column))
    return next((name for name in names if isinstance(name, str) and name), None)


def _as_captions(value, where, column):
    values = value if isinstance(value, list | tuple) else [value]
    if not all(text is None or isinstance(text, str) for text in values):
        raise DatasetProblem(f"{where}: {column!r} must be text or a list of texts, not {value!r}")
    return tuple(text.strip() for text in values if text and text.strip())


def _shown(path, root):
    return str(path.relative_to(root)) if root in path.parents else str(path)
