"""The parts of a dataset that is read as it comes: WebDataset tars, Parquet files, or those of a Hub dataset."""

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from finetuning.data.findings import DatasetError, Findings, counted
from finetuning.data.folders import walk
from finetuning.data.reading import as_captions, needed_columns, no_images, refuse_no_images
from finetuning.data.samples import Cell, Sample
from finetuning.data.tars import SHARD_ENDINGS, WebDatasetArgs, find_shards, read_shard, split_of

ROWS_TOGETHER = 64  # of a Parquet file, with their images, in memory at the same time
HASHED_BYTES = 1 << 16  # of a shard's beginning, and of its end: reading all of a large stream would take hours


class Shards:
    """The parts of a stream. `reader(number, findings)` yields the Samples of one, in an order that never changes.

    `files`: the shards' paths, where they are files of this machine.
    """

    def __init__(self, source, names, reader: Callable, on_bad_rows="error", files=()):
        self.source, self.names, self.reader, self.files = source, names, reader, files
        self.skips = on_bad_rows == "skip"
        self.lengths = {}  # {number: samples} of those that were read to their end
        self.reported, self.left_out = set(), 0

    def __len__(self):
        return len(self.names)

    def read(self, number):
        """Yield a shard's samples. Raises DatasetError at its end where some have errors, or --on_bad_rows skip."""
        findings, count = Findings(), 0
        for sample in self.reader(number, findings):
            count += 1
            yield sample
        self.lengths[number] = count
        self.tell(findings)

    def tell(self, findings):
        """Name and count what is left out, once. Raises DatasetError unless --on_bad_rows skip."""
        new = Findings()
        for known, found in ((findings.errors, new.errors), (findings.warnings, new.warnings)):
            for code, finding in ((code, finding) for code, examples in known.items() for finding in examples):
                if (code, finding) not in self.reported:
                    self.reported.add((code, finding))
                    found[code].append(finding)
        self.left_out += new.count()
        if new.errors and not self.skips:
            fix = "correct them, or --on_bad_rows skip; --resume_from_checkpoint latest goes on"
            raise DatasetError(f"the stream has {counted(new.count(), 'error')} here:\n{new.report()}\n  {fix}")
        if report := new.report():  # from every process: each reads other shards
            tqdm.write(f"stream, {self.left_out} left out so far:\n{report}", file=sys.stderr)

    def fingerprint(self):
        """A hash of the shards' names and, of files, their sizes, beginnings and ends."""
        digest = hashlib.sha256(repr(self.names).encode())
        for path in self.files:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(str(size).encode())
                for start in (0, max(0, size - HASHED_BYTES)):
                    file.seek(start)
                    digest.update(file.read(HASHED_BYTES))
        return digest.hexdigest()


def open_shards(args, say=print, cache_dir=None):
    """The Shards that --train_data_dir or --dataset_name mean, those for validation and tests left out."""
    source = args.train_data_dir or args.dataset_name
    if args.train_data_dir or Path(source).exists():
        return _file_shards(source, args, say)
    return _hub_shards(source, args, say, cache_dir)


def _file_shards(source, args, say):
    findings = Findings()
    files = _files(source, args, findings)
    top = os.path.commonpath([file.parent for file in files])
    training = [file for file in files if split_of(file.relative_to(top)) in ("train", None)]
    if others := len(files) - len(training) if training else 0:
        say(f"--streaming: {others} shards whose names say validation or test are left out")
    training = training or files  # all that were named are of one split, whatever it is called
    names = [str(file.relative_to(top)) for file in training]
    folders = () if args.allow_outside_paths else (Path(top).resolve(),)
    tar_args = _tar_args(args)
    if args.caption_column == "none" and any(file.suffix != ".parquet" for file in training):
        fix = "--proportion_empty_prompts 1 drops all captions"
        raise DatasetError(f"--caption_column none does not go with WebDataset tars: {fix}")

    def reader(number, findings):
        file = training[number]
        if file.suffix == ".parquet":
            return _read_parquet(file, args, folders, findings)
        return read_shard(file, tar_args, findings)

    shards = Shards(source, names, reader, args.on_bad_rows, training)
    shards.tell(findings)
    return shards


def _files(source, args, findings):
    if not Path(source).is_dir():
        return find_shards(source, args, findings)
    endings = (*SHARD_ENDINGS, ".parquet")
    found = [
        folder / name for folder, names in walk(Path(source), args.allow_outside_paths, findings) for name in names
    ]
    tars = {file.with_suffix("") for file in found if file.name.endswith(SHARD_ENDINGS)}
    # img2dataset lays a table of its own beside each tar: 00000.tar, 00000.parquet
    files = [file for file in found if file.suffix != ".parquet" or file.with_suffix("") not in tars]
    files = sorted(file for file in files if file.name.endswith(endings) and file.stem != "metadata")
    if not files:
        fix = "images with metadata.jsonl and Arrow files need little memory as they are: leave --streaming out"
        raise DatasetError(f"--streaming reads WebDataset tars and Parquet files, and {source} has none: {fix}")
    return files


def _tar_args(args):
    """--image_column png and --caption_column txt or json.KEY name files of a sample; the defaults: what is there."""
    found = {}
    if args.image_column != "image":
        found["image_field"] = args.image_column
    if args.caption_column != "text":
        found["caption_field"], _, key = args.caption_column.partition(".")
        found |= {"json_key": key} if key else {}
    return WebDatasetArgs(**found)


def _read_parquet(file, args, folders, findings):
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = needed_columns(args.image_column, args.caption_column, table.schema_arrow.names, file)
            kind, types = table.schema_arrow.field(args.image_column).type, pyarrow.types
            if not (types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)):
                raise no_images(file, args.image_column, kind)
            batches = table.iter_batches(ROWS_TOGETHER, columns=columns)
            records = (record for batch in batches for record in batch.to_pylist())
            yield from _samples(records, file, args, partial(_local_image, folders), findings)
    except (pyarrow.ArrowException, OSError) as error:
        findings.error("damaged_parquet", file, error)


def _hub_shards(source, args, say, cache_dir):
    from datasets import Image, load_dataset  # a slow import that files do not need
    from datasets.exceptions import DatasetsError

    errors = (OSError, ValueError, RuntimeError, DatasetsError)
    try:
        splits = load_dataset(source, args.dataset_config_name, cache_dir=cache_dir, streaming=True)
    except errors as error:
        config_name = f"--dataset_config_name {args.dataset_config_name}"
        raise DatasetError(f"--dataset_name {source} with {config_name} cannot be read: {error}") from error
    if "train" not in splits:
        raise DatasetError(f"{source} has no split named train, only {', '.join(splits)}")
    if len(splits) > 1:
        say(f"--streaming: of {source} only the split train is read, not {', '.join(sorted({*splits} - {'train'}))}")
    dataset = splits["train"]
    features = dataset.features or {}
    columns = needed_columns(args.image_column, args.caption_column, list(features), source)
    refuse_no_images(features, args.image_column, source)
    dataset = dataset.select_columns(columns).cast_column(args.image_column, Image(decode=False))
    count = dataset.num_shards

    def reader(number, findings):
        shard = f"{source} shard {number}"

        def records():
            try:
                yield from dataset.shard(num_shards=count, index=number)
            except errors as error:
                advice = "--resume_from_checkpoint latest goes on from the last checkpoint"
                raise DatasetError(f"{shard} cannot be read on: {error}; {advice}") from error

        return _samples(records(), shard, args, partial(_hub_image, source, args.allow_outside_paths), findings)

    names = [f"{source} {args.dataset_config_name} shard {number} of {count}" for number in range(count)]
    return Shards(source, names, reader, args.on_bad_rows)


def _samples(records, where, args, image_of, findings):
    """Samples of a table's rows; those without a caption go into the findings."""
    for number, record in enumerate(records):
        origin = f"{where} row {number}"
        captions = ("",)
        if args.caption_column != "none":
            captions = as_captions(record[args.caption_column], origin, args.caption_column)
        if captions:
            yield Sample(origin, image_of(record[args.image_column]), captions, origin)
        else:
            findings.error("no_caption", origin)


def _local_image(folders, value):
    return Cell([{"bytes": value} if isinstance(value, bytes) else value], 0, folders)


@dataclass(frozen=True)
class Remote:
    """An image that is a file of its own in a Hub dataset, or in an archive there; read when its turn comes."""

    url: str  # as fsspec takes it: "hf://datasets/NAME@REVISION/7.jpg", "zip://7.jpg::hf://..."

    def read_bytes(self):
        import fsspec

        with fsspec.open(self.url, "rb") as file:
            return file.read()


def _hub_image(source, anywhere, value):
    """What has read_bytes(): a row's own bytes or a file of the same dataset; with `anywhere` any file."""
    url = "" if not value or value.get("bytes") else value.get("path") or ""
    own = tuple(f"hf://datasets/{source}{end}" for end in "@/")
    if "://" in url and (anywhere or url.split("::")[-1].startswith(own)):
        return Remote(url)
    return Cell([value], 0, () if anywhere else (Path(os.devnull),))  # a streamed dataset has no files on this machine
