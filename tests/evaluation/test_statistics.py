"""FID, KID and their intervals: known answers, other programs' answers, and how often an interval holds the truth."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import t

from finetuning.evaluation import statistics
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.statistics import (
    Estimate,
    frechet,
    frechet_bias,
    frechet_influence,
    kernel_influence,
    mean_of,
    resampled_means,
    set_difference,
    set_estimate,
)

frechet_estimate, kernel_estimate = (partial(set_estimate, metric) for metric in ("fid", "kid"))
frechet_difference, kernel_difference = (partial(set_difference, metric) for metric in ("fid", "kid"))

SIZES = [(40, 40, 6), (60, 25, 8), (5, 9, 12), (30, 7, 12)]  # n, m, d: more images than features, fewer, mixed


def kernel_distance(a, b):
    return kernel_influence(a, b)[0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def pair(n, m, d, seed=0):
    """Two different sets of features."""
    return normal(n, d, seed=seed) @ normal(d, d, seed=seed + 1), 0.3 + normal(m, d, seed=seed + 2)


def with_moments(rows, mean, covariance):
    """The rows [n, d] made to have this mean and covariance exactly."""
    centred = rows - rows.mean(0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


# -- FID: known answers ----------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_that_vary_along_the_same_axes():
    mean, other = np.array([1.0, -2, 0, 0.5]), np.array([0.0, 1, 3, 0.5])
    spread, wide = np.array([1.0, 4, 0.25, 9]), np.array([4.0, 1, 0.25, 16])
    a, b = with_moments(normal(50, 4), mean, np.diag(spread)), with_moments(normal(33, 4, seed=1), other, np.diag(wide))
    expected = 1 + 9 + 9 + (1 - 2) ** 2 + (2 - 1) ** 2 + (3 - 4) ** 2
    assert frechet(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_gaussians_that_do_not():
    shapes = [normal(5, 5, seed=seed) @ normal(5, 5, seed=seed).T + np.eye(5) for seed in (1, 2)]
    a, b = (with_moments(normal(30 + seed, 5, seed=seed), 0, shape) for seed, shape in enumerate(shapes))
    expected = np.trace(shapes[0] + shapes[1] - 2 * sqrtm(shapes[0] @ shapes[1]).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_frechet_is_torch_fidelitys(size):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    a, b = pair(*size)
    theirs = [fid_features_to_statistics(torch.from_numpy(one)) for one in (a, b)]
    assert frechet(a, b) == pytest.approx(fid_statistics_to_metric(*theirs, False)[KEY_METRIC_FID], rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_frechet_is_symmetric_and_turns_moves_and_scales_with_the_features(size):
    a, b = pair(*size)
    turn = np.linalg.qr(normal(size[2], size[2], seed=9))[0]
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-10)
    assert frechet(a @ turn + 7, b @ turn + 7) == pytest.approx(frechet(a, b), rel=1e-10)
    assert frechet(3 * a, 3 * b) == pytest.approx(9 * frechet(a, b), rel=1e-10)
    assert frechet(a[::-1], b) == pytest.approx(frechet(a, b), rel=1e-10)


@pytest.mark.parametrize("size", [(40, 6), (7, 30), (300, 40)])
def test_frechet_of_a_set_and_itself_is_exactly_0(size):
    features = 100 * normal(*size)
    assert frechet(features, features) == frechet(features, features[::-1]) == 0
    assert frechet_estimate(features, features).as_dict() == pytest.approx(
        {"value": 0, "low": 0, "high": 0, "n": size[0]}, abs=1e-8
    )
    assert frechet(features, features + 1) == pytest.approx(size[1])


# -- KID: known answers ----------------------------------------------------------------------------------------------


def test_kernel_distance_is_torch_fidelitys_over_the_full_set():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    a, b = pair(30, 30, 12)
    theirs = kid_features_to_metric(
        *map(torch.from_numpy, (a, b)), kid_subsets=1, kid_subset_size=30, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0, verbose=False,
    )  # fmt: skip
    assert kernel_distance(a, b) == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-10)


@pytest.mark.parametrize("rows_at_once", [1, 3, 1024])
def test_kernel_distance_is_the_mean_over_all_pairs(monkeypatch, rows_at_once):
    monkeypatch.setattr(statistics, "KERNEL_ROWS", rows_at_once)
    a, b = pair(8, 5, 3)
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3
    among = lambda rows: np.mean([kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j])
    expected = among(a) + among(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased_and_may_be_negative():
    """Of 10 images each, where FID is far above 0."""
    sets = [(normal(10, 8, seed=2 * seed), normal(10, 8, seed=2 * seed + 1)) for seed in range(400)]
    found = np.array([kernel_distance(*pair) for pair in sets])
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(len(found))
    assert (found < 0).mean() > 0.3
    assert min(frechet(*pair) for pair in sets[:50]) > 1
    assert kernel_distance(sets[0][0], sets[0][0]) < 0


# -- influence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "influence"), [(frechet, frechet_influence), (kernel_distance, kernel_influence)])
@pytest.mark.parametrize("side", [0, 1])
def test_influence_is_what_one_more_of_an_image_adds(distance, influence, side):
    """In sets of many copies, where one more is a small change."""
    sets = [np.tile(one, (500, 1)) for one in pair(4, 4, 3)]
    value, *influences = influence(*sets)
    assert value == pytest.approx(distance(*sets), rel=1e-9)
    for row in range(4):
        longer = list(sets)
        longer[side] = np.vstack([sets[side], sets[side][row]])
        added = (distance(*longer) - value) * len(longer[side])
        assert influences[side][row] == pytest.approx(added, rel=0.02, abs=0.02 * influences[side].std())
    assert influences[side].mean() == pytest.approx(0, abs=1e-9)


def test_influence_of_more_features_than_images_is_what_weights_change():
    """By the definition: cross-Gram and variances of weighted rows, moved by a small weight."""
    a, b = pair(6, 9, 20)

    def weighted(weights):
        rows = np.sqrt(6 * weights)[:, None] * (a - weights @ a)
        shared = np.linalg.svd(rows @ (b - b.mean(0)).T, compute_uv=False).sum() / math.sqrt(5 * 8)
        spread = (rows**2).sum() / 5 + b.var(0, ddof=1).sum()
        return ((weights @ a - b.mean(0)) ** 2).sum() + spread - 2 * shared

    even = np.full(6, 1 / 6)
    value, influences, _ = frechet_influence(a, b)
    assert value == pytest.approx(weighted(even), rel=1e-10)
    for row in range(6):
        toward = np.eye(6)[row] - even
        slope = (weighted(even + 1e-5 * toward) - weighted(even - 1e-5 * toward)) / 2e-5
        assert influences[row] == pytest.approx(slope, rel=1e-5)


# -- intervals -------------------------------------------------------------------------------------------------------


def coverage(draw, estimate, expected, rounds=100):
    """(share of the intervals that hold the expected value, their mean width)."""
    found = [estimate(*draw(seed)) for seed in range(1000, 1000 + rounds)]
    assert all(one.low <= one.value <= one.high for one in found)
    return np.mean([one.low <= expected <= one.high for one in found]), np.mean([one.high - one.low for one in found])


@pytest.fixture
def few_rounds(monkeypatch):
    """For simulations: the ends of an interval are a little less sure."""
    monkeypatch.setattr(statistics, "ROUNDS", 1000)


# What images are like for the intervals: (n, d, how the features' variance falls, shift of one set).
WORLDS = {
    "many images": (100, 6, 0, 0.5),
    "few images": (24, 64, 1, 0.5),
    "ten images": (10, 64, 1, 0.5),
    "equal sets": (24, 64, 1, 0),
    "equal sets, many images": (100, 6, 0, 0),
}


@pytest.fixture(params=WORLDS.values(), ids=WORLDS)
def world(request):
    """seed -> (features [n, d], truth [n, d]): row i of both shares a part, as images of one caption do."""
    n, d, fall, shift = request.param
    scales = np.arange(1, d + 1) ** (-fall / 2)

    def draw(seed):
        captions, own, true = normal(3, n, d, seed=seed)
        return scales * (captions + own + shift), scales * (captions + true)

    return draw


@pytest.mark.parametrize(("distance", "estimate"), [(frechet, frechet_estimate), (kernel_distance, kernel_estimate)])
@pytest.mark.usefixtures("few_rounds")
def test_interval_of_95_percent_holds_the_expected_figure(world, distance, estimate):
    """The expectation of the figure at this number of images."""
    figures = [distance(*world(seed)) for seed in range(400)]
    held, width = coverage(world, estimate, np.mean(figures))
    needed = np.subtract(*np.quantile(figures, (0.975, 0.025)))
    print(f"{distance.__name__}: {held:.3f} held, {width / needed:.2f} of the width needed")
    assert held >= 0.9
    assert width < 2.5 * needed


def test_resampling_the_images_themselves_would_put_fid_too_high():
    """Why the influences are resampled: percentiles over repeated images hold the figure almost never."""
    draw = lambda seed: (normal(24, 64, seed=2 * seed), normal(24, 64, seed=2 * seed + 1))
    expected = np.mean([frechet(*draw(seed)) for seed in range(100)])
    held, above = [], []
    for seed in range(1000, 1020):
        a, b = draw(seed)
        drawn = np.random.default_rng(seed).integers(24, size=(60, 2, 24))
        resampled = [frechet(a[one], b[other]) for one, other in drawn]
        low, high = np.quantile(resampled, (0.025, 0.975))
        held.append(low <= expected <= high)
        above.append(np.mean(resampled) / frechet(a, b))
    print(f"plain bootstrap: {np.mean(held):.3f} held, resampled FIDs {np.mean(above):.2f} of the figure")
    assert np.mean(held) < 0.3
    assert np.mean(above) > 1.05


@pytest.mark.parametrize(
    ("difference", "distance"), [(frechet_difference, frechet), (kernel_difference, kernel_distance)]
)
@pytest.mark.parametrize("longer_truth", [False, True])
@pytest.mark.usefixtures("few_rounds")
def test_difference_of_equal_models_rarely_excludes_zero_and_of_unequal_ones_does(difference, distance, longer_truth):
    def draw(seed, shift):
        captions, own, other, true = normal(4, 30, 10, seed=seed)
        truth = normal(50, 10, seed=seed + 10**6) if longer_truth else captions + 0.5 * true
        return captions + 0.5 * own + shift, captions + 0.5 * other, truth

    equal = [difference(*draw(seed, 0)) for seed in range(100)]
    assert np.mean([one.excludes_zero for one in equal]) < 0.1
    shifted = [difference(*draw(seed, 1)) for seed in range(20)]
    assert np.mean([one.excludes_zero and one.value > 0 for one in shifted]) > 0.9
    a, b, truth = draw(0, 1)
    assert shifted[0].value == pytest.approx(distance(a, truth) - distance(b, truth))
    assert shifted[0].n == 30


def test_paired_difference_of_fid_is_sharper_than_two_intervals():
    captions, own, other, true = normal(4, 40, 10)
    a, b, truth = 3 * captions + 0.1 * own + 0.1, 3 * captions + 0.1 * other, 3 * captions + 0.1 * true
    width = lambda one: one.high - one.low
    both = width(frechet_estimate(a, truth)) + width(frechet_estimate(b, truth))
    assert width(frechet_difference(a, b, truth)) < both
    shuffled = np.random.default_rng(0).permutation(40)
    assert width(frechet_difference(a, b, truth)) < width(frechet_difference(a, b[shuffled], truth))


def test_difference_to_itself_is_exactly_0():
    a, truth = pair(20, 20, 5)
    for difference in (frechet_difference, kernel_difference):
        found = difference(a, a, truth)
        assert (found.value, found.low, found.high, found.excludes_zero) == (0, 0, 0, False)


@pytest.mark.parametrize("rows", [5, 10, 100])
@pytest.mark.usefixtures("few_rounds")
def test_interval_of_a_mean_is_as_wide_as_students_and_holds_it(rows):
    held, width = coverage(lambda seed: [normal(rows, seed=seed)], mean_of, 0, rounds=150)
    exact = np.mean([2 * t.ppf(0.975, rows - 1) * normal(rows, seed=s).std(ddof=1) for s in range(1000, 1150)])
    assert width == pytest.approx(exact / math.sqrt(rows), rel=0.15)
    assert held > 0.91


def test_mean_of_rows():
    found = mean_of([0, 1, 1, 0, 1] * 20)
    assert (found.value, found.n) == (0.6, 100)
    assert 0.45 < found.low < 0.55 and 0.65 < found.high < 0.75
    assert mean_of(torch.ones(7)) == Estimate(1, 1, 1, 7)


def test_draws_are_the_same_every_time_and_leave_numpys_own_alone(monkeypatch):
    a, truth = pair(20, 30, 5)
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first = frechet_estimate(a, truth), kernel_estimate(a, truth), mean_of(a[:, 0]), frechet_bias(a, truth)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 50)
    assert (frechet_estimate(a, truth), kernel_estimate(a, truth), mean_of(a[:, 0]), frechet_bias(a, truth)) == first
    assert np.random.get_state()[1].tolist() == before
    assert mean_of(a[:, 0], seed=1) != first[2]


# -- bias ------------------------------------------------------------------------------------------------------------


def test_bias_of_fid_is_measured_and_taken_off():
    """Equal Gaussians but for a shift of 0.5 in each of 8 features: the FID of infinitely many is 2."""
    sets = [(normal(100, 8, seed=2 * seed) + 0.5, normal(100, 8, seed=2 * seed + 1)) for seed in range(60)]
    raw = np.mean([frechet(*one) for one in sets])
    bias, infinite = np.mean([frechet_bias(*one) for one in sets], 0)
    print(f"FID {raw:.3f}, bias {bias:.3f}, infinite {infinite:.3f}")
    assert raw > 2.15
    assert infinite == pytest.approx(2, abs=0.1)
    assert bias == pytest.approx(raw - 2, abs=0.1)


def test_bias_with_fewer_images_than_features_is_a_lower_bound():
    sets = [(normal(20, 64, seed=2 * seed), normal(20, 64, seed=2 * seed + 1)) for seed in range(20)]
    raw = np.mean([frechet(*one) for one in sets])
    bias, _ = np.mean([frechet_bias(*one) for one in sets], 0)
    print(f"bias {bias:.3f} of {raw:.3f}")
    assert 0.1 * raw < bias < raw  # all of it is bias


def test_halves_are_of_the_same_rows_where_the_sets_pair():
    """Images equal row by row have FID 0 in every half; a longer truth is halved on its own."""
    a = normal(30, 4)
    assert frechet_bias(a, a) == (0, 0)
    assert frechet_bias(a, normal(60, 4, seed=1))[0] > 0


def test_all_series_are_resampled_with_the_same_rows():
    values = normal(3, 40)
    means = resampled_means(values, 5, "a sweep", rounds=300)
    assert means.shape == (3, 300)
    for one, own in zip(means, values, strict=True):
        np.testing.assert_allclose(one, resampled_means(own, 5, "a sweep", rounds=300), rtol=1e-12, atol=1e-15)
        assert one.mean() == pytest.approx(own.mean(), abs=0.1) and one.std() == pytest.approx(
            own.std() / 40**0.5, rel=0.2
        )
    assert not np.array_equal(means, resampled_means(values, 5, "another", rounds=300))


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "said"), [
    (lambda: frechet(np.full((3, 2), np.nan), [[1, 2], [np.inf, 3]]), "a has .* rows 0, 1, 2\nb has .* rows 1"),
    (lambda: kernel_distance(np.full((30, 2), np.nan), normal(5, 2)), "rows 0, 1, 2, .* 8, 9 and 20 more"),
    (lambda: frechet_estimate(normal(1, 4), normal(5, 4)), "a has 1 images: .* takes 2 at least"),
    (lambda: mean_of([1.0]), "values has 1 rows: .* takes 2 at least"), (lambda: mean_of([]), "values has 0 rows"),
    (lambda: mean_of(np.array([1, np.nan, 2, np.inf])), "not finite numbers in rows 1, 3"),
])  # fmt: skip
def test_bad_input_is_named(made, said):
    with pytest.raises(EvaluationError, match=f"(?s){said}"):
        made()
