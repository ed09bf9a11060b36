"""Image folders in the shapes that people have become samples with the right split, name and captions."""

import json
from dataclasses import dataclass

import pytest
from PIL import Image

from finetuning.conversion.imagefolder import read
from finetuning.data.findings import Findings


@dataclass
class Args:
    image_column: str = "image"
    caption_column: str = "text"
    allow_outside_paths: bool = False


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)


def jsonl(folder, *rows):
    lines = [json.dumps({"file_name": str(name), "text": text}) + "\n" for name, text in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def samples(root, **settings):
    """{(split, name): captions} of a folder in which nothing is wrong."""
    findings = Findings()
    found = list(read(str(root), Args(**settings), findings))
    assert not findings.errors
    assert len({one.key for one in found}) == len(found)
    assert all(one.image.is_file() for one in found)
    return {(one.split, one.name): one.captions for one in found}


CATS = {(None, "a.png"): ("a cat",), (None, "below/b.png"): ("two cats",)}


@pytest.fixture
def cats(tmp_path):
    """Two images, one in a folder below, still without metadata."""
    images(tmp_path, "a.png", "below/b.png")
    return tmp_path


def test_a_flat_folder_has_no_split(cats):
    jsonl(cats, ("below/b.png", "two cats"), ("a.png", "a cat"))
    assert samples(cats) == CATS
    assert list(samples(cats)) == list(CATS)  # by path, whatever the order of the metadata


def test_a_link_in_a_circle_is_no_image_beside_the_splits(tmp_path):
    images(tmp_path / "test", "1.png")
    jsonl(tmp_path / "test", ("1.png", "first"))
    (tmp_path / "again").symlink_to(tmp_path)
    assert samples(tmp_path) == {("test", "1.png"): ("first",)}


def test_rows_of_one_image_become_one_sample_with_all_captions(cats):
    jsonl(cats, ("a.png", "a cat"), ("below/b.png", "two cats"), ("./a.png", "a tabby"), ("a.png", "a cat"))
    found = samples(cats)
    assert sorted(found[None, "a.png"]) == ["a cat", "a tabby"]
    assert found[None, "below/b.png"] == ("two cats",)


def test_images_outside_keep_apart_from_those_inside(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    images(inside, "a.png")
    images(outside, "x/a.png", "y/a.png")
    jsonl(inside, ("a.png", "in"), (outside / "x/a.png", "x"), (outside / "y/a.png", "y"))
    assert samples(inside, allow_outside_paths=True) == {
        (None, "a.png"): ("in",),
        (None, "../outside/x/a.png"): ("x",),
        (None, "../outside/y/a.png"): ("y",),
    }
