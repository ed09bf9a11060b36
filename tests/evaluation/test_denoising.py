"""The loss on fixed rows, timesteps and noise: the same every time, row by row, and that of training's validation."""

import shutil
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.reading import DatasetError
from finetuning.data.training_set import DataArgs, load_images
from finetuning.diffusion.objective import NoiseArgs
from finetuning.evaluation.denoising import PipelineLoss, chosen_rows, load_rows, row_losses, stratified_timesteps
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.families.pipelines import open_pipeline
from finetuning.rng import gaussian


@dataclass
class DataFlags(BucketArgs, CaptionArgs, DataArgs):
    """Every flag of a dataset."""


@pytest.fixture
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)


@pytest.fixture
def losses_of(model, shapes_folder):
    """The losses of the tiny model on the validation rows of the shapes folder."""

    def measure(folder=shapes_folder, max_rows=256, split=None, args=None, seed=0, **how):
        images, rows = load_rows(folder, model.tokenize, (32, 32), max_rows=max_rows, split=split, seed=seed)
        return row_losses(model, images, rows, model.schedule, args, seed=seed, **how)

    return measure


@pytest.fixture
def copied(shapes_folder, tmp_path):
    """A dataset of one's own to spoil: 11 rows in train/, 4 in validation/."""
    return shutil.copytree(shapes_folder, tmp_path / "dataset")


def silence(model):
    """Let the denoiser answer 0."""
    with torch.no_grad():
        for parameter in model.denoiser.denoiser.conv_out.parameters():
            parameter.zero_()


def test_every_row_has_its_loss_by_hand(model, losses_of):
    """A denoiser that answers 0 leaves the mean square of each row's noise."""
    silence(model)
    noise = gaussian(0, "validation noise", 0, range(4), (4, 4, 4))
    losses = losses_of()
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, noise.double().square().flatten(1).mean(1), rtol=1e-6, atol=0)


def test_it_does_not_matter_when_and_in_what_batches(losses_of):
    torch.manual_seed(1)
    first = losses_of()
    torch.manual_seed(2)
    assert torch.equal(losses_of(), first)
    torch.testing.assert_close(losses_of(batch_size=3), first, rtol=1e-5, atol=0)
    assert not torch.isclose(losses_of(seed=1), first, rtol=1e-3).any()


def test_the_rows_are_those_of_training(model, shapes_folder, losses_of):
    held_out = load_images(DataFlags(train_data_dir=str(shapes_folder), resolution="32"), model.tokenize, seed=3)[1]
    rows = chosen_rows(len(held_out), 3, 3)
    schedule = model.schedule
    assert torch.equal(row_losses(model, held_out, rows, schedule, seed=3), losses_of(max_rows=3, seed=3))


def test_only_the_form_of_the_loss_counts(losses_of):
    plain = losses_of()
    training = NoiseArgs(snr_gamma=5.0, noise_offset=0.1, input_perturbation=0.1, dream_training=True)
    assert torch.equal(losses_of(args=training), plain)
    assert not torch.isclose(losses_of(args=NoiseArgs(loss_type="huber")), plain).any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(training, model, losses_of):
    model.denoiser.train(training)
    losses_of(max_rows=1)
    assert model.denoiser.training is training
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())


def test_the_denoiser_runs_in_the_context_that_is_given(losses_of):
    rounded = losses_of(autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    exact = losses_of()
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("count", [1, 4, 7, 1000])
def test_timesteps_share_the_schedule_evenly(count):
    found = stratified_timesteps(count, 1000, seed=0)
    assert sorted(int(timestep * count / 1000) for timestep in found) == list(range(count))
    assert found == stratified_timesteps(count, 1000, seed=0)
    assert count == 1 or found != stratified_timesteps(count, 1000, seed=1)


def test_an_autoencoder_that_overflows_in_fp16_encodes_in_fp32(tiny_sdxl, shapes_folder, monkeypatch):
    """As diffusers' pipeline decodes with it; it stays as that pipeline has it."""
    pipeline, seen = open_pipeline(str(tiny_sdxl), dtype=torch.float16), []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: (seen.append(pixels.dtype), encode(pixels))[1])
    for force_upcast, dtype in ((True, torch.float32), (False, torch.float16)):
        pipeline.vae.register_to_config(force_upcast=force_upcast)
        losses = PipelineLoss(pipeline, shapes_folder, size=(32, 32), max_rows=2)()
        assert losses.isfinite().all() and seen.pop() == dtype and pipeline.vae.dtype == torch.float16


def test_rows_are_drawn_once_each_and_with_the_seed():
    chosen = chosen_rows(100, 10, seed=0)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) != chosen_rows(100, 10, seed=1)
    assert chosen_rows(3, 10, seed=0) == [0, 1, 2]


@pytest.mark.parametrize(("split", "below", "count"), [
    (None, ".", 4), ("validation", ".", 4), ("train", ".", 11), (None, "validation", 4), (None, "train", 11),
])  # fmt: skip
def test_the_split_that_is_asked_for_is_read(split, below, count, model, shapes_folder):
    images, rows = load_rows(shapes_folder / below, model.tokenize, (32, 24), split=split)
    assert len(images) == len(rows) == count
    name = split or ("validation" if below == "." else below)
    assert {row.image.parent.name for row in images.rows} == {name}
    assert images.sizes[0] == (32, 24)


def test_rows_are_cropped_in_the_centre_and_not_mirrored(model, copied):
    for path in (copied / "validation").glob("*.png"):
        wide = Image.new("RGB", (96, 32), (255, 0, 0))
        wide.paste((0, 0, 255), (32, 0, 64, 32))
        wide.save(path)
    images, _ = load_rows(copied, model.tokenize, (32, 32))
    transform = images.transform_of(0)
    pixels, _ = transform.apply(images.image(0), transform.draw(0, 0))
    assert pixels[0].max() == -1 and pixels[2].min() == 1  # nothing but the blue middle


@pytest.mark.parametrize(("split", "remove", "said"), [
    ("test", None, "has no split test, only train, validation"),
    (None, "validation", "has no split validation, only train"),
    (None, ".", "there is no such folder"),
])  # fmt: skip
def test_a_split_that_is_not_there_is_named(split, remove, said, model, copied):
    if remove:
        shutil.rmtree(copied / remove)
    with pytest.raises(DatasetError, match=said):
        load_rows(copied, model.tokenize, (32, 32), split=split)


def test_all_that_is_wrong_is_said_at_once(model, copied):
    folder = copied / "validation"
    (folder / "00000.png").write_bytes((folder / "00000.png").read_bytes()[:60])
    (folder / "00001.png").unlink()
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "00002.png", "text": ""}\n')
    with pytest.raises(DatasetError) as problem:
        load_rows(copied, model.tokenize, (32, 32))
    for words in ("4 errors", "00000.png", "00001.png", "stray.png", "empty caption"):
        assert words in str(problem.value)


def test_rows_that_are_not_measured_need_not_be_whole(model, copied):
    chosen = chosen_rows(4, 2, seed=0)
    for index in set(range(4)) - set(chosen):
        (copied / f"validation/{index:05d}.png").write_bytes(b"not an image")
    assert load_rows(copied, model.tokenize, (32, 32), max_rows=2)[1] == chosen


def test_what_is_worth_knowing_is_said(model, copied):
    told = []
    with (copied / "validation/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "00002.png", "text": "the same image once more"}\n')
    load_rows(copied, model.tokenize, (32, 32), say=told.append)
    assert len(told) == 1 and "named by more than one row" in told[0]
