"""Images in one folder and captions in another, as in gm2-datasets: 37 dogs, one line each, no splits."""

from dataclasses import dataclass

import pytest
from PIL import Image

from finetuning.conversion import sidecar
from finetuning.data.findings import DatasetError, Findings


@dataclass
class Args(sidecar.ParallelArgs):
    """Every flag that the reader looks at."""

    allow_outside_paths: bool = False


def lay(root, images=(), captions=()):
    """Write images, and captions {name: text or bytes}."""
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    for name, text in dict(captions).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def read(root, **flags):
    findings = Findings()
    return list(sidecar.read_parallel(str(root), Args(**flags), findings)), findings


def clean(root, **flags):
    samples, findings = read(root, **flags)
    assert findings.report() == ""
    return samples


def test_images_find_the_caption_of_their_name(tmp_path):
    names = [f"{number:03}" for number in (2, 0, 1)]
    lay(tmp_path, [f"images/{name}.jpg" for name in names], {f"captions/{n}.txt": f"a dog, {n} \n" for n in names})
    samples = clean(tmp_path)
    assert [sample.name for sample in samples] == ["000.jpg", "001.jpg", "002.jpg"]
    assert [sample.captions for sample in samples] == [("a dog, 000",), ("a dog, 001",), ("a dog, 002",)]
    assert [sample.split for sample in samples] == [None] * 3
    assert samples[1].image == tmp_path / "images/001.jpg" and samples[1].origin == "images/001.jpg"
    assert samples[1].open().size == (4, 4)


@pytest.mark.parametrize("layout", ["{split}/{kind}/0", "{kind}/{split}/0"])
def test_splits_above_or_inside_the_two_folders(tmp_path, layout):
    for split in ("train", "val", "test"):
        lay(
            tmp_path,
            [layout.format(split=split, kind="images") + ".jpg"],
            {layout.format(split=split, kind="captions") + ".txt": split},
        )
    samples = clean(tmp_path)
    assert {sample.split: sample.captions for sample in samples} == {
        "train": ("train",), "validation": ("val",), "test": ("test",),
    }  # fmt: skip
    assert len({sample.key for sample in samples}) == 3


def test_what_lacks_its_other_half_is_named(tmp_path):
    lay(
        tmp_path,
        ["images/0.jpg", "images/alone.jpg", "images/empty.jpg", "images/latin.jpg", "images/.hidden.jpg"],
        {
            "captions/0.txt": "fine", "captions/empty.txt": " \n", "captions/latin.txt": "café".encode("latin-1"),
            "captions/orphan.txt": "of nothing",
        },
    )  # fmt: skip
    samples, findings = read(tmp_path)
    assert [sample.name for sample in samples] == ["0.jpg"]
    assert findings.as_dict()["errors"] == {
        "no_caption_file": ["images/alone.jpg", "images/empty.jpg"],
        "caption_not_utf8": ["captions/latin.txt"],
        "caption_file_alone": ["captions/orphan.txt"],
    }


def test_one_caption_file_for_two_images_and_two_for_one_are_warnings(tmp_path):
    captions = {"captions/0.txt": "shared", "captions/1.txt": "unread", "captions/1.caption": "read"}
    lay(tmp_path, ["images/0.jpg", "images/0.png", "images/1.jpg"], captions)
    samples, findings = read(tmp_path)
    assert [sample.captions for sample in samples] == [("shared",), ("shared",), ("read",)]
    assert not findings.errors
    assert list(findings.as_dict()["warnings"].values()) == [["images/0.png"], ["captions/1.txt"]]


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ([], r"no folder .*images: name the two folders with --images_folder"),
        (["images/0.jpg"], r"no folder .*captions: name"),
        (["images/.keep.jpg", "captions/.keep.jpg"], "no images in .*images"),
    ],
)
def test_a_folder_that_is_not_like_this_is_refused(tmp_path, there, message):
    lay(tmp_path, there)
    with pytest.raises(DatasetError, match=message):
        read(tmp_path)


def test_folders_inside_and_other_names_of_the_two(tmp_path):
    lay(tmp_path, ["img/a/0.png", "img/b/0.v2.png"], {"labels/a/0.txt": "one", "labels/b/0.v2.caption": "two"})
    samples = clean(tmp_path, images_folder="img", captions_folder="labels")
    assert [(sample.name, sample.captions) for sample in samples] == [("a/0.png", ("one",)), ("b/0.v2.png", ("two",))]
