"""prepare_dataset.py as a user runs it: the folder that comes out, the exit status, the messages."""

import json
import os
import signal
import tarfile
import time

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, config
from datasets import Image as ImageColumn
from PIL import Image
from scipy.io import savemat

from finetuning.conversion.sources import SOURCES
from finetuning.data.findings import Findings
from finetuning.data.images import open_rgb
from finetuning.data.reading import read_folder
from prepare_dataset import main


@pytest.fixture
def folder(tmp_path, lay):
    """Two images with metadata."""
    rows = [json.dumps({"file_name": f"{name}.png", "text": f"image {name}"}) + "\n" for name in "ab"]
    images = {f"{name}.png": Image.new("RGB", (8, 6), (i, 0, 0)) for i, name in enumerate("ab")}
    return lay(tmp_path / "photos", {**images, "metadata.jsonl": "".join(rows)})


def convert(source, output, *more, kind="imagefolder"):
    fractions = ["--validation_fraction", "0", "--test_fraction", "0"]
    return main(["convert", kind, str(source), "--output", str(output), *fractions, *map(str, more)])


def captions(output):
    written = (output / "train/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, written)}


# Each source, a handful of images; tests/conversion has their schemas and oddities


def lines(*rows):
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def imagefolder(lay, root):
    rows = [{"file_name": name, "text": f"image {name}"} for name in ("train/1.png", "val/1.png")]
    lay(root, {"train/1.png": 10, "val/1.png": 20, "metadata.jsonl": lines(*rows)})
    return root, [], {"train/1.png": (10, "image train/1.png"), "validation/1.png": (20, "image val/1.png")}


def sidecar(lay, root):
    lay(root, {"1_sks dog/1.png": 10, "1_sks dog/1.caption": "sks dog, asleep\n", "1_dog/1.png": 20})
    return root, ["--class_captions"], {
        "train/1_dog-1.png": (20, "dog"), "train/1_sks dog-1.png": (10, "sks dog, asleep"),
    }  # fmt: skip


def parallel(lay, root):
    lay(root, {"images/000.png": 10, "images/001.png": 20, "captions/000.txt": "a dog ", "captions/001.txt": "two"})
    return root, [], {"train/000.png": (10, "a dog"), "train/001.png": (20, "two")}


def unsplash(lay, root):
    columns = ["photo_id", "photo_image_url", "photo_description", "ai_description"]
    rows = [["XMyPniM9LF0", "https://images/1", "", "brown dunes"], ["rDLBArZUl1c", "https://images/2", "My lake", ""]]
    lay(root, {"photos.csv000": lines(*("\t".join(row) for row in (columns, *rows)))})
    lay(root.parent / "images", {"XMyPniM9LF0.png": 10, "jo-rDLBArZUl1c-unsplash.png": 20})
    flags = ["--images", root.parent / "images", "--caption_from", "description", "ai_description"]
    return root, flags, {"train/XMyPniM9LF0.png": (10, "brown dunes"), "train/rDLBArZUl1c.png": (20, "My lake")}


def sbu(lay, root):
    urls, captions = ["http://host/1/a.jpg?zz=1", "http://host/2/b.jpg"], ["Egyptian cat .", "Man in a boat"]
    lists = {"urls": lines(*urls), "captions": lines(*captions)}
    lay(root, {f"dataset/SBU_captioned_photo_dataset_{name}.txt": content for name, content in lists.items()})
    lay(root / "fetched", {"a.jpg": 10, "b.jpg": 20})
    return root, ["--images", root / "fetched"], {
        "train/a.png": (10, "Egyptian cat ."), "train/b.png": (20, "Man in a boat"),
    }  # fmt: skip


def stanford_dogs(lay, root):
    box = "<bndbox><xmin>2</xmin><ymin>4</ymin><xmax>18</xmax><ymax>20</ymax></bndbox>"
    xml = f"<annotation><size><width>32</width><height>24</height></size><object>{box}</object></annotation>"
    dogs = ["n02085620-Chihuahua/n02085620_7", "n02099429-curly-coated_retriever/n02099429_1"]
    for number, (dog, split) in enumerate(zip(dogs, ("train", "test"), strict=True), 1):
        image = Image.new("RGB", (32, 24), (10 * number, 0, 0))
        lay(root, {f"Images/{dog}.jpg": image, f"Annotation/{dog}": xml})
        cells = np.array([[f"{dog}.jpg"]], dtype=object)
        savemat(root / f"{split}_list.mat", {"file_list": cells, "labels": np.ones((1, 1), np.uint8)})
    return root, ["--crop_to_dogs", "--lower_case_breeds"], {
        "train/n02085620-Chihuahua-n02085620_7.png": (10, "a photo of a chihuahua"),
        "test/n02099429-curly-coated_retriever-n02099429_1.png": (20, "a photo of a curly-coated retriever"),
    }  # fmt: skip


def dreambooth(lay, root):
    table = lines("Classes", "", "subject_name,class", "dog6,dog", "vase,vase", "", "Prompts", "", "Object Prompts")
    lay(root / "dataset", {"dog6/00.jpg": 10, "dog6/01.jpg": 20, "vase/00.jpg": 30, "prompts_and_classes.txt": table})
    return root, ["--subject", "dog6"], {
        "train/dog6-00.png": (10, "a photo of sks dog"), "train/dog6-01.png": (20, "a photo of sks dog"),
    }  # fmt: skip


def webdataset(lay, root):
    lay(root, {"loose/0.png": 10, "loose/0.txt": "a dog", "loose/1.png": 20, "loose/1.json": '{"caption": "two"}'})
    with tarfile.open(root / "00000.tar", "w") as tar:
        tar.add(root / "loose", ".")
    return root / "{00000..00000}.tar", [], {"train/00000-0.png": (10, "a dog"), "train/00000-1.png": (20, "two")}


def hub(lay, root):
    lay(root, {"10.png": 10, "20.png": 20})
    image = lambda red: {"bytes": (root / f"{red}.png").read_bytes(), "path": None}
    splits = {"train": (10, "a dog"), "test": (20, "two")}
    tables = {split: Dataset.from_dict({"img": [image(red)], "alt": [text]}) for split, (red, text) in splits.items()}
    tables = {split: table.cast_column("img", ImageColumn()) for split, table in tables.items()}
    DatasetDict(tables).save_to_disk(root / "d")
    flags = ["--image_column", "img", "--caption_column", "alt"]
    return root / "d", flags, {f"{split}/{split}-00000000.png": value for split, value in splits.items()}


def generated(lay, root):
    records = [{"file": "0_a dog.png", "prompt": "a dog", "seed": 3}, {"file": "1_two.png", "prompt": "two"}]
    lay(root, {"0_a dog.png": 10, "1_two.png": 20, "grid.png": 30, "images.json": records})
    return root, [], {"train/0_a dog.png": (10, "a dog"), "train/1_two.png": (20, "two")}


SOURCES_OF = {
    "imagefolder": imagefolder, "sidecar": sidecar, "parallel": parallel, "unsplash-lite": unsplash, "sbu": sbu,
    "stanford-dogs": stanford_dogs, "dreambooth": dreambooth, "generated": generated,
    "webdataset": webdataset, "hub": hub,
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_becomes_a_folder_that_training_accepts(kind, tmp_path, lay, monkeypatch, capsys):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path, flags, expected = SOURCES_OF[kind](lay, tmp_path / "source")
    output = tmp_path / "out"
    assert convert(path, output, *flags, kind=kind) == 0, capsys.readouterr().err
    findings, found = Findings(), {}
    for split in ("train", "validation", "test"):
        for row in read_folder(output, split, "image", "text", False, findings) or ():
            red, _, _ = open_rgb(row.image).getpixel((1, 1))
            found[f"{split}/{row.image.name}"] = (red, *row.captions)
    assert found == expected
    assert not findings.errors and not findings.warnings
    assert open_rgb(next(output.glob("train/*.png"))).size == ((16, 16) if kind == "stanford-dogs" else (4, 4))
    assert main(["check", str(output), "--resolution", "8"]) == 0
    assert "training would accept it" in capsys.readouterr().out


# The script


def test_settings_reach_the_images(folder, tmp_path):
    assert convert(folder, tmp_path / "out", "--max_side", "4", "--image_format", "jpg", "--limit", "1") == 0
    assert captions(tmp_path / "out") == {"a.jpg": "image a"}
    with Image.open(tmp_path / "out/train/a.jpg") as image:
        assert (image.size, image.format) == ((4, 3), "JPEG")


def test_faults_of_the_source_are_all_named_before_anything_is_written(folder, tmp_path, capsys):
    Image.new("RGB", (8, 6)).save(folder / "mute.png")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "gone.png", "text": "no"}\n')
    assert convert(folder, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "2 errors" in message and "mute.png" in message and "gone.png" in message
    assert "--on_bad_rows skip" in message
    assert not (tmp_path / "out").exists()
    assert convert(folder, tmp_path / "out", "--on_bad_rows", "skip") == 0
    assert "mute.png" in capsys.readouterr().err
    assert list(captions(tmp_path / "out")) == ["a.png", "b.png"]


def test_a_broken_image_ends_with_status_1_and_can_be_mended(folder, tmp_path, capsys):
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:40])
    assert convert(folder, tmp_path / "out") == 1
    assert "1 image could not be taken" in capsys.readouterr().err
    (folder / "b.png").write_bytes(whole)
    assert convert(folder, tmp_path / "out") == 0
    assert list(captions(tmp_path / "out")) == ["a.png", "b.png"]


@pytest.mark.parametrize("output", ["photos", "photos/new", "taken"])
def test_an_output_that_cannot_be(folder, tmp_path, output, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    before = sorted(os.listdir(folder))
    assert convert(folder, tmp_path / output) == 1
    assert "--output" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == before and os.listdir(tmp_path / "taken") == ["notes.txt"]


def test_a_killed_conversion_goes_on(tmp_path, lay):
    """SIGKILL, which nothing can catch, in the middle of the images."""
    numbers = range(60)
    images = {f"{i:03}.png": Image.new("RGB", (300, 300), (i, 0, 5)) for i in numbers}
    folder = lay(tmp_path / "photos", images | {f"{i:03}.txt": f"number {i}" for i in numbers})
    output, flags = tmp_path / "out", ("--image_format", "webp", "--workers", "1")
    child = os.fork()
    if child == 0:
        try:
            convert(folder, output, *flags, kind="sidecar")
        finally:
            os._exit(99)
    while len(list(output.glob("train/*.webp"))) < 10:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = len(list(output.glob("train/*.webp")))
    assert 10 <= done < 60 and not (output / "conversion.json").exists()
    assert convert(folder, output, *flags, kind="sidecar") == 0
    assert captions(output) == {f"{i:03}.webp": f"number {i}" for i in numbers}
    assert {path.name for path in output.glob("train/*")} == {*captions(output), "metadata.jsonl"}
