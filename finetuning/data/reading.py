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
        raise DatasetError(f"{folder} has no split {wanted}, only {', '.join(there) or 'the folder itself'}")
    return rows


def read_folder(root, split, image_column, caption_column, allow_outside_paths, findings):
    """The rows of one split of a local folder, sorted by path; None where the folder has no such split.

    caption_column "none" reads images alone, each with an empty caption (unconditional training).
    """
    root = existing_folder(root)
    splits = split_folders(root)
    if split not in splits and split != "train":
        return None
    base = splits.get(split, root)
    tree = _Tree(base, _others(root, base))
    if not tree.images:
        raise DatasetError(f"there are no images in {base} ({', '.join(sorted(EXTENSIONS))}){what_else(base)}")
    _refuse_nested_splits(base, tree)
    if split == "train" and base != root:
        inside = {os.path.realpath(path) for path in tree.linked}
        for path in _Tree(root, [base, *tree.others]).images:
            if os.path.realpath(path) not in inside:
                findings.warn("beside_train", _shown(path, root), train=base.name)
    resolver = _Resolver(root, base, tree, allow_outside_paths)
    if caption_column == "none":
        rows = Rows.of(_uncaptioned(resolver, findings))
        _name_dead_links(tree, root, findings)
        return rows

    metadata = _metadata_of(root, base, tree)
    if not metadata:
        raise DatasetError(_no_metadata_message(base, tree.images))
    seen = tree.images  # {image: how many rows name it}
    rows = Rows.of(
        row
        for path in metadata
        for row in _rows_of(path, resolver, image_column, caption_column, split == "train", seen, findings)
    )
    for path, count in seen.items():
        if count == 0:
            findings.error("unnamed_image", _shown(path, root))
        elif count > 1:
            findings.warn("named_twice", _shown(path, root))
    _name_dead_links(tree, root, findings)
    for name in resolver.moved:
        findings.warn("moved", name)
    return rows.by_image()


def metadata_files(root):
    """The metadata files that the rows of a folder's splits come from, sorted: above the splits and inside them."""
    root, found = Path(root), set()
    splits = split_folders(root)
    for base in {root, *splits.values()} if "train" not in splits else splits.values():
        found.update(_metadata_of(root, base, _Tree(base, _others(root, base))))
    return sorted(found)


def _others(root, base):
    """The folders in `root` that mean another split than `base`, which is one of them or `root` itself."""
    return [entry for entry in root.iterdir() if split_meant(entry.name) and entry.is_dir() and entry != base]


def _metadata_of(root, base, tree):
    above = [root / name for name in METADATA_NAMES if base != root and (root / name).is_file()]
    return sorted(tree.metadata + above)


def _name_dead_links(tree, root, findings):
    for path in sorted(tree.dead):
        findings.error("dead_link", _shown(path, root))


def _rows_of(path, resolver, image_column, caption_column, is_train, seen, findings):
    """The rows of one metadata file; `seen` counts how often each image is named."""
    # Metadata above the splits is read for each of them; what is wrong with it is reported once, for train.
    reported = findings if is_train or resolver.base in path.parents else Findings()
    folder, columns = str(path.parent), {}
    for where, record in read_records(path, resolver.root, reported):
        columns.update(dict.fromkeys(record))
        name = named_image(record, image_column)
        if name is None:
            reported.error("no_image_named", where)
            continue
        captions = as_captions(record.get(caption_column), where, caption_column)
        image, problem = resolver.find(name, folder)
        if problem == "another_split":
            continue
        if problem:
            hint = resolver.hint(name, folder) if problem == "image_missing" else ""
            reported.error(problem, where, f"{_printable(name)}{hint}")
            continue
        seen[image] = seen.get(image, 0) + 1  # one outside of the folder may be new
        if not captions:
            findings.error("no_caption", where, _printable(name))
        elif _printable("".join(captions)) != "".join(captions):
            findings.error("half_character", where, name)
        else:
            yield Row(image, captions, where)
    _check_columns(columns, image_column, caption_column, _shown(path, resolver.root))


def _uncaptioned(resolver, findings):
    for path in resolver.tree.images:
        _, problem = resolver.permit(path)
        where = _shown(path, resolver.root)
        if problem:
            findings.error(problem, where)
        else:
            yield Row(path, ("",), where)


def read_hub(dataset, image_column, caption_column, findings):
    """The rows of a loaded Hugging Face dataset split; images stay in the dataset and are decoded when needed."""
    needed_columns(image_column, caption_column, dataset.column_names, "the dataset")
    refuse_no_images(dataset.features, image_column, "the dataset")
    captions = [""] * len(dataset) if caption_column == "none" else dataset[caption_column]
    rows = []
    for index, value in enumerate(captions):
        texts = ("",) if caption_column == "none" else as_captions(value, f"row {index}", caption_column)
        if texts:
            rows.append(Row(index, texts, f"row {index}"))
        else:
            findings.error("no_caption", f"row {index}")
    return Rows.of(rows)


def needed_columns(image_column, caption_column, names, where):
    """The columns that are read of a table. Raises DatasetError where one is not there."""
    needed = [image_column] if caption_column == "none" else [image_column, caption_column]
    if missing := [name for name in needed if name not in names]:
        raise DatasetError(
            f"{where} has no column {' or '.join(missing)}, only {', '.join(names)}: "
            "name them with --image_column and --caption_column"
        )
    return needed


def no_images(where, column, kind):
    return DatasetError(f"{where}: the column {column} holds {kind}, not images: name another with --image_column")


def refuse_no_images(features, column, where):
    """Text would be opened as a path on this machine, wherever the dataset comes from. Raises DatasetError."""
    kind = type(features[column]).__name__
    if kind != "Image":
        raise no_images(where, column, kind)


class _Tree:
    """What lies below a split's folder, hidden files and folders and the other splits left out. Paths are text."""

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
            for entry in self._entries(folder):
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
        self.images = dict.fromkeys(sorted(images), 0)  # in the order of their paths

    @staticmethod
    def _entries(folder):
        """What lies in a folder, without what is hidden. Raises DatasetError where it cannot be read."""
        try:
            with os.scandir(folder) as entries:
                yield from (entry for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            raise DatasetError(f"{folder} cannot be read: {error}") from error


class _Resolver:
    """Finds the image that a metadata row means, or the code of the problem."""

    def __init__(self, root, base, tree, allow_outside_paths):
        self.root, self.base, self.others, self.tree = root, base, tree.others, tree
        self.allow_outside_paths = allow_outside_paths
        self.real_root = root.resolve()
        self.moved = []

    def find(self, name, folder):
        """(path of the image, None) or (None, code of the problem)."""
        plain = os.path.normpath(f"{folder}{os.sep}{name}" if folder != "." else name)
        if plain in self.tree.images and plain not in self.tree.linked and not os.path.isabs(name):
            return plain, None  # nearly all names are such, and a dataset may have a million
        is_absolute = os.path.isabs(name) or PureWindowsPath(name).is_absolute()
        is_above = self.base not in (Path(folder), *Path(folder).parents)  # it may mean the images of any split
        places = [folder, str(self.base), *(map(str, self.others) if is_above else [])]
        for candidate in [name] if is_absolute else [os.path.join(place, name) for place in places]:
            candidate = os.path.normpath(candidate)
            if candidate in self.tree.images or os.path.isfile(candidate):
                return self.permit(candidate)
            if candidate in self.tree.dead:
                self.tree.dead.discard(candidate)  # named here, by its row
                return None, "dead_link"
        if is_absolute:
            same_name = self.by_name[PureWindowsPath(name).name if "\\" in name else os.path.basename(name)]
            here = [path for path in same_name if path.startswith(folder + os.sep)]
            here = here or [path for path in same_name if path in self.tree.images]
            if len(here) == 1:
                (path,) = here
                if path not in self.tree.images:
                    return None, "another_split"
                self.moved.append(name)
                return path, None
            if here:
                return None, "ambiguous_name"
        return None, "image_missing"

    def hint(self, name, folder):
        """Words that follow a name that is not there: what is meant perhaps; "" where nothing is near it."""
        inside = os.path.relpath(folder, self.root)
        plain = name.replace("\\", "/").removeprefix("./").strip()
        doubled = [plain.removeprefix(f"{above}/") for above in {inside, self.base.name, self.root.resolve().name}]
        near = {
            path
            for one in dict.fromkeys([plain, unquote(plain), *doubled])
            for path in self.by_plain_name.get(_plain(one), ())
        }
        if len(near) != 1:
            return ""
        (path,) = near
        meant = os.path.relpath(path, folder)
        if "\\" in name:
            why = "write / in place of \\"
        elif name.strip() != name:
            why = "there are spaces around the name"
        elif unquote(name) != name:
            why = "write the name as it is, not as in an address"
        elif unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", meant):
            why = "the two are written in different Unicode forms"
        elif name.casefold() == meant.casefold():
            why = "small and capital letters differ"
        else:
            why = f"names count from {'the folder of the metadata' if inside == '.' else f'{inside}/'}"
        return f": {_printable(meant)} is there; {why}"

    @cached_property
    def by_plain_name(self):
        """{name without case, in one Unicode form: paths} of this split's images, below the root and the split."""
        found = defaultdict(set)
        for path in self.tree.images:
            for above in (self.root, self.base):
                found[_plain(os.path.relpath(path, above))].add(path)
        return found

    @cached_property
    def by_name(self):
        """{file name: paths} of all splits, for absolute names of another machine."""
        found = defaultdict(list)
        trees = [self.tree, *(_Tree(other, ()) for other in self.others)]
        for path in dict.fromkeys(path for tree in trees for path in tree.images):
            found[os.path.basename(path)].append(path)
        return found

    def permit(self, path):
        """(image, None) for a file that is there, or (None, code of the problem)."""
        if path in self.tree.images and path not in self.tree.linked:
            return path, None
        real = Path(path).resolve()
        if self.real_root not in real.parents:
            if self.allow_outside_paths:
                return path, None
            return None, "outside"
        if path in self.tree.images:
            return path, None
        # The same file by another spelling (an absolute name through a link, say), or an image of another split.
        relative = self.root / real.relative_to(self.real_root)
        if str(relative) in self.tree.images:
            return str(relative), None
        if not is_image_name(path):
            return None, "not_an_image"
        if any(other in relative.parents for other in self.others):
            return None, "another_split"
        return None, "hidden"


def _refuse_nested_splits(base, tree):
    """Train on images/train beside images/test would be training on both. Raises DatasetError."""
    with_images = {os.path.dirname(path) for path in tree.images}
    for folder in (Path(name) for name in sorted(with_images)):
        for above in (folder, *folder.parents):
            if base in above.parents and split_meant(above.name) in ("validation", "test"):
                raise DatasetError(
                    f"{above} looks like a split that must not be trained on: name the folder that holds the splits, "
                    f"{above.parent}, or give {above.name} another name"
                )


def _no_metadata_message(base, images):
    sidecars = sum(Path(path).with_suffix(suffix).is_file() for path in images for suffix in (".txt", ".caption"))
    message = f"{base} has {counted(len(images), 'image')} but no {' or '.join(METADATA_NAMES)}"
    if near := sorted(entry.name for entry in base.iterdir() if NEARLY_METADATA.match(entry.name)):
        message += f"; {first_few(near)} is there: rename it, if it is that"
    if sidecars:
        message += f"; {counted(sidecars, 'caption file')} beside them: `prepare_dataset.py convert sidecar` reads them"
    return message + (
        '. Write one line {"file_name": "image.png", "text": "its caption"} per image into '
        f"{base / METADATA_NAMES[0]}, or train without captions with --caption_column none"
    )


def read_records(path, root, findings):
    """Yield (where, record) of a metadata file. Raises DatasetError naming the file where it cannot be read."""
    shown, number = _shown(path, root), 0
    if is_lfs_pointer(path):
        raise DatasetError(f"{shown} is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path, shown)
            return
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                if len(names := reader.fieldnames or ()) == 1 and set(names[0]) & set(";\t|"):
                    raise DatasetError(f"{shown} has one column, {names[0]!r}: save it again, separated by commas")
                for number, record in enumerate(reader, 1):
                    if None in record:
                        findings.error("too_many_fields", f"{shown} row {number}")
                    else:
                        yield f"{shown} row {number}", record
                return
            for number, line in enumerate(file, 1):
                if number == 1 and line.lstrip().startswith("["):
                    raise DatasetError(
                        f"{shown} is one JSON list: write one object on each line, without [ ] and commas"
                    )
                if line.strip() and (record := _json_record(line, f"{shown} line {number}", findings)) is not None:
                    yield f"{shown} line {number}", record
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{shown} is not UTF-8 (after line {number}: {error.reason}): save it again as UTF-8"
        ) from error
    except csv.Error as error:
        raise DatasetError(f"{shown} cannot be read after row {number}: {error}") from error
    except OSError as error:
        raise DatasetError(f"{shown} cannot be read: {error.strerror or error}") from error


def _json_record(line, where, findings):
    """The object of one line, or None and an error."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        findings.error("not_json", where, error)
        return None
    if isinstance(record, dict):
        return record
    findings.error("not_an_object", where)
    return None


def _parquet_records(path, shown):
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{shown} row {number}", record
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{shown} cannot be read: {error}") from error


def _check_columns(columns, image_column, caption_column, shown):
    """A column that no record has is a problem of the whole file. Raises DatasetError listing those there are."""
    there = ", ".join(columns) or "nothing"
    if columns and not any(name in columns for name in _file_name_columns(image_column)):
        raise DatasetError(
            f'{shown} names no images: it has {there}, and "file_name" is needed '
            "(or name the column with --image_column)"
        )
    if columns and caption_column not in columns:
        raise DatasetError(
            f"{shown} has no column {caption_column!r}, only {there}: "
            "name the captions' column with --caption_column, or add it"
        )


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


def _plain(name):
    return unicodedata.normalize("NFC", name).casefold()
