"""Figures stand with their row, model and side; what cannot be had is said; two equal models do not differ."""

import json
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from PIL import Image

from finetuning.cli import read
from finetuning.evaluation import networks, statistics
from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.generation import Row
from finetuning.evaluation.measuring import EvalNetworkArgs, measure, open_networks, summarise
from finetuning.evaluation.metrics import EvaluationError, dataset_metrics
from finetuning.evaluation.networks import Unavailable, Weights
from finetuning.evaluation.preprocessing import matched
from finetuning.evaluation.words import note
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import parse

SHAPES = load_checker("finetuning.shapes.checker")
ALL = dataset_metrics(SHAPES)
OF_ROWS = ("clip_score", "clip_image", "lpips")


@pytest.fixture
def args():
    return EvalNetworkArgs(eval_batch_size=3, checker=SHAPES.name)  # 4 rows: the last batch is not full


@pytest.fixture
def world(tmp_path, captions):
    """Write an image for each caption: (rows, {"original": ..., "tuned": ...}); the tuned draws chalk elsewhere."""
    rows = [Row(10 * index, caption, tmp_path / f"truth-{index}.png", None) for index, caption in enumerate(captions)]
    images = {"original": {}, "tuned": {}}
    for index, row in enumerate(rows):
        scene = parse(row.caption)
        draw(scene, index, "chalk").save(row.image)
        for seed, (label, style) in enumerate({"original": "filled", "tuned": "chalk"}.items(), 50):
            path = tmp_path / f"{label}-{index}.png"
            draw(scene, seed + index, style).save(path)
            images[label][row.number] = path
    return rows, images


@dataclass
class Flags(EvalNetworkArgs):
    """The flags as a script has them."""


# -- values ----------------------------------------------------------------------------------------------------------


def test_every_metric_has_its_value_by_hand(world, opened, args, brightness):
    rows, images = world
    measured = measure(rows, images, opened, args)
    assert tuple(measured.metrics) == ALL and measured.sides == [64] and measured.models == ["original", "tuned"]
    values = {metric: by_side[64] for metric, by_side in measured.values.items()}
    for label, own in images.items():
        for index, row in enumerate(rows):
            drawn, truth = brightness(own[row.number]), brightness(row.image)
            assert values["clip_score"][label][index] == pytest.approx(100 * np.cos(drawn * np.pi / 2))
            assert values["clip_image"][label][index] == pytest.approx(100 * np.cos((drawn - truth) * np.pi / 2))
            assert values["lpips"][label][index] == pytest.approx(abs(drawn - truth))
    assert values["style"]["original"].tolist() == [0] * 4 and values["style"]["tuned"].tolist() == [1] * 4
    assert values["shapes"]["original"].tolist() == [1] * 4
    assert all(one.dtype == np.float64 for by in values.values() for one in by.values())


def test_a_cosine_below_zero_is_a_clip_score_of_zero(world, opened, args, monkeypatch):
    clip = opened.found["clip"][0]
    monkeypatch.setattr(clip, "texts", lambda captions: np.tile([-1.0, 0.0], (len(captions), 1)))
    measured = measure(*world, opened, args, offered=("clip_score",))
    assert measured.values["clip_score"][64]["tuned"].tolist() == [0] * 4


@pytest.mark.parametrize("how", [{"eval_batch_size": 1}, {"eval_batch_size": 100}, {"num_workers": 1}])
def test_it_does_not_matter_in_what_batches(how, world, opened, args):
    first, again = (measure(*world, opened, flags, offered=OF_ROWS) for flags in (args, replace(args, **how)))
    for metric, label in product(OF_ROWS, world[1]):
        assert np.array_equal(*(one.values[metric][64][label] for one in (first, again))), metric


def test_every_side_has_values_of_matched_images(world, opened, args, brightness):
    rows, images = world
    measured = measure(rows, images, opened, replace(args, resolutions=[32, 64]))
    for side in (32, 64):
        drawn, truth = (matched(Image.open(path), side) for path in (images["tuned"][30], rows[3].image))
        assert drawn.size == (side, side)
        assert measured.values["lpips"][side]["tuned"][3] == pytest.approx(abs(brightness(drawn) - brightness(truth)))
    assert list(summarise(measured)["summary"]["fid"]) == ["32", "64"]
    Image.new("RGB", (48, 40)).save(images["original"][10])  # without --resolutions the first model's smallest counts
    assert measure(rows, images, opened, args, offered=("lpips",)).sides == [40]


# -- the summary -----------------------------------------------------------------------------------------------------


def test_the_summary_has_every_estimate_and_difference(world, opened, args, tmp_path):
    rows, images = world
    measured = measure(rows, images, opened, args)
    report = json.loads(json.dumps(summarise(measured, tmp_path), allow_nan=False))
    assert list(report["summary"]) == list(report["differences"]) == list(ALL)
    assert report["reference"] == "original" and report["protocol"] == "clean" and report["sides"] == [64]
    sets = measured.features[64]["tuned"], measured.truth[64]
    by_hand = {"fid": statistics.frechet(*sets), "kid": statistics.kernel_influence(*sets)[0]}
    for metric, value in by_hand.items():
        assert report["summary"][metric]["64"]["tuned"]["value"] == pytest.approx(value, rel=1e-9)
    values = measured.values["lpips"][64]
    assert report["summary"]["lpips"]["64"]["original"]["value"] == pytest.approx(values["original"].mean())
    assert report["summary"]["lpips"]["64"]["original"]["n"] == 4
    for metric in ALL:
        assert list(report["differences"][metric]["64"]) == ["tuned"]
        found = report["differences"][metric]["64"]["tuned"]
        summary = report["summary"][metric]["64"]
        assert found["value"] == pytest.approx(summary["tuned"]["value"] - summary["original"]["value"], abs=1e-9)
        assert found["low"] <= found["high"] and isinstance(found["excludes_zero"], bool)
    assert report["differences"]["style"]["64"]["tuned"]["excludes_zero"]


def test_the_rows_stand_as_the_report_wants_them(world, opened, args, tmp_path):
    rows, images = world
    Image.new("RGB", (64, 64)).save(images["tuned"][20])
    measured = measure(rows, images, opened, replace(args, resolutions=[32, 64]))
    record = summarise(measured, tmp_path / "report")["rows"][2]
    assert (record["row"], record["caption"], record["truth"]) == (20, rows[2].caption, "../truth-2.png")
    assert record["images"] == {"original": "../original-2.png", "tuned": "../tuned-2.png"}
    assert set(record["values"]) == {*OF_ROWS, "shapes", "style"}
    assert record["values"]["lpips"]["tuned"] == measured.values["lpips"][64]["tuned"][2]
    assert record["values"]["shapes"] == {"original": 1.0, "tuned": 0.0}


# -- what is not to be had -------------------------------------------------------------------------------------------


def test_other_captions_have_no_shapes(world, opened, args):
    rows, images = world
    strange = [replace(row, caption="a cat") for row in rows]
    assert [one["metric"] for one in measure(strange, images, opened, args).left_out] == ["shapes", "style"]
    mixed = measure([*strange[:1], *rows[1:]], images, opened, args)
    assert [one["metric"] for one in mixed.left_out] == ["shapes", "style"]
    assert mixed.left_out[0] == note("captions", metric="shapes", checker=SHAPES.name, captions=["a cat"], of=4)
    with pytest.raises(EvaluationError, match=r"--metrics shapes: .* 4 of 4 captions"):
        measure(strange, images, opened, replace(args, metrics=["shapes"]))


def test_without_true_images_the_rest_is_measured(world, opened, args):
    rows, images = world
    rows = [*rows[:3], replace(rows[3], image=None)]
    measured = measure(rows, images, opened, args)
    assert list(measured.metrics) == ["shapes", "style", "clip_score"]
    assert [one["metric"] for one in measured.left_out] == ["clip_image", "lpips", "kid", "fid"]
    assert all((one["code"], one["rows"], one["of"]) == ("no_truth", [30], 4) for one in measured.left_out)
    assert summarise(measured)["rows"][3]["truth"] is None
    with pytest.raises(EvaluationError) as problem:
        measure(rows, images, opened, replace(args, metrics=["kid", "lpips"]))
    assert "--metrics kid" in str(problem.value) and "--metrics lpips" in str(problem.value)


@pytest.fixture
def offline(monkeypatch):
    """Only LPIPS can be opened."""

    def unavailable(name):
        def refuse(*how):
            raise Unavailable(f"no {name}: give --{name}")

        return refuse

    monkeypatch.setattr(networks, "inception", unavailable("inception_weights"))
    monkeypatch.setattr(networks, "clip", unavailable("clip_model"))
    monkeypatch.setattr(networks, "lpips_network", lambda *how: ("net", Weights("lpips", "a.pth", "0" * 64, True)))


def test_missing_weights_leave_their_metrics_out_with_the_reason(world, offline, opened, args):
    found = open_networks(args)
    assert list(found.found) == ["lpips"] and list(found.missing) == ["inception", "clip"]
    measured = measure(*world, found, args)
    assert list(measured.metrics) == ["shapes", "style", "lpips"]
    said = {one["metric"]: one["reason"] for one in measured.left_out}
    assert said["fid"] == said["kid"] == "no inception_weights: give --inception_weights"
    assert said["clip_score"] == said["clip_image"] == "no clip_model: give --clip_model"
    assert [one["name"] for one in summarise(measured)["weights"]] == ["lpips"]


def test_missing_weights_of_a_metric_asked_for_by_name_are_refused(offline, args):
    assert list(open_networks(replace(args, metrics=["lpips", "shapes"])).found) == ["lpips"]
    with pytest.raises(EvaluationError) as problem:
        open_networks(replace(args, metrics=["clip_score", "lpips", "fid"]))
    assert "--clip_model" in str(problem.value) and "--inception_weights" in str(problem.value)


def test_lpips_of_images_too_small_for_it_is_left_out(world, opened, args):
    small = replace(args, resolutions=[64, 16])
    measured = measure(*world, opened, small)
    assert measured.left_out == [note("too_small", metric="lpips", smallest=31, side=16)]
    with pytest.raises(EvaluationError, match="--metrics lpips"):
        measure(*world, opened, replace(small, metrics=["lpips"]))


# -- warnings --------------------------------------------------------------------------------------------------------


def warned(code, measured):
    return [one for one in measured.warnings if one["code"] == code]


@pytest.mark.parametrize(("count", "unreliable"), [(10, True), (37, True), (50, False)])
def test_few_images_are_called_unreliable(count, unreliable, world, opened, args):
    rows, images = world
    rows = [replace(rows[index % 4], number=index) for index in range(count)]
    images = {label: {index: own[index % 4 * 10] for index in range(count)} for label, own in images.items()}
    measured = measure(rows, images, opened, args, offered=("lpips",))
    assert warned("few_images", measured) == [note("few_images", images=count)] * unreliable


def test_an_fid_of_few_images_is_warned_of_for_each_model_and_side(world, opened, args):
    measured = measure(*world, opened, replace(args, resolutions=[32, 64]), offered=("kid", "fid"))
    told = {(one["model"], one["side"]): one for one in warned("fid_bias", measured)}
    assert sorted(told) == [(label, side) for label in ("original", "tuned") for side in (32, 64)]
    features, truth = measured.features[64]["tuned"], measured.truth[64]
    assert told["tuned", 64]["bias"] == statistics.frechet_bias(features, truth)[0]
    assert told["tuned", 64]["value"] == pytest.approx(statistics.frechet(features, truth))
    rows, images = world
    images = {label: {row.number: own[row.number] for row in rows[:3]} for label, own in images.items()}
    assert len(warned("fid_bias_unknown", measure(rows[:3], images, opened, args))) == 2
    assert not warned("fid_bias", measure(*world, opened, args, offered=("kid",)))


@pytest.mark.parametrize(("published", "code"), [(False, "not_published"), (None, "unknown_weights"), (True, None)])
def test_weights_of_unknown_origin_are_named(published, code, world, opened, args):
    opened.found["lpips"] = (None, Weights("lpips", "random.pth", "f" * 64, published))
    told = [one["code"] for one in measure(*world, opened, args).warnings if one.get("origin") == "random.pth"]
    assert told == [code] * (code is not None)
    others = measure(*world, opened, args, offered=("clip_score",))
    assert not any(one.get("origin") == "random.pth" for one in others.warnings)


def test_unlike_sizes_and_cut_captions_are_named(world, opened, args, monkeypatch):
    rows, images = world
    assert not warned("unlike_sizes", measure(rows, images, opened, args))
    Image.new("RGB", (600, 400)).save(rows[1].image)
    monkeypatch.setattr(opened.found["clip"][0], "truncated", 2)
    measured = measure(rows, images, opened, args)
    told = warned("unlike_sizes", measured)
    assert [(one["model"], one["own"], one["truth"]) for one in told] == [
        (label, "64x64", "64x64 to 600x400") for label in ("original", "tuned")
    ]
    assert warned("cut_captions", measured)[0]["captions"] == 2
    assert not warned("unlike_sizes", measure(rows, images, opened, args, offered=("shapes", "clip_score")))


# -- bad input -------------------------------------------------------------------------------------------------------


def test_rows_and_images_have_to_fit_and_all_is_said_at_once(world, opened, args):
    rows, images = world
    del images["original"][0], images["original"][30]
    images["tuned"][7] = images["tuned"][10]
    with pytest.raises(EvaluationError) as problem:
        measure(rows, images, opened, args)
    assert "original: no image for 2 of 4 captions: rows 0, 30" in str(problem.value)
    assert "tuned: 1 images belong to no caption: rows 7" in str(problem.value)


def test_unreadable_images_are_all_named(world, opened, args):
    rows, images = world
    broken = [images["tuned"][10], rows[2].image]
    for path in broken:
        path.write_bytes(b"not an image")
    with pytest.raises(EvaluationError) as problem:
        measure(rows, images, opened, args)
    assert all(path.name in str(problem.value) for path in broken)


def test_values_that_are_not_numbers_are_named(world, opened, args, monkeypatch):
    monkeypatch.setattr(networks, "lpips_of", lambda network, a, b: np.full(len(a), np.nan))
    with pytest.raises(EvaluationError, match="lpips of tuned at 64 px is not a finite number: rows 0, 10, 20, 30"):
        measure(*world, opened, args, offered=("lpips",))


def test_bad_flags_are_listed_at_once():
    problems_of = lambda words: read(Flags, "", words.split())[1]
    assert len(problems_of("--resolutions 64 4 --num_workers -1 --eval_batch_size 0")) == 3
    problems = "\n".join(problems_of("--metrics fid fid --inception_weights nowhere.pth"))
    assert "--metrics fid fid" in problems and "nowhere.pth" in problems
    assert "--metrics style" in problems_of("--metrics style")[0] and "--checker" in problems_of("--checker no.such")[0]
    assert not problems_of(f"--metrics style kid lpips --protocol legacy --checker {SHAPES.name}")
