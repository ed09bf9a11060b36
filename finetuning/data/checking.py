"""What a training run would take of a dataset, and what it would refuse: every fault found before the first step."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from finetuning.data.pictures import UnreadablePicture, frames, open_rgb
from finetuning.data.reading import DatasetProblem, Findings, read_folder, read_hub
from finetuning.draws import python_random


@dataclass
class Checked:
    """Rows that can be trained on, rows held out (None: there are none), and what was found on the way."""

    rows: list
    held_out: list | None
    pictures: object  # the Hub dataset's column of pictures; None for a folder, whose rows have paths
    held_out_pictures: object
    findings: Findings = field(default_factory=Findings)


def read_checked(args, tokenizer, seed, validation_fraction=0.0, cache_dir=None):
    """Read a dataset (flags: training_set.DataArgs) and open every picture. Raises DatasetProblem if nothing is there.

    The held out rows are the folder's own validation split, else the share `validation_fraction` of the rows.
    """
    findings = Findings()
    rows, held_out, pictures, held_out_pictures = _read(args, findings, cache_dir)
    if held_out is None and validation_fraction:
        held_out, rows = _split_off(rows, validation_fraction, seed)
        held_out_pictures = pictures
        if held_out and not rows:
            raise DatasetProblem(f"no row is left to train on: {validation_fraction} of {len(held_out)} are held out")
    if args.max_train_samples is not None:
        if args.max_train_samples > len(rows):
            kind = "--max_train_samples above the number of rows (all are used)"
            findings.notes[kind].append(f"{args.max_train_samples} of {len(rows)}")
        rows = _sample(rows, args.max_train_samples, seed)  # before the pictures are opened: only these are needed

    rows = _without_unreadable(rows, pictures, args.check_pictures, findings)
    if held_out:
        held_out = _without_unreadable(held_out, held_out_pictures, args.check_pictures, findings)
    _note_cut_captions(rows, tokenizer, findings)
    return Checked(rows, held_out, pictures, held_out_pictures, findings)


def _read(args, findings, cache_dir):
    """(rows, validation rows or None, the Hub dataset's pictures or None, the same for validation)."""
    source = args.train_data_dir or args.dataset_name
    if Path(source).is_dir() and not _is_saved_dataset(Path(source)):
        columns = (args.image_column, args.caption_column, args.allow_outside_paths, findings)
        return read_folder(source, "train", *columns), read_folder(source, "validation", *columns), None, None

    splits = _load_splits(source, args.dataset_config_name, cache_dir)
    if "train" not in splits:
        raise DatasetProblem(f"{source} has no split named train, only {', '.join(splits)}")
    columns = (args.image_column, args.caption_column, findings)
    validation = splits.get("validation")
    return (
        read_hub(splits["train"], *columns),
        None if validation is None else read_hub(validation, *columns),
        splits["train"][args.image_column],
        None if validation is None else validation[args.image_column],
    )


def _load_splits(source, config_name, cache_dir):
    """{split: dataset} of a Hub name or of a folder that `datasets` wrote."""
    from datasets import DatasetDict, load_dataset, load_from_disk  # a slow import that a picture folder does not need

    try:
        if any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = load_from_disk(source)
            return loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return load_dataset(source, config_name, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError) as error:
        message = f"--dataset_name {source} with --dataset_config_name {config_name} cannot be loaded: {error}"
        raise DatasetProblem(message) from error


def _is_saved_dataset(folder):
    """Parquet or Arrow files with the pictures inside them, as `datasets` writes them."""
    return any(path.suffix in (".parquet", ".arrow") and path.stem != "metadata" for path in folder.rglob("*"))


def _without_unreadable(rows, pictures, depth, findings):
    """The rows whose picture opens; the others go into the findings. Decoding runs on all cores."""

    def trouble(row):
        try:
            if isinstance(row.picture, int):
                open_rgb(pictures[row.picture])
                return None
            if depth == "full":
                open_rgb(row.picture)
            return "animated" if frames(row.picture) > 1 else None
        except (UnreadablePicture, OSError, ValueError, SyntaxError) as error:  # `datasets` decodes for itself
            return f"{row.origin} ({error})"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        troubles = list(tqdm(pool.map(trouble, rows), total=len(rows), desc="checking pictures", leave=False, delay=2))
    kept = []
    for row, found in zip(rows, troubles, strict=True):
        if found == "animated":
            findings.notes["animated pictures (the first frame is used)"].append(row.origin)
        if found in (None, "animated"):
            kept.append(row)
        else:
            findings.faults["pictures that cannot be read"].append(found)
    return kept


def _note_cut_captions(rows, tokenizer, findings):
    """Captions longer than the text encoder reads; only their first tokens are trained on."""
    texts = [(row, text) for row in rows for text in row.captions]
    for start in range(0, len(texts), 1024):
        part = texts[start : start + 1024]
        lengths = map(len, tokenizer([text for _, text in part], verbose=False).input_ids)
        for (row, _), length in zip(part, lengths, strict=True):
            if length > tokenizer.model_max_length:
                kind = f"captions longer than {tokenizer.model_max_length} tokens (the end is not read)"
                findings.notes[kind].append(f"{row.origin}, {length} tokens")


def _split_off(rows, fraction, seed):
    pictures = list(dict.fromkeys(row.picture for row in rows))  # all rows of a picture go to the same side
    count = min(len(pictures), max(1, round(fraction * len(pictures))))
    chosen = {pictures[i] for i in _chosen(len(pictures), count, seed, "validation split")}
    return [row for row in rows if row.picture in chosen], [row for row in rows if row.picture not in chosen]


def _sample(rows, count, seed):
    return [rows[i] for i in sorted(_chosen(len(rows), min(count, len(rows)), seed, "sample"))]


def _chosen(total, count, seed, purpose):
    return python_random(seed, purpose).sample(range(total), count)
