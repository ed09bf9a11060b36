"""Evaluation while training: known answers, the same base after a resume, and a run that ends in time."""

import copy
import json
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.reading import DatasetError
from finetuning.data.training_set import DataArgs, load_images
from finetuning.diffusion.objective import NoiseArgs
from finetuning.evaluation import denoising, networks
from finetuning.evaluation.metrics import EvaluationError
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.families.table import DEFAULT_FAMILY, FAMILIES
from finetuning.rng import gaussian
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import single_scenes
from finetuning.training.checkpoint import checkpoints_in
from finetuning.training.ema import AveragedWeights, NoAverage
from finetuning.training.evaluator import Evaluator, RetentionArgs, ValidationArgs

ENDS = ("", "_low", "_high")
PROMPTS = {"validation_prompts": ["a red circle", "a blue square"], "num_validation_images": 2}


@dataclass
class Args(RetentionArgs, ValidationArgs, NoiseArgs, BucketArgs, CaptionArgs, DataArgs):
    """All that an evaluator reads."""

    seed: int = 0


def opened(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)))


@pytest.fixture
def model(tiny_model):
    return opened(tiny_model)


@pytest.fixture(scope="module")
def held_out(tiny_model, shapes_folder):
    tokenize = opened(tiny_model).tokenize
    return load_images(Args(train_data_dir=str(shapes_folder), resolution="32"), tokenize, seed=0)[1]


@pytest.fixture
def build(model, held_out, shapes_folder, tmp_path, fake_run):
    """An Evaluator of the tiny model on the four held-out rows, and with `retain` on 3 rows of the train split."""

    def make(ema=None, rows=held_out, is_main=True, first_step=0, model=model, total_steps=7, retain=False, **flags):
        if retain:
            retained = {"evaluate_every": 2, "retain_dataset": str(shapes_folder), "retain_split": "train"}
            flags = {**retained, "retain_rows": 3, "validation_epochs": 0, **flags}
        args = Args(**{"resolution": "32", "train_batch_size": 4, "validation_inference_steps": 1, **flags})
        sampler = SimpleNamespace(steps_per_epoch=5)
        data = SimpleNamespace(held_out=rows, batch_sampler=sampler, total_steps=total_steps)
        return Evaluator(args, fake_run(tmp_path, is_main=is_main), model, ema or NoAverage(), data, first_step)

    return make


@torch.no_grad()
def answer(model, value):
    """Let the denoiser predict this number everywhere, so that the loss of a row follows from its noise alone."""
    model.denoiser.denoiser.conv_out.weight.zero_()
    model.denoiser.denoiser.conv_out.bias.fill_(value)


def losses_by_hand(rows, value):
    noise = gaussian(0, "validation noise", 0, rows, (4, 4, 4)).double().numpy()
    return ((value - noise) ** 2).mean((1, 2, 3))


def with_interval(name, value, contributions):
    """For three or four rows the expanded percentile interval is so wide that it reaches from the lowest to the
    highest resampled mean: that of the lowest row alone, and that of the highest."""
    return {
        name: pytest.approx(value, rel=1e-5, abs=1e-7),
        f"{name}_low": pytest.approx(value + contributions.min(), rel=1e-5, abs=1e-7),
        f"{name}_high": pytest.approx(value + contributions.max(), rel=1e-5, abs=1e-7),
    }


def base_file(folder):
    return json.loads((folder / "validation/base_evaluation.json").read_text())


# -- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "validation", "retention"),
    [
        ({"validation_steps": 3}, [0, 3, 6, 7], []),
        ({"validation_epochs": 1}, [0, 5, 7], []),
        ({"validation_epochs": 1, "validation_steps": 4}, [0, 4, 7], []),
        ({"validation_epochs": 0}, [0, 7], []),
        ({"retain": True, "evaluate_every": 3}, [0, 3, 6, 7], [0, 3, 6, 7]),
        ({"retain": True, "evaluate_every": 4, "validation_steps": 3}, [0, 3, 4, 6, 7], [0, 4, 7]),
        ({"validation_loss_rows": 0}, [], []),
        ({"rows": None}, [], []),
        ({"retain": True, "rows": None}, [], [0, 2, 4, 6, 7]),
    ],
)
def test_it_is_due_at_the_start_every_so_often_and_at_the_end(flags, validation, retention, build):
    evaluator = build(**flags)
    evaluator.losses_of = lambda images, rows: [1.0 + row for row in rows]
    for step in range(8):
        assert evaluator.evaluate(step) is False
    evaluator.evaluate(7, last=True)
    logged = evaluator.run.logged.items()
    assert [step for step, values in logged if "validation_loss" in values] == validation
    assert [step for step, values in logged if "retention" in values] == retention


def test_a_step_is_measured_once(build):
    evaluator, measured = build(validation_steps=1), []
    evaluator.losses_of = lambda images, rows: measured.append(rows) or [1.0, 2.0, 3.0, 4.0]
    evaluator.evaluate(4)
    evaluator.evaluate(4, last=True)
    assert len(measured) == 1


def test_nothing_to_measure_writes_nothing(build, tmp_path):
    evaluator = build(rows=None)
    assert evaluator.evaluate(0) is False and evaluator.evaluate(7, last=True) is False
    assert evaluator.run.logged == {} and list(tmp_path.iterdir()) == [] and evaluator.compare(7) is None


def test_only_the_main_process_writes(build, tmp_path):
    evaluator = build(is_main=False, retain=True, **PROMPTS)
    evaluator.evaluate(0)
    assert list(tmp_path.iterdir()) == []


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_rows_by_hand_with_its_interval(build, model, tmp_path):
    answer(model, 0.0)
    first = build()
    first.evaluate(0)
    base = losses_by_hand(range(4), 0.0)
    assert first.run.logged[0] == with_interval("validation_loss", base.mean(), base - base.mean())
    assert base_file(tmp_path)["losses"] == pytest.approx(base.tolist(), rel=1e-5)

    answer(model, 0.5)
    resumed = build(first_step=3)
    resumed.evaluate(7, last=True)
    now = losses_by_hand(range(4), 0.5)
    change = now - base
    assert resumed.run.logged[7] == {
        **with_interval("validation_loss", now.mean(), now - now.mean()),
        **with_interval("validation_loss_change", change.mean(), change - change.mean()),
    }


def test_the_loss_is_the_same_whenever_it_is_taken_and_in_whatever_batches(build):
    torch.manual_seed(1)
    first = build().losses_of(*build().held_out)
    torch.manual_seed(2)
    assert build().losses_of(*build().held_out) == first
    assert build(train_batch_size=3).losses_of(*build().held_out) == pytest.approx(first, rel=1e-5)


def test_rows_share_the_timesteps_evenly(build, monkeypatch):
    seen, real = [], denoising.diffusion_loss

    def watched(predict, schedule, latents, draws, args):
        seen.extend(draws.timesteps.tolist())
        return real(predict, schedule, latents, draws, args)

    monkeypatch.setattr(denoising, "diffusion_loss", watched)
    build(train_batch_size=3).evaluate(0)
    assert sorted(seen) == [125, 375, 625, 875]


def test_what_only_training_does_stays_out_of_the_loss(build):
    loss = lambda **flags: build(**flags).losses_of(*build().held_out)
    plain = loss()
    assert loss(snr_gamma=5.0, noise_offset=0.1, input_perturbation=0.1, dream_training=True) == plain
    assert loss(loss_type="huber") != plain


def test_held_out_rows_of_several_sizes_keep_their_losses_and_places(build, held_out):
    mixed = copy.copy(held_out)
    mixed.sizes = [(32, 32), (24, 40), (32, 32), (40, 24)]
    cases = ((held_out, 4), (mixed, 1), (mixed, 4))
    square, alone, together = (
        torch.tensor(build(rows=rows, train_batch_size=n).losses_of(rows, range(4))) for rows, n in cases
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert torch.isclose(together, square, rtol=1e-5, atol=0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("rows", [1, 3])
def test_validation_loss_rows_is_a_limit_and_other_rows_are_not_compared(build, rows, tmp_path):
    evaluator = build(validation_loss_rows=rows)
    evaluator.evaluate(0)
    assert len(base_file(tmp_path)["losses"]) == rows
    assert ("validation_loss_low" in evaluator.run.logged[0]) is (rows > 1)  # of one row there is no interval
    resumed = build(first_step=3)
    resumed.evaluate(7, last=True)
    assert "validation_loss_change" not in resumed.run.logged[7]


def test_the_average_is_measured_and_all_is_put_back(build, model):
    answer(model, 0.0)
    average = AveragedWeights(model.trained_parameters(), 0.5, "warm")
    evaluator = build(ema=average, retain=True)
    evaluator.evaluate(0)
    answer(model, 0.5)
    trained = [parameter.detach().clone() for parameter in model.trained_parameters().values()]
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    evaluator.evaluate(2)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert evaluator.run.logged[2]["retention"] == 1  # the average has not moved
    assert all(torch.equal(now, then) for now, then in zip(model.trained_parameters().values(), trained, strict=True))
    assert model.denoiser.training


# -- learned and retained --------------------------------------------------------------------------------------------


def test_learned_and_retained_are_those_of_the_losses_by_hand(build, model, tmp_path):
    answer(model, 0.0)
    evaluator = build(retain=True)
    evaluator.evaluate(0)
    assert {evaluator.run.logged[0][f"learned{end}"] for end in ENDS} == {0}
    assert {evaluator.run.logged[0][f"retention{end}"] for end in ENDS} == {1}

    answer(model, 0.5)
    evaluator.evaluate(2)
    retained = denoising.chosen_rows(11, 3, 0)
    fit, retain = (losses_by_hand(rows, 0.0) for rows in (range(4), retained))
    fit_now, retain_now = (losses_by_hand(rows, 0.5) for rows in (range(4), retained))
    assert base_file(tmp_path)["retain"] == pytest.approx(retain.tolist(), rel=1e-5)
    left, share = fit_now.mean() / fit.mean(), retain.mean() / retain_now.mean()
    # what each row adds to a ratio of means is (its value - ratio * its reference) / the mean reference
    parts = (fit_now - left * fit) / fit.mean(), (retain - share * retain_now) / retain_now.mean()
    assert evaluator.run.logged[2] == {
        **with_interval("learned", 1 - left, -parts[0]),
        **with_interval("retention", share, parts[1]),
        **{name: value for name, value in evaluator.run.logged[2].items() if name.startswith("validation_loss")},
    }


def test_what_is_retained_is_compared_with_the_limit(build, model):
    answer(model, 0.0)
    evaluator = build(retain=True, stop_when_retention_below=0.5)
    evaluator.evaluate(0)
    answer(model, 2.0)
    assert evaluator.evaluate(1) is False  # not due
    assert evaluator.evaluate(2) is True
    retention = evaluator.run.logged[2]["retention"]
    assert retention < 0.5 and "--stop_when_retention_below 0.5" in evaluator.run.said[-1]
    assert build(retain=True, stop_when_retention_below=retention / 2, first_step=1).evaluate(2) is False
    assert build(retain=True, first_step=1).evaluate(2) is False


@pytest.mark.parametrize("flags", [{"rows": None}, {"validation_loss_rows": 1}, {"validation_loss_rows": 0}])
def test_without_two_held_out_rows_learned_is_not_measured(build, flags):
    evaluator = build(retain=True, **flags)
    evaluator.evaluate(0)
    assert {"retention"} == {name for name in evaluator.run.logged[0] if name in ("retention", "learned")}
    assert "--validation_fraction" in evaluator.run.said[0]


# -- the base of a resumed run ---------------------------------------------------------------------------------------


def test_a_resumed_run_compares_with_the_same_base(build, model):
    straight = build(retain=True)
    straight.evaluate(0)
    answer(model, 0.5)
    straight.evaluate(4)
    resumed = build(retain=True, first_step=4)
    resumed.evaluate(4)
    assert resumed.run.logged[4] == straight.run.logged[4]


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"retain_rows": 2}, "rows to retain"), ({"loss_type": "huber"}, "loss"), ({"seed": 1}, "seed")],
)
def test_a_base_of_another_measurement_is_refused(build, flags, named):
    build(retain=True).evaluate(0)
    with pytest.raises(EvaluationError, match=rf"base_evaluation.json.*{named}"):
        build(retain=True, first_step=2, **flags)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"losses": []}'])
def test_a_base_that_cannot_be_read_is_named_where_it_is_needed(build, tmp_path, content):
    (tmp_path / "validation").mkdir()
    if content is not None:
        (tmp_path / "validation/base_evaluation.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"base_evaluation.json"):
        build(retain=True, first_step=2)
    evaluator = build(first_step=2)  # without --evaluate_every only the change is missing
    evaluator.evaluate(7, last=True)
    assert "validation_loss" in evaluator.run.logged[7] and "validation_loss_change" not in evaluator.run.logged[7]


# -- images ----------------------------------------------------------------------------------------------------------


def test_images_are_named_by_prompt_and_number_and_each_has_a_seed_of_its_own(build, tmp_path):
    for step, together in ((0, 4), (7, 4), (5, 3)):
        torch.manual_seed(step)
        evaluator = build(rows=None, train_batch_size=together, validation_epochs=1, **PROMPTS)
        evaluator.evaluate(step, last=step == 7)
        assert evaluator.run.shown == [("validation", 4, step), ("validation grid", 1, step)]
    names = ["prompt00-0", "prompt00-1", "prompt01-0", "prompt01-1"]
    assert sorted(path.name for path in (tmp_path / "validation/step-0").iterdir()) == [
        "grid.png",
        *(f"{name}.png" for name in names),
    ]
    pixels = lambda step, name: Image.open(tmp_path / f"validation/step-{step}/{name}.png").tobytes()
    assert [pixels(0, name) for name in names] == [pixels(7, name) for name in names]
    assert len({pixels(0, name) for name in names}) == 4
    difference = [abs(a - b) for name in names for a, b in zip(pixels(0, name), pixels(5, name), strict=True)]
    assert max(difference) <= 1  # another batch size may round differently


def test_the_comparison_shows_the_base_beside_the_model(build, model, tmp_path):
    evaluator = build(rows=None, **PROMPTS)
    evaluator.evaluate(0)
    assert evaluator.compare(7) is None  # there are no images of step 7 yet
    answer(model, 0.5)
    evaluator.evaluate(7, last=True)
    assert evaluator.compare(7) == tmp_path / "comparison.png"
    images = [Image.open(tmp_path / f"validation/step-{step}/prompt01-1.png") for step in (0, 7)]
    assert images[0].tobytes() != images[1].tobytes()
    # The last row: two cells of 192 pixels, each with a gap of 6 after it.
    sheet = Image.open(tmp_path / "comparison.png")
    for column, image in enumerate(images):
        left, top = sheet.width - (2 - column) * 198, sheet.height - 198
        cell = sheet.crop((left, top, left + 192, top + 192))
        assert cell.tobytes() == image.resize((192, 192), Image.Resampling.NEAREST).tobytes()


def test_no_images_are_made_where_0_are_asked_for(build, tmp_path):
    evaluator = build(rows=None, validation_prompt="a red circle", num_validation_images=0)
    evaluator.evaluate(0)
    assert evaluator.run.shown == [] and list(tmp_path.iterdir()) == []


def test_an_image_that_is_not_finite_is_told_and_the_training_goes_on(build, model, tmp_path):
    with torch.no_grad():
        model.components["vae"].decoder.conv_out.bias.fill_(torch.nan)
    evaluator = build(rows=None, **PROMPTS)
    assert evaluator.evaluate(0) is False and evaluator.run.shown == []
    assert any("not finite" in message for message in evaluator.run.said)
    assert not list(tmp_path.rglob("*.png"))


class Words:
    """A tokenizer."""

    model_max_length = 77

    def __call__(self, text):
        return SimpleNamespace(input_ids=text.split())


class Painter:
    """A model whose pipeline shows what a caption asks for, in `style`; the last `wrong` images show a square."""

    numpy_to_pil = staticmethod(DiffusionPipeline.numpy_to_pil)
    loaded = nullcontext
    tokenizer = Words()

    def __init__(self, scenes):
        self.scenes, self.style, self.wrong, self.calls = {scene.caption: scene for scene in scenes}, "filled", 0, []

    @contextmanager
    def pipeline(self):
        yield self

    def __call__(self, prompts, generator, height, width, output_type, **how):
        self.calls.append((list(prompts), [one.initial_seed() for one in generator], how))
        assert (height, width, output_type) == (64, 64, "np")
        images = [draw(self.scenes[prompt], 0, self.style) for prompt in prompts]
        square = draw(next(s for s in single_scenes() if s.things[0].shape == "square"), 0, self.style)
        shown = images[: len(images) - self.wrong] + [square] * self.wrong
        return SimpleNamespace(images=np.stack([np.asarray(image) / 255 for image in shown]))


CIRCLES = [scene for scene in single_scenes() if scene.things[0].shape == "circle"][:6]


@pytest.fixture
def painter(monkeypatch):
    monkeypatch.setitem(FAMILIES, "Painter", DEFAULT_FAMILY)
    return Painter(CIRCLES)


@pytest.fixture
def by_images(build, painter, tmp_path):
    """An Evaluator of the painter: the last two images are of what is learned, four of what should be retained."""

    def make(kind="checker", **flags):
        general = tmp_path / "general.txt"
        general.write_text("\n".join(scene.caption for scene in CIRCLES[2:]))
        how = {
            "evaluate_with": kind, "general_prompts": str(general), "resolution": "64", "evaluate_every": 2,
            "validation_prompts": [scene.caption for scene in CIRCLES[:2]], "num_validation_images": 1,
            "train_batch_size": 6, "checker": "finetuning.shapes.checker" if kind == "checker" else None,
        }  # fmt: skip
        evaluator = build(model=painter, rows=None, **{**how, **flags})
        evaluator._validation_images = lambda step: None
        return evaluator

    return make


def test_a_checker_judges_the_images(by_images, painter, tmp_path):
    evaluator = by_images(validation_inference_steps=3, validation_guidance_scale=2.0)
    evaluator.evaluate(0)
    painter.style, painter.wrong = "chalk", 1
    evaluator.evaluate(2)
    first, second = (evaluator.run.logged[step] for step in (0, 2))
    assert (first["learned"], first["retention"]) == (0, 1)
    assert (second["learned"], second["retention"]) == (1, 0.75)
    assert (second["retention_low"], second["retention_high"]) == (0, 1)  # one row is 0, three are 1
    assert painter.calls[0] == painter.calls[1]
    prompts, seeds, how = painter.calls[0]
    assert len(prompts) == len(set(seeds)) == 6 and how == {"num_inference_steps": 3, "guidance_scale": 2.0}
    base = base_file(tmp_path)
    assert (base["losses"], base["fit"], base["retain"]) == (None, [0, 0], [1, 1, 1, 1])
    assert base["facts"]["checker"] == "finetuning.shapes.checker"


def test_an_image_starts_from_the_same_noise_in_whatever_batch(by_images, painter):
    for together in (6, 4):
        by_images(train_batch_size=together).evaluate(0)
    whole, first, second = (seeds for _, seeds, _ in painter.calls)
    assert whole == first + second


def test_a_base_that_gets_nothing_right_has_nothing_to_forget(by_images, painter):
    painter.wrong = 6
    with pytest.raises(EvaluationError, match=r"--evaluate_with checker.* 4 rows"):
        by_images().evaluate(0)


def test_one_validation_prompt_has_no_interval(by_images, painter):
    evaluator = by_images(validation_prompts=[CIRCLES[0].caption])
    evaluator.evaluate(0)
    assert list(evaluator.run.logged[0]) == ["retention", "retention_low", "retention_high"]
    assert "two --validation_prompts" in evaluator.run.said[0] and len(painter.calls[0][0]) == 4


def test_clip_scores_are_taken_of_image_and_prompt(by_images, painter, monkeypatch):
    """A CLIP that finds 0.5 in every filled image, and 0.25 in chalk."""
    asked = []

    def clip(name, device):
        texts = lambda captions: np.tile([1.0, 0.0], (len(captions), 1))
        angle = lambda: np.arccos(0.5 if painter.style == "filled" else 0.25)
        images = lambda images: np.tile([np.cos(angle()), np.sin(angle())], (len(images), 1))
        asked.append((name, str(device)))
        return SimpleNamespace(texts=texts, images=images), SimpleNamespace(sha256="00")

    monkeypatch.setattr(networks, "clip", clip)
    evaluator = by_images("clip", clip_model="here")
    evaluator.evaluate(0)
    painter.style = "chalk"
    evaluator.evaluate(2)
    values = evaluator.run.logged[2]
    assert asked == [("here", "cpu")]
    assert values["learned"] == pytest.approx(-25) and values["retention"] == pytest.approx(0.5)


# -- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, []),
        ({"retain_dataset": "x"}, []),  # off: the flag's own `requires` says so
        ({"evaluate_every": 2}, ["--retain_dataset"]),
        ({"evaluate_every": 2, "retain_dataset": "nowhere"}, ["--retain_dataset nowhere"]),
        ({"evaluate_every": 2, "evaluate_with": "checker"}, ["--checker"]),
        ({"evaluate_every": 2, "evaluate_with": "checker", "checker": "no_such_module", "general_prompts": "{shapes}"},
         ["--checker no_such_module"]),
        ({"evaluate_every": 2, "evaluate_with": "checker", "checker": "finetuning.shapes.checker",
          "general_prompts": "{strange}"}, ["--checker finetuning.shapes.checker"]),
        ({"evaluate_every": 2, "evaluate_with": "clip"}, []),
        ({"evaluate_every": 2, "evaluate_with": "clip", "general_prompts": "{one}"}, ["--general_prompts"]),
        ({"evaluate_every": 2, "evaluate_with": "clip", "retain_dataset": "x", "general_prompts": "gone.txt"},
         ["--retain_dataset", "gone.txt"]),
    ],
)  # fmt: skip
def test_flags_that_cannot_work_are_named_together(flags, named, tmp_path):
    texts = {"shapes": "a red circle\na blue square", "strange": "a dog\na cat", "one": "a dog"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    paths = {name: tmp_path / f"{name}.txt" for name in texts}
    flags = {name: value.format(**paths) if isinstance(value, str) else value for name, value in flags.items()}
    problems = list(RetentionArgs(**flags).problems())
    assert len(problems) == len(named)
    assert all(words in problem for words, problem in zip(named, problems, strict=True))


@pytest.mark.parametrize("damage", ["empty", "one row", "broken image"])
def test_a_retain_dataset_that_cannot_be_used_is_named(build, shapes_folder, tmp_path, damage):
    folder = tmp_path / "retain"
    shutil.copytree(shapes_folder / "train", folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    if damage == "broken image":
        for path in folder.glob("*.png"):
            path.write_bytes(path.read_bytes()[:60])
    else:
        (folder / "metadata.jsonl").write_text("".join(lines[: damage == "one row"]))
    with pytest.raises((EvaluationError, DatasetError), match="retain"):
        build(retain=True, retain_dataset=str(folder), retain_split=None)


# -- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_that_forgets_ends_at_a_whole_checkpoint_and_goes_on_when_it_may(
    training, tiny_model, shapes_folder, tmp_path, capfd
):
    """With the full fine-tune: both scripts have the same Session."""
    script = "train_text_to_image"
    arguments = f"""
        --pretrained_model_name_or_path {tiny_model} --train_data_dir {shapes_folder} --resolution 32
        --train_batch_size 4 --max_train_steps 4 --seed 3 --learning_rate 0.5 --use_ema --ema_decay 0.5
        --checkpointing_steps 0 --validation_epochs 0 --report_to none
        --evaluate_every 2 --retain_dataset {shapes_folder} --retain_split train --retain_rows 4
    """.split()
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert training.run(script, arguments, straight) == 0
    found = {line["step"]: line for line in training.metrics(straight) if "retention" in line}
    assert list(found) == [0, 2, 4]
    assert (found[0]["learned"], found[0]["retention"]) == (0, 1) and found[2]["retention"] < 0.99

    limit = ("--stop_when_retention_below", 0.99)
    assert training.run(script, arguments, stopped, *limit) == 0
    assert [step for step, _ in checkpoints_in(stopped)] == [2]
    assert (stopped / "model_index.json").is_file()
    finished = training.metrics(stopped)
    assert finished[-1]["step"] == 2 and "validation_loss" in finished[-1]

    again = ("--resume_from_checkpoint", "latest")
    assert training.run(script, arguments, stopped, *limit, *again) == 0  # the same command ends where it ended
    assert training.metrics(stopped) == finished and [step for step, _ in checkpoints_in(stopped)] == [2]
    capfd.readouterr()
    assert training.run(script, arguments, stopped, *again) == 0
    assert "these have changed" not in capfd.readouterr().err
    training.assert_same(stopped, straight)

    (stopped / "validation/base_evaluation.json").unlink()
    assert training.run(script, arguments, stopped, *again) == 1
    assert "base_evaluation.json" in capfd.readouterr().err
