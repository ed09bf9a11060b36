"""Images with a caption file beside each, as kohya's scripts and other tools leave them."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from finetuning.conversion.sidecar import read
from finetuning.data.findings import Findings


@dataclass
class Args:
    caption_lines: str = "all"
    class_captions: bool = False
    allow_outside_paths: bool = False


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def pair(path, content):
    image(path)
    text(path.with_suffix(".txt"), content)


def reading(root, **settings):
    """({name: captions}, errors, warnings)"""
    findings = Findings()
    found = list(read(str(root), Args(**settings), findings))
    assert len({one.key for one in found}) == len(found)
    return {one.name: one.captions for one in found}, *findings.as_dict().values()


def clean(root, **settings):
    found, errors, warnings = reading(root, **settings)
    assert (errors, warnings) == ({}, {})
    return found


WITHOUT, ORPHANS = "no_caption_file", "caption_file_alone"


@pytest.mark.parametrize("ending", [".txt", ".caption", ".TXT", ".Caption"])
def test_a_text_file_beside_each_image(tmp_path, ending):
    for name in ("b.JPG", "a.png", "below/c.webp"):
        image(tmp_path / name)
        text((tmp_path / name).with_suffix(ending), f" {name}\n")
    assert list(clean(tmp_path).items()) == [(name, (name,)) for name in ("a.png", "b.JPG", "below/c.webp")]


def test_the_image_s_whole_name_may_stand_before_the_ending(tmp_path):
    for name in ("a.jpg", "a.png"):
        image(tmp_path / name)
        text(tmp_path / f"{name}.txt", name)
    assert clean(tmp_path) == {"a.jpg": ("a.jpg",), "a.png": ("a.png",)}


@pytest.mark.parametrize(
    ("which", "captions"),
    [("all", ("a cat", "a tabby, asleep")), ("first", ("a cat",)), ("join", ("a cat a tabby, asleep",))],
)
def test_several_lines(tmp_path, which, captions):
    pair(tmp_path / "a.png", "\ufeffa cat \r\n\r\n  a tabby, asleep\r\n")
    found, errors, warnings = reading(tmp_path, caption_lines=which)
    assert (found, errors) == ({"a.png": captions}, {})
    assert warnings == ({"several_lines": ["a.txt"]} if which == "all" else {})  # nobody may have meant that


def test_kohya_folders_keep_apart_and_repeats_are_warnings(tmp_path):
    pair(tmp_path / "10_sks dog/1.png", "a dog")
    pair(tmp_path / "1_dog/1.png", "another dog")
    found, errors, warnings = reading(tmp_path)
    assert found == {"10_sks dog/1.png": ("a dog",), "1_dog/1.png": ("another dog",)}
    assert errors == {}
    assert list(warnings.values()) == [["10_sks dog"]]


def test_the_class_of_the_folder_where_there_is_no_caption_file(tmp_path):
    image(tmp_path / "1_sks dog/1.png")
    pair(tmp_path / "1_sks dog/2.png", "a dog asleep")
    assert clean(tmp_path, class_captions=True) == {
        "1_sks dog/1.png": ("sks dog",),
        "1_sks dog/2.png": ("a dog asleep",),
    }
    assert reading(tmp_path)[1] == {WITHOUT: ["1_sks dog/1.png"]}


def test_each_half_alone_is_an_error_and_named(tmp_path):
    pair(tmp_path / "a.png", "a cat")
    image(tmp_path / "alone.png")
    pair(tmp_path / "blank.png", " \n\n")
    text(tmp_path / "below/orphan.caption", "nobody")
    found, errors, _ = reading(tmp_path)
    assert found == {"a.png": ("a cat",)}
    assert errors == {WITHOUT: ["alone.png", "blank.png"], ORPHANS: ["below/orphan.caption"]}


def test_what_is_no_file_is_named(tmp_path):
    pair(tmp_path / "a.png", "a cat")
    (tmp_path / "b.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "c.png")
    (tmp_path / "d.png").symlink_to("d.png")
    found, errors, _ = reading(tmp_path)
    assert list(found) == ["a.png"]
    assert errors == {"dead_link": ["b.png", "c.png", "d.png"]}


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    pair(tmp_path / "a.png", "a cat")
    pair(tmp_path / "private/b.png", "no")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found, errors, _ = reading(tmp_path)
    assert list(found) == ["a.png"]
    assert errors == {"unreadable_folder": [f"{tmp_path / 'private'} (Permission denied)"]}


def test_only_line_feeds_end_a_line(tmp_path):
    pair(tmp_path / "a.png", "a cat\u2028on two lines\x0cof print\n")
    assert clean(tmp_path) == {"a.png": ("a cat\u2028on two lines\x0cof print",)}
