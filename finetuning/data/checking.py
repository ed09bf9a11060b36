"""What a training run would take of a dataset, and what it would refuse: every error found before the first step."""

from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from finetuning.data.buckets import sort_into_buckets
from finetuning.data.captions import may_mirror, with_prefix
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.folders import STATE_FILES, is_saved_dataset, split_meant
from finetuning.data.images import open_rgb, remarks, size_in_header
from finetuning.data.reading import read_folder, read_hub, read_split
from finetuning.data.rows import TOGETHER, Rows
from finetuning.data.threads import in_order
from finetuning.rng import python_random


@dataclass
class Checked:
    """Rows that can be trained on, rows held out (None: there are none), and what was found on the way."""

    rows: Rows
    held_out: Rows | None
    sizes: list  # (height, width) that each row is trained at
    held_out_sizes: list
    images: object  # the Hub dataset's column of images; None for a folder, whose rows have paths
    held_out_images: object
    findings: Findings


def read_checked(args, tokenizers, seed, validation_fraction=0.0, cache_dir=None):
    """Read a dataset (flags: DataArgs, CaptionArgs, BucketArgs) and open every image, unless --check_images none.

    The held out rows are the folder's own validation split, else the share `validation_fraction` of the rows. Raises
    DatasetError if nothing is there.

    tokenizers   whose limits the captions are counted against
    """
    findings = Findings()
    rows, held_out, images, held_out_images = _read(args, findings, cache_dir)
    if held_out is None and validation_fraction:
        held_out, rows = _split_off(rows, validation_fraction, seed)
        held_out_images = images
        if held_out and not rows:
            raise DatasetError(f"no row is left to train on: {validation_fraction} of {len(held_out)} are held out")
    if args.max_train_samples is not None:
        if args.max_train_samples > len(rows):
            findings.warn("max_train_samples", f"{args.max_train_samples} of {len(rows)}")
        count = min(args.max_train_samples, len(rows))  # before the images are opened: only these are needed
        rows = rows.take(sorted(python_random(seed, "sample").sample(range(len(rows)), count)))

    if args.prior_data_dir:
        of_prior = Findings()
        prior = read_split(args.prior_data_dir, None, "train", args.caption_column, of_prior)
        findings.take(of_prior, args.prior_data_dir)
        rows = rows.with_prior(prior, args.prior_data_dir)
    rows, sizes = _readable(rows, images, args, findings)
    rows, sizes = sort_into_buckets(args, rows, sizes, findings)
    held_out_sizes = []
    if held_out:
        held_out, held_out_sizes = _readable(held_out, held_out_images, args, findings)
        errors_only = Findings(findings.errors)  # the warnings are about the images that are trained on
        held_out, held_out_sizes = sort_into_buckets(args, held_out, held_out_sizes, errors_only)
    _note_cut_captions(rows, tokenizers, args, findings)
    _note_sides(rows, args, findings)
    return Checked(rows, held_out, sizes, held_out_sizes, images, held_out_images, findings)


def _read(args, findings, cache_dir):
    """(rows, validation rows or None, the Hub dataset's images or None, the same for validation)."""
    source = args.train_data_dir or args.dataset_name
    if Path(source).is_dir() and not is_saved_dataset(Path(source)):
        columns = (args.image_column, args.caption_column, args.allow_outside_paths, findings)
        return read_folder(source, "train", *columns), read_folder(source, "validation", *columns), None, None

    splits = load_splits(source, args.dataset_config_name, cache_dir)
    named = {}
    for name in sorted(splits, key=lambda name: name in ("train", "validation")):  # the plain names count most
        named[split_meant(name) or name] = splits[name]
    splits = named
    if "train" not in splits:
        raise DatasetError(f"{source} has no split named train, only {', '.join(splits)}")
    columns = (args.image_column, args.caption_column, findings)
    validation = splits.get("validation")
    return (
        read_hub(splits["train"], *columns),
        None if validation is None else read_hub(validation, *columns),
        splits["train"][args.image_column],
        None if validation is None else validation[args.image_column],
    )


def load_splits(source, config_name=None, cache_dir=None):
    """{split: dataset} of a Hub name or of a folder that `datasets` wrote. Raises DatasetError."""
    from datasets import DatasetDict, load_dataset, load_from_disk  # a slow import that an image folder does not need
    from datasets.exceptions import DatasetsError

    try:
        if any((Path(source) / name).is_file() for name in STATE_FILES):
            loaded = load_from_disk(source)
            return loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return load_dataset(source, config_name, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        message = f"{source} with --dataset_config_name {config_name} cannot be loaded: {error}"
        raise DatasetError(message) from error


def _readable(rows, images, args, findings):
    """(rows whose image opens, their sizes); the others go into the findings. Decoding runs on all cores."""
    if args.check_images == "none":
        return rows, [args.size] * len(rows)

    def look(row):
        """((height, width), [codes of warnings])."""
        if isinstance(row.image, int):
            return open_rgb(images[row.image]).size[::-1], []
        size = open_rgb(row.image).size[::-1] if args.check_images == "full" else size_in_header(row.image)
        return size, remarks(row.image)

    kept, sizes, equal = [], [], {}
    errors = (OSError, ValueError, SyntaxError)  # `datasets` decodes for itself
    looked = in_order(look, rows, errors=errors, window=1000)  # headers are read faster than a thread gets its turn
    looked = tqdm(looked, "checking images", len(rows), leave=False, delay=2)
    for number, (row, result) in enumerate(looked):
        if isinstance(result, Exception):
            findings.error("unreadable_image", row.origin, result)
            continue
        size, codes = result
        for code in codes:
            findings.warn(code, row.origin)
        kept.append(number)
        sizes.append(equal.setdefault(size, size))
    return rows.take(kept), sizes


def _note_cut_captions(rows, tokenizers, args, findings):
    """Captions longer than a text encoder reads; only their first tokens are trained on. Each is named once."""
    if args.check_images == "none":
        findings.warn("uncounted_captions", "--check_images none")
        return
    named = set()
    for tokenizer in tokenizers:
        limit, prefix = tokenizer.model_max_length, args.caption_prefix
        marks = len(tokenizer("").input_ids)  # begin and end
        for start in range(0, len(rows), TOGETHER):
            some = rows[start : start + TOGETHER]
            texts = [(row.origin, with_prefix(text, prefix)) for row in some for text in row.captions]
            # A token is at least a byte: most captions need not be taken apart to know that they fit
            long = [one for one in texts if len(one[1].encode()) + marks > limit and one not in named]
            lengths = map(len, tokenizer([text for _, text in long], verbose=False).input_ids) if long else ()
            for (origin, text), length in zip(long, lengths, strict=True):
                if length > limit:
                    findings.warn("cut_caption", origin, f"{length} tokens", limit=limit)
                    named.add((origin, text))


def _note_sides(rows, args, findings):
    """Rows that --random_flip passes over."""
    if args.random_flip and args.flip_captions == "skip":
        for row in rows:
            if not may_mirror(row.captions, "skip"):
                findings.warn("says_a_side", row.origin)


def _split_off(rows, fraction, seed):
    """(held out rows, the others); all rows of an image go to the same side."""
    images = rows.images()
    different = list(dict.fromkeys(images))
    count = min(len(different), max(1, round(fraction * len(different))))
    chosen = {different[i] for i in python_random(seed, "validation split").sample(range(len(different)), count)}
    held_out = [number for number, image in enumerate(images) if image in chosen]
    return rows.take(held_out), rows.take([number for number, image in enumerate(images) if image not in chosen])
