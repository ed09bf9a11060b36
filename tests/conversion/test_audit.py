"""The audit names what is wrong with a dataset, and says what training itself says."""

import io
import json

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from transformers import CLIPTokenizer

from finetuning.cli import read
from finetuning.conversion import audit
from finetuning.conversion.audit import AuditArgs, examine
from finetuning.conversion.audit_report import histograms, report
from finetuning.conversion.caption_text import tidy
from finetuning.conversion.measures import measure, near_pairs
from finetuning.data import checking
from finetuning.data.findings import DatasetError
from finetuning.data.training_set import load_images
from finetuning.families.family import Tokenizers
from finetuning.families.table import DEFAULT_FAMILY


def photo(seed, size=(96, 72)):
    """Large soft areas and fine grain, as a photograph has."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(40, 215, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 8, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))


def as_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def write(folder, **images):
    """name=image or name=(image, caption) into a split with its metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, what in images.items():
        image, caption = what if isinstance(what, tuple) else (what, f"a {folder.name} room called {name}")
        image.save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def examined(path, **flags):
    return examine(AuditArgs(path=str(path), workers=1, **{"resolution": "64", **flags}))


def groups(found, kind):
    """The concern's groups as lists of names; [] where it was not raised."""
    return [
        [found.shown(one) for one in group]
        for concern in found.concerns
        if concern.code == kind
        for group in concern.groups
    ]


def kinds(found):
    return [concern.code for concern in found.concerns]


def test_exact_copies_and_leaks_are_told_apart(tmp_path):
    write(tmp_path / "train", a=photo(0), again=photo(0), leak=photo(1), other=photo(2))
    write(tmp_path / "validation", a=photo(1))
    write(tmp_path / "test", b=photo(1))
    photo(0).save(tmp_path / "train/again.png", compress_level=0)  # other bytes, the same pixels
    found = examined(tmp_path)
    assert groups(found, "same_twice") == [["train/a.png", "train/again.png"]]
    assert groups(found, "same_leak") == [["train/leak.png", "validation/a.png", "test/b.png"]]
    assert kinds(found) == ["same_leak", "same_twice"]  # the worst first; exact copies are not near ones as well
    assert found.accepted  # training takes both


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.resize((48, 36), Image.Resampling.LANCZOS),
        lambda p: p.resize((72, 72)),
        lambda p: as_jpeg(p, 40),
        lambda p: ImageEnhance.Brightness(p).enhance(0.8),
        lambda p: ImageEnhance.Contrast(p).enhance(1.2),
        ImageOps.mirror,
        lambda p: ImageOps.mirror(as_jpeg(p, 60)),
    ],
    ids=["half", "square", "jpeg", "darker", "contrast", "mirrored", "mirrored jpeg"],
)
def test_near_copies_are_found(tmp_path, change):
    write(tmp_path / "train", **{f"p{n}": photo(n) for n in range(8)}, copy=change(photo(3)))
    write(tmp_path / "test", copy=change(photo(5)), other=photo(20))
    found = examined(tmp_path)
    assert groups(found, "near_twice") == [["train/copy.png", "train/p3.png"]]
    assert groups(found, "near_leak") == [["train/p5.png", "test/copy.png"]]


def test_the_same_shapes_in_other_colours_are_no_copies(tmp_path):
    red, green, blue = photo(0).split()
    write(tmp_path / "train", a=photo(0), b=Image.merge("RGB", (blue, green, red)))
    assert groups(examined(tmp_path, near_bits=24), "near_twice") == []


def test_near_pairs_do_not_depend_on_the_blocks():
    images = [photo(n % 9) if n < 9 else as_jpeg(photo(n % 9), 50) for n in range(20)]
    measured = [measure(image) for image in images]
    pairs = lambda block: {(int(i), int(j)) for part in near_pairs(measured, 10, block) for i, j in part.T}
    assert pairs(256) == {(n, n + 9) for n in range(9)} | {(0, 18), (9, 18), (1, 19), (10, 19)}
    assert pairs(3) == pairs(7) == pairs(256)


def test_plain_images_are_not_near_copies_of_each_other(tmp_path):
    write(tmp_path / "train", a=Image.new("RGB", (64, 64)), b=Image.new("RGB", (64, 65)), c=photo(0))
    assert kinds(examined(tmp_path)) == ["black"]


def speckled(size, ground, spot, share):
    pixels = np.full((size, size, 3), ground, dtype=np.uint8)
    pixels.reshape(-1, 3)[: int(size * size * share)] = spot
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (speckled(100, 10, 200, 0.01), "black"),
        (speckled(100, 10, 200, 0.03), None),
        (speckled(100, 250, 100, 0.01), "white"),
        (speckled(100, 250, 100, 0.03), None),
        (Image.new("RGB", (64, 64), (90, 120, 40)), "flat"),
        (photo(0).filter(ImageFilter.GaussianBlur(3)), "blurred"),
        (photo(0, (1600, 1200)).filter(ImageFilter.GaussianBlur(12)), "blurred"),
        (Image.fromarray(np.tile([[[255, 0, 0], [0, 130, 0]]], (64, 32, 1)).astype(np.uint8)), None),  # one luma
        (Image.new("RGB", (64, 2), (200, 0, 0)), "flat"),
    ],
)
def test_poor_images_have_one_name_each(tmp_path, image, kind):
    write(tmp_path / "train", a=image, b=photo(9))
    found = examined(tmp_path, resolution="2")
    assert kinds(found) == ([kind] if kind else [])
    if kind:
        assert groups(found, kind) == [["train/a.png"]]


@pytest.mark.parametrize(
    ("resolution", "most", "tiny"),
    [("100", 2.0, []), ("145", 2.0, ["train/a.png"]), ("145", 2.1, []), ("72x193", 2.0, ["train/a.png"])],
)
def test_tiny_is_what_must_be_enlarged_too_much(tmp_path, resolution, most, tiny):
    write(tmp_path / "train", a=photo(0, (96, 72)), b=photo(1, (400, 400)))
    found = examined(tmp_path, resolution=resolution, max_enlargement=most)
    assert [name for (name,) in groups(found, "tiny")] == tiny


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("a café, naïve and Łódź", None),
        ("a room ❤\ufe0f 👩\u200d🍳", None),
        ("a cafÃ© in Paris", "wrong_encoding"),
        ("a caf\ufffd in Paris", "wrong_encoding"),
        ("a cafe\u0301", "untidy_caption"),
        ("a\u200broom", "untidy_caption"),
        ("two  rooms", "untidy_caption"),
        ("комната", "other_alphabet"),
        ("a room, 部屋", "other_alphabet"),
    ],
)
def test_odd_captions(tmp_path, caption, kind):
    write(tmp_path / "train", a=(photo(0), caption), b=photo(1))
    found = examined(tmp_path)
    assert kinds(found) == ([kind] if kind else [])
    assert not kind or groups(found, kind) == [["train/a.png"]]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("  a\troom\n\nwith\u00a0light ", "a room with light"),
        ("\ufeffa room", "a room"),
        ("a cafe\u0301", "a café"),
        ("a cafÃ©", "a café"),
        ("a caf\xe9", "a café"),
        ("bell\x07 and half \ud800", "bell and half"),
        ("\u200b\ufeff", ""),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
        ("\u201cquoted\u201d \u2013 5 €", "\u201cquoted\u201d \u2013 5 €"),
    ],
)
def test_tidy(text, written):
    assert tidy(text) == written
    assert tidy(written) == written


def test_captions_that_repeat_stand_together_the_most_frequent_first(tmp_path):
    captions = ["A dog", "a cat", "a dog", "a bird", "a dog", "a cat"]
    write(tmp_path / "train", **{f"p{n}": (photo(n), text) for n, text in enumerate(captions)})
    assert groups(examined(tmp_path), "repeated_caption") == [
        ["train/p0.png", "train/p2.png", "train/p4.png"], ["train/p1.png", "train/p5.png"],
    ]  # fmt: skip


def test_lengths_are_those_of_the_tokenizer_and_cut_captions_are_named(tmp_path, tiny_model):
    long = "a very long caption of a dog that runs and runs"
    write(tmp_path / "train", a=(photo(0), "a dog"), b=(photo(1), long))
    write(tmp_path / "test", c=(photo(2), long + " still"))
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    for name in (tiny_model, tiny_model / "tokenizer"):
        found = examined(tmp_path, tokenizer=str(name))
        assert found.lengths == [len(tokenizer(text).input_ids) for text in ("a dog", long, long + " still")]
        assert found.length_unit == "tokens, cut at 16"
        assert groups(found, "cut_caption") == [["train/b.png"], ["test/c.png"]]


def test_without_a_tokenizer_words_are_counted_and_it_says_so(tmp_path):
    write(tmp_path / "train", a=(photo(0), "a dog"), b=(photo(1), " ".join(["word"] * 300)))
    found = examined(tmp_path)
    assert found.lengths == [2, 300]
    assert "no --tokenizer given" in report(found)
    assert kinds(found) == []


def test_histograms_count_every_image_once(tmp_path):
    write(tmp_path / "train", a=photo(0, (300, 200)), b=photo(1, (200, 300)), c=photo(2, (63, 63)))
    write(tmp_path / "test", d=photo(3, (128, 128)))
    found = dict(histograms(examined(tmp_path, resolution="256")))
    assert found["shorter side of the images, in pixels"] == [("below 64", 1), ("from 128", 3)]
    assert found["shape of the images, width : height"] == [("2:3", 1), ("1:1", 2), ("3:2", 1)]
    buckets = dict(found["sizes they would be trained at with --aspect_buckets, height x width"])
    assert buckets == {"192x320": 1, "320x192": 1, "192x192": 1, "too small": 1}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def append(path, line):
    path.write_bytes(path.read_bytes() + line + b"\n")


TROUBLES = {
    "nothing": (lambda root: None, True),
    "an image is cut": (lambda root: cut(root / "train/a.png"), False),
    "a validation image is cut": (lambda root: cut(root / "validation/a.png"), False),
    "a test image is cut": (lambda root: cut(root / "test/a.png"), True),
    "no image": (lambda root: (root / "train/a.png").write_bytes(b"<html>"), False),
    "the image is gone": (lambda root: (root / "train/a.png").unlink(), False),
    "no row": (lambda root: photo(7).save(root / "train/new.png"), False),
    "no row in test": (lambda root: photo(7).save(root / "test/new.png"), True),
    "an empty caption": (
        lambda root: append(root / "train/metadata.jsonl", b'{"file_name": "a.png", "text": ""}'), False
    ),
    "a caption that is a number": (
        lambda root: append(root / "train/metadata.jsonl", b'{"file_name": "a.png", "text": 3}'), False
    ),
    "not JSON": (lambda root: append(root / "validation/metadata.jsonl", b"{"), False),
    "latin-1": (lambda root: append(root / "train/metadata.jsonl", b'{"text": "caf\xe9"}'), False),
    "outside": (
        lambda root: append(root / "train/metadata.jsonl", b'{"file_name": "../../x.png", "text": "x"}'), False
    ),
    "no metadata": (lambda root: (root / "train/metadata.jsonl").unlink(), False),
    "no metadata in test": (lambda root: (root / "test/metadata.jsonl").unlink(), True),
    "no images": (lambda root: [path.unlink() for path in (root / "train").glob("*.png")], False),
}  # fmt: skip


@pytest.mark.parametrize(("trouble", "accepted"), TROUBLES.values(), ids=TROUBLES.keys())
def test_the_verdict_is_that_of_training(tmp_path, tiny_model, trouble, accepted):
    for split, seeds in (("train", (0, 1)), ("validation", (2,)), ("test", (3,))):
        write(tmp_path / "set" / split, **dict(zip("ab", map(photo, seeds), strict=False)))
    photo(5).save(tmp_path / "x.png")
    trouble(tmp_path / "set")
    found = examined(tmp_path / "set")
    assert found.accepted == accepted
    assert ("accept" if accepted else "REFUSE") in report(found).splitlines()[0]

    args = AuditArgs(path=str(tmp_path / "set"), resolution="64").training()
    args.check_images = "full"
    tokenize = Tokenizers({"text_encoder": CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")}, DEFAULT_FAMILY)
    if accepted:
        training, _ = load_images(args, tokenize, seed=0)
        assert len(training) == 2
    else:
        with pytest.raises(DatasetError) as refused:
            load_images(args, tokenize, seed=0)
        if not found.refusal:
            for examples in found.findings.as_dict()["errors"].values():
                assert all(example in str(refused.value) for example in examples)
        else:
            assert found.refusal == str(refused.value)


def test_what_is_wrong_with_the_test_split_is_told(tmp_path):
    write(tmp_path / "train", a=photo(0))
    write(tmp_path / "test", a=photo(1), b=photo(2))
    cut(tmp_path / "test/a.png")
    found = examined(tmp_path)
    (error,) = found.test_findings.as_dict()["errors"]["unreadable_image"]
    assert error.startswith("test/metadata.jsonl line 1 (") and "a.png" in error
    assert error in report(found)
    (tmp_path / "test/metadata.jsonl").unlink()
    assert "the test split" in report(examined(tmp_path)) and "no metadata" in report(examined(tmp_path))


def test_too_small_for_a_bucket_is_refused_as_in_training(tmp_path):
    write(tmp_path / "train", a=photo(0, (20, 20)), b=photo(1, (512, 512)))
    flags = {"resolution": "512", "max_enlargement": 100.0}
    assert examined(tmp_path, **flags).accepted
    found = examined(tmp_path, **flags, aspect_buckets=True)
    assert not found.accepted
    assert "image_too_small" in found.findings.errors


def test_an_image_is_decoded_once(tmp_path, monkeypatch):
    write(tmp_path / "train", a=photo(0), b=photo(1))
    append(tmp_path / "train/metadata.jsonl", b'{"file_name": "a.png", "text": "the same again"}')
    opened = []
    real = audit.open_rgb
    monkeypatch.setattr(audit, "open_rgb", lambda path: opened.append(path.name) or real(path))
    monkeypatch.setattr(checking, "open_rgb", lambda path: pytest.fail("decoded twice"))
    found = examined(tmp_path)
    assert opened == ["a.png", "b.png"]
    assert found.seen[0].captions == ("a train room called a", "the same again")


def test_a_dataset_that_datasets_wrote_has_to_be_converted(tmp_path):
    table = Dataset.from_dict({"image": [photo(0)], "text": ["a room"]})
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(DatasetError, match="convert hub"):
        examined(tmp_path / "saved")


@pytest.mark.parametrize("name", ["{tmp}/nowhere", "{tmp}/empty", "nobody/nothing"])
def test_a_tokenizer_that_is_not_there_is_named(tmp_path, name):
    """transformers gives an empty one for a folder without files, which cuts nothing."""
    write(tmp_path / "train", a=photo(0))
    (tmp_path / "empty/tokenizer").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"--tokenizer .*(nowhere|empty|nothing)"):
        examined(tmp_path, tokenizer=name.format(tmp=tmp_path))


def test_every_wrong_flag_is_named_at_once(tmp_path):
    words = [str(tmp_path), "--near_bits", "40", "--blur_below", "-1", "--max_enlargement", "0.5", "--workers", "0"]
    words += ["--html", str(tmp_path / "page.html"), "--fix", str(tmp_path / "new"), "--resolution", "big"]
    _, problems = read(AuditArgs, "", words)
    for flag in ("--near_bits", "--blur_below", "--max_enlargement", "--workers", "--html", "--fix", "--resolution"):
        assert sum(flag in problem for problem in problems) == 1, flag
    for words, named in ((["--html", str(tmp_path.parent)], "--html"), (["--fix", str(tmp_path.parent)], "--fix")):
        (problem,) = read(AuditArgs, "", [str(tmp_path), *words])[1]
        assert problem.startswith(named)
    (problem,) = read(AuditArgs, "", [str(tmp_path / "none")])[1]
    assert "PATH" in problem
    assert "PATH is required" in read(AuditArgs, "", [])[1][0]


def test_the_report_prints_whatever_a_file_is_called(tmp_path):
    write(tmp_path / "train", a=photo(0), b=photo(0))
    odd = tmp_path / "train" / b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (tmp_path / "train/b.png").rename(odd)
    found = examined(tmp_path)
    assert "caf" in report(found).encode("utf-8").decode("utf-8")
    assert not found.accepted
