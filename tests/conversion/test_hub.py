"""Datasets with the images inside: what save_to_disk, to_parquet and the Hub's own Parquet files hold."""

import io

import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value, config
from PIL import Image as PILImage

from finetuning.data.findings import DatasetError
from finetuning.data.images import UnreadableImage


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` unpacks goes away with the test."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(side, kind="JPEG"):
    content = io.BytesIO()
    PILImage.new("RGB", (side, side)).save(content, kind)
    return content.getvalue()


def table(*captions, images=None, image="image", text="text"):
    """Rows whose images are squares of 1, 2, 3 ... pixels, in the Hub's schema."""
    images = images or [{"bytes": encoded(side), "path": None} for side in range(1, len(captions) + 1)]
    return Dataset.from_dict(
        {image: images, text: list(captions)}, features=Features({image: Image(), text: Value("string")})
    )


def written(folder, how, **splits):
    if how == "save_to_disk":
        (DatasetDict(splits) if len(splits) > 1 else next(iter(splits.values()))).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        for split, dataset in splits.items():
            dataset.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("how", ["save_to_disk", "parquet"])
def test_rows_of_every_split_with_the_images_as_they_were_encoded(tmp_path, clean, how):
    folder = written(tmp_path / "d", how, train=table("one", "two "), validation=table("held out"))
    samples = clean("hub", folder).samples
    assert [(sample.name, sample.split, sample.captions) for sample in samples] == [
        ("train/00000000", "train", ("one",)),
        ("train/00000001", "train", ("two",)),
        ("validation/00000000", "validation", ("held out",)),
    ]
    assert [sample.image.read_bytes() for sample in samples] == [encoded(1), encoded(2), encoded(1)]
    assert [sample.open().width for sample in samples] == [1, 2, 1]
    assert samples[1].origin == "train row 1"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_dataset_of_one_split_is_undivided(tmp_path, clean, split):
    found = clean("hub", written(tmp_path / "d", "parquet", **{split: table("one", "two")}))
    assert found.places == {(None, f"{split}/00000000"), (None, f"{split}/00000001")}


def test_splits_that_say_nothing_are_errors(tmp_path, read_source):
    DatasetDict(train=table("one"), unlabeled=table("two", "three"), val=table("four")).save_to_disk(tmp_path / "d")
    found = read_source("hub", tmp_path / "d")
    assert found.captions == [("train/00000000", ("one",)), ("val/00000000", ("four",))]
    assert {split for split, _ in found.places} == {"train", "validation"}
    assert found.errors == {"unknown_split": ["unlabeled (2 rows)"]}


def test_the_columns_may_have_other_names(tmp_path, clean, read_source):
    folder = written(tmp_path / "d", "parquet", train=table("one", image="jpg", text="prompt"))
    found = clean("hub", folder, image_column="jpg", caption_column="prompt")
    assert found.captions == [("train/00000000", ("one",))]
    with pytest.raises(DatasetError, match="--image_column and --caption_column"):
        read_source("hub", folder)


def test_empty_captions_are_named_with_their_split(tmp_path, read_source):
    folder = written(tmp_path / "d", "parquet", train=table("one", " "), test=table(None, "two"))
    found = read_source("hub", folder)
    assert [(one.name, one.open().width) for one in found.samples] == [("train/00000000", 1), ("test/00000001", 2)]
    assert found.errors == {"no_caption": ["train row 1", "test row 0"]}


def test_rows_without_an_image_or_with_a_broken_one_are_unreadable(tmp_path, clean):
    images = [None, {"bytes": b"<html>", "path": None}, {"bytes": encoded(1, "PNG")[:40], "path": "x.png"}]
    folder = written(tmp_path / "d", "parquet", train=table("a", "b", "c", images=images))
    for number, sample in enumerate(clean("hub", folder).samples):
        with pytest.raises(UnreadableImage, match=rf"^train row {number}: "):
            sample.open()


def test_a_row_does_not_reach_outside_the_dataset(tmp_path, clean):
    private = tmp_path / "private.png"
    private.write_bytes(encoded(7, "PNG"))
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "own.png").write_bytes(encoded(3, "PNG"))
    (folder / "link.png").symlink_to(private)
    outside = [private, folder / "../private.png", folder / "link.png", "https://example.org/dog.jpg", "dog.jpg"]
    names = [str(name) for name in (folder / "own.png", *outside)]
    images = [{"bytes": None, "path": name} for name in names]
    pyarrow.parquet.write_table(table(*names, images=images).data.table, folder / "train.parquet")
    own, *others = clean("hub", folder).samples
    assert own.open().width == 3
    for sample in others:
        with pytest.raises(UnreadableImage, match=r"outside the dataset .*--allow_outside_paths"):
            sample.open()
    assert clean("hub", folder, allow_outside_paths=True).samples[1].open().width == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: PILImage.new("RGB", (1, 1)).save(folder / "0.png"), "convert `imagefolder`"),
        (lambda folder: (folder / "x.parquet").write_bytes(b"PAR1"), "cannot be loaded: .*"),
    ],
)
def test_a_folder_that_holds_no_dataset_is_refused(tmp_path, read_source, make, message):
    (tmp_path / "d").mkdir()
    make(tmp_path / "d")
    with pytest.raises(DatasetError, match=message):
        read_source("hub", tmp_path / "d")
