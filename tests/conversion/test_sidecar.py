"""Images with a caption file each: beside them, as kohya's scripts leave them, or in a folder of their own."""

import errno
import os
from pathlib import Path

import pytest

from finetuning.data.findings import DatasetError

LINES = "\ufeffa cat \r\n\r\n  a tabby, asleep\r\n"
LATIN = "café".encode("latin-1")
SIDECAR = {  # what: (files, flags, captions, errors, warnings)
    **{
        f"a text file beside each image, {end}": (
            {f"b{end}": " b\n", "b.JPG": 1, "a.png": 1, f"a{end}": " a\n", "below/c.webp": 1, f"below/c{end}": " c\n"},
            {}, {"a.png": ("a",), "b.JPG": ("b",), "below/c.webp": ("c",)}, {}, {},
        )
        for end in (".txt", ".caption", ".TXT", ".Caption")
    },
    "the image's whole name before the ending": (
        {"a.jpg": 1, "a.png": 2, "a.jpg.txt": "jpg", "a.png.txt": "png"},
        {}, {"a.jpg": ("jpg",), "a.png": ("png",)}, {}, {},
    ),
    "several lines, of which nobody may have known": (
        {"a.png": 1, "a.txt": LINES}, {}, {"a.png": ("a cat", "a tabby, asleep")}, {}, {"several_lines": ["a.txt"]},
    ),
    "several lines, the first": (
        {"a.png": 1, "a.txt": LINES}, {"caption_lines": "first"}, {"a.png": ("a cat",)}, {}, {},
    ),
    "several lines, joined": (
        {"a.png": 1, "a.txt": LINES}, {"caption_lines": "join"}, {"a.png": ("a cat a tabby, asleep",)}, {}, {},
    ),
    "only line feeds end a line": (
        {"a.png": 1, "a.txt": "a cat\u2028on two lines\x0cof print\n"},
        {}, {"a.png": ("a cat\u2028on two lines\x0cof print",)}, {}, {},
    ),
    "kohya's folders keep apart, and repeats are told": (
        {"10_sks dog/1.png": 1, "10_sks dog/1.txt": "a dog", "1_dog/1.png": 2, "1_dog/1.txt": "another dog"},
        {}, {"10_sks dog/1.png": ("a dog",), "1_dog/1.png": ("another dog",)}, {}, {"repeats": ["10_sks dog"]},
    ),
    "the class of the folder where there is no caption file": (
        {"1_sks dog/1.png": 1, "1_sks dog/2.png": 2, "1_sks dog/2.txt": "a dog asleep"}, {"class_captions": True},
        {"1_sks dog/1.png": ("sks dog",), "1_sks dog/2.png": ("a dog asleep",)}, {}, {},
    ),
    "the class only where it is asked for": (
        {"1_sks dog/1.png": 1}, {}, {}, {"no_caption_file": ["1_sks dog/1.png"]}, {},
    ),
    "each half alone": (
        {"a.png": 1, "a.txt": "a cat", "alone.png": 2, "blank.png": 3, "blank.txt": " \n\n", "below/o.caption": "x"},
        {}, {"a.png": ("a cat",)},
        {"no_caption_file": ["alone.png", "blank.png"], "caption_file_alone": ["below/o.caption"]}, {},
    ),
}  # fmt: skip
PARALLEL = {
    "images find the caption of their name": (
        {f"{kind}/00{n}.{end}": f"a dog, 00{n} \n" if end == "txt" else n
         for n in (2, 0, 1) for kind, end in (("images", "jpg"), ("captions", "txt"))},
        {}, {f"00{n}.jpg": (f"a dog, 00{n}",) for n in range(3)}, {}, {},
    ),
    "folders inside, and other names of the two": (
        {"img/a/0.png": 1, "img/b/0.v2.png": 2, "labels/a/0.txt": "one", "labels/b/0.v2.caption": "two"},
        {"images_folder": "img", "captions_folder": "labels"}, {"a/0.png": ("one",), "b/0.v2.png": ("two",)}, {}, {},
    ),
    "each half alone": (
        {**{f"images/{name}.jpg": 1 for name in ("0", "alone", "empty", "latin", ".hidden")}, "captions/0.txt": "fine",
         "captions/empty.txt": " \n", "captions/latin.txt": LATIN, "captions/orphan.txt": "x"},
        {}, {"0.jpg": ("fine",)},
        {"no_caption_file": ["images/alone.jpg", "images/empty.jpg"], "caption_not_utf8": ["captions/latin.txt"],
         "caption_file_alone": ["captions/orphan.txt"]}, {},
    ),
    "one caption file for two images, and two for one": (
        {"images/0.jpg": 1, "images/0.png": 2, "images/1.jpg": 3, "captions/0.txt": "shared",
         "captions/1.txt": "unread", "captions/1.caption": "read"},
        {}, {"0.jpg": ("shared",), "0.png": ("shared",), "1.jpg": ("read",)}, {},
        {"shared_caption_file": ["images/0.png"], "second_caption_file": ["captions/1.txt"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("sidecar", one) for one in SIDECAR.values()), *(("parallel", one) for one in PARALLEL.values())],
    ids=[*SIDECAR, *(f"parallel: {name}" for name in PARALLEL)],
)
def test_captions_are_found_and_what_lacks_its_other_half_is_named(tmp_path, lay, read_source, kind, case):
    files, flags, captions, errors, warnings = case
    found = read_source(kind, lay(tmp_path, files), **flags)
    assert found.captions == list(captions.items())
    assert (found.errors, found.warnings) == (errors, warnings)
    for sample in found.samples:
        assert sample.split is None and sample.image == tmp_path / sample.origin and sample.open().size == (4, 4)


def test_what_is_no_file_is_named(tmp_path, lay, read_source):
    lay(tmp_path, {"a.png": 1, "a.txt": "a cat"})
    (tmp_path / "b.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "c.png")
    (tmp_path / "d.png").symlink_to("d.png")
    found = read_source("sidecar", tmp_path)
    assert found.captions == [("a.png", ("a cat",))] and found.errors == {"dead_link": ["b.png", "c.png", "d.png"]}


def test_a_folder_that_may_not_be_read_is_named(tmp_path, lay, read_source, monkeypatch):
    lay(tmp_path, {"a.png": 1, "a.txt": "a cat", "private/b.png": 2, "private/b.txt": "no"})
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = read_source("sidecar", tmp_path)
    assert found.captions == [("a.png", ("a cat",))]
    assert found.errors == {"unreadable_folder": [f"{tmp_path / 'private'} (Permission denied)"]}


@pytest.mark.parametrize("layout", ["{split}/{kind}/0", "{kind}/{split}/0"])
def test_splits_above_or_inside_the_two_folders(tmp_path, lay, clean, layout):
    for split in ("train", "val", "test"):
        image, text = (layout.format(split=split, kind=kind) for kind in ("images", "captions"))
        lay(tmp_path, {f"{image}.jpg": 1, f"{text}.txt": split})
    found = clean("parallel", tmp_path)
    assert {(sample.split, *sample.captions) for sample in found.samples} == {
        ("train", "train"), ("validation", "val"), ("test", "test"),
    }  # fmt: skip
    assert {name for name, _ in found.captions} == {"0.jpg"}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ([], r"no folder .*images: name the two folders with --images_folder"),
        (["images/0.jpg"], r"no folder .*captions: name"),
        (["images/.keep.jpg", "captions/.keep.jpg"], "no images in .*images"),
    ],
)
def test_a_folder_without_the_two_is_refused(tmp_path, lay, read_source, there, message):
    with pytest.raises(DatasetError, match=message):
        read_source("parallel", lay(tmp_path, there))
