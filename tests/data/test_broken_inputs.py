"""What people's folders really hold: over forty broken things, each with its stated outcome.

LOADS     the row is trained on, with this caption and this size of image
COUNTED   the row is left out with --on_bad_rows skip, and named under this code; without it the run stops
REFUSED   nothing can be trained on before this is mended; the message says these words

Whatever it is, no image and no row may vanish: each is trained on, or named.
"""

import io
import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import ExifTags, Image, features
from PIL.PngImagePlugin import PngInfo

from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.checking import read_checked
from finetuning.data.findings import PROBLEMS, DatasetError
from finetuning.data.images import EXTENSIONS, open_rgb
from finetuning.data.training_set import DataArgs
from prepare_dataset import main as prepare_dataset

LOADS, COUNTED, REFUSED = "loads", "counted", "refused"
UNREADABLE, NOT_THERE, OUTSIDE = "unreadable_image", "image_missing", "outside"
EMPTY, NOT_JSON, NO_ROW, NO_IMAGE = "no_caption", "not_json", "unnamed_image", "no_image_named"


@dataclass
class Args(BucketArgs, CaptionArgs, DataArgs):
    """What reads a folder."""


def noise(side=(10, 8), mode="RGB", seed=3):
    """A PIL image, width x height."""
    shape = (side[1], side[0], len(mode)) if len(mode) > 1 else (side[1], side[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def row(name, text="a thing"):
    return {"file_name": name, "text": text}


def image_case(name, content, text="a thing"):
    """A file with a row of its own."""

    def make(folder):
        (folder / name).write_bytes(content() if callable(content) else content)
        return [row(name, text)]

    return make


def text_case(text):
    """A sound image whose row has this caption."""
    return image_case("x.png", lambda: encoded(noise(), "PNG"), text)


def row_case(record):
    """A row, or a line as it stands, without an image of its own."""
    return lambda folder: [record]


def bomb():
    """A PNG of 60,000 x 60,000 that is a few hundred bytes long."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def workflow():
    """What image generators write into their PNGs."""
    text = PngInfo()
    text.add_text("workflow", json.dumps(list(range(1_000_000))), zip=True)
    return text


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def animation():
    return encoded(noise(), "GIF", save_all=True, append_images=[noise(seed=4), noise(seed=5)], duration=9)


def turned():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(noise(), "JPEG", exif=exif)


def deep():
    return encoded(Image.fromarray(np.full((8, 10), 40_000, np.uint16)), "PNG")


def cut(content, share=0.5):
    return content[: int(len(content) * share)]


@dataclass
class Link:
    """A link that leads there, from its own folder."""

    target: str


A_FOLDER = object()
X_PNG = {"x.png": noise()}


def files_case(files, *names):
    """Files {name: image, text, Link or A_FOLDER}, and rows of these names; {folder} is where they stand."""

    def make(folder):
        for name, content in files.items():
            if isinstance(content, Image.Image):
                content.save(folder / name)
            elif isinstance(content, str):
                (folder / name).write_text(content)
            elif content is A_FOLDER:
                (folder / name).mkdir()
            else:
                (folder / name).symlink_to(content.target)
        return [row(name.format(folder=folder)) for name in names]

    return make


def twice(folder):
    noise().save(folder / "x.png")
    return [row("x.png", "one"), row("x.png", "two")]


def raw_metadata(content):
    """The whole metadata file as bytes; {} stands for the sound image's own row."""

    def make(folder):
        noise().save(folder / "x.png")
        return content

    return make


SOUND = json.dumps(row("sound.png", "sound")).encode()
X = json.dumps(row("x.png")).encode()
LATIN = '{"file_name": "x.png", "text": "ein Hündchen"}'.encode("latin-1")

UNNAMED = files_case({"alone.png": noise()})
CASES = {
    # images
    "truncated JPEG": (image_case("x.jpg", lambda: cut(encoded(noise((90, 80))))), COUNTED, UNREADABLE),
    "truncated PNG": (image_case("x.png", lambda: cut(encoded(noise((90, 80)), "PNG"))), COUNTED, UNREADABLE),
    "truncated WebP": (image_case("x.webp", lambda: cut(encoded(noise((90, 80)), "WEBP"))), COUNTED, UNREADABLE),
    "zero bytes": (image_case("x.png", b""), COUNTED, UNREADABLE),
    "text named .jpg": (image_case("x.jpg", b"<html>404</html>"), COUNTED, UNREADABLE),
    "zeros named .png": (image_case("x.png", bytes(500)), COUNTED, UNREADABLE),
    "PNG with a wrong checksum": (
        image_case("x.png", lambda: encoded(noise(), "PNG").replace(b"IDAT", b"IDAX")), COUNTED, UNREADABLE,
    ),
    "decompression bomb": (image_case("x.png", bomb), COUNTED, UNREADABLE),
    "PNG named .jpg": (image_case("x.jpg", lambda: encoded(noise(), "PNG")), LOADS, (10, 8)),
    "upper-case ending": (image_case("X.JPG", lambda: encoded(noise())), LOADS, (10, 8)),
    "CMYK": (image_case("x.jpg", lambda: encoded(noise(mode="CMYK"))), LOADS, (10, 8)),
    "16 bits": (image_case("x.png", deep), LOADS, (10, 8)),
    "grey": (image_case("x.png", lambda: encoded(noise(mode="L"), "PNG")), LOADS, (10, 8)),
    "one bit": (image_case("x.png", lambda: encoded(noise(mode="L").convert("1"), "PNG")), LOADS, (10, 8)),
    "palette": (image_case("x.png", lambda: encoded(noise().quantize(8), "PNG")), LOADS, (10, 8)),
    "transparent": (image_case("x.png", lambda: encoded(noise(mode="RGBA"), "PNG")), LOADS, (10, 8)),
    "animated": (image_case("x.gif", animation), LOADS, (10, 8)),
    "turned by EXIF": (image_case("x.jpg", turned), LOADS, (8, 10)),
    "a phone's HEIC": (image_case("X.HEIC", lambda: encoded(noise(), "HEIF")), LOADS, (10, 8)),
    "truncated HEIC": (image_case("x.heic", lambda: cut(encoded(noise((90, 80)), "HEIF"))), COUNTED, UNREADABLE),
    "EXIF that is text": (
        image_case("x.png", lambda: encoded(noise(), "PNG", exif=b"Exif\0\0MM no TIFF")), LOADS, (10, 8),
    ),
    "Git LFS pointer": (image_case("x.png", LFS_POINTER), COUNTED, UNREADABLE),
    "a megabyte of text in a PNG": (
        image_case("x.png", lambda: encoded(noise(), "PNG", pnginfo=workflow())), LOADS, (10, 8),
    ),
    "one pixel": (image_case("x.png", lambda: encoded(noise((1, 1)), "PNG")), LOADS, (1, 1)),
    # where they lie
    "link to an image inside": (
        files_case({"target.png": noise(), "link.png": Link("target.png")}, "link.png", "target.png"), LOADS, (10, 8),
    ),
    "link out of the folder": (
        files_case({"../outside.png": noise(), "link.png": Link("../outside.png")}, "link.png"), COUNTED, OUTSIDE,
    ),
    "link to nothing": (files_case({"dead.png": Link("nowhere.png")}, "dead.png"), COUNTED, "dead_link"),
    "../ in a name": (files_case({"../above.png": noise()}, "../above.png"), COUNTED, OUTSIDE),
    "absolute name, outside": (files_case({"../beside.png": noise()}, "{folder}/../beside.png"), COUNTED, OUTSIDE),
    "absolute name, inside": (files_case(X_PNG, "{folder}/x.png"), LOADS, (10, 8)),
    "absolute name of another machine": (files_case(X_PNG, "C:\\Users\\me\\images\\x.png"), LOADS, (10, 8)),
    "a URL": (row_case(row("https://example.org/x.png")), COUNTED, NOT_THERE),
    "an image that is not there": (row_case(row("gone.png")), COUNTED, NOT_THERE),
    "a folder named as an image": (files_case({"x.png": A_FOLDER}, "x.png"), COUNTED, NOT_THERE),
    "a file that is no image": (files_case({"notes.txt": "no image"}, "notes.txt"), COUNTED, "not_an_image"),
    "an image without a row": (UNNAMED, COUNTED, NO_ROW),
    "a hidden image": (files_case({".hidden.png": noise()}, ".hidden.png"), COUNTED, "hidden"),
    "a space, a quote, U+2028": (files_case({"a b'\u2028é.png": noise()}, "a b'\u2028é.png"), LOADS, (10, 8)),
    # rows
    "two rows of one image": (twice, LOADS, (10, 8)),
    "no file_name": (row_case({"text": "a thing"}), COUNTED, NO_IMAGE),
    "file_name is null": (row_case({"file_name": None, "text": "a thing"}), COUNTED, NO_IMAGE),
    "file_name with half a character": (row_case(row("\ud83d.png")), COUNTED, NOT_THERE),
    "file_name with a NUL": (row_case(row("x\0.png")), COUNTED, NOT_THERE),
    "file_name is a number": (row_case({"file_name": 7, "text": "a thing"}), COUNTED, NO_IMAGE),
    "not JSON": (row_case("{'file_name': 'x.png'}"), COUNTED, NOT_JSON),
    "half a line": (row_case('{"file_name": "x.png", "te'), COUNTED, NOT_JSON),
    "a list for a row": (row_case(["x.png", "a thing"]), COUNTED, NOT_JSON),
    "caption is null": (text_case(None), COUNTED, EMPTY),
    "caption is empty": (text_case(""), COUNTED, EMPTY),
    "caption is blank": (text_case(" \t\n "), COUNTED, EMPTY),
    "caption is an empty list": (text_case([]), COUNTED, EMPTY),
    "caption is missing": (
        lambda folder: [{"file_name": text_case("")(folder)[0]["file_name"]}], COUNTED, EMPTY,
    ),
    "caption is NaN": (text_case(float("nan")), REFUSED, ("metadata.jsonl line 2", "must be text", "nan")),
    "caption is a number": (text_case(12), REFUSED, ("metadata.jsonl line 2", "must be text", "12")),
    "caption is an object": (text_case({"en": "a thing"}), REFUSED, ("metadata.jsonl line 2", "must be text")),
    "caption with half a character": (text_case("a \ud83d thing"), COUNTED, "half_character"),
    "several captions": (text_case(["one", "two", None]), LOADS, (10, 8)),
    "a huge caption": (text_case("circle " * 20_000), LOADS, (10, 8)),
    # files
    "BOM": (raw_metadata(b"\xef\xbb\xbf" + SOUND + b"\n" + X), LOADS, (10, 8)),
    "CRLF": (raw_metadata(SOUND + b"\r\n" + X + b"\r\n"), LOADS, (10, 8)),
    "blank lines": (raw_metadata(b"\n\n" + SOUND + b"\n  \n" + X + b"\n\n"), LOADS, (10, 8)),
    "Latin-1": (raw_metadata(SOUND + b"\n" + LATIN), REFUSED, ("metadata.jsonl is not UTF-8", "as UTF-8")),
    "UTF-16": (raw_metadata((SOUND + b"\n" + X).decode().encode("utf-16")), REFUSED, ("metadata.jsonl is not UTF-8",)),
    "no caption column": (
        raw_metadata(b'{"file_name": "x.png", "caption": "a thing"}'), REFUSED,
        ("no column 'text'", "file_name, caption", "--caption_column"),
    ),
    "no file_name column": (
        raw_metadata(b'{"path": "x.png", "text": "a thing"}'), REFUSED, ('"file_name" is needed', "--image_column"),
    ),
    "empty metadata": (raw_metadata(b""), COUNTED, NO_ROW),
}  # fmt: skip
if features.check("avif"):
    CASES["AVIF"] = (image_case("x.avif", lambda: encoded(noise(), "AVIF")), LOADS, (10, 8))


def build(folder, make):
    """A folder with a sound image and the case's; the names of all images and the places of all rows in it."""
    folder.mkdir(parents=True)
    noise(seed=1).save(folder / "sound.png")
    records = make(folder)
    content = records
    if not isinstance(records, bytes):
        lines = [one if isinstance(one, str) else json.dumps(one) for one in [row("sound.png", "sound"), *records]]
        content = "".join(f"{line}\n" for line in lines).encode()
    (folder / "metadata.jsonl").write_bytes(content)
    images = {path.name for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS}
    lines = [n for n, line in enumerate(content.replace(b"\0", b"").split(b"\n"), 1) if line.strip()]
    return {name for name in images if not name.startswith(".")}, [f"metadata.jsonl line {n}" for n in lines]


@pytest.mark.parametrize(("make", "outcome", "expected"), CASES.values(), ids=CASES)
def test_every_broken_thing_has_its_outcome(make, outcome, expected, tmp_path, tokenize):
    folder, tokenizer = tmp_path / "data", tokenize.tokenizers["text_encoder"]
    images, lines = build(folder, make)
    args = Args(train_data_dir=str(folder))
    if outcome == REFUSED:
        with pytest.raises(DatasetError) as problem:
            read_checked(args, [tokenizer], 0)
        assert all(words in str(problem.value) for words in expected), str(problem.value)
        return

    found = read_checked(args, [tokenizer], 0)
    told = "\n".join(str(one) for examples in found.findings.errors.values() for one in examples)
    trained = {one.image.name for one in found.rows}
    if outcome == LOADS:
        assert not found.findings.errors
        (loaded,) = {one.image for one in found.rows if one.image.name != "sound.png"} - {folder / "target.png"}
        assert open_rgb(loaded).size == expected and open_rgb(loaded).mode == "RGB"
    else:
        assert found.findings.errors[expected], dict(found.findings.errors)
    for name in images:
        assert name in trained or name in told, f"{name} has vanished"
    rows_told = {one.origin for one in found.rows}
    for place in lines:
        assert place in rows_told or place in told, f"{place} has vanished"
    assert ("sound.png" in trained) == (expected != NO_ROW or make is UNNAMED)


# In one folder, what lies outside of a case's own folder is inside of the whole; and no metadata is no row at all.
TOGETHER = {name: case for name, case in CASES.items() if case[1] != REFUSED and case[2] not in (OUTSIDE, NO_ROW)}


@pytest.fixture(scope="module")
def all_at_once(tmp_path_factory):
    """One folder with every broken thing that does not refuse the whole, each in a folder of its own."""
    root = tmp_path_factory.mktemp("all") / "data"
    for number, (make, _, _) in enumerate(TOGETHER.values()):
        build(root / f"{number:02d}", make)
    return root


def test_check_refuses_all_of_them_in_one_message(all_at_once, capsys):
    assert prepare_dataset(["check", str(all_at_once)]) == 1
    printed = capsys.readouterr().out
    codes = {expected for _, outcome, expected in TOGETHER.values() if outcome == COUNTED}
    assert [code for code in codes if PROBLEMS[code][0] not in printed] == []


def test_convert_takes_what_can_be_taken_and_names_the_rest(all_at_once, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["convert", "imagefolder", str(all_at_once), "--output", str(output)]
    assert prepare_dataset(command) == 1
    assert "--on_bad_rows skip" in capsys.readouterr().err and not (output / "conversion.json").exists()
    assert prepare_dataset([*command, "--on_bad_rows", "skip"]) == 0
    counts = json.loads((output / "conversion.json").read_text())
    loading = sum(outcome == LOADS for _, outcome, _ in TOGETHER.values())
    sound = len(TOGETHER) + 1  # one beside each case, and the target of the link
    assert sum(counts["images"].values()) == loading + sound
    unreadable = sum(expected == UNREADABLE for _, _, expected in TOGETHER.values())
    assert counts["failures"] == unreadable == len((output / "failures.jsonl").read_text().splitlines())
    errors = json.loads((output / "findings.json").read_text())["errors"]
    others = [expected for _, outcome, expected in TOGETHER.values() if outcome == COUNTED and expected != UNREADABLE]
    for code in set(others):
        assert len(errors[code]) >= others.count(code)
    assert prepare_dataset(["check", str(output)]) == 0
