"""prepare_dataset.py augment: what each alteration does to pixels, and which images and captions get copies."""

import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from finetuning.cli import read
from finetuning.conversion.augmenting import AugmentArgs, Copy, altered, augment
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.images import open_rgb
from finetuning.data.reading import read_folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix not in ("", ".jsonl"))


def coordinates(width, height):
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def noisy(number):
    """An image that no other number has, not symmetric."""
    return Image.fromarray(np.random.default_rng(number).integers(60, 180, (12, 16, 3), dtype=np.uint8))


def write(folder, captions, ending=".png"):
    """{stem: caption} as images, all different, and their metadata.jsonl."""
    folder.mkdir(parents=True)
    rows = []
    for stem, caption in captions.items():
        noisy(sum(map(ord, folder.name + stem))).save(folder / f"{stem}{ending}")
        rows.append({"file_name": f"{stem}{ending}", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def dataset(tmp_path):
    write(tmp_path / "dogs/train", {"a": "a dog on the left", "b": "a bright cat"})
    write(tmp_path / "dogs/validation", {"c": "a bird on the right"})
    write(tmp_path / "dogs/test", {"d": "a cow"})
    return tmp_path / "dogs"


def args(dataset, output="new", **flags):
    return AugmentArgs(path=str(dataset), output=str(dataset.parent / output), workers=1, **flags)


def quiet(_):
    return None


def alter(image, kind, number=1, name="a.png", **flags):
    return altered(image, Copy("", kind, name, number), AugmentArgs(**flags))


def values(image):
    return np.asarray(image, dtype=np.float64)


def test_flip_mirrors_left_and_right():
    assert np.array_equal(values(alter(coordinates(9, 5), "flip")), values(coordinates(9, 5))[:, ::-1])


def test_brightness_changes_all_values_by_one_factor_in_both_directions():
    grey = Image.new("RGB", (4, 4), (100, 50, 10))
    factors = []
    for number in range(60):
        shown = values(alter(grey, "brightness", number, brightness=0.4))
        assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 1
        factors.append(shown[0, 0, 0] / 100)
        assert shown[0, 0, 1] == pytest.approx(50 * factors[-1], abs=1)
    distances = [abs(factor - 1) for factor in factors]
    assert min(distances) >= 0.19 and max(distances) <= 0.41  # half of 0.4 and 0.4, rounded to whole values
    assert min(factors) < 0.75 and max(factors) > 1.25


def test_crop_cuts_both_sides_alike_and_reaches_the_whole_image():
    starts = []
    for number in range(60):
        shown = values(alter(coordinates(100, 200), "crop", number, crop=0.2)).astype(int)
        height, width = shown.shape[:2]
        assert 80 <= width <= 90 and height == pytest.approx(2 * width, abs=1)
        left, top = shown[0, 0, 0], shown[0, 0, 1]
        starts.append((left / (100 - width), top / (200 - height)))
        assert np.array_equal(shown[0, :, 0], range(left, left + width))  # not resized
        assert np.array_equal(shown[:, 0, 1], range(top, top + height))
    for place in zip(*starts, strict=True):
        assert min(place) < 0.1 and max(place) > 0.9


@pytest.mark.parametrize("size", [(40, 40), (90, 30), (30, 90)])
def test_rotation_leaves_no_empty_corner(size):
    for number in range(20):
        shown = alter(Image.new("RGB", size, "white"), "rotate", number, rotate=20)
        assert values(shown).min() == 255
        share = (shown.width + 2) / size[0]
        assert share == pytest.approx((shown.height + 2) / size[1], abs=0.07)
        assert 0.4 < share < 0.95


def test_rotation_turns_by_the_angle_drawn_both_ways():
    ramp = coordinates(200, 200)
    angles = []
    for number in range(20):
        shown = values(alter(ramp, "rotate", number, rotate=10))
        slope_y, slope_x = (np.diff(shown[..., 0], axis=axis)[5:-5, 5:-5].mean() for axis in (0, 1))
        angles.append(np.degrees(np.arctan2(slope_y, slope_x)))
    assert all(4.8 <= abs(angle) <= 10.2 for angle in angles)
    assert min(angles) < 0 < max(angles)


def test_noise_has_the_deviation_asked_for_and_no_bias():
    grey = Image.new("RGB", (100, 100), (128, 128, 128))
    deviations = []
    for number in range(10):
        shown = values(alter(grey, "noise", number, noise=0.1))
        deviations.append(shown.std() / 255)
        assert shown.mean() == pytest.approx(128, abs=0.5)
        assert abs(np.corrcoef(shown[..., 0].ravel(), shown[..., 1].ravel())[0, 1]) < 0.05
    assert min(deviations) > 0.049 and max(deviations) < 0.101
    assert max(deviations) - min(deviations) > 0.01


@pytest.mark.parametrize("kind", ["brightness", "crop", "rotate", "noise"])
def test_draws_are_a_function_of_seed_name_and_number(kind):
    image = noisy(0).resize((256, 256))
    draw = lambda seed, name, number: alter(image, kind, number, name, seed=seed).tobytes()
    places = [(seed, name, number) for seed in range(2) for name in "ab" for number in (1, 2)]
    forwards = [draw(*place) for place in places]
    before = random.getstate(), torch.get_rng_state()
    assert [draw(*place) for place in reversed(places)] == forwards[::-1]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert len(set(forwards)) == len(places)


def test_every_training_image_gets_its_copies_and_nothing_else_does(dataset, lines):
    source = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    said = []
    counts = augment(args(dataset, flip_captions="ignore"), said.append)
    new = dataset.parent / "new"
    assert counts == {"train": 6, "validation": 1, "test": 1}
    assert names(new / "train") == [
        "a.png", "a~brightness.png", "a~flip.png", "b.png", "b~brightness.png", "b~flip.png",
    ]  # fmt: skip
    assert [row["file_name"] for row in lines(new / "train/metadata.jsonl")] == names(new / "train")
    for split, name in (("validation", "c.png"), ("test", "d.png")):
        assert names(new / split) == [name]
        assert lines(new / split / "metadata.jsonl") == lines(dataset / split / "metadata.jsonl")
        assert os.path.samefile(new / split / name, dataset / split / name)
    assert os.path.samefile(new / "train/a.png", dataset / "train/a.png")
    assert np.array_equal(
        values(open_rgb(new / "train/a~flip.png")), values(open_rgb(dataset / "train/a.png"))[:, ::-1]
    )
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == source
    assert said == [f"{new}: 6 train (2 + 2 flip + 2 brightness), 1 validation, 1 test"]
    assert json.loads((new / "augmentation.json").read_text())["copies"] == {"flip": 2, "brightness": 2}


@pytest.mark.parametrize(
    ("flip_captions", "expected"),
    [
        ("swap", {"a~flip.png": "a dog on the right", "a~crop.png": "a dog on the left", "b~flip.png": "a bright cat"}),
        (
            "ignore",
            {"a~flip.png": "a dog on the left", "a~crop.png": "a dog on the left", "b~flip.png": "a bright cat"},
        ),
        ("skip", {"a~crop.png": "a dog on the left", "b~flip.png": "a bright cat"}),
    ],
)
def test_captions_of_mirrored_images(dataset, flip_captions, expected, lines):
    said = []
    augment(args(dataset, alter=["flip", "crop"], flip_captions=flip_captions), said.append)
    texts = {row["file_name"]: row["text"] for row in lines(dataset.parent / "new/train/metadata.jsonl")}
    assert texts == expected | {"a.png": "a dog on the left", "b.png": "a bright cat", "b~crop.png": "a bright cat"}
    assert ("a~flip.png" in names(dataset.parent / "new/train")) == ("a~flip.png" in expected)
    assert ("are not mirrored" in said[0] and "a.png" in said[0]) == (flip_captions == "skip")


def test_one_caption_with_a_side_among_several_forbids_the_mirror_image(tmp_path, lines):
    write(tmp_path / "dogs/train", {"a": ["a dog", "a dog at the left"], "b": ["a cat", "cat"]})
    augment(args(tmp_path / "dogs", alter=["flip"]), quiet)
    assert names(tmp_path / "new/train") == ["a.png", "b.png", "b~flip.png"]
    augment(args(tmp_path / "dogs", "other", alter=["flip"], flip_captions="swap"), quiet)
    texts = {row["file_name"]: row["text"] for row in lines(tmp_path / "other/train/metadata.jsonl")}
    assert texts["a~flip.png"] == ["a dog", "a dog at the right"]


def test_all_rows_of_an_image_stand_for_its_copies_too(dataset, lines):
    with open(dataset / "train/metadata.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file_name": "b.png", "text": "a cat on the right", "by": "blip"}\n')
    augment(args(dataset, alter=["flip"]), quiet)
    assert names(dataset.parent / "new/train") == ["a.png", "b.png"]
    augment(args(dataset, "other", alter=["crop"]), quiet)
    rows = [row for row in lines(dataset.parent / "other/train/metadata.jsonl") if row["file_name"] == "b~crop.png"]
    assert [(row["text"], row.get("by")) for row in rows] == [("a bright cat", None), ("a cat on the right", "blip")]


def test_a_training_image_that_is_held_out_too_gets_no_copies(dataset):
    open_rgb(dataset / "validation/c.png").save(dataset / "train/b.png", compress_level=0)  # other bytes, same image
    said = []
    augment(args(dataset, flip_captions="ignore"), said.append)
    assert names(dataset.parent / "new/train") == ["a.png", "a~brightness.png", "a~flip.png", "b.png"]
    assert "just the original (2): b~flip.png; b~brightness.png" in said[0]


def test_a_copy_that_would_equal_a_held_out_image_is_left_out(dataset, lines):
    Image.fromarray(values(open_rgb(dataset / "train/b.png"))[:, ::-1].astype(np.uint8)).save(dataset / "test/d.png")
    augment(args(dataset, flip_captions="ignore"), quiet)
    assert names(dataset.parent / "new/train") == [
        "a.png", "a~brightness.png", "a~flip.png", "b.png", "b~brightness.png",
    ]  # fmt: skip
    assert "b~flip.png" not in {row["file_name"] for row in lines(dataset.parent / "new/train/metadata.jsonl")}


def test_a_copy_that_would_equal_its_original_is_left_out(tmp_path):
    write(tmp_path / "dogs/train", {"a": "a dog"})
    Image.new("RGB", (8, 8), "red").save(tmp_path / "dogs/train/a.png")
    said = []
    augment(args(tmp_path / "dogs"), said.append)
    assert names(tmp_path / "new/train") == ["a.png", "a~brightness.png"]
    assert "or just the original (1): a~flip.png" in said[0]


def test_result_does_not_depend_on_the_number_of_threads_or_on_other_images(dataset):
    flags = {"alter": ["brightness", "crop+rotate+noise"], "flip_captions": "ignore"}
    augment(args(dataset, **flags), quiet)
    several = args(dataset, "several", **flags)
    several.workers = 4
    augment(several, quiet)
    (dataset / "train/a.png").unlink()
    (dataset / "train/metadata.jsonl").write_text('{"file_name": "b.png", "text": "a cat"}\n', encoding="utf-8")
    augment(args(dataset, "fewer", **flags), quiet)
    augment(args(dataset, "seeded", seed=1, **flags), quiet)
    content = lambda name: {path.name: path.read_bytes() for path in (dataset.parent / name / "train").glob("*~*")}
    assert content("new") == content("several") and len(content("new")) == 4
    assert content("fewer") == {name: data for name, data in content("new").items() if name.startswith("b")}
    assert not set(content("seeded").values()) & set(content("fewer").values())


@pytest.mark.parametrize(
    ("ending", "copied", "form"),
    [(".jpg", "a~crop.jpg", "JPEG"), (".JPEG", "a~crop.JPEG", "JPEG"), (".webp", "a~crop.webp", "WEBP"),
     (".bmp", "a.bmp~crop.png", "PNG"), (".png", "a~crop.png", "PNG")],
)  # fmt: skip
def test_copies_are_written_as_the_original_is_where_that_is_usual(tmp_path, ending, copied, form):
    write(tmp_path / "dogs/train", {"a": "a dog"}, ending)
    augment(args(tmp_path / "dogs", alter=["crop"]), quiet)
    with Image.open(tmp_path / "new/train" / copied) as image:
        assert image.format == form


def test_copies_of_an_image_with_a_long_name_have_names_that_every_disk_takes(tmp_path):
    write(tmp_path / "dogs/train", {"x" * 250: "a dog"})
    augment(args(tmp_path / "dogs", alter=["flip+brightness+crop"]), quiet)
    (copied,) = [name for name in names(tmp_path / "new/train") if "~flip" in name]
    assert len(copied) < 255 and copied.startswith("xxx")


def test_a_phone_image_is_copied_upright_with_its_colours(tmp_path):
    write(tmp_path / "dogs/train", {"a": "a dog"}, ".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    coordinates(64, 32).save(tmp_path / "dogs/train/a.jpg", exif=exif, icc_profile=profile, quality=95)
    augment(args(tmp_path / "dogs", alter=["flip", "noise"]), quiet)
    for kind in ("flip", "noise"):
        with Image.open(tmp_path / f"new/train/a~{kind}.jpg") as image:
            assert image.size == (32, 64)
            assert image.getexif().get(0x0112, 1) == 1
            assert image.info["icc_profile"] == profile


def test_an_augmented_dataset_is_not_augmented_again(dataset):
    augment(args(dataset), quiet)
    with pytest.raises(DatasetError, match=r"b~flip\.png.*augmented already"):
        augment(args(dataset.parent / "new", "again"), quiet)
    assert not (dataset.parent / "again").exists()


def break_images(dataset):
    """One cut in train, one cut in validation, one in train that no row names."""
    for name in ("train/b.png", "validation/c.png"):
        (dataset / name).write_bytes((dataset / name).read_bytes()[:200])
    noisy(9).save(dataset / "train/nobody.png")


def test_bad_rows_are_left_out_and_named_where_that_is_asked(dataset):
    break_images(dataset)
    said = []
    counts = augment(args(dataset, on_bad_rows="skip", alter=["crop"]), said.append)
    assert counts == {"train": 2, "validation": 0, "test": 1}
    assert names(dataset.parent / "new") == ["augmentation.json", "test/d.png", "train/a.png", "train/a~crop.png"]
    for name in ("b.png", "c.png", "nobody.png"):
        assert name in said[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--alter", "flop"], "'flop' is not one of flip, brightness, crop, rotate, noise"),
        (["--alter", "crop+"], "'' is not one of"),
        (["--alter", "crop+flip", "flip+crop"], "crop+flip twice"),
        (["--alter", "crop+crop"], "crop+crop twice"),
        (["--copies", "2"], "an image has one mirror image"),
    ],
)
def test_bad_flags_are_named(dataset, flags, named):
    _, problems = read(AugmentArgs, "", [str(dataset), "--output", str(dataset.parent / "new"), *flags])
    assert len(problems) == 1 and named in problems[0]


def test_training_reads_the_result_without_a_fault(dataset):
    augment(args(dataset, copies=3, alter=["crop", "flip+noise"], flip_captions="swap"), quiet)
    findings = Findings()
    for split, count in (("train", 14), ("validation", 1), ("test", 1)):
        assert len(read_folder(dataset.parent / "new", split, "image", "text", False, findings)) == count
    assert findings.report() == ""
    expected = [
        "a~crop.png",
        "a~crop2.png",
        "a~crop3.png",
        "a~flip+noise.png",
        "a~flip+noise2.png",
        "a~flip+noise3.png",
    ]
    assert [name for name in names(dataset.parent / "new/train") if name.startswith("a~")] == expected
    assert len({(dataset.parent / "new/train" / name).read_bytes() for name in expected}) == 6
