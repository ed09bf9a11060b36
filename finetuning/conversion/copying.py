"""What every changed copy of a dataset has in common: read and accepted as training does, written whole or not at all.

Images that need no change are hard-linked. Columns of the metadata besides the caption are taken along, other files
are not.
"""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetuning.cli import REQUIRED, flag
from finetuning.conversion.writer import take_over
from finetuning.data.captions import origin_column
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.folders import SPLIT_NAMES, folder_problems, split_meant
from finetuning.data.reading import metadata_files, read_folder, read_records
from finetuning.files import overlap, write_json_lines


@dataclass
class CopyArgs:
    """Dataset"""

    path: str = flag(REQUIRED, "folder of a dataset that training reads; it is never changed", positional=True)
    output: str = flag(REQUIRED, "folder of the new dataset; it appears when all of it is written")
    image_column: str = flag("image", "metadata key of the image, besides file_name")
    caption_column: str = flag("text", "metadata key of the caption or list of captions")
    allow_outside_paths: bool = flag(False, "let metadata and links reach images outside PATH")
    on_bad_rows: str = flag("error", "what to do with rows that cannot be trained on", choices=("error", "skip"))
    link: bool = flag(True, "hard-link images that need no change; copy them where that cannot be or with --no-link")

    def problems(self):
        yield from folder_problems("PATH", self.path)
        if not self.output:
            return
        output = Path(self.output)
        if overlap(output, self.path):
            yield f"--output {self.output} and PATH lie inside one another: name a folder elsewhere"
        elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
            yield f"--output {self.output} is already there: name a new folder"


def read_splits(args: CopyArgs, findings):
    """{split: rows} of the splits that the folder has, as training reads them."""
    columns = (args.image_column, args.caption_column, args.allow_outside_paths, findings)
    splits = {split: read_folder(args.path, split, *columns) for split in SPLIT_NAMES}
    return {split: rows for split, rows in splits.items() if rows is not None}


def accept(splits, args: CopyArgs, findings, say):
    """Say what is left out and what is to be known. Raises DatasetError with all errors, as training does."""
    findings.refuse(args.path, args.on_bad_rows, say)
    if not splits["train"]:
        raise DatasetError(f"{args.path}: no row is left to train on")


@contextmanager
def new_folder(path):
    """A folder to fill: it gets the name `path` when the block ends well, and is removed when it does not.

    Raises DatasetError where the disk refuses.
    """
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()  # only an empty one can be
        os.rename(temporary, path)
    except OSError as error:
        raise DatasetError(f"{path} is not written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_names(rows, split, args: CopyArgs):
    """{image: its name in the copy's split}: with the source's subfolders, and no two that differ in case alone."""
    root, names, taken = Path(args.path), {}, set()
    for image in dict.fromkeys(row.image for row in rows):
        plain = name = _inside(image, root, split)
        number = 1
        while str(name).lower() in taken:  # some disks take such names for equal
            number += 1
            name = plain.with_stem(f"{plain.stem}~{number}")
        taken.add(str(name).lower())
        names[image] = name.as_posix()
    return names


def _inside(image, root, split):
    """The image's path in its split; its bare name where it stands outside the dataset."""
    if root not in image.parents:
        return Path(image.name)
    parts = image.relative_to(root).parts
    return Path(*(parts[1:] if len(parts) > 1 and split_meant(parts[0]) == split else parts))


def fill(folder, splits, names, args: CopyArgs, copies=()):
    """Link or copy the images of {split: rows} to their names {split: {image: name}}, and write each metadata.jsonl.

    copies  (name, row) of images that stand in train/ already

    The rows are sorted and keep their other columns. Empty captions are left out; the others stand as text, or as
    lists if any row has several: Hugging Face `datasets` refuses a mixture.
    """
    entries = {split: [(names[split][row.image], row) for row in rows] for split, rows in splits.items()}
    for split, pairs in entries.items():
        for name, image in {name: row.image for name, row in pairs}.items():
            (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
            take_over(image, folder / split / name, args.link)
    entries["train"] += copies
    others = _other_columns((row for pairs in entries.values() for _, row in pairs), args)
    several = any(len([*filter(None, row.captions)]) > 1 for pairs in entries.values() for _, row in pairs)
    said_of = lambda row: _said_of(row, others.get(row.origin, {}), several, args.caption_column)
    for split, pairs in entries.items():
        if pairs:
            records = ({"file_name": name} | said_of(row) for name, row in sorted(pairs, key=lambda pair: pair[0]))
            write_json_lines(folder / split / "metadata.jsonl", records)


def _said_of(row, others, several, column):
    """The captions of a row and its other columns; of captions that are left out the origins go too."""
    if column == "none":
        return others
    shape = lambda kept: kept if several else kept[0]
    record = {column: shape([*filter(None, row.captions)]), **others}
    origins = record.get(origin_column(column))
    if isinstance(origins, list):
        kept = [origin for origin, caption in zip(origins, row.captions, strict=False) if caption]
        record[origin_column(column)] = shape(kept) if len(origins) == len(row.captions) else None
    return record


def _other_columns(rows, args):
    """{origin of a row: what its metadata says besides file name and caption}, ready for JSON."""
    root, wanted = Path(args.path), {row.origin for row in rows}
    ours = {"file_name", f"{args.image_column}_file_name", args.image_column, args.caption_column}
    others = {
        where: {key: value for key, value in record.items() if key not in ours}
        for file in metadata_files(root)
        for where, record in read_records(file, root, Findings())
        if where in wanted and record.keys() - ours
    }
    return json.loads(json.dumps(others, default=str))  # a parquet file may hold dates
