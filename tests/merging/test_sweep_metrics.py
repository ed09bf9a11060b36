"""What a sweep measures, on images whose truth is known and on models whose loss is."""

from types import SimpleNamespace

import pytest
import torch

from finetuning.evaluation.denoising import load_rows, row_losses
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError
from finetuning.families.pipelines import open_pipeline
from finetuning.merging.sweep_metrics import checker_metric, loss_metric
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import parse

CIRCLE = "a large red circle on a white background"
STAR = "a large blue star on a gray background"
PAIR = "a small red circle above a large green square on a white background"


def drawn(caption, style, count=1):
    return [draw(parse(caption), seed, style) for seed in range(count)]


# -- a checker -------------------------------------------------------------------------------------------------------


def measured(prompts_in, prompts_out, images_in, images_out, seeds=(0,)):
    args = SimpleNamespace(seed=list(seeds), checker_named="finetuning.shapes.checker")
    return checker_metric(args, None, prompts_in, prompts_out).measure(0.5, images_in, images_out)


def test_learned_is_read_off_the_images_of_what_was_trained():
    images = drawn(CIRCLE, "chalk") + drawn(PAIR, "chalk") + drawn(STAR, "filled")
    learned, retained = measured([CIRCLE, PAIR, STAR], [], images, [])
    assert learned.tolist() == [1.0, 1.0, 0.0] and learned.dtype == torch.float64 and len(retained) == 0


def test_retained_is_read_off_the_others_whatever_their_style():
    images = [drawn(caption, "filled")[0] for caption in (CIRCLE, CIRCLE.replace("red", "blue"), STAR)]
    retained = measured([], [CIRCLE, CIRCLE, CIRCLE, STAR], [], images + drawn(STAR, "chalk"))[1]
    assert retained.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_the_seeds_of_a_prompt_are_one_row():
    images = drawn(CIRCLE, "chalk") + drawn(CIRCLE, "filled") + drawn(STAR, "filled", 2)
    learned, retained = measured(
        [CIRCLE, STAR], [STAR], images, drawn(STAR, "filled") + drawn(CIRCLE, "filled"), seeds=(0, 1)
    )
    assert learned.tolist() == [0.5, 0.0] and retained.tolist() == [0.5]


def test_the_checker_and_its_content_are_facts():
    args = SimpleNamespace(seed=[0], checker_named="finetuning.shapes.checker")
    metric = checker_metric(args, None, [], [])
    assert metric.facts["checker"] == "finetuning.shapes.checker" and len(metric.facts["sha256"]) == 64
    assert metric.learned.startswith("learned: ") and metric.retained.startswith("retained: ")


# -- loss ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loss(tiny_model, shapes_folder):
    """measure, facts and the ratios that were set, of tiny_model on the validation and training rows of the shapes."""

    def prepare(dtype=torch.float32, fit=shapes_folder, retain=shapes_folder / "train", **flags):
        ratios = []
        pipeline = open_pipeline(str(tiny_model), scheduler="dpm++", dtype=dtype)
        known = {"seed": [0], "size": "32", "batch_size": 4, "loss_rows": 5}
        args = SimpleNamespace(fit_dataset=str(fit), retain_dataset=str(retain), **known | flags)
        blend = SimpleNamespace(pipeline=pipeline, set=ratios.append)
        metric = loss_metric(args, blend, [], [])
        return metric.measure, metric.facts, ratios

    return prepare


def test_loss_is_minus_that_of_each_row(loss, tiny_model, shapes_folder):
    model = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)
    measure, facts, ratios = loss()
    learned, kept = measure(0.5, [], [])
    assert ratios == [0.5]
    for values, folder, one in zip((learned, kept), ("validation", "train"), facts["datasets"], strict=True):
        images, rows = load_rows(shapes_folder / folder, model.tokenize, (32, 32), max_rows=5)
        expected = row_losses(model, images, rows, model.schedule)
        # the same weights elsewhere in memory may round differently
        torch.testing.assert_close(values, -expected, rtol=1e-6, atol=0)
        assert one["rows"] == rows
    assert facts["size"] == [32, 32]


def test_loss_without_a_size_is_taken_at_the_models_own(loss):
    assert loss(size=None)[1]["size"] == [32, 32]
    assert loss(size="24x40")[1]["size"] == [24, 40]


def test_loss_runs_in_the_precision_of_the_pipeline(loss):
    exact, rounded = (loss(dtype)[0](0.0, [], []) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(exact, rounded, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_other_images_under_the_same_names_are_other_facts(loss, tmp_path):
    facts = []
    for style in ("filled", "chalk"):
        drawn(CIRCLE, style)[0].save(tmp_path / "a.png")
        (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "{CIRCLE}"}}\n')
        facts.append(loss(fit=tmp_path)[1]["datasets"])
    assert facts[0][0] != facts[1][0] and facts[0][1] == facts[1][1]


def test_what_is_wrong_with_both_datasets_is_said_at_once(loss, tmp_path):
    with pytest.raises(ModelError, match=r"(?s)no folder .*first.*no folder .*second"):
        loss(fit=tmp_path / "first", retain=tmp_path / "second")
