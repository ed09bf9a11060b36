"""WebDataset shards: uncompressed tars in which files of one key are a sample, 000012.jpg and 000012.txt or .json.

Images stay where they are in the tars until they are read. A source is a shard, a folder of shards, or a pattern in
quotes: "laion/{00000..00012}.tar", "laion/*.tar".
"""

import glob
import json
import os
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from finetuning.cli import first_few, flag
from finetuning.data.findings import DatasetError
from finetuning.data.folders import ARCHIVES, SPLIT_OF, existing_folder, is_image_name, walk
from finetuning.data.samples import CaptionFileArgs, Member, Sample, caption_lines

CAPTION_FIELDS = ("txt", "caption", "json")
SHARD_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # the compressed ones to be refused


@dataclass
class WebDatasetArgs(CaptionFileArgs):
    """WebDataset"""

    image_field: str | None = flag(
        None, "the image has this name after the key, where samples have several (jpg, left.png)", was="picture_field"
    )
    caption_field: str | None = flag(None, f"the same for the caption (none: {', '.join(CAPTION_FIELDS)} in turn)")
    json_key: str = flag("caption", "key of the caption, or list of captions, in .json files")


def read_shards(path, args, findings):
    """The samples of every shard, in the tars' order. Shards are apart: two may have the same keys.

    Where one of the shards has train in its name or folder, such names are the splits.
    """
    shards = find_shards(path, args, findings)
    top = Path(os.path.commonpath([shard.parent for shard in shards] or [path]))
    splits = {shard: split_of(shard.relative_to(top)) for shard in shards}
    if "train" not in splits.values():
        splits = dict.fromkeys(shards)
    for shard in shards:
        if not splits[shard] and any(splits.values()):
            findings.warn("shard_without_split", shard)
        yield from read_shard(shard, args, findings, f"{shard.relative_to(top).with_suffix('')}/", splits[shard])


def find_shards(path, args, findings):
    """The shards that a file, a folder or a pattern ("laion/{00..12}.tar") means, sorted. Raises DatasetError."""
    if Path(path).is_dir():
        files = walk(Path(path), args.allow_outside_paths, findings)
        shards = [folder / name for folder, names in files for name in names if name.endswith(SHARD_ENDINGS)]
    elif Path(path).suffix.lower() in ARCHIVES:
        existing_folder(path)
    elif Path(path).is_file():
        shards = [Path(path)]
    else:
        found = {name: list(filter(os.path.isfile, glob.glob(name, recursive=True))) for name in _expanded(str(path))}
        if missing := [name for name, files in found.items() if not files]:
            raise DatasetError(f"there is no {first_few(missing)}")
        shards = {Path(file) for files in found.values() for file in files}
    if not shards and not findings.errors:
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
    """The split that a shard's folders or name say: val/000.tar, laion-train-000.tar; None where they say none."""
    words = re.split(r"[^a-z]+", str(shard.with_suffix("")).lower())
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)


def read_shard(shard, args, findings, label="", split=None):
    """Yield the Samples of one tar, in its order. Their names begin with `label`."""
    return samples_of(_groups(shard, findings), shard, args, findings, label, split)


def samples_of(groups, where, args, findings, label="", split=None):
    """Yield the Samples of {key: {what follows the key in a name: file}}, of a shard or a folder called `where`."""
    for key, fields in groups.items():
        for field in _image_fields(f"{where}/{key}", fields, args, findings):
            captions = _captions(f"{where}/{key}", field, fields, args, findings)
            if captions:
                name = f"{key}.{field}"
                yield Sample(f"{label}{name}", fields[field], captions, f"{where}/{name}", split)


def members(archive, findings):
    """Yield (name, Member) of each file in a tar, in its order. What cannot be read of it is an error."""
    length = archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as tar:
            while info := tar.next():
                tar.members.clear()  # or all entries of a large tar stay in memory
                if info.offset_data + info.size > length:
                    raise tarfile.ReadError(f"{info.name} is cut off")
                if info.isreg() and not info.issparse():
                    yield info.name, Member(archive, info.offset_data, info.size)
                elif not info.isdir():
                    findings.error("tar_link", f"{archive}/{info.name}")
            _check_end(tar)
    except tarfile.ReadError as error:
        if _is_compressed(archive):
            findings.error("compressed_tar", archive)
        else:
            findings.error("damaged_tar", archive, error)


def _check_end(tar):
    """`tarfile` stops without a word where a header is cut or broken. Raises ReadError."""
    tar.fileobj.seek(tar.offset)
    first = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without a tar's end mark: cut off, or not written to its end")
    if first.strip(b"\0") or any(part.strip(b"\0") for part in iter(partial(tar.fileobj.read, 1 << 20), b"")):
        raise tarfile.ReadError(f"something stands behind byte {tar.offset} that is no file: damaged, or joined tars")


def _is_compressed(path):
    magics = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
    with open(path, "rb") as file:
        return file.read(6).startswith(magics)


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
            findings.warn("no_ending", f"{shard}/{name}")
        elif field in groups[str(path.with_name(stem))]:
            findings.error("twice_in_shard", f"{shard}/{name}")
        else:
            groups[str(path.with_name(stem))][field] = member
    return groups


def _image_fields(where, fields, args, findings):
    """Which fields of a sample are its images. Several only where each has a caption of its own: keys with dots."""
    images = [field for field in fields if is_image_name(f"x.{field}")]
    if args.image_field:
        images = [field for field in images if field.lower() == args.image_field.lower()]
    if not images:
        findings.error("sample_without_image", where, f"it has {', '.join(fields)}")
    own = [_own_caption(field, fields, args) for field in images]
    if len(images) > 1 and (None in own or len(set(own)) < len(own)):
        findings.error("several_images", where, ", ".join(images))
        return []
    return images


def _caption_fields(args):
    return (args.caption_field,) if args.caption_field else CAPTION_FIELDS


def _own_caption(image, fields, args):
    """The field of the caption that has the image's very name: 1.txt of 1.jpg, and txt of jpg."""
    stem = image.rpartition(".")[0]
    return next((one for end in _caption_fields(args) if (one := f"{stem}.{end}".strip(".")) in fields), None)


def _captions(where, image, fields, args, findings):
    """The captions of an image; none, and an error, where there are none to be had."""
    field = _own_caption(image, fields, args) or next((end for end in _caption_fields(args) if end in fields), None)
    if field is None:
        findings.error("sample_without_caption", where, f"it has {', '.join(fields)}")
        return ()
    where, content = f"{where}.{field}", fields[field].read_bytes()
    try:
        if field.endswith("json"):
            captions = _json_captions(json.loads(content), args.json_key)
        else:
            captions = caption_lines(content, args.caption_lines, where, findings)
    except UnicodeDecodeError:
        findings.error("caption_not_utf8", where)
        return ()
    except (ValueError, RecursionError) as error:
        findings.error("no_json_text", where, error, key=args.json_key)
        return ()
    if not captions:
        findings.error("no_caption", where)
    return captions


def _json_captions(record, key):
    """Raises ValueError saying what there is instead."""
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"it has {', '.join(record)}" if isinstance(record, dict) else f"it is {record!r:.40}")
    texts = record[key] if isinstance(record[key], list) else [record[key]]
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"it has {record[key]!r:.40}")
    return tuple(text.strip() for text in texts if text and text.strip())
