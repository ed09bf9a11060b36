"""Learned and kept by every yardstick, against the original; two equal models have learned 0 and kept 1."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from finetuning.cli import read
from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.denoising import PipelineLoss, load_rows, row_losses
from finetuning.evaluation.forgetting import ForgettingArgs, forgetting
from finetuning.evaluation.generation import Row, general_rows
from finetuning.evaluation.measuring import EvalNetworkArgs, Networks
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.retention import RETENTION_MEASURES, learned_and_kept, ratio_of_means, retention_measure
from finetuning.evaluation.words import note
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.families.pipelines import open_pipeline
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import parse

SHAPES = load_checker("finetuning.shapes.checker")
NOISE_FLOOR = "original, seed 2"


@pytest.mark.parametrize("by", ["checker", *RETENTION_MEASURES])
def test_two_equal_models_learn_nothing_and_keep_everything(by):
    fit, retain = np.random.default_rng(0).uniform(0.5, 1.5, (2, 30))
    learned, kept = learned_and_kept(by, (fit, fit), (retain, retain))
    assert learned.value == 0 and learned.low <= 0 <= learned.high
    assert kept.value == 1 and kept.low <= 1 <= kept.high


@pytest.mark.parametrize("by", ["checker", *RETENTION_MEASURES])
def test_two_seeds_of_a_model_are_within_their_interval(by):
    first, second, third, fourth = np.random.default_rng(1).uniform(0.5, 1.5, (4, 50))
    learned, kept = learned_and_kept(by, (first, second), (third, fourth))
    assert learned.low < 0 < learned.high and kept.low < 1 < kept.high


@pytest.mark.parametrize(("by", "fit", "retain", "learned", "kept"), [
    ("checker", ([1, 1, 0.5, 0.5], [0, 0, 0, 0.2]), ([1, 0, 1, 0], [1, 1, 1, 1]), 0.7, 0.5),
    ("checker", ([0, 0, 0, 0], [0, 0, 0, 0]), ([1, 1, 1, 1], [1, 1, 1, 1]), 0, 1),
    ("clip", ([30, 31, 32], [28, 29, 30]), ([24, 27, 21], [30, 30, 30]), 2, 0.8),
    ("loss", ([0.5, 0.25], [1, 0.5]), ([2, 4], [1, 2]), 0.5, 0.5),
    ("loss", ([2, 4], [1, 2]), ([0.5, 0.4], [0.5, 0.5]), -1, 1 / 0.9),
])  # fmt: skip
def test_the_numbers_by_hand(by, fit, retain, learned, kept):
    found = learned_and_kept(by, fit, retain)
    for one, expected in zip(found, (learned, kept), strict=True):
        assert one.value == pytest.approx(expected)
        assert one.low <= one.value + 1e-12 and one.high >= one.value - 1e-12
    assert [one.n for one in found] == [len(fit[0]), len(retain[0])]


def test_the_interval_of_a_ratio_is_that_of_the_delta_method():
    generator = np.random.default_rng(2)
    reference = generator.uniform(1, 3, 400)
    values = 0.8 * reference + generator.normal(0, 0.1, 400)
    found = ratio_of_means(values, reference)
    error = np.std(values - found.value * reference, ddof=1) / reference.mean() / 20
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert found.low < 0.8 < found.high
    # paired: the spread that both have in common does not count
    alone = ratio_of_means(values, generator.permutation(reference))
    assert alone.high - alone.low > 5 * (found.high - found.low)


def test_a_ratio_needs_something_to_be_a_share_of():
    for reference in ([0, 0, 0, 0], [1, 0, 0, 0]):
        with pytest.raises(EvaluationError, match="over 4 rows, not clearly above 0"):
            ratio_of_means([0, 0, 1, 1], reference)
    assert ratio_of_means([4, 0, 4, 0], [1, 4, 1, 4]).low == 0  # a share is never below 0
    with pytest.raises(ValueError):
        ratio_of_means([1, 1, 1], [1, 1])


def test_a_pipeline_has_the_loss_of_its_model(tiny_model, shapes_folder):
    model = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)
    pipeline = open_pipeline(tiny_model, scheduler="dpm++")
    for split, count in ((None, 4), ("train", 11)):
        images, rows = load_rows(shapes_folder, model.tokenize, (32, 32), split=split)
        expected = row_losses(model, images, rows, model.schedule).numpy()
        found = PipelineLoss(pipeline, shapes_folder, split=split)().numpy()
        assert found.dtype == np.float64 and len(found) == count
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(PipelineLoss(pipeline, shapes_folder, max_rows=3)().numpy()) == 3
    learned, kept = learned_and_kept("loss", (found, expected), (expected, found))
    assert learned.value == pytest.approx(0, abs=1e-5) and kept.value == pytest.approx(1, abs=1e-5)
    other = PipelineLoss(pipeline, shapes_folder, split="train", seed=1)().numpy()
    assert not np.isclose(other, found).any()


@pytest.fixture
def general(tmp_path, captions):
    """General prompts of the shapes world, and what three models drew: the tuned one has two of four wrong."""
    rows = [Row(number, caption, None, "ab"[number % 2]) for number, caption in enumerate(captions)]
    images = {label: {} for label in ("original", "tuned", NOISE_FLOOR)}
    for label, drawn in images.items():
        for row in rows:
            caption = captions[0] if label == "tuned" and row.number in (1, 2) else row.caption
            drawn[row.number] = tmp_path / f"{label}-{row.number}.png"
            draw(parse(caption), 7 if label == NOISE_FLOOR else 3).save(drawn[row.number])
    return rows, images


@pytest.fixture
def args():
    return EvalNetworkArgs()


def measured_of(**metrics):
    """Stands in for Measured of the dataset's captions: {metric: {label: values}} at one side."""
    values = {metric: {64: by_label} for metric, by_label in metrics.items()}
    return SimpleNamespace(values=values, sides=[64], warnings=[])


STYLE = {"original": np.zeros(4), "tuned": np.array([1, 1, 1, 0.6]), NOISE_FLOOR: np.zeros(4)}
SCORES = {"original": np.full(4, 20.0), "tuned": np.array([22, 23, 24, 23.0]), NOISE_FLOOR: np.full(4, 20.0)}
LOSSES = {
    "fit": {"original": np.array([1.0, 2.0]), "tuned": np.array([0.5, 1.0])},
    "retain": {"original": np.array([1.0, 1.0]), "tuned": np.array([1.25, 1.25])},
}


def test_the_shapes_world_is_judged_by_its_own_eyes(general, opened, args):
    dataset = measured_of(style=STYLE, clip_score=SCORES)
    found = forgetting(*general, opened, args, dataset=dataset, losses=LOSSES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["by"] == "checker" and list(found["all"]) == ["checker", "clip", "loss"]
    assert found["learned"]["tuned"]["value"] == pytest.approx(0.9)
    assert found["kept"]["tuned"]["value"] == pytest.approx(0.5)
    assert found["learned"][NOISE_FLOOR]["value"] == 0 and found["kept"][NOISE_FLOOR]["value"] == 1
    assert "original" not in found["learned"]
    assert found["words"]["learned"] == retention_measure("checker", SHAPES).learned and found["words"]["kept"]
    assert found["all"]["clip"]["learned"]["tuned"]["value"] == pytest.approx(3)
    assert found["all"]["loss"]["learned"] == {"tuned": found["all"]["loss"]["learned"]["tuned"]}
    assert found["all"]["loss"]["learned"]["tuned"]["value"] == pytest.approx(0.5)
    assert found["all"]["loss"]["kept"]["tuned"]["value"] == pytest.approx(0.8)


def test_drift_is_measured_from_the_originals_image(general, opened, args, brightness, tmp_path):
    rows, images = general
    found = forgetting(rows, images, opened, args, folder=tmp_path)
    assert list(found["summary"]) == ["shapes", "clip_score", "drift_clip", "drift_lpips"]
    assert set(found["words"]) == {"learned", "kept", *found["summary"]}
    for label in ("tuned", NOISE_FLOOR):
        for number, record in enumerate(found["prompts"]):
            apart = brightness(images[label][number]) - brightness(images["original"][number])
            assert record["values"]["drift_lpips"][label] == pytest.approx(abs(apart))
            assert record["values"]["drift_clip"][label] == pytest.approx(100 - 100 * np.cos(apart * np.pi / 2))
    assert "original" not in found["summary"]["drift_lpips"] and "original" in found["summary"]["clip_score"]
    assert found["summary"]["shapes"]["tuned"]["value"] == 0.5
    record = found["prompts"][1]
    assert (record["row"], record["caption"], record["category"]) == (1, rows[1].caption, "b")
    assert record["images"]["tuned"] == "tuned-1.png"
    assert set(record["values"]["clip_score"]) == {"original", "tuned", NOISE_FLOOR}


def test_what_was_kept_needs_nothing_of_the_dataset_and_drift_stands_alone(general, opened, args):
    found = forgetting(*general, opened, args)
    assert found["by"] == "checker" and found["learned"] == {} and found["kept"]["tuned"]["value"] == 0.5
    rows = [replace(row, caption="a cat") for row in general[0]]
    blind = Networks({"lpips": opened.found["lpips"]}, {}, SHAPES)
    found = forgetting(rows, general[1], blind, args)
    assert found["by"] is None and found["learned"] == found["kept"] == found["all"] == {}
    assert list(found["summary"]) == ["drift_lpips"]


def test_other_captions_are_judged_by_clip_and_without_it_by_the_loss(general, opened, args, brightness):
    rows, images = general
    rows = [replace(row, caption=f"a cat, {row.number}") for row in rows]
    found = forgetting(rows, images, opened, args, dataset=measured_of(clip_score=SCORES), losses=LOSSES)
    assert found["by"] == "clip" and "shapes" not in found["summary"]
    expected = {
        label: np.mean([np.cos(brightness(p) * np.pi / 2) for p in own.values()]) for label, own in images.items()
    }
    assert found["kept"]["tuned"]["value"] == pytest.approx(expected["tuned"] / expected["original"])
    blind = Networks({"lpips": opened.found["lpips"]}, {"clip": "no CLIP here"})
    found = forgetting(rows, images, blind, args, dataset=measured_of(), losses=LOSSES)
    assert found["by"] == "loss" and list(found["all"]) == ["loss"]
    assert note("no_weights", metric="drift_clip", network="clip", reason="no CLIP here") in found["left_out"]


def test_without_general_prompts_there_is_the_loss(opened, args):
    found = forgetting([], {}, opened, args, losses=LOSSES)
    assert found["by"] == "loss" and found["prompts"] == [] and found["left_out"] == []
    assert list(found["summary"]) == ["fit_loss", "retain_loss"]
    assert found["summary"]["retain_loss"]["tuned"]["value"] == 1.25


def test_an_original_that_can_do_nothing_has_nothing_to_keep(general, opened, args):
    rows, images = general
    for path in images["original"].values():
        Image.new("RGB", (64, 64)).save(path)
    found = forgetting(rows, images, opened, args, dataset=measured_of(style=STYLE), losses=LOSSES)
    assert found["by"] == "loss" and "checker" not in found["all"]
    told = [one for one in found["left_out"] if one["code"] == "nothing_to_keep"]
    assert [(one["model"], one["mean"], one["rows"]) for one in told] == [("tuned", 0, 4), (NOISE_FLOOR, 0, 4)]


def test_metrics_that_were_named_for_the_dataset_choose_here_too(general, opened, args):
    rows, images = general
    named = replace(args, metrics=["shapes", "kid", "lpips"], resolutions=[32])
    assert list(forgetting(rows, images, opened, named)["summary"]) == ["shapes", "drift_lpips"]
    rows = [replace(rows[0], caption="a cat"), *rows[1:]]
    found = forgetting(rows, images, opened, named)
    assert [one["metric"] for one in found["left_out"]] == ["shapes"]


def test_a_prompt_without_its_image_is_named(general, opened, args):
    rows, images = general
    del images["original"][2]
    with pytest.raises(EvaluationError, match="original: no image for 1 of 4 captions: rows 2"):
        forgetting(rows, images, opened, args)


@dataclass
class Flags(ForgettingArgs):
    """The flags as a script has them."""


def test_bad_flags_are_listed_at_once(tmp_path):
    problems = "\n".join(read(Flags, "", ["--retain_split", "train", "--fit_split", "test", "--loss_rows", "1"])[1])
    for words in ("--retain_split", "--fit_split", "--loss_rows"):
        assert words in problems
    problems = "\n".join(read(Flags, "", ["--general_prompts", "no.txt", "--retain_dataset", "nowhere"])[1])
    assert "--general_prompts no.txt" in problems and "--retain_dataset nowhere" in problems
    assert not read(Flags, "", ["--retain_dataset", str(tmp_path), "--retain_split", "test"])[1]


def test_the_general_prompts_are_those_that_are_asked_for(tmp_path):
    assert ForgettingArgs().general_rows() == general_rows()
    assert ForgettingArgs(general_prompts="none").general_rows() == []
    (tmp_path / "mine.txt").write_text("a dog\na house\n")
    rows = ForgettingArgs(general_prompts=str(tmp_path / "mine.txt")).general_rows()
    assert [row.caption for row in rows] == ["a dog", "a house"]
