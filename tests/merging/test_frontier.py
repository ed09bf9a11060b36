"""The frontier of a sweep: where the knee is, when there is none, and how sure the rows make us of it."""

import json

import numpy as np
import pytest
from PIL import Image

from finetuning.merging.frontier import bootstrap, knee, normalised, pareto, plot, summary, table

RATIOS = np.linspace(0, 1, 11)
ROUND = 100 * RATIOS, 80 * (1 - RATIOS**3)  # concave: forgets late. r + (1 - r^3) - 1 is largest near 0.577
STRAIGHT = 0.2 + 0.5 * RATIOS, 0.9 - 0.3 * RATIOS
HOLLOW = 10 * RATIOS**3, 1 - RATIOS


def rows_of(learned, kept, noise=0.0, rows=(40, 60)):
    """Rows whose means are the given ones, exactly."""
    generator = np.random.default_rng(0)
    spread = [noise * generator.standard_normal((len(learned), count)) for count in rows]
    return [mean[:, None] + own - own.mean(1, keepdims=True) for mean, own in zip((learned, kept), spread, strict=True)]


# -- the knee --------------------------------------------------------------------------------------------------------


def test_ends_are_the_corners_of_the_normalised_frontier():
    learned, kept = normalised(RATIOS, *ROUND)
    assert learned == pytest.approx(RATIOS) and kept == pytest.approx(1 - RATIOS**3)


def test_knee_of_a_round_frontier_is_where_it_stands_farthest_from_the_chord():
    found = knee(RATIOS, *ROUND)
    assert found.ratio == pytest.approx(0.6)
    assert found.gain == pytest.approx(0.6 - 0.6**3)
    assert found.says == "ratio 0.6 learns 60% of the style and keeps 78% of what the tuned model forgets"


@pytest.mark.parametrize("stretch", [(1000, 0, 1, 0), (1, -7, 0.01, 40)])
def test_units_do_not_move_the_knee(stretch):
    a, b, c, d = stretch
    moved = knee(RATIOS, a * ROUND[0] + b, c * ROUND[1] + d)
    assert (moved.ratio, moved.gain) == (knee(RATIOS, *ROUND).ratio, pytest.approx(0.6 - 0.6**3))


@pytest.mark.parametrize("frontier", [STRAIGHT, HOLLOW])
def test_straight_or_hollow_frontier_has_no_knee_and_says_so(frontier):
    found = knee(RATIOS, *frontier)
    assert (found.ratio, found.gain) == (None, 0.0)
    assert "no ratio lies above the straight line" in found.says


@pytest.mark.parametrize(
    ("learned", "kept", "said"),
    [
        ([1.0, 2.0, 1.0], [3.0, 2.0, 1.0], "learned nothing"),
        ([1.0, 2.0, 0.5], [3.0, 2.0, 1.0], "learned nothing"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 3.0], "forgotten nothing"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 4.0], "forgotten nothing"),
        ([1.0, 1.0, 1.0], [3.0, 3.0, 3.0], "learned nothing.*forgotten nothing"),
    ],
)
def test_where_there_is_no_trade_it_is_said_and_not_computed(learned, kept, said):
    means = [0.0, 0.5, 1.0], np.array(learned), np.array(kept)
    found = knee(*means)
    assert (found.ratio, found.gain) == (None, 0.0)
    with pytest.raises(ValueError, match=said):
        normalised(*means)
    rows = [np.repeat(values[:, None], 4, 1) for values in means[1:]]
    whole = summary(means[0], *rows)
    assert whole["knee"] == {"ratio": None, "gain": None, "says": found.says} and whole["no_knee_share"] == 1
    assert found.says[1:] in table(whole)


def test_a_ratio_beyond_the_tuned_model_is_measured_against_the_same_chord():
    ratios = [0.0, 0.5, 1.0, 1.25]
    learned, kept = normalised(ratios, np.array([0.0, 2.0, 4.0, 5.0]), np.array([10.0, 9.0, 6.0, 2.0]))
    assert learned.tolist() == [0, 0.5, 1, 1.25] and kept.tolist() == [1, 0.75, 0, -1]


# -- what is beaten --------------------------------------------------------------------------------------------------


def test_a_ratio_is_beaten_by_one_as_good_in_both_and_better_in_one():
    ratios = [0.0, 0.25, 0.5, 0.75, 1.0]
    learned, kept = np.array([0.0, 0.3, 0.2, 0.6, 0.6]), np.array([1.0, 0.9, 0.8, 0.5, 0.4])
    assert pareto(ratios, learned, kept) == [0.0, 0.25, 0.75]


def test_equal_points_do_not_beat_each_other():
    assert pareto([0.0, 0.5, 1.0], np.array([1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])) == [0.0, 0.5]


# -- how sure ----------------------------------------------------------------------------------------------------------


def test_resamples_draw_the_same_rows_at_every_ratio():
    """Rows that differ much from each other and not between ratios: unpaired, the ratios' means would come apart."""
    row = np.random.default_rng(1).normal(0, 10, 50)
    means = bootstrap(np.stack([row, row + 1, row + 2]), 200, 0, "learned")
    assert means.shape == (200, 3)
    assert np.ptp(means[:, 0]) > 1
    np.testing.assert_allclose(np.diff(means, axis=1), 1)


def test_learned_and_kept_draw_their_rows_apart():
    """They are other prompts: a lucky draw of one must say nothing of the other."""
    row = np.random.default_rng(1).normal(0, 1, (1, 50))
    pair = [bootstrap(row, 1000, 0, name)[:, 0] for name in ("learned", "kept")]
    assert abs(np.corrcoef(pair)[0, 1]) < 0.15


def test_intervals_are_as_wide_as_the_rows_make_them():
    """95 % of a mean of 400 rows of spread 2 lie within 1.96 * 2 / 20 of it."""
    learned, kept = rows_of(*STRAIGHT, noise=2.0, rows=(400, 400))
    for index, point in enumerate(summary(RATIOS, learned, kept)["points"]):
        for what, means in zip(("learned", "kept"), STRAIGHT, strict=True):
            interval = point[what]
            assert interval["mean"] == pytest.approx(means[index])
            assert interval["low"] < means[index] < interval["high"]
            assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * 0.1, rel=0.2)


def test_intervals_cover_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        rows = generator.normal(5, 1, (1, 40))
        low, high = np.quantile(bootstrap(rows, 400, seed, "kept"), (0.025, 0.975))
        hits += low < 5 < high
    assert 180 <= hits <= 198


def test_the_same_seed_gives_the_same_summary_and_another_gives_another():
    rows = rows_of(*ROUND, noise=20.0)
    first = summary(RATIOS, *rows, resamples=300, seed=1)
    assert first == summary(RATIOS, *rows, resamples=300, seed=1)
    assert first != summary(RATIOS, *rows, resamples=300, seed=2)
    assert json.loads(json.dumps(first)) == first


def test_shares_of_the_resamples_sum_to_one_and_gather_at_the_knee():
    found = summary(RATIOS, *rows_of(*ROUND, noise=10.0))
    shares = {point["ratio"]: point["knee_share"] for point in found["points"]}
    assert sum(shares.values()) + found["no_knee_share"] == pytest.approx(1)
    assert sum(share for ratio, share in shares.items() if 0.45 < ratio < 0.75) > 0.9
    assert found["knee"]["ratio"] == pytest.approx(0.6)
    assert found["knee"]["gain"]["low"] < found["knee"]["gain"]["mean"] < found["knee"]["gain"]["high"]
    assert "chance" not in found["knee"]["says"]


def test_a_knee_within_the_noise_is_said_to_be_chance():
    found = summary(RATIOS, *rows_of(STRAIGHT[0], STRAIGHT[1] + 0.001 * RATIOS * (1 - RATIOS), noise=0.2))
    assert found["knee"]["ratio"] == pytest.approx(0.5) and "may be chance" in found["knee"]["says"]


@pytest.mark.parametrize(
    ("ratios", "learned", "kept", "said"),
    [
        ([0.1, 0.5, 1], np.ones((3, 4)), np.ones((3, 4)), "must have 0"),
        ([0, 0.5, 0.9], np.ones((3, 4)), np.ones((3, 4)), "1 .the tuned model"),
        ([0, 1, 0.5], np.ones((3, 4)), np.ones((3, 4)), "must ascend"),
        ([0, 0.5, 1], np.ones((2, 4)), np.ones((3, 4)), r"learned must be \[3 ratios, rows\], not \[2, 4\]"),
        ([0, 0.5, 1], np.ones((3, 4)), np.ones(3), "kept must be"),
        ([0, 0.5, 1], np.ones((3, 4)), np.full((3, 4), np.nan), "kept has 12 values"),
    ],
)
def test_results_that_cannot_be_read_are_refused(ratios, learned, kept, said):
    with pytest.raises(ValueError, match=said):
        summary(ratios, learned, kept)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_table_has_a_line_for_each_ratio_and_names_the_knee():
    learned, kept = ROUND[0].copy(), ROUND[1].copy()
    learned[3] = 5.0  # now ratio 0.1 is better in both
    text = table(summary(RATIOS, *rows_of(learned, kept)))
    lines = text.splitlines()
    assert lines[8].startswith("| 0.6 | 60 (60 to 60) | 62.7 (62.7 to 62.7) | 100% |") and "**knee**" in lines[8]
    assert lines[5].endswith("| another is better |")
    assert text.count("**knee**") == 1 and len(lines) == 2 + 11 + 2
    assert lines[-1].startswith("Ratio 0.6 learns 60%")


@pytest.mark.parametrize("count", [1, 6])
def test_plot_writes_an_image_of_all_curves(tmp_path, count):
    frontiers = [ROUND, STRAIGHT, HOLLOW]
    curves = {
        f"run {index}": summary(RATIOS, *rows_of(*frontiers[index % 3], noise=0.1), resamples=50)
        for index in range(count)
    }
    plot(curves, tmp_path / "frontier.png", "in chalk (%)", "right (%)")
    image = np.asarray(Image.open(tmp_path / "frontier.png").convert("RGB"))
    assert image.shape == (605, 880, 3)
    colours = {tuple(pixel) for pixel in np.unique(image.reshape(-1, 3), axis=0).tolist()}
    matplotlibs = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)]
    assert [colour in colours for colour in matplotlibs] == [index < count for index in range(6)]
