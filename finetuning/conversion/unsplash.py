"""The Unsplash Lite dataset: photos.tsv000 and keywords.tsv000 (or .csv000, ...), images by photo_id.

Also the manifest.json that scrapers of the Unsplash API leave beside their images.
"""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from urllib.parse import parse_qsl, urlencode

from finetuning.cli import flag
from finetuning.conversion.download import arrived, place, read_json
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.folders import existing_folder, is_image_name, walk
from finetuning.data.samples import Sample

COLUMNS = {"description": "photo_description", "ai_description": "ai_description"}
MANIFEST_KEYS = {"description": "description", "ai_description": "alt_description", "query": "query"}
PHOTO_ID = re.compile(r"[\w-]+", re.ASCII)
WEBSITE_NAME = re.compile(r".+-(?P<id>[\w-]{11})-unsplash", re.ASCII)  # as the website's download button names it


@dataclass
class UnsplashArgs:
    """Unsplash"""

    caption_from: list[str] = flag(
        ["ai_description"], "what says what is on a photo; of several, the first that it has. query is a manifest's "
        "search; none leaves an empty text, for caption_images.py to fill",
        choices=("ai_description", "description", "keywords", "query", "none"),
    )  # fmt: skip
    keyword_confidence: float = flag(
        50.0, "leave out keywords of which the AI was less sure than this; a person's stay", min=0, max=100
    )
    keyword_count: int = flag(10, "at most so many keywords for a photo, the surest first", min=1)
    download_side: int = flag(1024, "shorter side of photos fetched by the tables, in pixels (0: as they are)", min=0)

    def problems(self):
        if not self.caption_from:
            yield "--caption_from needs a value"
        if "none" in self.caption_from[:-1]:
            yield "--caption_from: what follows none is never used, so none stands last"


def read(path, args, findings):
    """Each photo once, in the order of the files, with one caption. Raises DatasetError."""
    path = Path(path)
    manifest = path if path.suffix == ".json" else path / "manifest.json"
    photos = _manifest(manifest, args, findings) if manifest.is_file() else _tables(path, args, findings)
    yield from arrived(_samples(photos, args, findings), args, findings)


def _samples(photos, args, findings):
    """(sample, url) of each (where, photo_id, name, image, texts, url)."""
    seen, files = set(), set()
    for where, photo, name, image, texts, url in photos:
        if photo in seen:
            findings.warn("listed_twice", where, photo)
        elif image in files:
            findings.error("shared_file_name", where, name)
        else:
            seen.add(photo)
            files.add(image)
            if captions := _captions(texts, where, photo, args, findings):
                yield Sample(name, image, captions, where), url


def _tables(root, args, findings):
    """Each row of photos.*"""
    if "query" in args.caption_from:
        raise DatasetError("--caption_from query is for a manifest.json: the tables do not say what was searched for")
    if not args.images:
        raise DatasetError(f"{root} has addresses, not images: --images names their folder, and --download fills it")
    columns = {"photo_id", *(COLUMNS[kind] for kind in args.caption_from if kind in COLUMNS)}
    columns |= {"photo_image_url", "photo_width", "photo_height"} if args.download else set()
    keywords = _keywords(root, args, findings) if "keywords" in args.caption_from else {}
    standing = _standing(Path(args.images))
    for where, row in _rows(root, "photos", columns, findings):
        photo = row["photo_id"]
        if not PHOTO_ID.fullmatch(photo):
            findings.error("no_photo_id", where)
            continue
        texts = {kind: row.get(column) for kind, column in COLUMNS.items()} | {"keywords": keywords.get(photo)}
        image = standing.get(photo) or Path(args.images) / f"{photo}.jpg"
        url = _resized(row, args.download_side) if args.download else None
        yield where, photo, f"{photo}{image.suffix}", image, texts, url


def _manifest(path, args, findings):
    """Each record of a scraper's [{id, url, file_name, query, alt_description}, ...]."""
    if "keywords" in args.caption_from:
        raise DatasetError(f"{path} has no keywords: --caption_from takes {', '.join(MANIFEST_KEYS)} or none of it")
    records = read_json(path)
    if not (isinstance(records, list) and all(isinstance(record, dict) for record in records)):
        raise DatasetError(f"{path} must be a list of records {{id, url, file_name, query, alt_description}}")
    images = Path(args.images) if args.images else path.parent
    for number, record in enumerate(records, 1):
        where = f"{path.name} record {number}"
        photo, url = str(record.get("id") or ""), str(record.get("url") or "")
        name = str(record.get("file_name") or f"{photo}.jpg")
        image = place(images, name)
        if not photo or image is None:
            findings.error("bad_record", where, name)
            continue
        texts = {kind: record.get(key) for kind, key in MANIFEST_KEYS.items()}
        yield where, photo, str(image.relative_to(images)), image, texts, url


def _captions(texts, where, photo, args, findings):
    """The first text that there is, on one line; () and an error where there is none."""
    for kind in args.caption_from:
        text = " ".join(str(texts.get(kind) or "").split())
        if text or kind == "none":
            return (text,)
    findings.error("no_text", where, photo, wanted=" or ".join(args.caption_from))
    return ()


def _keywords(root, args, findings):
    """{photo_id: "dog, grass, ..."}, the surest first: those of people, then by confidence, then by the alphabet."""
    columns = {"photo_id", "keyword", "ai_service_1_confidence", "ai_service_2_confidence", "suggested_by_user"}
    found = {}
    for _, row in _rows(root, "keywords", columns, findings):
        sure = max(_number(row["ai_service_1_confidence"]), _number(row["ai_service_2_confidence"]))
        if row["suggested_by_user"].lower() in ("t", "true", "1"):
            sure = math.inf
        if sure >= args.keyword_confidence and row["keyword"].strip():
            found.setdefault(row["photo_id"], {})[intern(row["keyword"].strip())] = -sure
    for photo, words in found.items():
        ordered = sorted(words, key=lambda word, words=words: (words[word], word))
        found[photo] = ", ".join(ordered[: args.keyword_count])
    return found


def _number(text):
    """Empty where a service did not see the keyword."""
    try:
        return float(text)
    except ValueError:
        return -math.inf


def _rows(root, table, columns, findings):
    """Yield (where, {column: text}) of all shards of a table. Raises DatasetError."""
    shards = sorted(file for file in existing_folder(root).iterdir() if re.match(rf"{table}\.[tc]sv", file.name))
    if not shards:
        raise DatasetError(f"{root} has no {table}.tsv or .csv, whatever follows (.tsv000), and no manifest.json")
    for shard in shards:
        try:
            with open(shard, encoding="utf-8-sig", newline="") as file:
                delimiter = "\t" if "\t" in file.readline() else ","
                file.seek(0)
                yield from _records(csv.DictReader(file, delimiter=delimiter), shard, columns, findings)
        except UnicodeDecodeError as error:
            raise DatasetError(f"{shard} is not UTF-8 text ({error}): unpack it, or fetch it again") from error
        except csv.Error as error:
            raise DatasetError(f"{shard} cannot be read: {error} (a quote that is never closed?)") from error


def _records(reader, shard, columns, findings):
    if missing := sorted(columns - set(reader.fieldnames or [])):
        there = ", ".join(reader.fieldnames or ["nothing"])
        raise DatasetError(f"{shard} has no column {' or '.join(missing)}, only {there}")
    for row in reader:
        where = f"{shard.name} line {reader.line_num}"
        if None in row or None in row.values():
            findings.error("wrong_fields", where)
        else:
            yield where, row


def _standing(images):
    """{photo_id: image} of the folder and those in it, however they were fetched."""
    standing = {}
    for folder, names in walk(images, True, Findings()):
        for path in (folder / name for name in names if is_image_name(name)):
            website = WEBSITE_NAME.fullmatch(path.stem)
            standing.setdefault(website["id"] if website else path.stem, path)
    return standing


def _resized(row, side):
    """The photo's address, asking for a shorter side of `side` pixels; w= and fit=max of imgix never enlarge."""
    if not side:
        return row["photo_image_url"]
    width, height = _number(row["photo_width"]), _number(row["photo_height"])
    wide = math.ceil(side * width / height) if width > height > 0 else side
    address, _, query = row["photo_image_url"].partition("?")
    return f"{address}?{urlencode(dict(parse_qsl(query)) | {'w': wide, 'fit': 'max'})}"
