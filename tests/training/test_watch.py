"""Learned and kept while training: known answers, the same base after a resume, and a run that ends in time."""

import importlib
import json
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.cli import problems_of
from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.reading import DatasetError
from finetuning.data.training_set import DataArgs, load_images
from finetuning.diffusion.objective import NoiseArgs
from finetuning.diffusion.schedule import NoiseSchedule
from finetuning.evaluation import networks
from finetuning.evaluation.denoising import load_rows, row_losses
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.retention import learned_and_kept
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import single_scenes
from finetuning.training.checkpoint import checkpoints_in
from finetuning.training.ema import AveragedWeights, NoAverage
from finetuning.training.validation import ValidationArgs
from finetuning.training.watch import NoWatch, WatchArgs, build_watch

FIGURES = ["learned", "kept", "validation_loss"]
ENDS = ("", "_low", "_high")


@dataclass
class Args(WatchArgs, ValidationArgs, NoiseArgs, BucketArgs, CaptionArgs, DataArgs):
    """All that a watch reads."""

    seed: int = 0


class FakeRun(SimpleNamespace):
    """A run without accelerate that keeps what it is given to log and to say."""

    def __init__(self, output_dir, is_main=True):
        accelerator = SimpleNamespace(autocast=nullcontext)
        super().__init__(
            output_dir=output_dir, is_main=is_main, accelerator=accelerator, device=torch.device("cpu"), logged={},
            said=[],
        )  # fmt: skip

    def any(self, flag):
        return bool(flag)

    def log(self, values, step):
        self.logged[step] = values

    def say(self, message):
        self.said.append(message)


@pytest.fixture
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)


@pytest.fixture(scope="module")
def held_out(tiny_model, shapes_folder):
    tokenizer = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0).tokenizer
    return load_images(Args(train_data_dir=str(shapes_folder), resolution="32"), tokenizer, seed=0)[1]


@pytest.fixture
def build(model, held_out, shapes_folder, tmp_path):
    """A Watch by the loss: the 4 held-out rows, and 3 rows of the train split that should be kept."""

    def make(ema=None, rows=held_out, is_main=True, first_step=0, model=model, **flags):
        by_loss = {"retain_dataset": str(shapes_folder), "retain_split": "train", "retain_rows": 3}
        given = flags if "evaluate_with" in flags else by_loss | flags
        args = Args(**({"evaluate_every": 2, "resolution": "32", "train_batch_size": 4} | given))
        schedule = NoiseSchedule.of(model.scheduler)
        return build_watch(args, FakeRun(tmp_path, is_main), model, ema or NoAverage(), schedule, rows, first_step, 7)

    return make


@torch.no_grad()
def change(model, amount=0.1):
    for parameter in model.trained_parameters().values():
        parameter += amount


def silence(model):
    """Let the denoiser answer 0: the loss of a row is the mean square of its noise."""
    with torch.no_grad():
        for parameter in model.denoiser.unet.conv_out.parameters():
            parameter.zero_()


# -- when ------------------------------------------------------------------------------------------------------------


def test_it_is_due_at_the_start_every_so_often_and_at_the_end(build):
    watch = build(evaluate_every=3)
    assert [step for step in range(8) if watch.due(step)] == [0, 3, 6, 7]


def test_off_asks_for_nothing_and_logs_nothing():
    args = SimpleNamespace(evaluate_every=0)
    watch = build_watch(args, None, None, None, None, None, 5, 7)
    assert isinstance(watch, NoWatch) and not any(watch.look(step) for step in range(8))


def test_other_processes_measure_nothing(build, tmp_path):
    watch = build(is_main=False)
    assert watch.look(0) is False
    assert watch.run.logged == {} and list(tmp_path.iterdir()) == []


# -- the loss --------------------------------------------------------------------------------------------------------


def test_an_untouched_model_learned_nothing_and_kept_all(build):
    watch = build(stop_when_retention_below=0.99)
    assert [watch.look(step) for step in range(5)] == [False] * 5
    assert list(watch.run.logged) == [0, 2, 4]
    for values in watch.run.logged.values():
        assert list(values) == [figure + end for figure in FIGURES for end in ENDS]
        assert {values["learned" + end] for end in ENDS} == {0} and {values["kept" + end] for end in ENDS} == {1}
        assert values["validation_loss_low"] < values["validation_loss"] < values["validation_loss_high"]
    assert watch.run.logged[0] == watch.run.logged[4]


def test_the_figures_are_those_of_the_losses_by_hand(build, model, tmp_path):
    watch = build()
    watch.look(0)
    fit, retain = (np.array(json.loads(watch.path.read_text())[name]) for name in ("fit", "retain"))
    assert (len(fit), len(retain)) == (4, 3)
    silence(model)
    watch.look(2)
    kept_rows = load_rows(watch.args.retain_dataset, model.tokenizer, (32, 32), split="train", most=3)
    schedule = NoiseSchedule.of(model.scheduler)
    now = [row_losses(model, *rows, schedule).numpy() for rows in (watch.held_out, kept_rows)]
    values = watch.run.logged[2]
    assert values["learned"] == pytest.approx(1 - now[0].mean() / fit.mean()) != 0
    assert values["kept"] == pytest.approx(retain.mean() / now[1].mean())
    assert values["validation_loss"] == pytest.approx(now[0].mean())
    learned, kept = learned_and_kept("loss", (now[0], fit), (now[1], retain))
    intervals = [learned.low, learned.high, kept.low, kept.high]
    assert [values[f"{name}_{end}"] for name in FIGURES[:2] for end in ("low", "high")] == pytest.approx(intervals)


def test_what_is_kept_is_compared_with_the_limit(build, model):
    silence(model)
    watch = build(stop_when_retention_below=0.5)
    watch.look(0)
    change(model, 0.5)
    assert watch.look(1) is False  # not due
    assert watch.look(2) is True
    kept = watch.run.logged[2]["kept"]
    assert kept < 0.5
    message = watch.run.said[-1]
    assert f"step 2: kept {kept:.3f}" in message and "--stop_when_retention_below 0.5" in message
    assert build(stop_when_retention_below=kept / 2, first_step=1).look(2) is False
    assert build(first_step=1).look(2) is False


@pytest.mark.parametrize("flags", [{"rows": None}, {"validation_loss_rows": 0}])
def test_without_held_out_rows_only_what_is_kept_is_measured(build, flags):
    watch = build(**flags)
    watch.look(0)
    assert list(watch.run.logged[0]) == ["kept", "kept_low", "kept_high"]
    assert "learned is not measured" in watch.run.said[0] and "--validation_fraction" in watch.run.said[0]


def test_looking_draws_from_no_global_generator_and_puts_everything_back(build, model):
    average = AveragedWeights(model.trained_parameters(), 0.5, "warm")
    watch = build(ema=average)
    watch.look(0)
    change(model)
    trained = [parameter.detach().clone() for parameter in model.trained_parameters().values()]
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    watch.look(2)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert watch.run.logged[2]["kept"] == 1  # the average has not moved
    assert all(torch.equal(now, then) for now, then in zip(model.trained_parameters().values(), trained, strict=True))
    assert model.denoiser.training


# -- the base of a resumed run ---------------------------------------------------------------------------------------


def test_a_resumed_run_compares_with_the_same_base(build, model):
    straight = build()
    straight.look(0)
    change(model)
    straight.look(4)
    resumed = build(first_step=4)
    resumed.look(4)
    assert resumed.run.logged[4] == straight.run.logged[4]
    assert straight.run.logged[4]["kept"] != 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"retain_rows": 2}, "rows to retain"), ({"loss_type": "huber"}, "loss"), ({"seed": 1}, "seed")],
)
def test_a_base_of_another_measurement_is_refused(build, flags, named):
    build().look(0)
    with pytest.raises(EvaluationError, match=rf"base_evaluation.json is of another measurement \({named}\)"):
        build(first_step=2, **flags)


def test_a_base_that_is_not_there_is_named_with_what_to_do(build, tmp_path):
    for content in (None, "{"):
        if content:
            (tmp_path / "validation").mkdir()
            (tmp_path / "validation/base_evaluation.json").write_text(content)
        with pytest.raises(EvaluationError, match=r"base_evaluation.json cannot be read .* copy it from the run"):
            build(first_step=2)


# -- images --------------------------------------------------------------------------------------------------------


class Painter:
    """A model whose pipeline shows what a caption asks for, in `style`; the last `wrong` images show a square."""

    def __init__(self, model, scenes):
        self.tokenizer, self.scheduler = model.tokenizer, model.scheduler
        self.scenes, self.style, self.wrong, self.calls = {scene.caption: scene for scene in scenes}, "filled", 0, []

    @contextmanager
    def pipeline(self):
        yield self.paint

    def paint(self, prompts, generator, height, width, **how):
        self.calls.append((list(prompts), [one.initial_seed() for one in generator], how))
        assert (height, width) == (64, 64)
        images = [draw(self.scenes[prompt], 0, self.style) for prompt in prompts]
        square = draw(next(s for s in single_scenes() if s.things[0].shape == "square"), 0, self.style)
        return SimpleNamespace(images=images[: len(images) - self.wrong] + [square] * self.wrong)


CIRCLES = [scene for scene in single_scenes() if scene.things[0].shape == "circle"][:6]


@pytest.fixture
def painter(model):
    return Painter(model, CIRCLES)


@pytest.fixture
def by_images(build, painter, tmp_path):
    """A Watch of the painter: two prompts of what is learned, four of what should be kept, in batches of six."""

    def make(kind, **flags):
        (tmp_path / "general.txt").write_text("\n".join(scene.caption for scene in CIRCLES[2:]))
        flags = {"validation_prompts": [scene.caption for scene in CIRCLES[:2]], "train_batch_size": 6} | flags
        how = {"evaluate_with": kind, "general_prompts": str(tmp_path / "general.txt"), "resolution": "64"}
        return build(model=painter, rows=None, **how, **flags)

    return make


def test_shapes_are_read_off_the_pixels(by_images, painter):
    watch = by_images("shapes", validation_inference_steps=3, validation_guidance_scale=2.0)
    watch.look(0)
    painter.style, painter.wrong = "chalk", 1
    watch.look(2)
    first, second = (watch.run.logged[step] for step in (0, 2))
    assert (first["learned"], first["kept"]) == (0, 1)
    assert (second["learned"], second["kept"]) == (1, 0.75)
    assert second["kept_low"] < 0.75 < second["kept_high"]
    assert painter.calls[0] == painter.calls[1]
    prompts, seeds, how = painter.calls[0]
    assert len(prompts) == len(set(seeds)) == 6 and how == {"num_inference_steps": 3, "guidance_scale": 2.0}


def test_an_image_starts_from_the_same_noise_in_whatever_batch(by_images, painter):
    for together in (6, 4):
        by_images("shapes", train_batch_size=together).look(0)
    whole, first, second = (seeds for _, seeds, _ in painter.calls)
    assert whole == first + second


def test_a_base_that_draws_nothing_right_has_nothing_to_forget(by_images, painter):
    painter.wrong = 6
    with pytest.raises(EvaluationError, match=r"--evaluate_with shapes: .* average over 4 rows"):
        by_images("shapes").look(0)


def test_one_validation_prompt_has_no_interval(by_images, painter):
    watch = by_images("shapes", validation_prompts=[CIRCLES[0].caption])
    watch.look(0)
    assert list(watch.run.logged[0]) == ["kept", "kept_low", "kept_high"]
    assert "two --validation_prompts" in watch.run.said[0] and len(painter.calls[0][0]) == 4


def test_clip_scores_are_taken_of_image_and_prompt(by_images, painter, monkeypatch):
    """A CLIP that finds 0.5 in every filled image, and 0.25 in chalk."""
    opened = []

    def clip(name, device):
        texts = lambda captions: np.tile([1.0, 0.0], (len(captions), 1))
        angle = lambda: np.arccos(0.5 if painter.style == "filled" else 0.25)
        images = lambda images: np.tile([np.cos(angle()), np.sin(angle())], (len(images), 1))
        opened.append((name, str(device)))
        return SimpleNamespace(texts=texts, images=images), SimpleNamespace(sha256="00")

    monkeypatch.setattr(networks, "clip", clip)
    watch = by_images("clip", clip_model="here")
    watch.look(0)
    painter.style = "chalk"
    watch.look(2)
    assert opened == [("here", "cpu")]
    assert watch.run.logged[2]["learned"] == pytest.approx(-25) and watch.run.logged[2]["kept"] == pytest.approx(0.5)


# -- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"evaluate_every": -1}, ["--evaluate_every -1"]),
        ({"retain_rows": 1}, ["--retain_rows 1"]),
        ({"stop_when_retention_below": 0.5}, ["--stop_when_retention_below does nothing without --evaluate_every"]),
        ({"evaluate_every": 2}, ["--evaluate_with loss needs --retain_dataset"]),
        ({"evaluate_every": 2, "retain_dataset": "nowhere"}, ["--retain_dataset nowhere: there is no such folder"]),
        ({"evaluate_every": 2, "evaluate_with": "shapes"}, ["--evaluate_with shapes needs --general_prompts"]),
        ({"evaluate_every": 2, "evaluate_with": "clip"}, []),
        (
            {"evaluate_every": 2, "stop_when_retention_below": 1.0, "clip_model": "x", "general_prompts": "y.txt"},
            [
                "--stop_when_retention_below 1.0 must be",
                "--general_prompts only goes with --evaluate_with shapes or clip",
                "--clip_model only goes with --evaluate_with clip",
                "--evaluate_with loss needs",
            ],
        ),
        (
            {"evaluate_every": 2, "evaluate_with": "clip", "retain_dataset": "x", "general_prompts": "gone.txt"},
            ["--retain_dataset only goes with --evaluate_with loss", "--general_prompts gone.txt cannot be read"],
        ),
    ],
)
def test_flags_that_cannot_work_are_named_together(flags, said):
    problems = problems_of(WatchArgs(**flags))
    assert len(problems) == len(said)
    assert all(text in problem for text, problem in zip(said, problems, strict=True))


def test_general_prompts_that_cannot_be_read_off_images_are_named(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(f"{CIRCLES[0].caption}\na cat\na dog\n")
    flags = {"evaluate_every": 2, "general_prompts": str(path)}
    problems = list(WatchArgs(**flags, evaluate_with="shapes").problems())
    assert [problem.split(": ")[-1] for problem in problems] == ["'a cat'", "'a dog'"]
    path.write_text("a cat")
    (problem,) = WatchArgs(**flags, evaluate_with="clip").problems()
    assert "at least 2 prompts" in problem


def test_faults_of_the_retain_dataset_are_named_before_the_first_step(build, shapes_folder, tmp_path):
    bad = shutil.copytree(shapes_folder, tmp_path / "bad")
    (bad / "train/00003.png").unlink()
    with pytest.raises(DatasetError, match="1 faults"):
        build(retain_dataset=str(bad))
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (32, 32)).save(one / "0.png")
    (one / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    with pytest.raises(EvaluationError, match="at least 2 rows, it has 1"):
        build(retain_dataset=str(one), retain_split="train")


# -- runs of the scripts ---------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(script, tiny_model, shapes_folder):
    """Learning so fast, in every layer, that all is forgotten."""
    every_layer = "--lora_target_modules all-linear conv" if script == "train_lora" else ""
    return f"""
        {every_layer}
        --pretrained_model_name_or_path {tiny_model} --train_data_dir {shapes_folder} --resolution 32
        --train_batch_size 4 --max_train_steps 6 --seed 3 --learning_rate 0.5 --use_ema --ema_decay 0.5
        --checkpointing_steps 0 --validation_epochs 0 --report_to none
        --evaluate_every 2 --retain_dataset {shapes_folder} --retain_split train --retain_rows 4
    """.split()


def train(script, arguments, output_dir, *more):
    """Run the script in this process; its exit status."""
    return importlib.import_module(script).main([*arguments, "--output_dir", str(output_dir), *map(str, more)])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


RESULT = {"train_text_to_image": "unet/diffusion_pytorch_model", "train_lora": "pytorch_lora_weights"}


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_that_forgets_ends_at_a_whole_checkpoint_and_goes_on_when_it_may(
    script, arguments, tmp_path, capfd, tensors
):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(script, arguments, straight) == 0
    looks = {line["step"]: line for line in metrics(straight) if "kept" in line}
    assert list(looks) == [0, 2, 4, 6]
    assert (looks[0]["learned"], looks[0]["kept"]) == (0, 1) and looks[2]["kept"] < 0.99

    limit = ("--stop_when_retention_below", 0.99)
    assert train(script, arguments, stopped, *limit) == 0
    assert "step 2: kept" in capfd.readouterr().err
    assert [step for step, _ in checkpoints_in(stopped)] == [2]
    assert (stopped / f"{RESULT[script]}.safetensors").is_file()
    finished = metrics(stopped)
    assert finished[-1]["step"] == 2 and "validation_loss" in finished[-1]

    again = ("--resume_from_checkpoint", "latest")
    assert train(script, arguments, stopped, *limit, *again) == 0  # the same command ends where it ended
    assert metrics(stopped) == finished and [step for step, _ in checkpoints_in(stopped)] == [2]
    capfd.readouterr()
    assert train(script, arguments, stopped, *again) == 0
    assert "these have changed" not in capfd.readouterr().err
    assert metrics(stopped) == metrics(straight)
    one, other = tensors(straight), tensors(stopped)
    for name, weights in one.items():
        assert all(torch.equal(value, other[name][key]) for key, value in weights.items()), name

    (stopped / "validation/base_evaluation.json").unlink()
    assert train(script, arguments, stopped, *again) == 1
    assert "EvaluationError: --evaluate_every compares with step 0" in capfd.readouterr().err


@pytest.mark.usefixtures("fresh_accelerate")
def test_looking_changes_nothing_and_lr_0_learns_nothing(script, arguments, tmp_path, tensors):
    cut = arguments.index("--evaluate_every")
    few = ("--max_train_steps", 3)
    assert train(script, arguments, tmp_path / "looked", *few) == 0
    assert train(script, arguments[:cut], tmp_path / "plain", *few) == 0
    assert not (tmp_path / "plain/validation/base_evaluation.json").exists()
    looked, plain = tensors(tmp_path / "looked"), tensors(tmp_path / "plain")
    assert looked.keys() == plain.keys() != set()
    assert all(torch.equal(value, looked[name][key]) for name in plain for key, value in plain[name].items())

    assert (
        train(script, arguments, tmp_path / "still", *few, "--learning_rate", 0, "--stop_when_retention_below", 0.99)
        == 0
    )
    looks = [line for line in metrics(tmp_path / "still") if "kept" in line]
    assert [line["step"] for line in looks] == [0, 2, 3]
    assert [(line["learned"], line["kept"]) for line in looks] == [pytest.approx((0, 1), abs=1e-6)] * 3
