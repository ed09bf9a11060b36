"""What all readers of folders have in common: splits, links, hidden files, and folders that hold nothing."""

import json
from pathlib import Path

import pytest

from finetuning.data.findings import DatasetError

FLAGS = {"instance_prompt": ["a {token} dog"]}
SPLITS = ("imagefolder", "sidecar", "parallel")  # which know folders of splits
every_source = pytest.mark.parametrize("kind", [*SPLITS, "dreambooth", "stanford-dogs", "generated", "webdataset"])
with_split_folders = pytest.mark.parametrize("kind", SPLITS)


@pytest.fixture
def put(lay, pack):
    """Add an image with all that a kind of source wants beside it."""

    def put(kind, root, name):
        text = str(Path(name).with_suffix(".txt"))
        if kind == "imagefolder":
            metadata = root / "metadata.jsonl"
            before = metadata.read_text() if metadata.is_file() else ""
            lay(root, {name: 1, "metadata.jsonl": before + json.dumps({"file_name": name, "text": name}) + "\n"})
        elif kind == "webdataset":
            pack((root / name).with_suffix(".tar"), {"0.png": 1, "0.txt": "a caption"})
        else:
            lay(root, {
                "sidecar": {name: 1, text: name}, "parallel": {f"images/{name}": 1, f"captions/{text}": name},
                "generated": {name: 1, "images.json": [{"file": name, "prompt": "a dog"}]},
                "dreambooth": {f"dog/{name}": 1}, "stanford-dogs": {f"Images/n02085620-Chihuahua/{name}": 1},
            }[kind])  # fmt: skip

    return put


@every_source
def test_a_folder_that_is_not_there_or_holds_nothing_is_refused(tmp_path, read_source, kind):
    (tmp_path / "empty").mkdir()
    for name in ("gone", "empty"):
        with pytest.raises(DatasetError, match=name):
            read_source(kind, tmp_path / name, **FLAGS)


@every_source
def test_hidden_files_are_no_data(tmp_path, read_source, put, kind):
    root = tmp_path / "set"
    put(kind, root, "1.png")
    found = read_source(kind, root, **FLAGS)
    put(kind, root / ".trash", "2.png")
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        (folder / "._1.png").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves on other disks
    assert read_source(kind, root, **FLAGS) == found and not found.errors


# imagefolder: its rows are refused, not its links: tests/data/test_reading.py
@pytest.mark.parametrize("kind", ["sidecar", "parallel", "dreambooth", "stanford-dogs", "webdataset"])
def test_links_that_lead_out_are_followed_only_by_leave(tmp_path, read_source, put, kind):
    put(kind, tmp_path / "elsewhere", "2.png")
    put(kind, tmp_path / "set", "1.png")
    inside = read_source(kind, tmp_path / "set", **FLAGS).places
    name, leads = ("dog2", "dog") if kind == "dreambooth" else ("more", "")
    for place in ("images", "captions") if kind == "parallel" else ("",):
        (tmp_path / "set" / place / name).symlink_to(tmp_path / "elsewhere" / place / leads)
    (tmp_path / "set/again").symlink_to(tmp_path / "set")  # a circle
    found = read_source(kind, tmp_path / "set", **FLAGS)
    assert found.places == inside and list(found.errors) == ["link_outside"]
    found = read_source(kind, tmp_path / "set", **FLAGS, allow_outside_paths=True)
    assert found.errors == {} and inside < found.places and len(found.samples) == 2


@with_split_folders
@pytest.mark.parametrize(
    ("names", "places"),
    [
        *(([f"{name}/below/1.png" for name in names],
           {(split, "below/1.png") for split in ("train", "validation", "test")})
          for names in (("train", "val", "test"), ("Training", "VALID", "Testing"))),
        # beside a validation folder: for training
        (["val/1.png", "1.png", "more/2.png"], {("validation", "1.png"), ("train", "1.png"), ("train", "more/2.png")}),
        (["dogs/1.png"], {(None, "dogs/1.png")}),
    ],
    ids=["usual", "any case", "beside validation", "none"],
)  # fmt: skip
def test_folders_at_the_top_are_splits(tmp_path, clean, put, kind, names, places):
    for name in names:
        put(kind, tmp_path, name)
    assert clean(kind, tmp_path).places == places


@with_split_folders
def test_images_beside_train_are_named(tmp_path, read_source, put, kind):
    put(kind, tmp_path, "train/1.png")
    put(kind, tmp_path, "loose.png")
    found = read_source(kind, tmp_path)
    assert found.places == {("train", "1.png")}
    assert [Path(name).name for name in found.errors["beside_splits"]] == ["loose.png"]


@with_split_folders
def test_two_folders_for_one_split_are_refused_by_name(tmp_path, read_source, put, kind):
    for name in ("train/1.png", "val/1.png", "dev/2.png"):
        put(kind, tmp_path, name)
    with pytest.raises(DatasetError, match=r"dev/? and val"):
        read_source(kind, tmp_path)
