"""The frontier of a sweep: where the knee is, when there is none, and how sure the rows make us of it."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from finetuning.merging import frontier
from finetuning.merging.frontier import knee, normalised, pareto, plot, summary, table

RATIOS = np.linspace(0, 1, 11)
ROUND = 100 * RATIOS, 80 * (1 - RATIOS**3)  # concave: forgets late. r + (1 - r^3) - 1 is largest near 0.577
STRAIGHT = 0.2 + 0.5 * RATIOS, 0.9 - 0.3 * RATIOS
HOLLOW = 10 * RATIOS**3, 1 - RATIOS


def rows_of(learned, retained, noise=0.0, rows=(40, 60)):
    """Rows whose means are the given ones, exactly."""
    generator = np.random.default_rng(0)
    spread = [noise * generator.standard_normal((len(learned), count)) for count in rows]
    return [
        mean[:, None] + own - own.mean(1, keepdims=True) for mean, own in zip((learned, retained), spread, strict=True)
    ]


def test_ends_are_the_corners_of_the_normalised_frontier():
    learned, retained = normalised(RATIOS, *ROUND)
    assert learned == pytest.approx(RATIOS) and retained == pytest.approx(1 - RATIOS**3)


def test_knee_of_a_round_frontier_is_where_it_stands_farthest_from_the_chord():
    found = knee(RATIOS, *ROUND)
    assert found.ratio == pytest.approx(0.6)
    assert found.gain == pytest.approx(0.6 - 0.6**3)
    assert all(text in found.sentence for text in ("ratio 0.6 ", "60%", "78%"))


@pytest.mark.parametrize("stretch", [(1000, 0, 1, 0), (1, -7, 0.01, 40)])
def test_units_do_not_move_the_knee(stretch):
    a, b, c, d = stretch
    moved = knee(RATIOS, a * ROUND[0] + b, c * ROUND[1] + d)
    assert (moved.ratio, moved.gain) == (knee(RATIOS, *ROUND).ratio, pytest.approx(0.6 - 0.6**3))


@pytest.mark.parametrize("frontier", [STRAIGHT, HOLLOW])
def test_straight_or_hollow_frontier_has_no_knee_and_says_so(frontier):
    found = knee(RATIOS, *frontier)
    assert (found.ratio, found.gain) == (None, 0.0)
    assert "no ratio lies above the straight line" in found.sentence


@pytest.mark.parametrize(("learned", "retained", "said"), [
    ([1.0, 2.0, 1.0], [3.0, 2.0, 1.0], "learned nothing"), ([1.0, 2.0, 0.5], [3.0, 2.0, 1.0], "learned nothing"),
    ([1.0, 2.0, 3.0], [3.0, 2.0, 3.0], "forgotten nothing"), ([1.0, 2.0, 3.0], [3.0, 2.0, 4.0], "forgotten nothing"),
    ([1.0, 1.0, 1.0], [3.0, 3.0, 3.0], "learned nothing.*forgotten nothing"),
])  # fmt: skip
def test_where_there_is_no_trade_it_is_said_and_not_computed(learned, retained, said):
    means = [0.0, 0.5, 1.0], np.array(learned), np.array(retained)
    found = knee(*means)
    assert (found.ratio, found.gain) == (None, 0.0)
    assert re.search(said, found.sentence) and np.isnan(normalised(*means)).all()
    rows = [np.repeat(values[:, None], 4, 1) for values in means[1:]]
    whole = summary(means[0], *rows)
    assert whole["knee"] == {"ratio": None, "gain": None, "sentence": found.sentence} and whole["no_knee_share"] == 1
    assert found.sentence[1:] in table(whole)


def test_a_ratio_beyond_the_tuned_model_is_measured_against_the_same_chord():
    ratios = [0.0, 0.5, 1.0, 1.25]
    learned, retained = normalised(ratios, np.array([0.0, 2.0, 4.0, 5.0]), np.array([10.0, 9.0, 6.0, 2.0]))
    assert learned.tolist() == [0, 0.5, 1, 1.25] and retained.tolist() == [1, 0.75, 0, -1]


def test_a_ratio_is_beaten_by_one_as_good_in_both_and_better_in_one():
    ratios = [0.0, 0.25, 0.5, 0.75, 1.0]
    learned, retained = np.array([0.0, 0.3, 0.2, 0.6, 0.6]), np.array([1.0, 0.9, 0.8, 0.5, 0.4])
    assert pareto(ratios, learned, retained) == [0.0, 0.25, 0.75]


def test_equal_points_do_not_beat_each_other():
    assert pareto([0.0, 0.5, 1.0], np.array([1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])) == [0.0, 0.5]


def test_resamples_draw_the_same_rows_at_every_ratio():
    """Rows that differ much from each other and little between ratios: unpaired, the knee would be anywhere."""
    spread = np.random.default_rng(1).normal(0, 100, 50)
    learned, retained = (mean[:, None] + spread for mean in ROUND)
    assert max(point["knee_share"] for point in summary(RATIOS, learned, retained)["points"]) == 1


def test_intervals_are_as_wide_as_the_rows_make_them():
    """95 % of a mean of 400 rows of spread 2 lie within 1.96 * 2 / 20 of it."""
    learned, retained = rows_of(*STRAIGHT, noise=2.0, rows=(400, 400))
    for index, point in enumerate(summary(RATIOS, learned, retained)["points"]):
        for what, means in zip(("learned", "retained"), STRAIGHT, strict=True):
            interval = point[what]
            assert interval["value"] == pytest.approx(means[index])
            assert interval["low"] < means[index] < interval["high"]
            assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * 0.1, rel=0.2)


def test_a_result_of_one_row_has_no_interval():
    found = summary(RATIOS, *(values[:, None] for values in ROUND))
    assert found["points"][3]["learned"] == {"value": pytest.approx(30), "low": None, "high": None, "n": 1}
    assert "| 30 |" in table(found) and "n 1)" in table(found)


def test_the_same_seed_gives_the_same_summary_and_another_gives_another():
    rows = rows_of(*ROUND, noise=20.0)
    first = summary(RATIOS, *rows, seed=1)
    assert first == summary(RATIOS, *rows, seed=1)
    assert first != summary(RATIOS, *rows, seed=2)
    assert json.loads(json.dumps(first)) == first


def test_shares_of_the_resamples_sum_to_one_and_gather_at_the_knee():
    found = summary(RATIOS, *rows_of(*ROUND, noise=10.0))
    shares = {point["ratio"]: point["knee_share"] for point in found["points"]}
    assert sum(shares.values()) + found["no_knee_share"] == pytest.approx(1)
    assert sum(share for ratio, share in shares.items() if 0.45 < ratio < 0.75) > 0.9
    assert found["knee"]["ratio"] == pytest.approx(0.6)
    assert found["knee"]["gain"]["low"] < found["knee"]["gain"]["value"] < found["knee"]["gain"]["high"]
    assert "chance" not in found["knee"]["sentence"]


def test_a_knee_within_the_noise_is_said_to_be_chance():
    found = summary(RATIOS, *rows_of(STRAIGHT[0], STRAIGHT[1] + 0.001 * RATIOS * (1 - RATIOS), noise=0.2))
    assert found["knee"]["ratio"] == pytest.approx(0.5) and "may be chance" in found["knee"]["sentence"]


@pytest.mark.parametrize(("ratios", "value", "said"), [
    ([0.1, 0.5, 1], 1, "0"), ([0, 0.5, 0.9], 1, "1"), ([0, 0.5, 1], np.nan, "retained has 12 values"),
])  # fmt: skip
def test_results_that_cannot_be_read_are_refused(ratios, value, said):
    with pytest.raises(ValueError, match=said):
        summary(ratios, np.ones((3, 4)), np.full((3, 4), value))


def test_table_has_a_line_for_each_ratio_and_names_the_knee():
    learned, retained = ROUND[0].copy(), ROUND[1].copy()
    learned[3] = 5.0  # now ratio 0.1 is better in both
    text = table(summary(RATIOS, *rows_of(learned, retained)))
    lines = text.splitlines()
    assert lines[8].startswith("| 0.6 | 60 (60 to 60) | 62.7 (62.7 to 62.7) | 100% |") and "**knee**" in lines[8]
    assert lines[5].endswith("| another is better |")
    assert text.count("**knee**") == 1 and len(lines) == 2 + 11 + 2
    assert lines[-1].startswith("Ratio 0.6 has 60%")


def test_plot_writes_an_image_of_all_curves(tmp_path):
    curves = {f"run {at}": summary(RATIOS, *rows_of(*one, noise=0.1)) for at, one in enumerate((ROUND, STRAIGHT))}
    plot(curves, tmp_path / "frontier.png", "in chalk (%)", "right (%)")
    image = np.asarray(Image.open(tmp_path / "frontier.png").convert("RGB"))
    assert image.shape == (605, 880, 3)
    colours = {tuple(pixel) for pixel in np.unique(image.reshape(-1, 3), axis=0).tolist()}
    matplotlibs = [(31, 119, 180), (255, 127, 14), (44, 160, 44)]
    assert [colour in colours for colour in matplotlibs] == [True, True, False]


def test_ratios_in_the_plot_do_not_cover_one_another(tmp_path, monkeypatch):
    """Of a curve with more points than there is room for numbers; base and tuned model have theirs in any case."""
    labels, real = [], frontier._label
    monkeypatch.setattr(frontier, "_label", lambda *args: (real(*args), labels.append((args[1], list(args[-1]))))[0])
    ratios = np.linspace(0, 1, 61)
    steep = 1 / (1 + np.exp(-40 * (ratios - 0.5)))
    plot({"merge": summary(ratios, *rows_of(steep, 1 - steep**2, noise=0.01))}, tmp_path / "frontier.png")
    boxes = labels[-1][1]
    assert 3 <= len(boxes) < 61 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    first = [text for text, taken in labels[:3] if taken]
    assert {"0", "1"} <= set(first)
