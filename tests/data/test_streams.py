"""A stream is trained on whole, in an order that any step can be asked for; images that cannot be read are named."""

import itertools
import pickle
from collections import Counter

import pytest

from finetuning.cli import read as read_flags
from finetuning.data.reading import DatasetError
from finetuning.data.streams import StreamBatchSampler, open_stream, stream_sampler
from train_text_to_image import Args

SIZES = (3, 7, 1, 5)  # samples of the shards: 16 in all
NAMES = [f"{shard}-{number}" for shard, size in enumerate(SIZES) for number in range(size)]


@pytest.fixture
def kind():
    """Of the shards; the reader of each has its tests in test_shards.py."""
    return "tar"


@pytest.fixture
def folder(kind, tmp_path, write_shards):
    """A folder of four shards."""
    return write_shards(tmp_path / "shards", kind, SIZES)


each_kind = pytest.mark.parametrize("kind", ["tar", "parquet"])


@pytest.fixture
def stream(stream_args):
    """The StreamedImages of a source; captions stand for their tokens."""

    def stream(source, **flags):
        return open_stream(stream_args(source, **flags), TokensAreCaptions(), 1)

    return stream


@pytest.fixture
def sampler(stream_args, stream):
    """The StreamBatchSampler of a source on one of several processes."""

    def sampler(source, processes=1, process=0, **flags):
        args = stream_args(source, **flags)
        return stream_sampler(
            args, stream(source, **flags).shards, micro_batch=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps, processes=processes, process=process, seed=args.seed,
        )  # fmt: skip

    return sampler


class TokensAreCaptions:
    """In place of Tokenizers."""

    def __call__(self, captions):
        return {}


def captions(samples):
    return [sample.captions[0] for sample in samples]


def places(sampler, first, last):
    """[(step, epoch, row, caption)]"""
    batches = sampler.micro_batches(first, last)
    return [(place.step, place.epoch, place.row, place.sample.captions[0]) for batch in batches for place in batch]


# -- the order -------------------------------------------------------------------------------------------------------


@each_kind
def test_an_epoch_is_a_permutation_of_all_samples_of_the_seed(folder, sampler):
    epochs = [captions(sampler(folder).samples(epoch)) for epoch in range(4)]
    assert all(sorted(epoch) == sorted(NAMES) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert captions(sampler(folder).samples(0)) == epochs[0]
    assert captions(sampler(folder, seed=2).samples(0)) != epochs[0]


def test_a_buffer_of_one_keeps_the_files_order_and_the_shards_are_permuted(folder, sampler):
    epochs = [captions(sampler(folder, shuffle_buffer=1).samples(epoch)) for epoch in range(8)]
    for epoch in epochs:
        by_shard = [list(names) for _, names in itertools.groupby(epoch, key=lambda name: name[0])]
        assert len(by_shard) == len(SIZES) and all(names == sorted(names) for names in by_shard)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def test_the_buffer_mixes_shards_and_holds_no_more_than_it_may(tmp_path, sampler, write_shards):
    source = sampler(write_shards(tmp_path, sizes=(20, 20)), shuffle_buffer=5)
    read, unlimited = [], source.shards.reader
    source.shards.reader = lambda number, findings: (read.append(one) or one for one in unlimited(number, findings))
    for taken, _ in enumerate(source.samples(0)):
        assert len(read) <= taken + 6
    mixed = captions(source.samples(0))
    assert len([1 for one, other in itertools.pairwise(mixed) if one[0] != other[0]]) > 1
    assert any(one > other for one, other in itertools.pairwise(mixed[:15]))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_read_every_sample_once_between_them(folder, sampler, processes):
    for epoch in range(3):
        parts = [captions(sampler(folder, processes, process).samples(epoch)) for process in range(processes)]
        assert all(parts) and sorted(itertools.chain(*parts)) == sorted(NAMES)


def test_rows_have_numbers_of_their_own_in_every_process_and_epoch(folder, sampler):
    parts = [places(sampler(folder, 2, process), 0, 20) for process in range(2)]
    numbers = [(epoch, row) for part in parts for _, epoch, row, _ in part]
    assert len(set(numbers)) == len(numbers) == 80
    assert {epoch for epoch, _ in numbers} >= {0, 1, 2, 3}


def test_steps_are_full_and_go_on_into_the_next_epoch(folder, sampler):
    flags = {"train_batch_size": 3, "gradient_accumulation_steps": 2}
    source = sampler(folder, 2, 1, **flags)
    batches = list(source.micro_batches(0, 6))
    assert [len(batch) for batch in batches] == [3] * 12
    assert [batch[0].step for batch in batches] == [step for step in range(6) for _ in range(2)]
    assert [{place.ends_step for place in batch} for batch in batches] == [{False}, {True}] * 6
    assert {place.weight for batch in batches for place in batch} == {1 / 12}  # 3 x 2 accumulated x 2 processes
    assert source.total_batch_size == 12
    assert max(place.epoch for batch in batches for place in batch) > 1


@pytest.mark.parametrize("processes", [1, 3])
def test_every_step_can_be_resumed_at(folder, sampler, processes):
    for process in range(processes):
        straight = places(sampler(folder, processes, process), 0, 22)
        for first in range(0, 22, processes):
            resumed = places(sampler(folder, processes, process), first, 22)
            assert resumed == [place for place in straight if place[0] >= first], first


def test_an_epoch_whose_shards_were_counted_is_not_read_again(folder, sampler):
    source = sampler(folder)
    straight = places(source, 0, 34)  # 68 samples: four epochs of 16 and four more
    opened, reader = Counter(), source.shards.reader
    source.shards.reader = lambda number, findings: opened.update([number]) or reader(number, findings)
    assert places(source, 33, 34) == straight[-2:]
    assert set(opened.values()) == {1}


def test_fewer_shards_than_processes_are_refused(folder, sampler):
    assert isinstance(sampler(folder, 4, 3), StreamBatchSampler)
    with pytest.raises(DatasetError, match="4 shards for 5 processes"):
        sampler(folder, 5, 0)


# -- the images ------------------------------------------------------------------------------------------------------


def batches(training, source, first=0, last=6, workers=0):
    return list(training.loader(source, first, last, workers))


@each_kind
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_images_and_captions_of_their_places(folder, stream, sampler, workers):
    found = batches(stream(folder), sampler(folder), workers=workers)
    rows = [(batch.step, row, text) for batch in found for row, text in zip(batch.rows, batch.captions, strict=True)]
    assert rows == [(step, row, text) for step, _, row, text in places(sampler(folder), 0, 6)]
    reds = [pixels[0, 0, 0].item() for batch in found for pixels in batch.pixels]
    shown = [10 * int(text[0]) + int(text[2:]) for _, _, text in rows]
    assert reds == pytest.approx([red / 255 * 2 - 1 for red in shown], abs=1e-6)
    assert all(batch.weights.tolist() == [0.5, 0.5] for batch in found)
    assert all(batch.sizes.tolist() == [[8, 8, 0, 0, 8, 8]] * 2 for batch in found)


def test_what_a_spawned_worker_gets_is_picklable(folder, stream, sampler):
    training, source = stream(folder), sampler(folder)
    [[*indices]] = source.micro_batches(0, 1)
    again, same = pickle.loads(pickle.dumps((training, indices)))
    batch, _, _ = again.collate([again[index] for index in same])
    assert batch.captions == batches(training, source)[0].captions
    assert len(training.shards) == 4  # here they stay


def test_several_captions_take_turns_and_flags_act_on_them(tmp_path, stream, sampler, encoded, write_tar):
    write_tar(tmp_path / "0.tar", {"a.png": encoded(), "a.txt": "one\ntwo\n"})
    training = stream(tmp_path, caption_prefix="a")
    found = [batch.captions for batch in batches(training, sampler(tmp_path), last=20)]
    assert {text for texts in found for text in texts} == {"a one", "a two"}
    assert training.caption_prefix() == "a"


def test_the_rows_of_the_step_can_be_named(folder, stream, sampler):
    training, source = stream(folder), sampler(folder, gradient_accumulation_steps=2)
    loader = training.loader(source, 0, 3, 0)
    known = [row for batch in list(itertools.islice(loader, 4))[2:] for row in batch.rows]  # those of step 1
    lines = training.describe([*known, 99], 1).splitlines()
    origins = [place.sample.origin for batch in source.micro_batches(1, 2) for place in batch]
    assert lines[:-1] == [f"  {origin}" for origin in origins]
    assert "another process" in lines[-1] and "99" in lines[-1]
    before = [place.sample.origin for batch in source.micro_batches(0, 1) for place in batch]
    rows = [place.row for batch in source.micro_batches(0, 1) for place in batch]
    assert training.describe(rows, 0).splitlines() == [f"  {origin}" for origin in before]  # looked at a step later


@pytest.fixture
def broken(tmp_path, stream, sampler, encoded, write_tar):
    """(images, sampler) of six samples, of which 0 and 3 are cut."""

    def broken(on_bad_rows):
        files = {f"{n}.png": encoded(n) if n % 3 else encoded()[:-30] for n in range(6)}
        write_tar(tmp_path / "0.tar", files | {f"{n}.txt": str(n) for n in range(6)})
        flags = {"on_bad_rows": on_bad_rows, "train_batch_size": 3, "shuffle_buffer": 1}
        return stream(tmp_path, **flags), sampler(tmp_path, **flags)

    return broken


def test_images_that_cannot_be_read_are_left_out_counted_and_named_once(broken, capsys):
    training, source = broken("skip")
    found = batches(training, source, last=6)
    assert [batch.captions for batch in found] == [["1", "2"], ["4", "5"]] * 3
    assert [batch.weights.tolist() for batch in found] == [[0.5, 0.5]] * 6  # their share goes to the others
    message = capsys.readouterr().err
    assert message.count("0.tar/0.png") == message.count("0.tar/3.png") == 1
    assert "2 left out so far" in message
    straight = [(batch.rows, batch.captions) for batch in found]
    for first in range(6):  # a resumed stream leaves out the same
        assert [(batch.rows, batch.captions) for batch in batches(training, source, first)] == straight[first:]


def test_a_batch_of_which_nothing_can_be_read_counts_for_nothing(tmp_path, stream, sampler, write_tar):
    write_tar(tmp_path / "0.tar", {"a.png": b"no image", "a.txt": "a"})
    (found,) = batches(stream(tmp_path, on_bad_rows="skip"), sampler(tmp_path), last=1)
    assert found.weights.tolist() == [0.0] and found.pixels.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_run_unless_a_flag_says_otherwise(broken, workers):
    with pytest.raises(DatasetError) as caught:
        batches(*broken("error"), workers=workers)
    for text in ("0.tar/0.png", "--on_bad_rows skip", "--resume_from_checkpoint latest"):
        assert text in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("process", [0, 1])
def test_the_process_that_found_the_error_names_it(tmp_path, stream, sampler, write_tar, capsys, process):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {"a.png": b"no image", "a.txt": "a"})
    with pytest.raises(DatasetError):
        batches(stream(tmp_path), sampler(tmp_path, 2, process))
    # the script prints what the main process raises
    assert capsys.readouterr().err.startswith("process 1: " if process else "")


def test_the_fingerprint_tells_other_shards(tmp_path, stream, write_shards):
    prints = [stream(write_shards(tmp_path / str(number), sizes=sizes)).fingerprint()
              for number, sizes in enumerate([(1, 2), (1, 2), (1, 20)])]  # fmt: skip
    assert prints[0] == prints[1] != prints[2]  # wherever they are


# -- the flags -------------------------------------------------------------------------------------------------------

STREAMING = "--streaming --max_train_steps 5"


@pytest.mark.parametrize(
    ("flags", "starts"),
    [
        ("--streaming", ["--streaming needs --max_train_steps"]),
        (STREAMING, []),
        (f"{STREAMING} --shuffle_buffer 0", ["--shuffle_buffer 0"]),
        ("--shuffle_buffer 5", ["--shuffle_buffer"]),
        (f"{STREAMING} --cache_latents --center_crop", ["--cache_latents needs"]),
        (f"{STREAMING} --cached_crops 2", ["--cached_crops needs"]),
        (f"{STREAMING} --aspect_buckets", ["--aspect_buckets needs"]),
        (f"{STREAMING} --max_train_samples 5", ["--max_train_samples needs"]),
        (f"{STREAMING} --validation_fraction 0.1", ["--validation_fraction needs"]),
        (f"{STREAMING} --checkpointing_epochs 1", ["--checkpointing_epochs needs"]),
        (f"{STREAMING} --validation_prompts x", ["--validation_epochs"]),
        (f"{STREAMING} --validation_prompts x --validation_steps 5", []),
        (f"{STREAMING} --validation_prompts x --validation_epochs 0", []),
        ("--streaming --cache_latents --center_crop --aspect_buckets", ["--cache", "--streaming", "--aspect"]),
    ],
)
def test_what_does_not_go_with_a_stream_is_named_at_once(flags, starts):
    always = ["--pretrained_model_name_or_path", "x", "--dataset_name", "me/images"]
    found = read_flags(Args, "", [*always, *flags.split()])[1]
    assert len(found) == len(starts) and all(map(str.startswith, found, starts)), found
