"""What a folder is: images, something that `datasets` wrote, or tars; and which folders in it are splits."""

import io
import json
import tarfile
from dataclasses import dataclass

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from finetuning.data.checking import read_checked
from finetuning.data.findings import DatasetError
from finetuning.data.folders import is_saved_dataset, split_folders
from finetuning.data.shards import open_shards


def png(side=4):
    content = io.BytesIO()
    PILImage.new("RGB", (side, side)).save(content, "PNG")
    return content.getvalue()


def image_folder(root):
    root.mkdir(parents=True, exist_ok=True)
    (root / "a.png").write_bytes(png())
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a cat"}) + "\n")
    return root


def scores(path):
    """Somebody's table about the images, without images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a.png"], "score": [0.5]}), path)


def with_images(path, *captions):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": png(), "path": None} for _ in captions], "text": list(captions)}
    Dataset.from_dict(rows, features=Features({"image": Image(), "text": Value("string")})).to_parquet(path)


def img2dataset(root, shard="00000"):
    """A tar as img2dataset writes it, with its table and statistics beside it."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / f"{shard}.tar", "w") as tar:
        for name, content in (("0.png", png()), ("0.txt", b"a cat"), ("0.json", b'{"caption": "a cat"}')):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    table = pyarrow.table({"url": ["http://host/0.png"], "caption": ["a cat"], "status": ["success"]})
    pyarrow.parquet.write_table(table, root / f"{shard}.parquet")
    (root / f"{shard}_stats.json").write_text('{"successes": 1}')
    return root


@dataclass
class Args:
    """What reads a dataset looks at."""

    train_data_dir: str
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    allow_outside_paths: bool = False
    on_bad_rows: str = "error"
    max_train_samples: int | None = None
    check_images: str = "full"
    aspect_buckets: bool = False
    size: tuple = (8, 8)
    caption_prefix: str = ""
    random_flip: bool = False


class Words:
    """Stands where no tokenizer is needed."""

    model_max_length = 77

    def __call__(self, texts, verbose=False):
        self.input_ids = [[0, 1]] if isinstance(texts, str) else [text.split() for text in texts]
        return self


@pytest.mark.parametrize(
    "stray", ["train/scores.parquet", "scores.parquet", "train/cache.arrow", "train/below/more.parquet"]
)
def test_a_table_beside_images_and_metadata_changes_nothing(tmp_path, stray):
    image_folder(tmp_path / "train")
    scores(tmp_path / stray)
    assert not is_saved_dataset(tmp_path)
    found = read_checked(Args(str(tmp_path)), Words(), 0)
    assert [row.captions for row in found.rows] == [("a cat",)] and not found.findings.errors


def test_images_without_metadata_beside_a_table_without_images_are_an_image_folder(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    scores(tmp_path / "scores.parquet")
    assert not is_saved_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"no metadata\.jsonl"):
        read_checked(Args(str(tmp_path)), Words(), 0)


def test_tables_with_images_are_a_dataset_even_beside_a_logo(tmp_path):
    with_images(tmp_path / "data/train-00000-of-00001.parquet", "a cat")
    assert is_saved_dataset(tmp_path)
    (tmp_path / "logo.png").write_bytes(png())
    assert is_saved_dataset(tmp_path)
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert is_saved_dataset(tmp_path / "saved")


def test_a_row_of_a_table_without_an_image_is_an_error_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [None, {"bytes": png(), "path": None}], "text": ["a ghost", "a cat"]}
    (tmp_path / "set/data").mkdir(parents=True)
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set/data/train.parquet")
    found = read_checked(Args(str(tmp_path / "set")), Words(), 0, cache_dir=str(tmp_path / "cache"))
    assert [one.where for one in found.findings.errors["unreadable_image"]] == ["row 0"]
    assert [row.captions for row in found.rows] == [("a cat",)]


def test_a_folder_of_img2dataset_streams_its_tars_and_leaves_its_tables(tmp_path):
    for shard in ("00000", "00001"):
        img2dataset(tmp_path, shard)
    shards = open_shards(Args(str(tmp_path)), say=pytest.fail)
    assert shards.names == ["00000.tar", "00001.tar"]
    assert [sample.captions for sample in shards.read(0)] == [("a cat",)]


def test_a_folder_of_tars_says_that_they_need_streaming(tmp_path):
    img2dataset(tmp_path)
    assert not is_saved_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"00000\.tar.*--streaming"):
        read_checked(Args(str(tmp_path)), Words(), 0)


def test_split_folders_are_known_in_any_case(tmp_path):
    for name in ("Train", "VALID", "testing", "images"):
        image_folder(tmp_path / name)
    found = split_folders(tmp_path)
    assert {split: folder.name for split, folder in found.items()} == {
        "train": "Train", "validation": "VALID", "test": "testing",
    }  # fmt: skip
    (tmp_path / "test").mkdir()  # an empty one is no second split
    assert split_folders(tmp_path)["test"].name == "testing"
    image_folder(tmp_path / "Dev")
    with pytest.raises(DatasetError, match="Dev/ and VALID/"):
        split_folders(tmp_path)
