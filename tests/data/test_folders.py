"""What a folder is: images, something that `datasets` wrote, or tars; whatever tables lie beside them."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from finetuning.data.checking import read_checked
from finetuning.data.findings import DatasetError
from finetuning.data.folders import is_saved_dataset
from finetuning.data.shards import open_shards


@pytest.fixture
def image_folder(encoded, write_metadata):
    def image_folder(root):
        root.mkdir(parents=True, exist_ok=True)
        (root / "a.png").write_bytes(encoded())
        write_metadata(root, [("a.png", "a cat")])

    return image_folder


@pytest.fixture
def img2dataset(tmp_path, encoded, write_tar):
    """A tar as img2dataset writes it, with its table and statistics beside it."""

    def img2dataset(shard="00000"):
        record = json.dumps({"caption": "a cat"})
        write_tar(tmp_path / f"{shard}.tar", {"0.png": encoded(), "0.txt": "a cat", "0.json": record})
        table = pyarrow.table({"url": ["http://host/0.png"], "caption": ["a cat"], "status": ["success"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text('{"successes": 1}')

    return img2dataset


@pytest.fixture
def check(tmp_path, data_args, tokenize):
    return lambda: read_checked(data_args(tmp_path), tokenize.tokenizers.values(), 0)


def scores(path):
    """Somebody's table about the images, without images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a.png"], "score": [0.5]}), path)


@pytest.mark.parametrize(
    "stray", ["train/scores.parquet", "scores.parquet", "train/cache.arrow", "train/below/more.parquet"]
)
def test_a_table_beside_images_and_metadata_changes_nothing(tmp_path, image_folder, check, stray):
    image_folder(tmp_path / "train")
    scores(tmp_path / stray)
    assert not is_saved_dataset(tmp_path)
    found = check()
    assert [row.captions for row in found.rows] == [("a cat",)] and not found.findings.errors


def test_images_without_metadata_beside_a_table_without_images_are_an_image_folder(tmp_path, image_folder, check):
    image_folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    scores(tmp_path / "scores.parquet")
    with pytest.raises(DatasetError, match=r"no metadata\.jsonl"):
        check()


def test_tables_with_images_are_a_dataset_even_beside_a_logo(tmp_path, encoded, write_parquet):
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [(encoded(), "a cat")])
    assert is_saved_dataset(tmp_path)
    (tmp_path / "logo.png").write_bytes(encoded())
    assert is_saved_dataset(tmp_path)
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert is_saved_dataset(tmp_path / "saved")


def test_a_folder_of_img2dataset_streams_its_tars_and_leaves_its_tables(tmp_path, img2dataset, stream_args):
    for shard in ("00000", "00001"):
        img2dataset(shard)
    shards = open_shards(stream_args(tmp_path), say=pytest.fail)
    assert shards.names == ["00000.tar", "00001.tar"]
    assert [sample.captions for sample in shards.read(0)] == [("a cat",)]


def test_a_folder_of_tars_says_that_they_need_streaming(img2dataset, check):
    img2dataset()
    with pytest.raises(DatasetError, match=r"00000\.tar.*--streaming"):
        check()
