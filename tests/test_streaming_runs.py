"""Every train_*.py on a stream, run as a user runs it: exact under resume, and with every error named."""

import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from finetuning.training.run import Run
from finetuning.training.session import Session

FULL = pytest.mark.parametrize("script", ["train_text_to_image"])
STEPS = 8


def in_three(samples):
    """The samples in shards of unequal length."""
    return [[one for number, one in enumerate(samples) if min(number // 2, 2) == shard] for shard in range(3)]


@pytest.fixture
def tars(shards, pack):
    """Write samples as tars."""

    def tars(samples):
        for shard, mine in enumerate(in_three(list(enumerate(samples)))):
            files = {}
            for number, (image, text) in mine:
                files |= {f"{number}.png": image, f"{number}.txt": text}
            pack(shards / f"{shard:05}.tar", files)

    return tars


@pytest.fixture
def tables(shards):
    """Write samples as Parquet files."""

    def tables(samples):
        schema = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}).arrow_schema
        for shard, mine in enumerate(in_three(samples)):
            columns = {"image": [{"bytes": one, "path": None} for one, _ in mine], "text": [text for _, text in mine]}
            pq.write_table(pa.table(columns, schema), shards / f"{shard:05}.parquet")

    return tables


@pytest.fixture
def samples(shapes_folder):
    """[(encoded image, caption)], 11 of them."""
    records = map(json.loads, (shapes_folder / "train/metadata.jsonl").read_text().splitlines())
    return [((shapes_folder / "train" / one["file_name"]).read_bytes(), one["text"]) for one in records]


@pytest.fixture
def shards(tmp_path):
    """A new folder for shards."""
    (tmp_path / "shards").mkdir()
    return tmp_path / "shards"


@pytest.fixture
def arguments(tiny_model, shards):
    """Groups of 4 of the 11 samples. Everything that draws is switched on."""
    return f"""
        --pretrained_model_name_or_path {tiny_model} --train_data_dir {shards} --streaming --shuffle_buffer 4
        --resolution 32 --train_batch_size 2 --gradient_accumulation_steps 2 --max_train_steps {STEPS} --seed 3
        --learning_rate 1e-3 --use_ema --random_flip --proportion_empty_prompts 0.3 --noise_offset 0.05
        --checkpointing_steps 2 --report_to none
    """.split()


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
    script, training, arguments, samples, tars, tables, tmp_path, capfd, monkeypatch
):
    write, workers = (tables, 1) if script == "train_lora" else (tars, 0)
    write(samples)
    straight = tmp_path / "straight"
    assert training.run(script, arguments, straight) == 0
    assert "dataset: a stream of 3 shards" in capfd.readouterr().err
    for stopped_at in (2, 6):  # in the first epoch, and in the third, there with what a GPU does besides
        monkeypatch.setattr(Session, "rehearses", stopped_at == 6)
        monkeypatch.setattr(Run, "lag", int(stopped_at == 6))
        resumed = tmp_path / f"resumed-{stopped_at}"
        resumed.mkdir()
        shutil.copytree(straight / f"checkpoint-{stopped_at}", resumed / f"checkpoint-{stopped_at}")
        shutil.copy(straight / "metrics.jsonl", resumed)
        more = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", workers)
        assert training.run(script, arguments, resumed, *more) == 0
        training.assert_same(resumed, straight)
        assert "have changed" not in capfd.readouterr().err


@FULL
def test_a_pattern_names_the_shards(script, training, arguments, samples, shards, tars, tmp_path):
    tars(samples)
    (shards / "00002.tar").rename(shards / "2.tar")  # not of the pattern
    pattern = str(shards / "{00000..00001}.tar")
    few = ("--train_data_dir", pattern, "--max_train_steps", "1")
    assert training.run(script, arguments, tmp_path / "run", *few) == 0
    assert json.loads((tmp_path / "run/args.json").read_text())["train_data_dir"] == pattern


def test_processes_read_shards_of_their_own_and_resume_exactly(
    script, training, arguments, samples, tars, tmp_path, tensors
):
    tars(samples)
    more = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert training.on_two_processes(script, arguments, tmp_path / "straight", *more) == [0, 0]
    shutil.copytree(tmp_path / "straight/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    assert training.on_two_processes(script, arguments, tmp_path / "resumed", *more) == [0, 0]
    assert json.loads((tmp_path / "resumed/args.json").read_text())["run"]["processes"] == 2
    straight, resumed = (tensors(tmp_path / name / "checkpoint-4") for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys() and straight
    for part, weights in straight.items():
        for name, value in weights.items():
            assert torch.equal(resumed[part][name], value), f"{part} {name}"


@FULL
def test_fewer_shards_than_processes_are_refused(script, training, arguments, samples, shards, tars, tmp_path, capfd):
    tars(samples[:2])
    for number in (1, 2):
        (shards / f"{number:05}.tar").unlink()
    assert training.on_two_processes(script, arguments, tmp_path / "out") == [1, 1]
    assert capfd.readouterr().err.count("has 1 shards for 2 processes") == 1


@FULL
def test_an_image_that_cannot_be_read_stops_the_run_which_goes_on_without_it(
    script, training, arguments, samples, shards, tars, tmp_path, capfd
):
    samples[7] = (samples[7][0][:-30], samples[7][1])
    tars(samples)
    assert training.run(script, arguments, tmp_path / "out") == 1
    said = capfd.readouterr().err
    assert "00002.tar/7.png" in said and "--on_bad_rows skip" in said and "Traceback" not in said
    skip = ("--on_bad_rows", "skip", "--resume_from_checkpoint", "latest")
    assert training.run(script, arguments, tmp_path / "out", *skip) == 0
    said = capfd.readouterr().err
    assert "00002.tar/7.png" in said and "1 left out so far" in said and "have changed" not in said
    assert training.run(script, arguments, tmp_path / "straight", *skip[:2]) == 0
    training.assert_same(tmp_path / "out", tmp_path / "straight")


@FULL
def test_other_shards_on_resume_are_named(script, training, arguments, samples, shards, tars, tmp_path, capfd):
    tars(samples)
    assert training.run(script, arguments, tmp_path / "out", "--max_train_steps", 1) == 0
    tars(samples[1:])
    more = ("--max_train_steps", 2, "--shuffle_buffer", 2, "--resume_from_checkpoint", "latest")
    assert training.run(script, arguments, tmp_path / "out", *more) == 0
    changes = capfd.readouterr().err.split("these have changed")[1].splitlines()[0]
    assert "the dataset's rows" in changes and "--shuffle_buffer 4 -> 2" in changes


@FULL
def test_rows_that_break_a_step_are_named(script, training, arguments, samples, shards, tars, tmp_path, capfd):
    tars(samples)
    assert training.run(script, arguments, tmp_path / "run", "--learning_rate", "1e30", "--max_grad_norm", 0) == 1
    said = capfd.readouterr().err
    assert said.split("error: ")[1].count(".tar/") == 4


@FULL
def test_what_cannot_be_streamed_is_refused_before_the_first_step(script, training, arguments, shards, tmp_path, capfd):
    assert training.run(script, arguments, tmp_path / "out") == 1
    assert f"--streaming reads WebDataset tars and Parquet files, and {shards} has none" in capfd.readouterr().err
    cut = arguments.index("--max_train_steps")
    with pytest.raises(SystemExit):
        training.run(script, arguments[:cut] + arguments[cut + 2 :], tmp_path / "out")
    assert "--streaming needs --max_train_steps" in capfd.readouterr().err
