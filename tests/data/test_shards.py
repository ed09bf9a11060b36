"""The shards of a stream: tars, Parquet files and Hub datasets; what does not fit is named."""

import json
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.data.images import UnreadableImage
from finetuning.data.reading import DatasetError
from finetuning.data.shards import Remote, open_shards

SIZES = (3, 7, 1, 5)  # samples of the shards: 16 in all
NAMES = [f"{shard}-{number}" for shard, size in enumerate(SIZES) for number in range(size)]


@pytest.fixture
def shards(stream_args):
    """The Shards of a source."""

    def shards(source, say=print, **flags):
        return open_shards(stream_args(source, **flags), say)

    return shards


def samples(shards):
    return [sample for number in range(len(shards)) for sample in shards.read(number)]


def captions(shards):
    return sorted(sample.captions[0] for sample in samples(shards))


def red(sample):
    return sample.open().getpixel((0, 0))[0]


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_pattern_names_shards(tmp_path, shards, write_shards):
    write_shards(tmp_path)
    assert captions(shards(tmp_path / "{00000..00002}.tar")) == [name for name in NAMES if name[0] != "3"]
    with pytest.raises(DatasetError, match=r"00004\.tar"):
        shards(tmp_path / "{00003..00004}.tar")
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(DatasetError, match="unpack it"):
        shards(tmp_path / "set.zip")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_for_validation_and_tests_are_not_trained_on(tmp_path, shards, write_shards, kind):
    write_shards(tmp_path / "train", kind)
    for split in ("val", "test"):
        write_shards(tmp_path / split, kind, (9,))
    for file in tmp_path.rglob("train-*"):
        file.rename(file.with_name(file.name.removeprefix("train-")))
    messages = []
    assert captions(shards(tmp_path, messages.append)) == sorted(NAMES)
    assert len(messages) == 1 and "2 shards" in messages[0]
    assert len(shards(tmp_path / "val")) == 1  # named on purpose


def test_captions_of_tars_are_found_by_the_flags(tmp_path, shards, encoded, write_tar):
    record = json.dumps({"caption": "of json", "title": "the title"})
    images = {"a.png": encoded(1), "a.jpg": encoded(2, "JPEG")}
    write_tar(tmp_path / "0.tar", images | {"a.txt": "of txt", "a.json": record})
    for flags, text in (({}, "of txt"), ({"caption_column": "json"}, "of json"),
                        ({"caption_column": "json.title"}, "the title")):  # fmt: skip
        (sample,) = samples(shards(tmp_path, image_column="png", **flags))
        assert sample.captions == (text,) and red(sample) == 1
    with pytest.raises(DatasetError, match="several images"):
        samples(shards(tmp_path))


def test_samples_without_caption_are_named_or_left_out(tmp_path, shards, encoded, write_tar, write_parquet, capsys):
    files = {"a.png": encoded(), "a.txt": "a", "b.png": encoded(), "c.png": encoded(), "c.txt": " "}
    write_tar(tmp_path / "0.tar", files)
    write_parquet(tmp_path / "1.parquet", [(encoded(), "d"), (encoded(), None), (encoded(), " ")])
    with pytest.raises(DatasetError, match=r"0\.tar/b"):
        samples(shards(tmp_path))
    source = shards(tmp_path, on_bad_rows="skip")
    assert captions(source) == ["a", "d"]
    message = capsys.readouterr().err
    assert all(name in message for name in ("0.tar/b", "0.tar/c", "1.parquet row 1", "1.parquet row 2", "4 left out"))
    assert captions(source) == ["a", "d"]
    assert capsys.readouterr().err == ""  # once is enough


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_damaged_shard_is_named(tmp_path, shards, write_shards, kind):
    (file,) = write_shards(tmp_path, kind, (5,)).iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DatasetError, match=f"damaged .*{file.name}"):
        samples(shards(tmp_path))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"caption_column": "blurb"}, ["no column blurb", "image, text, width"]),
        ({"image_column": "picture"}, ["no column picture", "image, text, width"]),
        ({"image_column": "width"}, ["width", "int64"]),
        ({"caption_column": "width"}, ["width", "text"]),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, shards, write_shards, flags, names):
    with pytest.raises(DatasetError) as caught:
        samples(shards(write_shards(tmp_path, "parquet"), **flags))
    assert [name for name in [*names, ".parquet"] if name not in str(caught.value)] == []


def test_images_as_plain_bytes_and_captions_as_lists_are_taken(tmp_path, shards, encoded):
    pq.write_table(pa.table({"image": [encoded(7)], "text": [["one", "two"]]}), tmp_path / "0.parquet")
    (sample,) = samples(shards(tmp_path))
    assert sample.captions == ("one", "two") and red(sample) == 7


def test_without_captions(tmp_path, shards, write_shards):
    assert captions(shards(write_shards(tmp_path / "a", "parquet"), caption_column="none")) == [""] * 16
    with pytest.raises(DatasetError, match="--proportion_empty_prompts 1"):
        shards(write_shards(tmp_path / "b"), caption_column="none")


def test_rows_and_links_do_not_reach_outside_the_folder_unless_a_flag_allows_it(
    tmp_path, shards, encoded, write_shards
):
    (tmp_path / "secret.png").write_bytes(encoded(9))
    write_shards(tmp_path / "in", sizes=(1,))
    paths = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"image": paths, "text": ["x"]}), tmp_path / "in/1.parquet")
    with pytest.raises(UnreadableImage, match="--allow_outside_paths"):
        samples(shards(tmp_path / "in"))[-1].open()
    assert red(samples(shards(tmp_path / "in", allow_outside_paths=True))[-1]) == 9

    write_shards(tmp_path / "elsewhere", sizes=(2,))
    (tmp_path / "in/00007.tar").symlink_to(tmp_path / "elsewhere/00000.tar")
    with pytest.raises(DatasetError, match=r"00007\.tar"):
        shards(tmp_path / "in")
    assert len(shards(tmp_path / "in", on_bad_rows="skip")) == 2
    assert len(shards(tmp_path / "in", allow_outside_paths=True)) == 3


def test_an_image_folder_needs_no_streaming(shapes_folder, shards):
    with pytest.raises(DatasetError, match="leave --streaming out"):
        shards(shapes_folder)


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, stream_args):
    """The Shards of a dataset of the Hub, whose files lie in a folder: tests have no network."""
    load = datasets.load_dataset

    def hub(folder, say=print, **flags):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, *more, **options: load(str(folder), *more, **options)
        )
        return open_shards(stream_args(None, dataset_name="me/images", **flags), say)

    return hub


def test_a_hub_dataset_is_streamed_shard_by_shard(tmp_path, hub, encoded, write_shards, write_parquet):
    write_shards(tmp_path / "data", "parquet")
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [(encoded(), "held out")])
    messages = []
    source = hub(tmp_path / "data", messages.append)
    assert len(source) == 4 and len(messages) == 1 and "validation" in messages[0]
    assert captions(source) == sorted(NAMES)
    for sample in samples(source):
        shard, number = map(int, sample.captions[0].split("-"))
        assert red(sample) == 10 * shard + number and sample.origin.startswith("me/images shard ")


def test_webdataset_tars_of_the_hub_need_their_columns(tmp_path, hub, write_shards):
    write_shards(tmp_path)
    assert captions(hub(tmp_path, image_column="png", caption_column="txt")) == sorted(NAMES)
    with pytest.raises(DatasetError, match=r"no column image or text, only .*png"):
        hub(tmp_path)


@pytest.mark.parametrize("column", ["nothing", "width"])
def test_columns_of_the_hub_that_do_not_fit_are_named(tmp_path, hub, write_shards, column):
    with pytest.raises(DatasetError, match=f"column {column}"):
        hub(write_shards(tmp_path, "parquet"), image_column=column)


def test_a_hub_dataset_without_images_is_refused(tmp_path, hub):
    (tmp_path / "0.jsonl").write_text('{"image": "/etc/hostname", "text": "x"}\n')
    with pytest.raises(DatasetError, match="column image"):
        hub(tmp_path)


def test_a_hub_dataset_that_is_not_there_is_named(tmp_path, hub):
    with pytest.raises(DatasetError, match="--dataset_name me/images"):
        hub(tmp_path / "nowhere")


def test_a_hub_shard_that_breaks_is_named(tmp_path, hub, write_shards):
    source = hub(write_shards(tmp_path, "parquet"))
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DatasetError, match="me/images shard 0"):
        list(source.read(0))


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "hf://datasets/me/images-of-others@main/0.png", "https://example.org/0.png"]
)
def test_rows_of_the_hub_do_not_reach_outside_their_dataset(tmp_path, hub, write_parquet, path):
    write_parquet(tmp_path / "0.parquet", [(None, "x")], path)
    (sample,) = samples(hub(tmp_path))
    with pytest.raises(UnreadableImage, match="outside"):
        sample.open()


def test_files_of_a_hub_dataset_are_read_when_their_turn_comes(tmp_path, hub, encoded, write_parquet):
    url = "zip://0.png::hf://datasets/me/images@main/all.zip"
    write_parquet(tmp_path / "hub/0.parquet", [(None, "x")], url)
    (sample,) = samples(hub(tmp_path / "hub"))
    assert sample.image == Remote(url)
    (tmp_path / "7.png").write_bytes(encoded(7))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "7.png", "a/7.png")
    for url in (f"file://{tmp_path}/7.png", f"zip://a/7.png::file://{tmp_path}/all.zip"):
        assert Remote(url).read_bytes() == encoded(7)
