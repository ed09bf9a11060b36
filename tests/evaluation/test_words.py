"""What a report says follows from its numbers: digits, better and worse, the verdict, and short notes."""

from dataclasses import asdict

import pytest

from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import METRICS, table
from finetuning.evaluation.words import (
    REASONS,
    WARNINGS,
    best_and_worst,
    is_beyond_noise,
    is_not_published,
    left_out,
    note,
    notes,
    number,
    percent,
    row_metrics,
    row_number,
    standing,
    title_of,
    verdict,
    written,
)  # fmt: skip

TABLE = {name: asdict(metric) for name, metric in table(load_checker("finetuning.shapes.checker")).items()}
NOISE = "original, seed 2"


def around(value, room, n=26):
    return {"value": value, "low": value - room, "high": value + room, "n": n}


def difference(value, room):
    return {**around(value, room), "excludes_zero": abs(value) > room}


@pytest.fixture
def report():
    """A report without figures, of a reference drawn twice and two models."""
    models = [("original", False), (NOISE, True), ("tuned", False), ("merged", False)]
    return {
        "models": [{"label": label, "source": "a", "noise_floor": floor} for label, floor in models],
        "reference": "original", "sides": [32, 64], "metrics": TABLE, "weights": [], "left_out": [], "warnings": [],
        "summary": {}, "differences": {}, "rows": [], "forgetting": None,
    }  # fmt: skip


@pytest.fixture
def compare(report):
    """Puts the figures of the models, and their differences from the original, into the report."""

    def put(metric, original, **others):
        of = report["summary"].setdefault(metric, {}).setdefault("64", {})
        against = report["differences"].setdefault(metric, {}).setdefault("64", {})
        of["original"] = around(original, 0.011)
        for label, (value, room) in others.items():
            of[label.replace("noise", NOISE)] = around(value, 0.011)
            against[label.replace("noise", NOISE)] = difference(value - original, room)

    return put


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "width", "expected"), [
    (0.7123456, 0.04, "0.712"), (0.7123456, 0.4, "0.71"), (105.34, 30.0, "105"), (24.1234, 2.4, "24.1"),
    (0.00123456, 0.0002, "0.00123"), (0.00123456, None, "0.001235"), (0.0, 0.0, "0"), (-0.0001, 0.1, "0.000"),
    (-1.5, 1.0, "-1.50"), (12345.0, None, "12345"), (1, None, "1"), (None, 0.1, "-"),
])  # fmt: skip
def test_a_number_has_the_digits_that_its_interval_allows(value, width, expected):
    assert number(value, width) == expected


def test_a_sign_is_written_before_what_is_not_0():
    assert [number(value, 0.2, sign=True) for value in (0.5, 0, -0.5)] == ["+0.50", "0.00", "-0.50"]


def test_an_estimate_is_written_with_its_interval():
    estimate = {"value": 0.71234, "low": 0.7, "high": 0.74, "n": 9}
    assert written(estimate) == "0.712 (0.700 to 0.740)"
    assert written(estimate, sign=True) == "+0.712 (+0.700 to +0.740)"
    assert percent(estimate) == "71.2 % (70.0 to 74.0 %)"
    assert percent({"value": 0.346, "low": 0.154, "high": 0.538, "n": 26}) == "35 % (15 to 54 %)"


@pytest.mark.parametrize("missing", ["low", "high"])
def test_an_estimate_without_an_interval_says_so(missing):
    estimate = {"value": 0.71234, "low": 0.7, "high": 0.74, "n": 1} | {missing: None}
    assert written(estimate) == "0.7123 (no interval)" and percent(estimate) == "71.23 % (no interval)"


@pytest.mark.parametrize(
    ("value", "words", "share"),
    [(1.0, "1 (all of 26)", "100 % (all of 26)"), (0.0, "0 (none of 26)", "0 % (none of 26)"),
     (0.5, "0.5 (the same in all 26)", "50 % (the same in all 26)")],
)  # fmt: skip
def test_an_interval_of_no_width_says_of_how_many(value, words, share):
    assert written(around(value, 0.0)) == words and percent(around(value, 0.0)) == share


def test_values_of_rows_have_as_many_digits_as_their_spread_asks_for():
    rows = [{"values": {"lpips": {"a": 0.4, "b": None}, "shapes": {"a": 1.0}}}, {"values": {"lpips": {"a": 0.6567}}}]
    assert row_number(rows, "lpips")(0.61234) == "0.612" and row_number(rows, "lpips")(None) == "-"
    assert row_number(rows, "shapes")(1.0) == "1"
    rows = [{"values": {"drift_clip": {}, "lpips": {}}}, {"values": {"shapes": {}}}]
    assert row_metrics({"metrics": TABLE}, rows) == ["shapes", "lpips", "drift_clip"]


def test_every_figure_has_a_title_for_people(report):
    named = {"kid": "KID", "drift_lpips": "LPIPS drift", "shapes": "right shapes", "something_new": "something new"}
    assert {name: title_of(report, name) for name in named} == named


# -- what a difference means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("value", "told"), [(0.5, True), (-0.5, True), (0.5, False)])
def test_better_and_worse_are_said_by_the_interval_and_the_direction(report, metric, value, told):
    report["differences"][metric] = {"64": {"tuned": {**around(value, 0.1), "excludes_zero": told}}}
    good = (value > 0) == (METRICS[metric].better == "higher")
    assert standing(report, metric, 64, "tuned") == (
        "no clear difference" if not told else "better" if good else "worse"
    )
    assert standing(report, metric, 64, "merged") is None and standing(report, metric, 32, "tuned") is None


@pytest.mark.parametrize(("value", "beyond"), [(0.29, False), (-0.29, False), (0.31, True), (-0.31, True)])
def test_the_noise_floor_is_the_far_end_of_its_interval(report, value, beyond):
    report["differences"]["kid"] = {"64": {NOISE: difference(-0.1, 0.2), "tuned": difference(value, 0.1)}}
    assert is_beyond_noise(report, "kid", 64, "tuned") is beyond
    del report["differences"]["kid"]["64"][NOISE]
    assert is_beyond_noise(report, "kid", 64, "tuned") is None


def test_only_weights_known_to_be_others_make_a_metric_not_comparable(report):
    weights = {"inception": False, "lpips trunk": True, "lpips heads": False, "clip": None}
    report["weights"] = [{"name": name, "published": published} for name, published in weights.items()]
    assert [name for name in METRICS if METRICS[name].measured_on == "dataset" and is_not_published(report, name)] == [
        "lpips",
        "kid",
        "fid",
    ]


# -- the verdict ---------------------------------------------------------------------------------------------------


def learned(report, label="tuned"):
    """The first sentence of the verdict on a model."""
    number_of = ["tuned", "merged"].index(label)
    return verdict(report)[number_of].rsplit(" What it forgot", 1)[0]


def test_the_verdict_names_the_figures_and_what_two_seeds_differ_by(report, compare):
    compare("style", 0.0, noise=(0.0, 0.0), tuned=(0.966, 0.04))
    compare("shapes", 0.953, noise=(0.92, 0.05), tuned=(0.89, 0.1))
    assert learned(report) == (
        "Against original, tuned has learned: it is better in chalk style (0.966 against 0.000), beyond what two seeds "
        "of original differ by; in right shapes any difference may be chance."
    )
    assert learned(report, "merged") == "No metric compares merged with original."


def test_better_and_worse_beyond_the_noise_and_within_it_are_told_apart(report, compare):
    compare("style", 0.1, noise=(0.1, 0.01), tuned=(0.9, 0.1))
    compare("clip_score", 24.0, noise=(24.0, 2.0), tuned=(25.0, 0.5))
    compare("clip_image", 70.0, noise=(70.0, 1.0), tuned=(60.0, 2.0))
    compare("lpips", 0.4, tuned=(0.5, 0.05))
    assert learned(report) == (
        "Against original, tuned has learned, but not in everything: it is better in chalk style (0.900 against "
        "0.100), beyond what two seeds of original differ by; better in CLIP score (25.000 against 24.000), but no "
        "more than two seeds of original may differ by; worse in CLIP image (60.000 against 70.000), beyond what two "
        "seeds of original differ by; worse in LPIPS (0.500 against 0.400)."
    )


@pytest.mark.parametrize(("figures", "said"), [
    ({"style": 0.9}, "has learned:"), ({"style": 0.1}, "has become worse:"),
    ({"style": 0.9, "shapes": 0.1}, "has learned, but not in everything:"),
    ({"style": 0.501}, "has not measurably learned: in chalk style any difference may be chance."),
    ({"style": 0.56}, "has not measurably learned: it is better in chalk style (0.560 against 0.500), but no more"),
    ({"style": 0.44}, "has not measurably learned: it is worse in chalk style (0.440 against 0.500), but no more"),
    ({"style": 0.9, "shapes": 0.44}, "has learned: it is better"),
    ({"kid": 0.1}, "has learned: it is better in KID (0.100 against 0.500)"),
])  # fmt: skip
def test_what_is_within_the_noise_is_not_learned(report, compare, figures, said):
    for metric, value in figures.items():
        compare(metric, 0.5, noise=(0.5, 0.1), tuned=(value, 0.05))
    assert learned(report).startswith(f"Against original, tuned {said}")


def test_without_a_second_seed_the_verdict_says_that_the_noise_is_not_known(report, compare):
    compare("style", 0.0, tuned=(0.9, 0.1))
    report["models"].pop(1)
    assert learned(report) == (
        "Against original, tuned has learned: it is better in chalk style (0.900 against 0.000). How far two seeds of "
        "original differ was not measured."
    )
    report["summary"] = {}
    assert "it is better in chalk style. How" in learned(report)


@pytest.mark.parametrize("metric", ["shapes", "clip_score", "retain_loss", None])
def test_what_was_kept_is_a_share_of_the_originals_in_the_words_of_its_metric(report, metric):
    report["forgetting"] = {"retained_metric": metric, "kept": {"tuned": around(0.35, 0.2)}}
    words = TABLE[metric]["verdict"] if metric else "it kept {kept} of what {reference} can do"
    words = words.format(kept="35 % (15 to 55 %)", reference="original")
    assert verdict(report)[0] == f"No metric compares tuned with original. It has forgotten: {words}."


def test_a_drift_alone_is_said_and_where_nothing_was_measured_what_helps(report):
    assert "--retain_dataset" in verdict(report)[0]
    report["forgetting"] = {
        "summary": {"drift_lpips": {"tuned": around(0.3, 0.1)}, "clip_score": {"tuned": around(9, 1)}}
    }
    tuned, merged = verdict(report)
    assert "LPIPS drift 0.30 (0.20 to 0.40)" in tuned and "CLIP" not in tuned and "--retain_dataset" in merged


@pytest.mark.parametrize(("kept", "told"), [
    (around(0.9, 0.05), "It has forgotten:"),
    (around(0.9, 0.2), "Whether it has forgotten anything is not clear:"),
    (around(1.2, 0.1), "It has forgotten nothing that was measured:"),
    (around(1.0, 0.0), "It has forgotten nothing that was measured:"),
    ({"value": 0.5, "low": None, "high": None, "n": 1}, "Whether it has forgotten anything is not clear:"),
])  # fmt: skip
def test_that_it_has_forgotten_is_said_by_the_interval(report, kept, told):
    report["forgetting"] = {"by": "checker", "retained_metric": "shapes", "kept": {"tuned": kept}}
    assert f" {told} on the general" in verdict(report)[0]


# -- notes ---------------------------------------------------------------------------------------------------------


def missing(metric, network):
    return note("no_weights", metric=metric, network=network, reason=f"no {network} on this machine")


def test_networks_that_are_not_there_are_one_note_and_their_reasons_stand_apart(report):
    report["summary"] = {"style": {}}
    report["left_out"] = [missing("clip_score", "clip"), missing("kid", "inception"), missing("fid", "inception")]
    report["forgetting"] = {"left_out": [missing("drift_clip", "clip"), missing("kid", "inception")]}
    (line,) = notes(report)
    assert line.startswith("CLIP score, KID, FID and CLIP drift not measured: ")
    assert "--clip_model and --inception_weights" in line and "on this machine" in line
    assert left_out(report) == [
        (["clip_score", "drift_clip"], "no clip on this machine"), (["kid", "fid"], "no inception on this machine"),
    ]  # fmt: skip


def test_other_reasons_are_told_once_for_all_their_metrics_and_models(report):
    report["summary"] = {"style": {}}
    report["left_out"] = [note("no_truth", metric=name, rows=[3, 4], of=9) for name in ("clip_image", "lpips")]
    report["left_out"] += [
        note("nothing_to_keep", metric="learned and kept by clip", model=label, mean=0.0, rows=5)
        for label in ("tuned", "merged")
    ]
    first, second = notes(report)
    assert first.startswith("CLIP image and LPIPS not measured: 2 of 9 rows") and "rows 3, 4" in first
    assert second.startswith("learned and kept by clip not measured: tuned and merged:")


def test_a_warning_is_told_once_for_all_models(report):
    bias = [
        note("fid_bias", model=label, side=side, images=8, bias=1.25, value=9.5)
        for label in ("original", "tuned")
        for side in (32, 64)
    ]
    report |= {
        "summary": {"style": {}},
        "warnings": [note("few_images", images=8), *bias, note("few_images", images=8)],
    }
    few, biased = notes(report)
    assert few.startswith("only 8 images") and biased.startswith("FID of 8 images")
    for words in ("original at 32 px: at least about +1.25 of its 9.5", "tuned at 64 px"):
        assert words in biased


def test_where_nothing_was_measured_it_says_what_helps(report):
    (line,) = notes(report)
    for flag in ("--clip_model", "--checker", "--retain_dataset"):
        assert flag in line
    report["forgetting"] = {"kept": {"tuned": around(0.35, 0.2)}}
    (line,) = notes(report)
    assert "--checker" in line and "--retain_dataset" not in line


@pytest.mark.parametrize("code", [*WARNINGS, *REASONS])
def test_every_note_has_a_sentence(report, code):
    fields = {
        "metric": "lpips", "model": "tuned", "side": 64, "sides": [64], "images": 3, "bias": 1.0, "value": 2.0,
        "name": "clip", "origin": "a", "captions": ["a cat"], "own": "64x64", "truth": "32x32", "checker": "mine",
        "smallest": 31, "reason": "why", "mean": 0.1, "network": "clip", "rows": [1, 2] if code == "no_truth" else 3,
    }  # fmt: skip
    if code in ("no_truth", "captions"):
        fields["of"] = 3
    if code == "captions":
        del fields["rows"]
    report["summary"] = {"style": {}}
    report["warnings" if code in WARNINGS else "left_out"].append(note(code, **fields))
    (text,) = notes(report)
    assert text and "{" not in text


# -- the best and the worst ----------------------------------------------------------------------------------------


def rows(metric, *values):
    return [{"row": n, "values": {metric: {"tuned": value, "original": 1 - value}}} for n, value in enumerate(values)]


@pytest.mark.parametrize(("metric", "best"), [("lpips", [2, 0]), ("clip_score", [1, 3])])
def test_best_and_worst_follow_the_metric_of_the_first_tuned_model(report, metric, best):
    report["rows"] = rows(metric, 0.2, 0.9, 0.1, 0.5)
    found, label, first, last = best_and_worst(report, 2)
    assert (found, label, [row["row"] for row in first]) == (metric, "tuned", best)
    assert [row["row"] for row in last] == ([1, 3] if metric == "lpips" else [2, 0])
    assert [row["row"] for row in best_and_worst(report, 1)[3]] == [1 if metric == "lpips" else 2]
    report["rows"][2]["values"] = {}
    assert len(best_and_worst(report, 9)[2]) == 2 and len(best_and_worst(report, 9)[3]) == 1


def test_other_metrics_decide_where_it_is_even_and_the_best_are_never_the_worst(report):
    report["rows"] = rows("style", 1.0, 1.0, 1.0, 0.5, 1.0)
    assert [[row["row"] for row in some] for some in best_and_worst(report, 2)[2:]] == [[0, 1], [3]]
    for row, value in zip(report["rows"], (0.0, 1.0, None, 1.0, 1.0), strict=True):
        row["values"]["shapes"] = {"tuned": value}
    assert [[row["row"] for row in some] for some in best_and_worst(report, 2)[2:]] == [[1, 4], [3, 2]]


def test_nothing_is_best_without_values(report):
    assert best_and_worst(report, 2) is None
