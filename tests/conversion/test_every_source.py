"""What all readers of folders have in common: splits, links, hidden files, and folders that hold nothing."""

import io
import json
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from finetuning.conversion import dreambooth, imagefolder, sidecar, stanford_dogs
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.tars import read_shards

BREED = "n02085620-Chihuahua"
FLAGS = {
    "image_column": "image", "caption_column": "text", "caption_lines": "all", "class_captions": False,
    "images_folder": "images", "captions_folder": "captions", "subject": None, "instance_prompt": ["a {token} dog"],
    "instance_token": "sks", "dog_captions": ["{name}"], "lower_case_breeds": False, "use_lists": True,
    "crop_to_dogs": False, "image_field": None, "caption_field": None, "json_key": "caption",
}  # fmt: skip


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def in_metadata(root, name):
    image(root / name)
    with open(root / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": name, "text": name}) + "\n")


def beside(root, name):
    image(root / name)
    text((root / name).with_suffix(".txt"), name)


def in_two_folders(root, name):
    image(root / "images" / name)
    text((root / "captions" / name).with_suffix(".txt"), name)


def of_a_subject(root, name):
    image(root / "dog" / name)


def of_a_breed(root, name):
    image(root / "Images" / BREED / name)


def in_a_tar(root, name):
    path = (root / name).with_suffix(".tar")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    with tarfile.open(path, "w") as tar:
        for field, data in (("png", content.getvalue()), ("txt", b"a caption")):
            entry = tarfile.TarInfo(f"0.{field}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


SOURCES = {
    "imagefolder": (imagefolder.read, in_metadata), "sidecar": (sidecar.read, beside),
    "parallel": (sidecar.read_parallel, in_two_folders), "dreambooth": (dreambooth.read, of_a_subject),
    "stanford-dogs": (stanford_dogs.read, of_a_breed), "webdataset": (read_shards, in_a_tar),
}  # fmt: skip
every_source = pytest.mark.parametrize(("read", "put"), SOURCES.values(), ids=SOURCES)
with_split_folders = pytest.mark.parametrize(("read", "put"), [*SOURCES.values()][:3], ids=[*SOURCES][:3])


def taken(read, root, allow_outside_paths=False):
    """({(split, name), ...}, errors) of a source."""
    findings = Findings()
    flags = Namespace(**FLAGS, allow_outside_paths=allow_outside_paths, limit=None)
    samples = list(read(str(root), flags, findings))
    assert len({sample.key for sample in samples}) == len(samples)
    return {(sample.split, sample.name) for sample in samples}, findings.as_dict()["errors"]


@every_source
def test_a_folder_that_is_not_there_or_holds_nothing_is_refused(tmp_path, read, put):
    (tmp_path / "empty").mkdir()
    for name in ("gone", "empty"):
        with pytest.raises(DatasetError, match=name):
            taken(read, tmp_path / name)


@every_source
def test_hidden_files_are_no_data(tmp_path, read, put):
    put(tmp_path / "set", "1.png")
    found, _ = taken(read, tmp_path / "set")
    put(tmp_path / "set" / ".trash", "2.png")
    for folder in [path for path in (tmp_path / "set").rglob("*") if path.is_dir()]:
        (folder / "._1.png").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves on other disks
    assert taken(read, tmp_path / "set") == (found, {})


@every_source
def test_links_that_lead_out_are_followed_only_by_leave(tmp_path, read, put):
    if read is imagefolder.read:
        pytest.skip("its rows are refused, not its links: tests/data/test_reading.py")
    put(tmp_path / "elsewhere", "2.png")
    put(tmp_path / "set", "1.png")
    inside, _ = taken(read, tmp_path / "set")
    name = {sidecar.read_parallel: "more", stanford_dogs.read: "more", dreambooth.read: "dog2"}.get(read, "more")
    for place in ("images", "captions") if read is sidecar.read_parallel else ("",):
        leads = tmp_path / "elsewhere" / place
        (tmp_path / "set" / place / name).symlink_to(leads / "dog" if read is dreambooth.read else leads)
    (tmp_path / "set/again").symlink_to(tmp_path / "set")  # a circle
    found, errors = taken(read, tmp_path / "set")
    assert found == inside and list(errors) == ["link_outside"]
    found, errors = taken(read, tmp_path / "set", allow_outside_paths=True)
    assert errors == {} and inside < found and len(found) == 2


@with_split_folders
@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALID", "Testing")])
def test_split_folders_are_splits_in_any_case(tmp_path, read, put, names):
    for name in names:
        put(tmp_path, f"{name}/below/1.png")
    splits = ("train", "validation", "test")
    assert taken(read, tmp_path) == ({(split, "below/1.png") for split in splits}, {})


@with_split_folders
def test_images_beside_a_validation_folder_are_for_training(tmp_path, read, put):
    for name in ("val/1.png", "1.png", "more/2.png"):
        put(tmp_path, name)
    expected = {("validation", "1.png"), ("train", "1.png"), ("train", "more/2.png")}
    assert taken(read, tmp_path) == (expected, {})


@with_split_folders
def test_images_beside_train_are_named(tmp_path, read, put):
    put(tmp_path, "train/1.png")
    put(tmp_path, "loose.png")
    found, errors = taken(read, tmp_path)
    assert found == {("train", "1.png")} and [Path(name).name for name in errors["beside_splits"]] == ["loose.png"]


@with_split_folders
def test_two_folders_for_one_split_are_refused_by_name(tmp_path, read, put):
    for name in ("train/1.png", "val/1.png", "dev/2.png"):
        put(tmp_path, name)
    with pytest.raises(DatasetError, match=r"dev/? and val"):
        taken(read, tmp_path)


@with_split_folders
def test_without_split_folders_at_the_top_there_is_no_split(tmp_path, read, put):
    put(tmp_path, "dogs/1.png")
    assert taken(read, tmp_path) == ({(None, "dogs/1.png")}, {})
