"""Looking at the model while it trains: always the same rows, timesteps, noise, prompts and seeds."""

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from finetuning.cli import problems_of
from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.training_set import DataArgs, load_images
from finetuning.diffusion.objective import NoiseArgs
from finetuning.diffusion.schedule import NoiseSchedule
from finetuning.evaluation import denoising
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.training.ema import AveragedWeights, NoAverage
from finetuning.training.validation import Validation, ValidationArgs


@dataclass
class DataFlags(BucketArgs, CaptionArgs, DataArgs):
    """Every flag of a dataset."""


class FakeRun(SimpleNamespace):
    """A run without accelerate that keeps what it is given to log."""

    def __init__(self, output_dir, is_main=True):
        accelerator = SimpleNamespace(autocast=nullcontext)
        super().__init__(
            output_dir=output_dir, is_main=is_main, accelerator=accelerator, device=torch.device("cpu"),
            args=SimpleNamespace(seed=0, size=(32, 32)), logged=[], shown=[],
        )  # fmt: skip

    def wait_for_everyone(self):
        pass

    def log(self, values, step):
        self.logged.append((step, values))

    def log_images(self, name, images, step):
        self.shown.append((name, len(images), step))


@pytest.fixture
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)


@pytest.fixture(scope="module")
def held_out(tiny_model, shapes_folder):
    tokenizer = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0).tokenizer
    return load_images(DataFlags(train_data_dir=str(shapes_folder), resolution="32"), tokenizer, seed=0)[1]


@pytest.fixture
def build(model, held_out, tmp_path):
    """A Validation of the tiny model on the four held-out rows."""

    def make(ema=None, noise=None, batch_size=4, rows=held_out, is_main=True, model=model, **flags):
        schedule = NoiseSchedule.of(model.scheduler)
        args = ValidationArgs(**({"validation_inference_steps": 2} | flags))
        run = FakeRun(tmp_path, is_main)
        return Validation(run, args, model, ema or NoAverage(), schedule, rows, noise or NoiseArgs(), batch_size)

    return make


def loss_of(validation, step=0):
    validation.look(step)
    return validation.run.logged[-1][1]["validation_loss"]


@torch.no_grad()
def change(model, amount=0.1):
    for parameter in model.trained_parameters().values():
        parameter += amount


# -- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"validation_steps": 3}, [0, 3, 6, 9, 12]),
        ({"validation_epochs": 2}, [0, 10]),
        ({"validation_epochs": 2, "validation_steps": 4}, [0, 4, 8, 12]),
        ({"validation_epochs": 0}, [0]),
    ],
)
def test_validation_is_due_at_the_start_and_every_so_often(flags, steps, build):
    validation = build(**flags)
    assert [step for step in range(13) if validation.due(step, steps_per_epoch=5)] == steps


def test_a_step_is_looked_at_once(build):
    validation = build()
    validation.look(4)
    validation.look(4)
    assert [step for step, _ in validation.run.logged] == [4]


def test_other_processes_do_not_look(build, tmp_path):
    validation = build(is_main=False, validation_prompts=["a red circle"])
    validation.look(0)
    assert validation.run.logged == [] and list(tmp_path.iterdir()) == []
    assert validation.compare(0) is None


def test_nothing_to_look_at_writes_nothing(build, tmp_path):
    for validation in (build(rows=None), build(validation_loss_rows=0)):
        validation.look(0)
        assert validation.run.logged == [] and list(tmp_path.iterdir()) == []


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_same_whenever_it_is_taken_and_in_whatever_batches(build):
    torch.manual_seed(1)
    first = loss_of(build())
    torch.manual_seed(2)
    assert loss_of(build()) == first
    assert loss_of(build(batch_size=3)) == pytest.approx(first, rel=1e-5)


def test_rows_share_the_timesteps_evenly(build, monkeypatch):
    seen, real = [], denoising.diffusion_loss

    def watched(predict, schedule, latents, draws, args):
        seen.extend(draws.timesteps.tolist())
        return real(predict, schedule, latents, draws, args)

    monkeypatch.setattr(denoising, "diffusion_loss", watched)
    build(batch_size=3).look(0)
    assert sorted(seen) == [125, 375, 625, 875]


def test_the_loss_is_that_of_the_rows_by_hand(build, model, held_out):
    """A denoiser that answers 0 leaves the mean square of the noise, which is about 1."""
    with torch.no_grad():
        for parameter in model.denoiser.unet.conv_out.parameters():
            parameter.zero_()
    noise = denoising.gaussian(0, "validation noise", 0, range(4), (4, 4, 4))
    assert loss_of(build()) == pytest.approx(noise.square().mean().item(), rel=1e-6)


def test_what_only_training_does_stays_out_of_the_loss(build):
    plain = loss_of(build())
    training = NoiseArgs(snr_gamma=5.0, noise_offset=0.1, input_perturbation=0.1, dream_training=True)
    assert loss_of(build(noise=training)) == plain
    assert loss_of(build(noise=NoiseArgs(loss_type="huber"))) != plain


def test_held_out_rows_of_several_sizes_keep_their_losses_and_places(build, held_out):
    mixed = copy.copy(held_out)
    mixed.sizes = [(32, 32), (24, 40), (32, 32), (40, 24)]
    square, alone, together = (build(rows=rows, batch_size=n) for rows, n in ((held_out, 4), (mixed, 1), (mixed, 4)))
    square, alone, together = (one._row_losses() for one in (square, alone, together))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert torch.isclose(together, square, rtol=1e-5, atol=0).tolist() == [True, False, True, False]


def test_validation_loss_rows_is_a_limit(build, tmp_path):
    build(validation_loss_rows=3).look(0)
    assert len(json.loads((tmp_path / "validation/base_losses.json").read_text())) == 3


def test_the_change_since_the_base_is_paired_row_by_row(build, model, tmp_path):
    build().look(0)
    base = torch.tensor(json.loads((tmp_path / "validation/base_losses.json").read_text()), dtype=torch.float64)
    unchanged = build()  # a resumed run starts with a new object
    unchanged.look(5)
    assert unchanged.run.logged[0][1]["validation_loss_change"] == 0
    change(model)
    changed = build()
    changed.look(6)
    values, now = changed.run.logged[0][1], changed._row_losses()
    assert values["validation_loss_change"] == pytest.approx((now - base).mean().item()) != 0
    interval = 1.96 * (now - base).std().item() / math.sqrt(4)
    assert values["validation_loss_change_95"] == pytest.approx(interval)


def test_no_change_is_reported_against_other_rows(build):
    build(validation_loss_rows=3).look(0)
    validation = build()
    validation.look(5)
    assert list(validation.run.logged[0][1]) == ["validation_loss"]


def test_the_average_is_looked_at_and_the_trained_weights_come_back(build, model):
    base = loss_of(build())
    average = AveragedWeights(model.trained_parameters(), 0.5, "warm")
    change(model)
    trained = [parameter.detach().clone() for parameter in model.trained_parameters().values()]
    assert loss_of(build(ema=average)) == base != loss_of(build())
    assert all(torch.equal(now, then) for now, then in zip(model.trained_parameters().values(), trained, strict=True))
    assert model.denoiser.training


# -- images --------------------------------------------------------------------------------------------------------

PROMPTS = {"validation_prompts": ["a red circle", "a blue square"], "num_validation_images": 2}


def test_images_are_named_by_prompt_and_number(build, tmp_path):
    validation = build(**PROMPTS)
    validation.look(0)
    expected = ["grid.png", "prompt00-0.png", "prompt00-1.png", "prompt01-0.png", "prompt01-1.png"]
    assert sorted(path.name for path in (tmp_path / "validation/step-0").iterdir()) == expected
    assert Image.open(tmp_path / "validation/step-0/prompt00-0.png").size == (32, 32)
    assert validation.run.shown == [("validation", 4, 0), ("validation grid", 1, 0)]


def test_each_image_has_a_seed_of_its_own_that_never_changes(build, tmp_path):
    for step, batch_size in ((0, 4), (7, 4), (8, 3)):
        torch.manual_seed(step)
        build(batch_size=batch_size, rows=None, **PROMPTS).look(step)
    pixels = lambda step, name: Image.open(tmp_path / f"validation/step-{step}/{name}.png").tobytes()
    names = ["prompt00-0", "prompt00-1", "prompt01-0", "prompt01-1"]
    assert [pixels(0, name) for name in names] == [pixels(7, name) for name in names]
    assert len({pixels(0, name) for name in names}) == 4
    difference = [abs(a - b) for name in names for a, b in zip(pixels(0, name), pixels(8, name), strict=True)]
    assert max(difference) <= 1  # another batch size may round differently


def test_the_comparison_shows_the_base_beside_the_model(build, model, tmp_path):
    validation = build(rows=None, **PROMPTS)
    validation.look(0)
    assert validation.compare(5) is None  # step 5 was never drawn
    change(model)
    validation.look(5)
    assert validation.compare(5) == tmp_path / "comparison.png"
    drawn = [Image.open(tmp_path / f"validation/step-{step}/prompt01-1.png") for step in (0, 5)]
    assert drawn[0].tobytes() != drawn[1].tobytes()
    # The last row: two cells of 192 pixels, each with a gap of 6 after it.
    sheet = Image.open(tmp_path / "comparison.png")
    for column, image in enumerate(drawn):
        left, top = sheet.width - (2 - column) * 198, sheet.height - 198
        cell = sheet.crop((left, top, left + 192, top + 192))
        assert cell.tobytes() == image.resize((192, 192), Image.Resampling.NEAREST).tobytes()


def test_without_prompts_there_is_no_comparison(build):
    validation = build()
    validation.look(0)
    assert validation.compare(0) is None


# -- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("num_validation_images", -1),
        ("validation_inference_steps", 0),
        ("validation_epochs", -1),
        ("validation_loss_rows", -1),
        ("validation_steps", 0),
    ],
)
def test_flags_that_cannot_work_are_named(flag, value):
    (problem,) = problems_of(ValidationArgs(**{flag: value}))
    assert problem.startswith(f"--{flag} {value}")


def test_no_validation_images():
    assert ValidationArgs(validation_prompts=["a cat"], num_validation_images=0).prompts == []
