"""Image folders in the shapes that people have become samples with the right split, name and captions."""

import json

import pytest


def jsonl(*rows):
    return "".join(json.dumps({"file_name": str(name), "text": text}) + "\n" for name, text in rows)


@pytest.mark.parametrize(
    ("rows", "captions"),
    [
        # by path, whatever the order of the metadata
        ([("below/b.png", "two cats"), ("a.png", "a cat")], ("a cat",)),
        # rows of one image become one sample with all captions
        ([("a.png", "a cat"), ("below/b.png", "two cats"), ("./a.png", "a tabby"), ("a.png", "a cat")],
         ("a cat", "a tabby")),
    ],
)  # fmt: skip
def test_a_flat_folder_has_no_split(tmp_path, lay, read_source, rows, captions):
    lay(tmp_path, {"a.png": 1, "below/b.png": 2, "metadata.jsonl": jsonl(*rows)})
    found = read_source("imagefolder", tmp_path)
    assert found.captions == [("a.png", captions), ("below/b.png", ("two cats",))]
    assert {split for split, _ in found.places} == {None} and not found.errors


def test_a_link_in_a_circle_is_no_image_beside_the_splits(tmp_path, lay, clean):
    lay(tmp_path / "test", {"1.png": 1, "metadata.jsonl": jsonl(("1.png", "first"))})
    (tmp_path / "again").symlink_to(tmp_path)
    assert clean("imagefolder", tmp_path).places == {("test", "1.png")}


def test_images_outside_keep_apart_from_those_inside(tmp_path, lay, clean):
    outside = lay(tmp_path / "outside", ["x/a.png", "y/a.png"])
    rows = ("a.png", "in"), (outside / "x/a.png", "x"), (outside / "y/a.png", "y")
    lay(tmp_path / "inside", {"a.png": 1, "metadata.jsonl": jsonl(*rows)})
    found = clean("imagefolder", tmp_path / "inside", allow_outside_paths=True)
    assert dict(found.captions) == {
        "a.png": ("in",), "../outside/x/a.png": ("x",), "../outside/y/a.png": ("y",),
    }  # fmt: skip
