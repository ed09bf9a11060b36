"""A Hub dataset by name, or a folder that Hugging Face `datasets` wrote: images inside Parquet or Arrow files.

The images are taken with the bytes they were encoded in. The table is mapped into memory, not read into it, so a
large dataset costs disk in the cache of `datasets` (HF_HOME says where) but little memory.
"""

from dataclasses import dataclass
from pathlib import Path

from finetuning.cli import flag
from finetuning.data.checking import load_splits
from finetuning.data.findings import DatasetError, counted
from finetuning.data.folders import is_saved_dataset, split_meant
from finetuning.data.reading import read_hub
from finetuning.data.samples import Cell, Sample


@dataclass
class HubArgs:
    """Hub dataset"""

    dataset_config_name: str | None = flag(None, "configuration (subset) of the dataset, where it has several")


def read(path, args, findings):
    """The rows of every split, in their order. A dataset of one split is undivided, whatever that split is called."""
    from datasets import Image, config  # a slow import that other sources do not need
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(path).is_dir() and not is_saved_dataset(Path(path)):
        raise DatasetError(f"{path} holds no Parquet or Arrow files: convert `imagefolder` reads image folders")
    splits = load_splits(path, args.dataset_config_name)
    folders = [config.HF_DATASETS_CACHE, HF_HUB_CACHE, *([path] if Path(path).is_dir() else [])]
    folders = () if args.allow_outside_paths else tuple(Path(folder).resolve() for folder in folders)
    for split, dataset in splits.items():
        meaning = split_meant(split)
        if len(splits) > 1 and not meaning:
            findings.error("unknown_split", split, counted(len(dataset), "row"))
            continue
        rows = read_hub(dataset, args.image_column, args.caption_column, findings, split)
        column = dataset.select_columns(args.image_column).cast_column(args.image_column, Image(decode=False))
        column = column[args.image_column]
        meaning = meaning if len(splits) > 1 else None
        for row in rows:
            image = Cell(column, row.image, folders)
            yield Sample(f"{split}/{row.image:08}", image, row.captions, row.origin, meaning)
