"""WebDataset shards: uncompressed tars in which files of one key are a sample, 000012.jpg and 000012.txt or .json.

PATH is a shard, a folder of shards, or a pattern in quotes: "laion/{00000..00012}.tar", "laion/*.tar". Images stay
where they are in the tars until they are written. Where one of the shards has train in its name or folder, such names
are the splits.
"""

import glob
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetuning.cli import flag
from finetuning.data.images import EXTENSIONS
from finetuning.data.reading import DatasetError
from finetuning.data.samples import SPLIT_OF, CaptionFileArgs, Sample, caption_lines, members, walk

CAPTION_FIELDS = ("txt", "caption", "json")
SHARD_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # the compressed ones to be refused


@dataclass
class WebDatasetArgs(CaptionFileArgs):
    """WebDataset"""

    image_field: str | None = flag(
        None, "take the image of this name after the key, where samples have several (jpg, left.png)"
    )
    caption_field: str | None = flag(
        None, f"take the caption from the file of this name after the key (none: {', '.join(CAPTION_FIELDS)} in turn)"
    )
    json_key: str = flag("caption", "key of the caption, or list of captions, in .json files")


def read(path, args, findings):
    """The samples of every shard, in the tars' order. Shards are apart: two may have the same keys."""
    shards = find_shards(path, args, findings)
    top = Path(os.path.commonpath([shard.parent for shard in shards] or [path]))
    splits = {shard: split_of(shard.relative_to(top)) for shard in shards}
    if "train" not in splits.values():
        splits = dict.fromkeys(shards)
    elif unnamed := [str(shard) for shard in shards if not splits[shard]]:
        findings.notes["shards whose name says no split, divided by content"] += unnamed
    for shard in shards:
        label = shard.relative_to(top).with_suffix("")
        for key, fields in _groups(shard, findings).items():
            for field in _image_fields(f"{shard}/{key}", fields, args, findings):
                captions = _captions(f"{shard}/{key}", field, fields, args, findings)
                if captions:
                    name = f"{key}.{field}"
                    yield Sample(f"{label}/{name}", fields[field], captions, f"{shard}/{name}", splits[shard])


def find_shards(path, args, findings):
    """The shards that PATH means, sorted. Raises DatasetError."""
    if Path(path).is_dir():
        files = walk(Path(path), args.allow_outside_paths, findings)
        shards = [folder / name for folder, names in files for name in names if name.endswith(SHARD_ENDINGS)]
    elif Path(path).is_file():
        shards = [Path(path)]
    else:
        found = {name: list(filter(os.path.isfile, glob.glob(name, recursive=True))) for name in _expanded(str(path))}
        if missing := [name for name, files in found.items() if not files]:
            more = f", and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise DatasetError(f"there is no {', '.join(missing[:5])}{more}")
        shards = {Path(file) for files in found.values() for file in files}
    if not shards and not findings.faults:
        raise DatasetError(f"there are no shards (.tar) in {path}")
    return sorted(shards)


def _expanded(pattern):
    """`a/{00..02}.tar` and `a/{x,y}.tar` as a shell would expand them."""
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
        width = max(len(first), len(last)) if padded else 1
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    elif numbers := re.search(r"\{([^{}]*,[^{}]*)\}", pattern):
        words = numbers[1].split(",")
    else:
        return [pattern]
    return [one for word in words for one in _expanded(f"{pattern[: numbers.start()]}{word}{pattern[numbers.end() :]}")]


def split_of(shard):
    """The split that a shard's folders or name say: val/000.tar, laion-train-000.tar."""
    words = re.split(r"[^a-z]+", str(shard.with_suffix("")).lower())
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)


def _groups(shard, findings):
    """{key: {field: Member}} of a shard; a key ends at the first dot of the file's name, as WebDataset has it."""
    groups = defaultdict(dict)
    for name, member in members(shard, findings):
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts):
            continue
        path = path.with_suffix(path.suffix.lower())
        stem, _, field = path.name.partition(".")
        if not field:
            findings.notes["files that belong to no sample (no ending)"].append(f"{shard}/{name}")
        elif field in groups[str(path.with_name(stem))]:
            findings.faults["files that stand twice in a shard (the first is taken)"].append(f"{shard}/{name}")
        else:
            groups[str(path.with_name(stem))][field] = member
    return groups


def _image_fields(where, fields, args, findings):
    """Which fields of a sample are its images. Several only where each has a caption of its own: keys with dots."""
    images = [field for field in fields if f".{field}".endswith(tuple(EXTENSIONS))]
    if args.image_field:
        images = [field for field in images if field.lower() == args.image_field.lower()]
    if not images:
        findings.faults["samples without an image"].append(f"{where} has {', '.join(fields)}")
    own = [_own_caption(field, fields, args) for field in images]
    if len(images) > 1 and (None in own or len(set(own)) < len(own)):
        kind = "samples with several images (say which with --image_field)"
        findings.faults[kind].append(f"{where} has {', '.join(images)}")
        return []
    return images


def _caption_fields(args):
    return (args.caption_field,) if args.caption_field else CAPTION_FIELDS


def _own_caption(image, fields, args):
    """The field of the caption that has the image's very name: 1.txt of 1.jpg, and txt of jpg."""
    stem = image.rpartition(".")[0]
    return next((one for end in _caption_fields(args) if (one := f"{stem}.{end}".strip(".")) in fields), None)


def _captions(where, image, fields, args, findings):
    """The captions of an image; none, and a fault, where there are none to be had."""
    field = _own_caption(image, fields, args) or next((end for end in _caption_fields(args) if end in fields), None)
    if field is None:
        findings.faults["samples without a caption (--caption_field)"].append(f"{where} has {', '.join(fields)}")
        return ()
    member = fields[field]
    try:
        if field.endswith("json"):
            captions = _json_captions(json.loads(member.read()), args.json_key)
        else:
            captions = caption_lines(member.read(), args.caption_lines)
    except UnicodeDecodeError:
        findings.faults["captions that are not UTF-8 (pack them again as UTF-8)"].append(f"{where}.{field}")
        return ()
    except (ValueError, RecursionError) as error:
        kind = f"JSON files that have no text under {args.json_key!r} (--json_key)"
        findings.faults[kind].append(f"{where}.{field}: {error}")
        return ()
    if not captions:
        findings.faults["samples with an empty caption"].append(f"{where}.{field}")
    return captions


def _json_captions(record, key):
    """Raises ValueError saying what there is instead."""
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"it has {', '.join(record)}" if isinstance(record, dict) else f"it is {record!r:.40}")
    texts = record[key] if isinstance(record[key], list) else [record[key]]
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"it has {record[key]!r:.40}")
    return tuple(text.strip() for text in texts if text and text.strip())
