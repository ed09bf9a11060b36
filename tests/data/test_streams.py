"""A stream is trained on whole, in an order that any step can be asked for, and what is wrong with it is named."""

import io
import itertools
import json
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetuning.cli import read as read_flags
from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.images import UnreadableImage
from finetuning.data.latents import LatentArgs
from finetuning.data.order import Order
from finetuning.data.reading import DatasetError
from finetuning.data.shards import Remote, open_shards
from finetuning.data.streams import StreamArgs, StreamOrder, load_training, row_order
from finetuning.data.training_set import DataArgs, ImageSet
from finetuning.training.checkpoint import CheckpointArgs
from finetuning.training.run import RunArgs
from finetuning.training.validation import ValidationArgs

SIZES = (3, 7, 1, 5)  # samples of the shards: 16 in all
NAMES = [f"{shard}-{number}" for shard, size in enumerate(SIZES) for number in range(size)]


@dataclass
class Args(RunArgs, ValidationArgs, CheckpointArgs, LatentArgs, BucketArgs, CaptionArgs, StreamArgs, DataArgs):
    """The flags of a training script, as far as they are looked at here."""


def encoded(red=0, kind="PNG"):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(content, kind)
    return content.getvalue()


def pack(path, files):
    """A WebDataset shard of {name: bytes or text}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def table(path, rows, file=None):
    """A Parquet file as `datasets` writes it, of (encoded image, caption)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "width": datasets.Value("int64")}
    )
    columns = {
        "image": [{"bytes": content, "path": file} for content, _ in rows],
        "text": [text for _, text in rows],
        "width": [8] * len(rows),
    }
    pq.write_table(pa.table(columns, features.arrow_schema), path)
    return path


def tars(folder, sizes=SIZES):
    for shard, size in enumerate(sizes):
        files = {}
        for number in range(size):
            files[f"{number:03}.png"] = encoded(10 * shard + number)
            files[f"{number:03}.txt"] = f"{shard}-{number}"
        pack(folder / f"{shard:05}.tar", files)
    return folder


def tables(folder, sizes=SIZES):
    for shard, size in enumerate(sizes):
        rows = [(encoded(10 * shard + number), f"{shard}-{number}") for number in range(size)]
        table(folder / f"train-{shard:05}-of-{len(sizes):05}.parquet", rows)
    return folder


@pytest.fixture(params=[tars, tables])
def folder(request, tmp_path):
    """A folder of four shards."""
    return request.param(tmp_path / "shards")


def arguments(source, **flags):
    flags = {"streaming": True, "max_train_steps": 9, "seed": 1, "train_batch_size": 2, "shuffle_buffer": 4} | flags
    return Args(train_data_dir=str(source), resolution="8", **flags)


def shards(source, **flags):
    return open_shards(arguments(source, **flags), say=lambda message: None)


def order(source, processes=1, process=0, **flags):
    """The StreamOrder of a source."""
    return row_order(arguments(source, **flags), stream(source, **flags), processes, process)


def stream(source, say=print, **flags):
    """The StreamedImages of a source; captions stand for their tokens."""
    training, held_out = load_training(arguments(source, **flags), None, 1, say=say)
    assert held_out is None
    training.tokenize = list
    return training


def captions(samples):
    return [sample.captions[0] for sample in samples]


def places(order, first, last):
    """[(step, epoch, row, caption)]"""
    batches = order.micro_batches(first, last)
    return [(place.step, place.epoch, place.row, place.sample.captions[0]) for batch in batches for place in batch]


# -- the order -------------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_of_all_samples(folder):
    epochs = [captions(order(folder).samples(epoch)) for epoch in range(4)]
    assert all(sorted(epoch) == NAMES for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_the_order_is_that_of_the_seed(folder):
    first = captions(order(folder).samples(0))
    assert captions(order(folder).samples(0)) == first
    assert captions(order(folder, seed=2).samples(0)) != first


def test_a_buffer_of_one_keeps_the_files_order_and_the_shards_are_permuted(folder):
    epochs = [captions(order(folder, shuffle_buffer=1).samples(epoch)) for epoch in range(8)]
    for epoch in epochs:
        by_shard = [list(names) for _, names in itertools.groupby(epoch, key=lambda name: name[0])]
        assert len(by_shard) == len(SIZES) and all(names == sorted(names) for names in by_shard)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def test_the_buffer_draws_anew_in_every_epoch(tmp_path):
    tars(tmp_path, (20,))
    for size in (4, 100):  # the second holds them all
        source = order(tmp_path, shuffle_buffer=size)
        assert captions(source.samples(0)) != captions(source.samples(1))


def test_the_buffer_mixes_shards_and_holds_no_more_than_it_may(tmp_path):
    source = order(tars(tmp_path / "shards", (20, 20)), shuffle_buffer=5)
    read = []
    unlimited = source.shards.reader
    source.shards.reader = lambda number, findings: (read.append(one) or one for one in unlimited(number, findings))
    for taken, _ in enumerate(source.samples(0)):
        assert len(read) <= taken + 6
    mixed = captions(source.samples(0))
    assert len([1 for one, other in itertools.pairwise(mixed) if one[0] != other[0]]) > 1
    assert any(one > other for one, other in itertools.pairwise(mixed[:15]))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_read_every_sample_once_between_them(folder, processes):
    for epoch in range(3):
        parts = [captions(order(folder, processes, process).samples(epoch)) for process in range(processes)]
        assert all(parts) and sorted(itertools.chain(*parts)) == NAMES


def test_rows_have_numbers_of_their_own_in_every_process_and_epoch(folder):
    parts = [places(order(folder, 2, process), 0, 20) for process in range(2)]
    numbers = [(epoch, row) for part in parts for _, epoch, row, _ in part]
    assert len(set(numbers)) == len(numbers) == 80
    assert {epoch for epoch, _ in numbers} >= {0, 1, 2, 3}


def test_steps_are_full_and_go_on_into_the_next_epoch(folder):
    flags = {"train_batch_size": 3, "gradient_accumulation_steps": 2}
    batches = list(order(folder, 2, 1, **flags).micro_batches(0, 6))
    assert [len(batch) for batch in batches] == [3] * 12
    assert [batch[0].step for batch in batches] == [step for step in range(6) for _ in range(2)]
    assert [{place.ends_step for place in batch} for batch in batches] == [{False}, {True}] * 6
    assert {place.weight for batch in batches for place in batch} == {1 / 12}  # 3 x 2 accumulated x 2 processes
    assert max(place.epoch for batch in batches for place in batch) > 1


@pytest.mark.parametrize("processes", [1, 3])
def test_every_step_can_be_resumed_at(folder, processes):
    for process in range(processes):
        straight = places(order(folder, processes, process), 0, 22)
        for first in range(22):
            resumed = places(order(folder, processes, process), first, 22)
            assert resumed == [place for place in straight if place[0] >= first], first


def test_an_epoch_whose_shards_were_counted_is_not_read_again(folder):
    source = order(folder)
    straight = places(source, 0, 34)  # 68 samples: four epochs of 16 and four more
    opened = Counter()
    reader = source.shards.reader
    source.shards.reader = lambda number, findings: opened.update([number]) or reader(number, findings)
    assert places(source, 33, 34) == straight[-2:]
    assert set(opened.values()) == {1}


def test_what_an_order_knows_and_a_stream_does_not_is_nothing(folder):
    source = order(folder, 2, gradient_accumulation_steps=3)
    assert (source.rows, source.steps_per_epoch, len(source.rows_in_bucket)) == (0, 0, 0)
    assert source.total_batch_size == 12


def test_fewer_shards_than_processes_are_refused(folder):
    assert isinstance(order(folder, 4, 3), StreamOrder)
    with pytest.raises(DatasetError, match="4 shards for 5 processes, and each reads its own: start at most 4"):
        order(folder, 5, 0)


# -- the images ----------------------------------------------------------------------------------------------------


def batches(training, source, first=0, last=6, workers=0):
    return list(training.loader(source, first, last, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_images_and_captions_of_their_places(folder, workers):
    found = batches(stream(folder), order(folder), workers=workers)
    expected = places(order(folder), 0, 6)
    rows = [(batch.step, row, text) for batch in found for row, text in zip(batch.rows, batch.input_ids, strict=True)]
    assert rows == [(step, row, text) for step, _, row, text in expected]
    reds = [pixels[0, 0, 0].item() for batch in found for pixels in batch.pixels]
    shown = [10 * int(text[0]) + int(text[2:]) for _, _, text in rows]
    assert reds == pytest.approx([red / 255 * 2 - 1 for red in shown], abs=1e-6)
    assert all(batch.weights.tolist() == [0.5, 0.5] for batch in found)


def test_several_captions_take_turns_and_flags_act_on_them(tmp_path):
    pack(tmp_path / "0.tar", {"a.png": encoded(), "a.txt": "one\ntwo\n"})
    training = stream(tmp_path, caption_prefix="a")
    said = [batch.input_ids for batch in batches(training, order(tmp_path), last=20)]
    assert {text for texts in said for text in texts} == {"a one", "a two"}
    assert training.caption_prefix() == "a"


def test_the_rows_of_the_step_can_be_named(folder):
    training, source = stream(folder), order(folder, gradient_accumulation_steps=2)
    loader = training.loader(source, 0, 3, 0)
    known = [row for batch in list(itertools.islice(loader, 4))[2:] for row in batch.rows]  # those of step 1
    told = training.describe([*known, 99]).splitlines()
    origins = [place.sample.origin for batch in source.micro_batches(1, 2) for place in batch]
    assert told[:-1] == [f"  {origin}" for origin in origins]
    assert "another process" in told[-1] and "99" in told[-1]


def broken_stream(tmp_path, on_bad_rows):
    files = {f"{n}.png": encoded(n) if n % 3 else encoded()[:-30] for n in range(6)}
    pack(tmp_path / "0.tar", files | {f"{n}.txt": str(n) for n in range(6)})
    flags = {"on_bad_rows": on_bad_rows, "train_batch_size": 3, "shuffle_buffer": 1}
    return stream(tmp_path, **flags), order(tmp_path, **flags)


def test_images_that_cannot_be_read_are_left_out_counted_and_named_once(tmp_path, capsys):
    training, source = broken_stream(tmp_path, "skip")
    found = batches(training, source, last=6)
    assert [batch.input_ids for batch in found] == [["1", "2"], ["4", "5"]] * 3
    assert [batch.weights.tolist() for batch in found] == [[0.5, 0.5]] * 6  # their share goes to the others
    said = capsys.readouterr().err
    assert said.count("0.tar/0.png") == said.count("0.tar/3.png") == 1
    assert "2 so far" in said


def test_a_resumed_stream_leaves_out_the_same_images(tmp_path):
    training, source = broken_stream(tmp_path, "skip")
    straight = [(batch.rows, batch.input_ids) for batch in batches(training, source)]
    for first in range(6):
        assert [(batch.rows, batch.input_ids) for batch in batches(training, source, first)] == straight[first:]


def test_a_batch_of_which_nothing_can_be_read_counts_for_nothing(tmp_path):
    pack(tmp_path / "0.tar", {"a.png": b"no image", "a.txt": "a"})
    (found,) = batches(stream(tmp_path, on_bad_rows="skip"), order(tmp_path), last=1)
    assert found.weights.tolist() == [0.0] and found.pixels.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_run_unless_told_otherwise(tmp_path, workers):
    training, source = broken_stream(tmp_path, "error")
    with pytest.raises(DatasetError) as problem:
        batches(training, source, workers=workers)
    told = str(problem.value)
    assert "0.tar/0.png" in told and "--on_bad_rows skip" in told and "--resume_from_checkpoint latest" in told
    assert "Traceback" not in told


def test_the_process_that_found_the_fault_says_so(tmp_path, capsys):
    pack(tmp_path / "0.tar", {"a.png": b"no image", "a.txt": "a"})
    pack(tmp_path / "1.tar", {"a.png": b"no image", "a.txt": "a"})
    with pytest.raises(DatasetError):
        batches(stream(tmp_path), order(tmp_path, 2, 1))
    assert "process 1: the stream has" in capsys.readouterr().err
    with pytest.raises(DatasetError):
        batches(stream(tmp_path), order(tmp_path, 2, 0))
    assert capsys.readouterr().err == ""  # the script tells of the main process's


def test_the_fingerprint_tells_other_shards(tmp_path):
    prints = {stream(tars(tmp_path / name, sizes)).fingerprint() for name, sizes in (("a", (1, 2)), ("b", (1, 2)))}
    assert len(prints) == 1  # wherever they are
    assert stream(tars(tmp_path / "c", (1, 20))).fingerprint() not in prints
    with pytest.raises(TypeError):
        len(stream(tmp_path / "a"))


# -- the sources -----------------------------------------------------------------------------------------------------


def test_a_pattern_names_shards(tmp_path):
    tars(tmp_path / "shards")
    source = order(tmp_path / "shards" / "{00000..00002}.tar")
    assert sorted(captions(source.samples(0))) == [name for name in NAMES if name[0] != "3"]
    with pytest.raises(DatasetError, match=r"there is no .*00004\.tar"):
        shards(tmp_path / "shards" / "{00003..00004}.tar")


@pytest.mark.parametrize("make", [tars, tables])
def test_shards_for_validation_and_tests_are_not_trained_on(tmp_path, make):
    make(tmp_path / "train")
    make(tmp_path / "val", (9,))
    make(tmp_path / "test", (9,))
    for file in tmp_path.rglob("train-*"):
        file.rename(file.with_name(file.name.removeprefix("train-")))
    said = []
    assert (
        sorted(captions(StreamOrder(open_shards(arguments(tmp_path), said.append), 2, 1, 1, 0, 1, 4).samples(0)))
        == NAMES
    )
    assert said == ["--streaming: 2 shards whose names say validation or test are left out"]
    assert len(shards(tmp_path / "val")) == 1  # named on purpose


def test_captions_of_tars_are_found_by_the_flags(tmp_path):
    record = json.dumps({"caption": "of json", "title": "the title"})
    pack(tmp_path / "0.tar", {"a.png": encoded(1), "a.jpg": encoded(2, "JPEG"), "a.txt": "of txt", "a.json": record})
    found = lambda **flags: next(order(tmp_path, image_column="png", **flags).samples(0))
    assert found().captions == ("of txt",)
    assert found(caption_column="json").captions == ("of json",)
    assert found(caption_column="json.title").captions == ("the title",)
    assert found().open().getpixel((0, 0)) == (1, 0, 0)
    with pytest.raises(DatasetError, match="several images"):
        list(order(tmp_path).samples(0))


def test_samples_without_caption_are_named_or_left_out(tmp_path, capsys):
    pack(tmp_path / "0.tar", {"a.png": encoded(), "a.txt": "a", "b.png": encoded(), "c.png": encoded(), "c.txt": " "})
    table(tmp_path / "1.parquet", [(encoded(), "d"), (encoded(), None), (encoded(), " ")])
    with pytest.raises(DatasetError, match=r"without a caption|empty caption"):
        list(order(tmp_path).samples(0))
    source = order(tmp_path, on_bad_rows="skip")
    assert sorted(captions(source.samples(0))) == ["a", "d"]
    said = capsys.readouterr().err
    assert all(name in said for name in ("0.tar/b", "0.tar/c", "1.parquet row 1", "1.parquet row 2", "4 so far"))
    assert sorted(captions(source.samples(1))) == ["a", "d"]
    assert capsys.readouterr().err == ""  # told once


def test_a_stream_of_faults_alone_is_refused(tmp_path):
    pack(tmp_path / "0.tar", {"a.png": encoded()})
    with pytest.raises(DatasetError, match=r"no row of .* is left to train on, in 0\.tar"):
        places(order(tmp_path, on_bad_rows="skip"), 0, 1)


@pytest.mark.parametrize("name", ["0.tar", "train-00000-of-00001.parquet"])
def test_a_damaged_shard_is_named(tmp_path, name):
    (tars if name.endswith("tar") else tables)(tmp_path, (5,))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DatasetError, match=f"damaged .*{file.name}"):
        places(order(tmp_path), 0, 3)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"caption_column": "blurb"}, "no column blurb, only image, text, width"),
        ({"image_column": "image"}, "no column image"),
        ({"image_column": "width"}, "the column width holds int64, not images"),
        ({"caption_column": "width"}, "must be text"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, flags, told):
    with pytest.raises(DatasetError, match=told) as problem:
        list(order(tables(tmp_path), **flags).samples(0))
    assert "parquet" in str(problem.value)


def test_images_as_plain_bytes_and_captions_as_lists_are_taken(tmp_path):
    pq.write_table(pa.table({"image": [encoded(7)], "text": [["one", "two"]]}), tmp_path / "0.parquet")
    (sample,) = order(tmp_path).samples(0)
    assert sample.captions == ("one", "two") and sample.open().getpixel((0, 0)) == (7, 0, 0)


def test_without_captions(tmp_path):
    assert captions(order(tables(tmp_path / "a"), caption_column="none").samples(0)) == [""] * 16
    with pytest.raises(DatasetError, match="--proportion_empty_prompts 1"):
        order(tars(tmp_path / "b"), caption_column="none")


def test_rows_do_not_reach_outside_the_folder_unless_told(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(9))
    (tmp_path / "in").mkdir()
    paths = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"image": paths, "text": ["x"]}), tmp_path / "in/0.parquet")
    with pytest.raises(DatasetError, match="--allow_outside_paths"):
        batches(stream(tmp_path / "in"), order(tmp_path / "in"), last=1)
    (sample,) = order(tmp_path / "in", allow_outside_paths=True).samples(0)
    assert sample.open().getpixel((0, 0)) == (9, 0, 0)


def test_links_to_shards_elsewhere_need_to_be_allowed(tmp_path):
    tars(tmp_path / "elsewhere", (2,))
    tars(tmp_path / "in", (1,))
    (tmp_path / "in/00007.tar").symlink_to(tmp_path / "elsewhere/00000.tar")
    with pytest.raises(DatasetError, match=r"00007\.tar"):
        shards(tmp_path / "in")
    assert len(shards(tmp_path / "in", on_bad_rows="skip")) == 1
    assert len(shards(tmp_path / "in", allow_outside_paths=True)) == 2


def test_an_image_folder_needs_no_streaming(shapes_folder):
    with pytest.raises(DatasetError, match=r"has none.*leave --streaming out"):
        shards(shapes_folder)


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Arguments that name a dataset of the Hub, whose files lie in a folder: tests have no network."""
    load = datasets.load_dataset

    def hub(folder, **flags):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, *more, **options: load(str(folder), *more, **options)
        )
        args = arguments("", dataset_name="me/images", **flags)
        args.train_data_dir = None
        return args

    return hub


def test_a_hub_dataset_is_streamed_shard_by_shard(tmp_path, hub):
    args = hub(tables(tmp_path / "data"))
    table(tmp_path / "data/validation-00000-of-00001.parquet", [(encoded(), "held out")])
    said = []
    source = StreamOrder(open_shards(args, said.append), 2, 1, 1, 0, 1, 4)
    assert len(source.shards) == 4
    assert "only the split train is read, not validation" in said[0]
    samples = list(source.samples(0))
    assert sorted(captions(samples)) == NAMES
    for sample in samples:
        shard, number = map(int, sample.captions[0].split("-"))
        assert sample.open().getpixel((0, 0)) == (10 * shard + number, 0, 0)
    assert samples[0].origin.startswith("me/images shard ")
    assert captions(source.samples(1)) != captions(samples)


def test_webdataset_tars_of_the_hub_need_their_columns(tmp_path, hub):
    tars(tmp_path)
    shards = open_shards(hub(tmp_path, image_column="png", caption_column="txt"))
    assert sorted(text for number in range(4) for text in captions(shards.read(number))) == NAMES
    with pytest.raises(DatasetError, match=r"has no column image or text, only .*png"):
        open_shards(hub(tmp_path))


@pytest.mark.parametrize(("column", "told"), [("nothing", "no column nothing"), ("width", "width holds Value")])
def test_columns_of_the_hub_that_do_not_fit_are_named(tmp_path, hub, column, told):
    with pytest.raises(DatasetError, match=told):
        open_shards(hub(tables(tmp_path), image_column=column))


def test_a_hub_dataset_without_images_is_refused(tmp_path, hub):
    (tmp_path / "0.jsonl").write_text('{"image": "/etc/hostname", "text": "x"}\n')
    with pytest.raises(DatasetError, match="the column image holds Value, not images"):
        open_shards(hub(tmp_path))


def test_a_hub_dataset_that_is_not_there_is_named(hub, tmp_path):
    with pytest.raises(DatasetError, match="--dataset_name me/images"):
        open_shards(hub(tmp_path / "nowhere"))


def test_a_hub_shard_that_breaks_is_named(tmp_path, hub):
    tables(tmp_path)
    shards = open_shards(hub(tmp_path))
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DatasetError, match="me/images shard 0 cannot be read on"):
        list(shards.read(0))


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "hf://datasets/me/images-of-others@main/0.png", "https://example.org/0.png"]
)
def test_rows_of_the_hub_do_not_reach_outside_their_dataset(tmp_path, hub, path):
    table(tmp_path / "0.parquet", [(None, "x")], path)
    (sample,) = open_shards(hub(tmp_path)).read(0)
    with pytest.raises(UnreadableImage, match="outside"):
        sample.open()


def test_a_row_of_the_hub_may_be_a_file_of_its_dataset(tmp_path, hub):
    url = "zip://0.png::hf://datasets/me/images@main/all.zip"
    table(tmp_path / "0.parquet", [(None, "x")], url)
    (sample,) = open_shards(hub(tmp_path)).read(0)
    assert sample.image == Remote(url)


def test_files_of_a_hub_dataset_are_read_when_their_turn_comes(tmp_path):
    (tmp_path / "7.png").write_bytes(encoded(7))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "7.png", "a/7.png")
    for url in (f"file://{tmp_path}/7.png", f"zip://a/7.png::file://{tmp_path}/all.zip"):
        assert Remote(url).read() == encoded(7)


# -- the flags -------------------------------------------------------------------------------------------------------


def problems(*flags):
    return read_flags(Args, "", ["--dataset_name", "me/images", *map(str, flags)])[1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--streaming", ["--streaming needs --max_train_steps"]),
        ("--streaming --max_train_steps 5", []),
        ("--streaming --max_train_steps 5 --shuffle_buffer 0", ["--shuffle_buffer 0 must be at least 1"]),
        ("--shuffle_buffer 5", ["--shuffle_buffer does nothing without --streaming"]),
        ("--streaming --max_train_steps 5 --cache_latents --center_crop", ["--cache_latents needs"]),
        ("--streaming --max_train_steps 5 --aspect_buckets", ["--aspect_buckets needs"]),
        ("--streaming --max_train_steps 5 --max_train_samples 5", ["--max_train_samples needs"]),
        ("--streaming --max_train_steps 5 --validation_fraction 0.1", ["--validation_fraction needs"]),
        ("--streaming --max_train_steps 5 --checkpointing_epochs 1", ["--checkpointing_epochs needs"]),
        ("--streaming --max_train_steps 5 --validation_prompts x", ["--validation_epochs: with --streaming"]),
        ("--streaming --max_train_steps 5 --validation_prompts x --validation_steps 5", []),
        ("--streaming --max_train_steps 5 --validation_prompts x --validation_epochs 0", []),
        ("--streaming --cache_latents --center_crop --aspect_buckets", ["--streaming needs", "--aspect", "--cache"]),
    ],
)
def test_what_does_not_go_with_a_stream_is_told_at_once(flags, told):
    found = problems(*flags.split())
    assert len(found) == len(told)
    assert all(one.startswith(start) for one, start in zip(found, told, strict=True)), found


def test_without_streaming_nothing_is_new(shapes_folder):
    args = arguments(shapes_folder, streaming=False, validation_epochs=0)
    training, held_out = load_training(args, tokenizer_of_words, 1, say=lambda message: None)
    assert (type(training), len(training), len(held_out)) == (ImageSet, 11, 4)
    found = row_order(args, training, 2, 1)
    assert found == Order(11, 2, 1, 2, 1, 1, training.sizes)


class TokenizerOfWords:
    """As much of a tokenizer as the check of a dataset asks for."""

    model_max_length = 77

    def __call__(self, texts, **options):
        words = [[len(word) for word in text.split()] for text in texts]
        return type("Tokens", (), {"input_ids": words})()


tokenizer_of_words = TokenizerOfWords()
