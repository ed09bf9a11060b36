"""check --fix writes a copy that training accepts, and says all that is different in it."""

import json
import os

import pytest
from PIL import Image, ImageOps

from finetuning.conversion import repair
from finetuning.conversion.audit import AuditArgs, examine
from finetuning.conversion.repair import audit
from finetuning.data.findings import DatasetError
from finetuning.data.images import open_rgb

ORIENTATION = 0x0112  # the EXIF tag


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder):
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


@pytest.fixture
def check(tmp_path):
    """Audits tmp_path/set with --fix tmp_path/new: (exit status, what was said, fixes)."""

    def run(**flags):
        flags = {"resolution": "32", "workers": 1, "fix": str(tmp_path / "new"), **flags}
        said = []
        status = audit(AuditArgs(path=str(tmp_path / "set"), **flags), said.append)
        lines = (tmp_path / "new/fixes.jsonl").read_text(encoding="utf-8").splitlines()
        return status, "\n".join(said), [json.loads(line) for line in lines]

    return run


def accepted(folder):
    found = examine(AuditArgs(path=str(folder), resolution="32", workers=1))
    return found.accepted, [concern.code for concern in found.concerns]


def test_every_error_is_repaired_and_told(tmp_path, check, write_split, photo):
    root = tmp_path / "set"
    write_split(
        root / "train",
        ("a.png", photo(0), "  a\u200b cafÃ©  room"),
        ("again.png", photo(0), "the same"),
        ("broken.jpg", b"<html>", "no image"),
        ("gone.png", None, "nothing"),
        ("leak.png", photo(1), "also in test"),
        ("mirrored.png", ImageOps.mirror(photo(2)), "mirrored in test"),
        ("more/b.png", photo(3), "fine"),
        ("mute.png", photo(4), "\u200b"),
        ("tiny.png", photo(5, (12, 9)), "tiny"),
    )
    write_split(root / "validation", ("a.png", photo(6), "held out"), ("leak.png", photo(7), "also in test"))
    write_split(root / "test", ("x.png", photo(1), "x"), ("y.png", photo(2), "y"), ("z.png", photo(7), "z"))
    photo(8).save(root / "train/unnamed.png")
    before = contents(root)
    status, _, fixes = check()
    assert status == 1
    assert contents(root) == before
    assert rows(tmp_path / "new/train") == {"a.png": "a café room", "more-b.png": "fine"}
    assert rows(tmp_path / "new/validation") == {"a.png": "held out"}
    assert rows(tmp_path / "new/test") == {"x.png": "x", "y.png": "y", "z.png": "z"}
    assert accepted(tmp_path / "new") == (True, [])

    left_out = {
        fix.get("image") or fix["where"]: fix.get("code", fix["why"]) for fix in fixes if fix["change"] == "left out"
    }
    reasons = {
        "train/again.png": "the same image as train/a.png",
        "train/leak.png": "the same image in several splits: test/x.png",
        "train/mirrored.png": "near copies in several splits: test/y.png",
        "train/mute.png": "no caption is left",
        "train/tiny.png": "tiny: 12 x 9",
        "validation/leak.png": "the same image in several splits: test/z.png",
        "train/metadata.jsonl line 3": "unreadable_image",
        "train/metadata.jsonl line 4": "image_missing",
        "train/unnamed.png": "unnamed_image",
    }
    assert len(left_out) == len(reasons)
    for place, reason in reasons.items():
        (why,) = [why for where, why in left_out.items() if where.startswith(place)]
        assert why.startswith(reason)
    (caption,) = [fix for fix in fixes if fix["change"] == "caption written tidily"]
    assert (caption["before"], caption["after"]) == (["a\u200b cafÃ©  room"], ["a café room"])
    assert caption["where"] == "train/metadata.jsonl line 1"
    assert [fix["captions"] for fix in fixes if fix.get("image") == "train/again.png"] == [["the same"]]


def test_a_sound_dataset_is_copied_as_it_is(tmp_path, check, write_split, photo):
    write_split(tmp_path / "set/train", ("a.png", photo(0), "one"), ("b.png", photo(1), "two"))
    status, said, fixes = check()
    assert status == 0 and fixes == [] and "nothing had to be changed" in said
    assert rows(tmp_path / "new/train") == {"a.png": "one", "b.png": "two"}
    assert (tmp_path / "new/train/a.png").read_bytes() == (tmp_path / "set/train/a.png").read_bytes()


def test_images_beside_the_splits_are_told(tmp_path, check, write_split, photo):
    write_split(tmp_path / "set/train", ("a.png", photo(0), "one"))
    photo(1).save(tmp_path / "set/loose.png")
    _, _, fixes = check()
    assert [(fix["change"], fix["where"]) for fix in fixes] == [("left out", "loose.png")]
    assert rows(tmp_path / "new/train") == {"a.png": "one"}


def test_images_are_written_as_they_look_and_that_is_told(tmp_path, check, write_split, photo):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    root = tmp_path / "set/train"
    moving = [photo(1), photo(2)]
    write_split(
        root, ("a.jpg", None, "turned"), ("b.gif", None, "moving"), ("c.png", None, "glass"), ("d.bmp", None, "old")
    )
    photo(0).save(root / "a.jpg", exif=exif, quality=95)
    moving[0].save(root / "b.gif", save_all=True, append_images=moving[1:])
    photo(3).convert("RGBA").save(root / "c.png")
    photo(4).save(root / "d.bmp")
    status, _, fixes = check()
    assert status == 0
    changes = {(fix["image"], fix["change"]) for fix in fixes}
    assert changes == {
        ("train/a.jpg", "turned upright as its EXIF says"),
        ("train/b.gif", "first of 2 frames kept"),
        ("train/b.gif", "P made RGB"),
        ("train/b.gif", "GIF written as PNG"),
        ("train/c.png", "RGBA made RGB"),
        ("train/d.bmp", "BMP written as PNG"),
    }
    assert list(rows(tmp_path / "new/train")) == ["a.jpg", "b.png", "c.png", "d.png"]
    with Image.open(tmp_path / "new/train/a.jpg") as turned:
        assert turned.size == (36, 48) and turned.getexif().get(ORIENTATION, 1) == 1
    assert open_rgb(tmp_path / "new/train/d.png").tobytes() == photo(4).tobytes()


def test_absolute_names_become_relative(tmp_path, check, write_split, photo):
    root = tmp_path / "set/train"
    write_split(root, ("a.png", photo(0), "moved"), ("b.png", photo(1), "here"))
    lines = [{"file_name": "/home/ann/set/a.png", "text": "moved"}, {"file_name": str(root / "b.png"), "text": "here"}]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, fixes = check()
    assert status == 0
    assert [(fix["change"], fix["where"]) for fix in fixes] == [("name made relative", "/home/ann/set/a.png")]
    assert rows(tmp_path / "new/train") == {"a.png": "moved", "b.png": "here"}


def test_of_a_leak_whose_test_image_is_tiny_train_keeps_its_own(tmp_path, check, write_split, photo):
    write_split(tmp_path / "set/train", ("a.png", photo(0), "large"), ("b.png", photo(1), "other"))
    small = photo(0).resize((12, 9), Image.Resampling.LANCZOS)
    write_split(tmp_path / "set/test", ("a.png", small, "small"), ("c.png", photo(2), "third"))
    check()
    assert list(rows(tmp_path / "new/train")) == ["a.png", "b.png"]
    assert list(rows(tmp_path / "new/test")) == ["c.png"]


def test_images_without_captions_are_repaired_too(tmp_path, check, photo):
    (tmp_path / "set/train").mkdir(parents=True)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        photo(seed).save(tmp_path / f"set/train/{name}.png")
    check(caption_column="none")
    assert rows(tmp_path / "new/train") == {"a.png": "", "c.png": ""}


def test_what_cannot_be_read_is_not_mended(tmp_path, check, write_split, photo):
    write_split(tmp_path / "set/train", ("a.png", photo(0), "one"))
    (tmp_path / "set/train/metadata.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match=r"nothing is written before .* is not UTF-8"):
        check()
    assert not (tmp_path / "new").exists()


def test_an_interrupted_copy_is_gone_on_with(tmp_path, check, monkeypatch, write_split, photo):
    write_split(tmp_path / "set/train", *((f"{n}.png", photo(n), f"room  {n}") for n in range(4)))
    real = repair.write_dataset

    def interrupted(samples, *args, **options):
        def some():
            yield from samples[:2]
            raise KeyboardInterrupt

        return real(some(), *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(repair, "write_dataset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check()
    _, _, fixes = check()
    assert len(rows(tmp_path / "new/train")) == 4 and len(fixes) == 4
    with pytest.raises(DatasetError, match="finished dataset"):
        check()


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_the_command_reports_and_returns_the_verdict(tmp_path, broken, status, write_split, photo):
    write_split(tmp_path / "set/train", ("a.png", photo(0), "one"), *([("b.png", b"", "two")] if broken else []))
    before = contents(tmp_path / "set"), os.stat(tmp_path / "set/train").st_mtime_ns
    said = []
    args = AuditArgs(path=str(tmp_path / "set"), resolution="32", html=str(tmp_path / "page.html"), workers=1)
    assert audit(args, said.append) == status
    assert ("REFUSE" if broken else "accept") in said[0]
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (contents(tmp_path / "set"), os.stat(tmp_path / "set/train").st_mtime_ns) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "set"]
