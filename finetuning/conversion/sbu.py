"""SBU Captions, in the ways that people keep it:

    SBU_captioned_photo_dataset_urls.txt and _captions.txt      a line each (torchvision.datasets.SBU)
    sbu-captions-all.json       {"image_urls": [...], "captions": [...]}
    sbu.json                    [{"image": ..., "url": ..., "caption": ...}, ...] (LAVIS)
    00000/000000000.jpg, .txt, .json      what img2dataset fetched, with --output_format files

The first three name images by address; an image's file has the last part of the address for its name.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

from finetuning.conversion.download import arrived, place, read_json
from finetuning.data.findings import DatasetError
from finetuning.data.folders import is_image_name, walk
from finetuning.data.samples import Sample
from finetuning.data.tars import WebDatasetArgs, samples_of

URLS, CAPTIONS = "SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt"
JSON_NAMES = ("sbu-captions-all.json", "sbu.json")


def read(path, args, findings):
    """Each image once with all of its captions, in the order of the file. Raises DatasetError."""
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"there is no {path}")
    lists = _lists(path)
    if len(lists) > 1:
        raise DatasetError(f"{path} holds {' and '.join(file.name for file in lists)}: name the file that counts")
    if not lists:
        yield from _shards(path, args, findings)
        return
    (listed,) = lists
    rows = _line_pairs(listed, findings) if listed.suffix == ".txt" else _json(listed)
    images = Path(args.images) if args.images else listed.parent
    photos = _photos(rows, findings)
    yield from arrived(_placed(photos, images, args, findings), args, findings)


def _lists(path):
    """The files of rows that a path means."""
    if path.is_file():
        return [path.with_name(URLS) if path.name == CAPTIONS else path]
    places = [folder / name for folder in (path, path / "dataset") for name in (URLS, *JSON_NAMES)]
    return [file for file in places if file.is_file()]


def _line_pairs(urls, findings):
    """Yield (where, url, caption, None) of two files that belong together line by line."""
    captions = urls.with_name(urls.name.replace("urls", "captions"))
    if captions == urls or not captions.is_file():
        raise DatasetError(f"{urls} needs {CAPTIONS} beside it, a line for each of its own")
    url_lines, caption_lines = _lines(urls), _lines(captions)
    if len(url_lines) != len(caption_lines):
        counts = f"{urls.name} has {len(url_lines)} lines and {captions.name} {len(caption_lines)}"
        raise DatasetError(f"{counts}, so that no one knows which belong together: fetch both again")
    for number, (url, caption) in enumerate(zip(url_lines, caption_lines, strict=True), 1):
        where = f"{urls.name} line {number}"
        try:
            yield where, url.decode(), caption.decode(), None
        except UnicodeDecodeError:
            findings.error("lines_not_utf8", where)


def _lines(path):
    """Split at line feeds alone, since the two files are matched by number. Bytes."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _json(path):
    """Yield (where, url, caption, name of the file or None)."""
    content = read_json(path)
    if isinstance(content, dict):
        urls, captions = content.get("image_urls"), content.get("captions")
        if not (isinstance(urls, list) and isinstance(captions, list) and len(urls) == len(captions)):
            raise DatasetError(f"{path} must hold image_urls and captions, lists of one length")
        rows = ((url, caption, None) for url, caption in zip(urls, captions, strict=True))
    elif isinstance(content, list) and all(isinstance(record, dict) for record in content):
        rows = ((record.get("url"), record.get("caption"), record.get("image")) for record in content)
    else:
        raise DatasetError(f"{path} must hold image_urls and captions, or a list of records {{image, url, caption}}")
    for number, row in enumerate(rows, 1):
        yield f"{path.name} record {number}", *row


def _photos(rows, findings):
    """{address, or name: (url or None, name, where, captions)}."""
    photos = {}
    for where, url, caption, name in rows:
        url, caption, name = (value.strip() if isinstance(value, str) else "" for value in (url, caption, name))
        if not (url or name):
            findings.error("no_address", where)
            continue
        if not caption:
            findings.error("no_caption", where)
            continue
        if (url or name) in photos:
            findings.warn("address_twice", where)
        *_, captions = photos.setdefault(url or name, (url or None, name or file_name(url), where, {}))
        captions[caption] = None  # each once
    return photos


def _placed(photos, images, args, findings):
    """Yield (sample, url); two addresses that end alike get files of their own."""
    sharing = Counter(name.lower() for _, name, _, _ in photos.values())  # disks may take such names for equal
    for address, (url, plain, where, captions) in photos.items():
        name = plain
        if sharing[plain.lower()] > 1:
            path = Path(plain)
            name = str(path.with_name(f"{path.stem}~{_hash(address)}{path.suffix}"))
        image = place(images, name)
        if image is None:
            findings.error("outside", where, name)
        elif name != plain and not args.download and not image.is_file() and (images / plain).is_file():
            findings.error("ambiguous_address", where, plain)
        else:
            yield Sample(name, image, tuple(captions), where), url


def file_name(url):
    """The last part of an address, fit for a file: "http://host/2723/43850_b0f29.jpg?zz=1" -> "43850_b0f29.jpg"."""
    last = re.split(r"[?#]", url)[0].rsplit("/", 1)[-1]
    last = re.sub(r"[^\w.~-]", "_", last, flags=re.ASCII).lstrip(".")
    ending = Path(last).suffix if is_image_name(last) else ""
    stem = last.removesuffix(ending)
    return f"{stem if 0 < len(stem) <= 150 else _hash(url)}{ending or '.jpg'}"


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _shards(root, args, findings):
    """The folders of img2dataset, which hold what its tars hold."""
    shards = count = 0
    for folder, names in walk(root, args.allow_outside_paths, findings):
        if folder.parent != root or not re.fullmatch(r"\d+", folder.name):
            continue
        shards += 1
        groups = defaultdict(dict)
        for file in (folder / name for name in names):
            if is_image_name(file) or file.suffix in (".json", ".txt"):
                groups[file.stem][file.suffix[1:]] = file
        fetched = {key: files for key, files in groups.items() if _is_fetched(f"{folder.name}/{key}", files, findings)}
        for sample in samples_of(fetched, folder.name, WebDatasetArgs(), findings, f"{folder.name}/"):
            yield sample
            count += 1
            if count == args.limit:
                return
    if not shards and not findings.errors:
        raise DatasetError(
            f"{root} holds none of what SBU comes as: {URLS} with {CAPTIONS}, {' or '.join(JSON_NAMES)}, or folders "
            "00000, 00001, ... of img2dataset (its .tar files are read by `convert webdataset`)"
        )


def _is_fetched(where, files, findings):
    """Whether img2dataset says that it has the image; what it says else is an error."""
    try:
        record = json.loads(files["json"].read_text(encoding="utf-8")) if "json" in files else {}
        status = record.get("status", "success")
    except (ValueError, AttributeError) as error:
        findings.error("no_json_text", where, error, key="caption")
        return False
    if status != "success":
        findings.error("not_fetched_before", where, record.get("error_message") or status)
    return status == "success"
