"""The writer: what it writes, what it leaves as it was, and how it goes on."""

import errno
import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image, ImageCms, ImageOps

from finetuning.cli import flag, read
from finetuning.conversion import writer as writing
from finetuning.conversion.writer import WritingArgs, write_dataset
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.images import open_rgb
from finetuning.data.reading import read_folder
from finetuning.data.samples import Member, Sample

ORIENTATION = 0x0112  # the EXIF tag
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"hold").replace(b"bXYZ", b"rXYZ").replace(b"hold", b"bXYZ")  # red and blue


@dataclass
class Args(WritingArgs):
    """As a script has them: with the source among the settings."""

    path: str = flag("", "the source")


@pytest.fixture
def args(tmp_path):
    """All images for training, into tmp_path/out, on one thread."""
    return Args(output=str(tmp_path / "out"), validation_fraction=0.0, test_fraction=0.0, workers=1)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def image_file(path, color=(10, 20, 30), size=(8, 6), mode="RGB", **options):
    """A file of one colour; JPEG and WebP keep it only nearly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def sample(path, captions=("a caption",), name=None, **options):
    return Sample(name or path.name, path, captions, str(path), **options)


def many(source, count, start=0, **options):
    """`count` samples whose images all differ."""
    paths = [image_file(source / f"{i:03}.png", (i, 7, 7)) for i in range(start, start + count)]
    return [sample(path, (f"number {path.stem}",), **options) for path in paths]


def written(args):
    """{split/file_name: text} of the finished dataset, every line and image accounted for."""
    folder, found = Path(args.output), {}
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").split("\n") if line]
        assert rows == sorted(rows, key=lambda row: row["file_name"])
        assert all(list(row) == ["file_name", "text"] for row in rows)
        found |= {f"{metadata.parent.name}/{row['file_name']}": row["text"] for row in rows}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    report = {f"{split}/metadata.jsonl" for split in {name.split("/")[0] for name in found}}
    assert there - {"failures.jsonl"} == {"conversion.json", *report, *found}
    return found


def failures(args):
    lines = (Path(args.output) / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def pixel(path, place=(1, 1)):
    return open_rgb(path).getpixel(place)


# What is written


def test_images_and_captions_are_in_the_source_s_words_and_order(source, args):
    texts = ["a cat", 'a "dog", asleep', "ein Hündchen\u2028auf zwei Zeilen"]
    samples = [sample(image_file(source / f"{i}.png", (i, 0, 0)), (text,)) for i, text in enumerate(texts)]
    assert write_dataset(reversed(samples), args) == {"train": 3, "validation": 0, "test": 0}
    assert written(args) == {f"train/{i}.png": text for i, text in enumerate(texts)}
    report = json.loads((Path(args.output) / "conversion.json").read_text())
    assert report["images"] == {"train": 3, "validation": 0, "test": 0}
    assert (report["failures"], report["settings"]["output"]) == (0, args.output)


@pytest.mark.parametrize("several", [False, True])
def test_training_and_hugging_face_datasets_read_what_is_written(source, args, tmp_path, several):
    samples = many(source, 3)
    if several:  # one kind of value in the column, or `datasets` refuses it
        samples[1] = replace(samples[1], captions=("number one", "the second"))
    samples += [replace(one, split="validation", name=f"v{one.name}") for one in samples]
    write_dataset(samples, args)
    texts = [["number 000"], ["number one", "the second"], ["number 002"]] if several else [
        "number 000", "number 001", "number 002",
    ]  # fmt: skip
    loaded = load_dataset("imagefolder", data_dir=args.output, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "validation": 3}
    assert list(loaded["train"]["text"]) == list(loaded["validation"]["text"]) == texts
    assert loaded["train"][2]["image"].getpixel((0, 0)) == (2, 7, 7)
    findings = Findings()
    rows = read_folder(args.output, "validation", "image", "text", False, findings)
    assert (len(rows), *findings.as_dict().values()) == (3, {}, {})


def test_where_the_disk_has_no_links_they_are_copied(source, args, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    path = image_file(source / "a.jpg")
    write_dataset([sample(path)], args)
    assert Path(args.output, "train/a.jpg").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("settings", [{}, {"max_side": 4}, {"image_format": "jpg"}, {"image_format": "webp"}])
def test_the_source_is_never_changed(source, args, settings):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    samples = [
        sample(image_file(source / "turned.jpg", exif=exif)),
        sample(image_file(source / "plain.png", (9, 9, 9))),
        sample(image_file(source / "see-through.png", (9, 9, 9, 9), mode="RGBA")),
    ]
    before = contents(source)
    write_dataset(samples, replace(args, **settings))
    assert contents(source) == before


def test_bytes_inside_a_tar_are_written_as_they_are(source, args):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (1, 2, 3)).save(file, "JPEG", quality=31)
    (source / "shard.tar").write_bytes(b"before" + file.getvalue() + b"behind")
    member = Member(source / "shard.tar", 6, len(file.getvalue()))
    write_dataset([Sample("0.jpg", member, ("a caption",), "shard.tar/0.jpg")], args)
    assert Path(args.output, "train/0.jpg").read_bytes() == file.getvalue()


def test_a_phone_s_turned_image_is_written_upright(source, args):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    shown = Image.new("RGB", (32, 48), (255, 0, 0))
    shown.paste((0, 0, 255), (0, 24, 32, 48))
    shown.rotate(90, expand=True).save(source / "phone.jpg", exif=exif, quality=95)
    write_dataset([sample(source / "phone.jpg")], args)
    with Image.open(Path(args.output, "train/phone.jpg")) as image:
        assert image.size == ImageOps.exif_transpose(image).size == (32, 48)
        assert image.getexif().get(ORIENTATION, 1) == 1
        assert image.getpixel((16, 6)) == pytest.approx((255, 0, 0), abs=12)
        assert image.getpixel((16, 42)) == pytest.approx((0, 0, 255), abs=12)


@pytest.mark.parametrize(
    ("mode", "color", "name", "options", "shown"),
    [
        ("RGBA", (200, 0, 0, 0), "a.png", {}, "a.png"),
        ("RGB", (1, 2, 3), "a.png", {"transparency": (1, 2, 3)}, "a.png"),
        ("LA", (7, 0), "a.png", {}, "a.png"),
        ("P", 0, "a.gif", {"transparency": 0}, "a.png"),
    ],
)
@pytest.mark.parametrize("image_format", ["keep", "jpg"])
def test_transparency_is_laid_on_white(source, args, mode, color, name, options, shown, image_format):
    write_dataset(
        [sample(image_file(source / name, color, mode=mode, **options))], replace(args, image_format=image_format)
    )
    copy = Path(args.output, "train", shown if image_format == "keep" else "a.jpg")
    with Image.open(copy) as image:
        assert image.mode == "RGB" and "transparency" not in image.info
        assert image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("saved", "name", "kept"),
    [("JPEG", "a.jfif", "a.jpg"), ("JPEG", "a.png", "a.jpg"), ("BMP", "a.bmp", "a.png"), ("TIFF", "a.tif", "a.png"),
     ("WEBP", "a.webp", "a.webp"), ("PNG", "a.PNG", "a.png"), ("MPO", "a.jpg", "a.jpg")],
)  # fmt: skip
def test_what_stands_in_the_file_decides_its_format(source, args, saved, name, kept):
    options = {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]} if saved == "MPO" else {}
    path = image_file(source / name, (90, 90, 90), format=saved, **options)
    write_dataset([sample(path)], args)
    copy = Path(args.output, "train", kept)
    assert list(written(args)) == [f"train/{kept}"]
    assert os.path.samefile(copy, path) == (saved not in ("BMP", "TIFF"))
    assert pixel(copy) == pytest.approx((90, 90, 90), abs=3)


@pytest.mark.parametrize(("name", "mode"), [("a.png", "L"), ("a.png", "P"), ("a.png", "1"), ("a.png", "I;16")])
def test_only_grey_and_rgb_stay_as_they_are(source, args, name, mode):
    path = image_file(source / name, 1, mode=mode)
    write_dataset([sample(path)], args)
    copy = Path(args.output, "train", name)
    assert os.path.samefile(copy, path) == (mode == "L")
    with Image.open(copy) as image:
        assert image.mode == ("L" if mode == "L" else "RGB")


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 20), (10, 5)), ((20, 40), (5, 10)), ((10, 10), (10, 10)), ((900, 2), (10, 1))]
)
def test_max_side_makes_larger_images_smaller(source, args, size, expected):
    write_dataset([sample(image_file(source / "a.png", size=size))], replace(args, max_side=10))
    assert open_rgb(Path(args.output, "train/a.png")).size == expected
    assert os.path.samefile(source / "a.png", Path(args.output, "train/a.png")) == (size == expected)


@pytest.mark.parametrize(
    ("box", "size"), [((2, 1, 6, 4), (4, 3)), ((-5, 3, 4, 99), (4, 3)), ((0, 0, 8, 6), (8, 6)), ((-1, 0, 9, 6), (8, 6))]
)
def test_a_box_keeps_what_is_inside_it_and_the_image(source, args, box, size):
    path = image_file(source / "a.png", (50, 60, 70))
    write_dataset([sample(path, box=box)], args)
    copy = Path(args.output, "train/a.png")
    assert open_rgb(copy).size == size
    assert pixel(copy, (size[0] - 1, size[1] - 1)) == (50, 60, 70)  # no black is added
    assert os.path.samefile(copy, path) == (size == (8, 6))


@pytest.mark.parametrize("box", [(8, 0, 9, 6), (5, 5, 5, 5), (6, 4, 2, 1), (0, -9, 8, 0)])
def test_a_box_beside_the_image_is_a_failure(source, args, box):
    with pytest.raises(DatasetError, match=r"nothing of the image is inside the box"):
        write_dataset([sample(image_file(source / "a.png"), box=box)], args)


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_a_colour_profile_stays_with_the_pixels_it_explains(source, args, image_format):
    samples = [sample(image_file(source / "a.png", icc_profile=SRGB)), sample(image_file(source / "b.png"))]
    write_dataset(samples, replace(args, image_format=image_format, max_side=4))
    for name, profile in (("a", SRGB), ("b", None)):
        with Image.open(Path(args.output, f"train/{name}.{image_format}")) as image:
            assert image.info.get("icc_profile") == profile


def test_other_colours_are_written_as_srgb_and_unreadable_exif_is_dropped(source, args):
    samples = [
        sample(image_file(source / "a.png", (10, 20, 200), icc_profile=SWAPPED)),
        sample(image_file(source / "b.png", (1, 2, 3), exif=b"Exif\0\0MM no TIFF")),
        sample(image_file(source / "c.png", (10, 20, 200), icc_profile=SRGB)),
    ]
    write_dataset(samples, args)
    train = Path(args.output, "train")
    with Image.open(train / "a.png") as image:
        assert image.getpixel((1, 1)) == pytest.approx((200, 20, 10), abs=2) and "icc_profile" not in image.info
    with Image.open(train / "b.png") as image:
        assert image.getpixel((1, 1)) == (1, 2, 3) and "exif" not in image.info
    assert os.path.samefile(train / "c.png", source / "c.png")


def test_images_beyond_the_limit_are_taken_where_they_get_smaller(source, args, monkeypatch):
    monkeypatch.setattr(writing, "MAX_PIXELS", 10)
    path = image_file(source / "a.png", size=(8, 6))
    with pytest.raises(DatasetError, match=r"8 x 6.*--max_side"):
        write_dataset([sample(path)], args)
    assert write_dataset([sample(path)], replace(args, output=args.output + "2", max_side=4))["train"] == 1


@pytest.mark.parametrize("image_format", ["keep", "png", "webp"])
def test_the_profile_of_a_print_does_not_stay_with_rgb(source, args, image_format):
    for_print = SRGB[:16] + b"CMYK" + SRGB[20:]
    image_file(source / "a.jpg", (0, 255, 255, 0), mode="CMYK", icc_profile=for_print)
    write_dataset([sample(source / "a.jpg")], replace(args, image_format=image_format))
    with Image.open(Path(args.output, "train", f"a.{image_format}".replace("keep", "jpg"))) as image:
        assert image.mode == "RGB" and not image.info.get("icc_profile")


def test_limit_takes_the_first(source, args):
    write_dataset(iter(many(source, 5)), replace(args, limit=2))
    assert list(written(args)) == ["train/000.png", "train/001.png"]


# Names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/1.png", "b/1.png"], ["a-1", "b-1"]),
        (["a/1.png", "a-1.png"], ["a-1", "a-1~2"]),
        (["1.png", "1.jpg", "1~2.png"], ["1", "1~2", "1~2~2"]),
        (["Cat.png", "cat.png", "CAT.png"], ["Cat", "cat~2", "CAT~3"]),
        (["caf\u00e9.png", "cafe\u0301.png"], ["caf\u00e9", "cafe\u0301~2"]),
        (["../elsewhere/1.png", "/abs/1.png", "./1.png"], ["elsewhere-1", "abs-1", "1"]),
        (['what? "a:b" <c>|*.png', "back\\slash.png"], ["what_ _a_b_ _c___", "back-slash"]),
        (["line\nend.png", "half\udce9.png", "\ud83d.png"], ["line_end", "half_", "_"]),
        ([".hidden.png", "...", "../. ."], ["hidden", "image", "image~2"]),
        (["no ending", "12.5 percent"], ["no ending", "12.5 percent"]),
        (["ein Hündchen #1 & 2%.png"], ["ein Hündchen #1 & 2%"]),
    ],
)
def test_names_are_apart_and_every_disk_takes_them(source, args, names, expected):
    samples = [replace(one, name=name) for one, name in zip(many(source, len(names)), names, strict=True)]
    write_dataset(samples, args)
    texts = {f"train/{stem}.png": one.captions[0] for stem, one in zip(expected, samples, strict=True)}
    assert written(args) == texts


def test_long_names_are_cut_and_stay_apart(source, args):
    names = [f"{'ä' * 150}/{i}.png" for i in range(2)]
    write_dataset([replace(one, name=name) for one, name in zip(many(source, 2), names, strict=True)], args)
    found = written(args)
    assert len(found) == 2 and all(len(name.encode()) < 220 for name in found)


def test_one_name_in_two_splits_stays_unless_the_split_is_drawn(source, args):
    first, second, third = many(source, 3)
    samples = [
        replace(first, name="1.png", split="train"),
        replace(second, name="1.png", split="test"),
        replace(third, name="1.png"),
    ]
    write_dataset(samples, args)
    assert set(written(args)) == {"train/1.png", "test/1.png", "train/1~2.png"}


def test_two_samples_of_one_name_are_a_failure(source, args):
    first, second = many(source, 2)
    write_dataset([first, replace(second, name=first.name)], replace(args, on_bad_rows="skip"))
    assert written(args) == {"train/000.png": "number 000"}
    assert [one["reason"] for one in failures(args)] == ["another sample of the source has the same name"]


# Splits by content


def test_the_content_draws_the_split_whatever_the_name(source, args):
    samples = many(source, 200)
    counts = write_dataset(samples, replace(args, validation_fraction=0.2, test_fraction=0.1))
    assert sum(counts.values()) == 200
    assert 25 < counts["validation"] < 55 and 8 < counts["test"] < 35
    renamed = [replace(one, name=f"{i}.png") for i, one in enumerate(reversed(samples))]
    again = replace(args, output=args.output + "-again", validation_fraction=0.2, test_fraction=0.1)
    write_dataset(renamed, again)
    place = lambda found: {text: name.split("/")[0] for name, text in found.items()}
    assert place(written(args)) == place(written(again))


def test_copies_of_an_image_stay_together_in_any_format_and_crop(source, args):
    samples = []
    for i in range(20):
        stored = Image.effect_noise((8, 6), 60 + i).convert("RGB")
        stored.save(source / f"{i}.png")
        stored.save(source / f"{i}.bmp")
        exif = Image.Exif()
        exif[ORIENTATION] = 3
        stored.rotate(180).save(source / f"{i}t.png", exif=exif)
        samples += [sample(source / f"{i}{end}", (str(i),)) for end in (".png", ".bmp", "t.png")]
        samples.append(sample(source / f"{i}.png", (str(i),), name=f"box{i}.png", box=(0, 0, 4, 4)))
    write_dataset(samples, replace(args, validation_fraction=0.3, test_fraction=0.3))
    splits = {}
    for name, text in written(args).items():
        splits.setdefault(text, set()).add(name.split("/")[0])
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "validation", "test"}
    assert json.loads(Path(args.output, "conversion.json").read_text())["same_image_in_two_splits"] == []


def test_images_that_the_source_has_in_two_splits_are_named(source, args):
    first, second = many(source, 2)
    samples = [replace(first, split="train"), replace(second, split="train"), replace(first, split="test")]
    said = []
    write_dataset(samples, args, say=said.append)
    report = json.loads(Path(args.output, "conversion.json").read_text())
    assert report["same_image_in_two_splits"] == [["test/000.png", "train/000.png"]]
    assert "1 image in two splits" in "\n".join(said)


# What cannot be taken


def broken(source):
    """Samples that cannot be taken, and the reason of each."""
    (source / "text.png").write_text("<html>404</html>")
    (source / "empty.png").write_bytes(b"")
    good = image_file(source / "good.png")
    cut = image_file(source / "cut.png", size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:60])
    return {
        sample(source / "text.png"): "cannot identify",
        sample(source / "empty.png"): "cannot identify",
        sample(source / "gone.png"): "No such file",
        sample(cut): "truncated",
        sample(good, (), name="mute.png"): "it has no caption",
        sample(good, ("half \ud83d",), name="half.png"): "half a character",
    }


def test_all_that_cannot_be_taken_is_named_and_the_rest_is_done(source, args):
    bad = broken(source)
    with pytest.raises(DatasetError) as caught:
        write_dataset([*bad, *many(source, 3)], args)
    message = str(caught.value)
    assert "6 images could not be taken" in message and "--on_bad_rows skip" in message
    listed = {one["name"]: one["reason"] for one in failures(args)}
    assert all(reason in listed[one.name] for one, reason in bad.items())
    assert len(list(Path(args.output, "train").glob("*.png"))) == 3
    assert not Path(args.output, "conversion.json").exists()


def test_an_image_too_large_for_its_format_is_a_failure_of_that_image(source, args):
    samples = [sample(image_file(source / "wide.png", size=(16384, 1))), *many(source, 1)]
    write_dataset(samples, replace(args, image_format="webp", on_bad_rows="skip"))
    assert set(written(args)) == {"train/000.webp"}
    assert "it cannot be written as WEBP" in failures(args)[0]["reason"]


# The folder


def test_a_finished_dataset_is_refused(source, args):
    write_dataset(many(source, 1), args)
    with pytest.raises(DatasetError, match="holds a finished dataset"):
        write_dataset(many(source, 2), args)


def test_a_second_conversion_into_the_folder_is_refused(source, args):
    first, second = many(source, 2)

    def samples():
        yield first
        with pytest.raises(DatasetError, match="is another conversion writing"):
            write_dataset([first], args)
        yield second

    assert write_dataset(samples(), args)["train"] == 2


# Going on


def stopped_after(samples, count, error=KeyboardInterrupt):
    yield from samples[:count]
    raise error


@pytest.fixture
def worked(monkeypatch):
    """The names of the samples whose images are opened."""
    names, write_one = [], writing._write_one

    def noting(folder, args, sample, stem, state):
        names.append(sample.name)
        return write_one(folder, args, sample, stem, state)

    monkeypatch.setattr(writing, "_write_one", noting)
    return names


def interrupted(samples, count, args):
    with pytest.raises(KeyboardInterrupt):
        write_dataset(stopped_after(samples, count), args, say=lambda text: None)


def test_an_interrupted_conversion_goes_on_and_equals_an_uninterrupted_one(source, args, worked):
    args = replace(args, validation_fraction=0.3)
    samples = [*many(source, 18), replace(many(source, 1)[0], name="Other/000.png", captions=("again",))]
    interrupted(samples, 10, args)
    done = len(worked)
    assert 0 < done <= 10 and not Path(args.output, "conversion.json").exists()
    del worked[:]
    counts = write_dataset(samples, replace(args, workers=2))  # other workers are no other conversion
    assert len(worked) < len(samples) and worked[-1] == "Other/000.png"
    straight = replace(args, output=args.output + "-straight")
    assert counts == write_dataset(samples, straight)
    assert written(args) == written(straight)
    for name in written(args):
        assert Path(args.output, name).read_bytes() == Path(straight.output, name).read_bytes()


def test_a_finished_image_that_is_gone_or_cut_is_written_again(source, args, worked):
    samples = many(source, 8)
    interrupted(samples, 8, replace(args, link=False))
    Path(args.output, "train/001.png").unlink()
    Path(args.output, "train/002.png").write_bytes(b"")  # what a power cut leaves
    del worked[:]
    write_dataset(samples, replace(args, link=False))
    assert worked[:2] == ["001.png", "002.png"] and "000.png" not in worked
    assert [pixel(Path(args.output, "train", name))[0] for name in ("001.png", "002.png")] == [1, 2]


def test_a_killed_run_s_half_written_files_do_no_harm(source, args):
    samples = many(source, 4)
    interrupted(samples, 4, args)
    train = Path(args.output, "train")
    for name in ("003.png", ".incomplete-003.png"):  # in place, and not in the journal yet
        (train / name).unlink(missing_ok=True)
        os.link(source / "003.png", train / name)
    before = contents(source)
    write_dataset(samples, args)
    assert len(written(args)) == 4
    assert contents(source) == before


def test_what_has_changed_in_the_source_is_taken_again(source, args, worked):
    samples = many(source, 8)
    interrupted(samples, 8, args)
    image_file(source / "other.png", (99, 9, 9), size=(9, 9)).replace(source / "001.png")
    samples[2] = replace(samples[2], captions=("corrected",))
    del worked[:]
    write_dataset(samples, args)
    assert worked[:2] == ["001.png", "002.png"] and "000.png" not in worked
    assert pixel(Path(args.output, "train/001.png")) == (99, 9, 9)
    assert written(args)["train/002.png"] == "corrected"


def test_what_has_left_the_source_leaves_the_dataset(source, args):
    samples = [replace(one, split="test" if i == 1 else "train") for i, one in enumerate(many(source, 8))]
    interrupted(samples, 8, args)
    assert Path(args.output, "test/001.png").exists()
    left = [one for i, one in enumerate(samples) if i not in (1, 3)]
    assert write_dataset(left, args) == {"train": 6, "validation": 0, "test": 0}
    assert set(written(args)) == {f"train/{one.name}" for one in left}
    assert not Path(args.output, "test").exists()


def test_names_that_move_with_the_source_do_not_mix_images_up(source, args):
    first, second, *rest = many(source, 8)
    first, second = replace(first, name="a/b.png"), replace(second, name="a-b.png")
    interrupted([first, second, *rest], 8, args)
    write_dataset([second, first, *rest], args)
    found = written(args)
    assert (found["train/a-b.png"], found["train/a-b~2.png"]) == ("number 001", "number 000")
    assert pixel(Path(args.output, "train/a-b.png"))[0] == 1
    assert pixel(Path(args.output, "train/a-b~2.png"))[0] == 0


def test_an_image_that_was_good_and_is_broken_now_is_not_kept(source, args):
    samples = many(source, 8)
    interrupted(samples, 8, args)
    (source / "000.png").unlink()
    (source / "000.png").write_bytes(b"broken")
    write_dataset(samples, replace(args, on_bad_rows="skip"))
    assert "train/000.png" not in written(args) and len(written(args)) == 7


def test_other_settings_do_not_go_on(source, args):
    interrupted(many(source, 8), 8, args)
    with pytest.raises(DatasetError, match=r"other settings \(max_side\)"):
        write_dataset(many(source, 8), replace(args, max_side=4))
    write_dataset(many(source, 8), replace(args, link=False, workers=2, on_bad_rows="skip"))


def test_a_full_disk_is_one_message_and_the_same_command_goes_on(source, args, monkeypatch):
    put, count = writing._put, []

    def full(content, target, link):
        count.append(target)
        if len(count) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        put(content, target, link)

    monkeypatch.setattr(writing, "_put", full)
    samples = many(source, 12)
    with pytest.raises(DatasetError, match=r"No space left on device.*\n.*same command again"):
        write_dataset(samples, args)
    monkeypatch.setattr(writing, "_put", put)
    assert write_dataset(samples, args)["train"] == len(written(args)) == 12


def test_few_images_are_in_work_at_once(source, args, monkeypatch):
    """A generator is read no further than the images in work: memory does not grow with the source."""
    taken, ahead = [], []
    samples = many(source, 60)
    opened = Sample.open
    monkeypatch.setattr(
        Sample, "open", lambda self, *most: (ahead.append(len(taken) - samples.index(self)), opened(self, *most))[1]
    )

    def handed():
        for one in samples:
            taken.append(one)
            yield one

    write_dataset(handed(), replace(args, workers=2))
    assert len(ahead) == 60 and max(ahead) <= 4 * 2 + 1


def test_a_link_in_the_source_leads_to_its_image(source, args, tmp_path):
    real = image_file(tmp_path / "elsewhere/b.png", (1, 2, 3))
    (source / "a.png").symlink_to(real)
    write_dataset([sample(source / "a.png")], args)
    copy = Path(args.output, "train/a.png")
    assert not copy.is_symlink() and pixel(copy) == (1, 2, 3)


def test_fractions_that_leave_nothing_to_train_on_are_named():
    flags = ["--output", "out", "--validation_fraction", "0.6", "--test_fraction", "0.4"]
    (problem,) = read(WritingArgs, "", flags)[1]
    assert "leave nothing to train on" in problem
