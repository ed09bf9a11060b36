"""The data of a run, whole or as a stream, as each process reads it."""

from types import SimpleNamespace

import pytest

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.loading import load_training
from finetuning.data.streams import StreamBatchSampler
from finetuning.data.training_set import ImageDataset


@pytest.fixture
def load_for(tokenize, data_args):
    """What a process of two reads."""

    def load_for(process, source, **flags):
        run = SimpleNamespace(processes=2, process=process, say=lambda message: None)
        return load_training(data_args(source, train_batch_size=2, seed=1, **flags), tokenize, run)

    return load_for


def test_a_folder_is_known_as_a_whole(shapes_folder, load_for):
    data = load_for(1, shapes_folder, num_train_epochs=5)
    assert (type(data.training), len(data.training), len(data.held_out)) == (ImageDataset, 11, 4)
    assert data.batch_sampler == BatchSampler(11, 2, 1, 2, 1, 1, data.training.sizes)
    assert data.batch_sampler.steps_per_epoch == 3 and data.total_steps == 15
    assert "11" in data.summary() and "4" in data.summary()


@pytest.mark.parametrize("flags", [{"max_train_steps": 7}, {"max_train_steps": 7, "num_train_epochs": 5}], ids=str)
def test_a_number_of_steps_comes_before_the_number_of_epochs(shapes_folder, load_for, flags):
    assert load_for(0, shapes_folder, **flags).total_steps == 7


def test_accumulated_rows_belong_to_the_step(shapes_folder, load_for):
    data = load_for(0, shapes_folder, gradient_accumulation_steps=2, num_train_epochs=2)
    assert data.batch_sampler.total_batch_size == 8 and data.total_steps == 4


def test_a_stream_has_no_end_of_its_own_and_nothing_held_out(tmp_path, load_for, write_tar):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {f"{number}.{kind}": "" for number in range(3) for kind in ("png", "txt")})
    flags = {"streaming": True, "max_train_steps": 9, "shuffle_buffer": 4, "gradient_accumulation_steps": 2}
    data = load_for(1, tmp_path, **flags)
    assert data.held_out is None and data.total_steps == 9 and "2" in data.summary()
    assert data.batch_sampler == StreamBatchSampler(data.training.shards, 2, 2, 2, 1, 1, 4)
    # What a BatchSampler knows, and a stream does not
    assert data.batch_sampler.rows is None and data.batch_sampler.steps_per_epoch is None
    with pytest.raises(TypeError):
        len(data.training)
