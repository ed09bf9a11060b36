"""Merge methods against NumPy in float64, on known answers, and where nothing may change."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

from finetuning.cli import read
from finetuning.merging.methods import (
    METHODS,
    MethodArgs,
    add_difference,
    bound,
    dare,
    linear_combination,
    slerp,
    soup,
    ties,
    train_difference,
    weighted_sum,
)
from finetuning.rng import torch_generator
from merge_checkpoints import MergeArgs

RATIOS = (0.1, 0.3, 0.5, 0.7, 1.0, 1.2, -0.2)
PRECISIONS = {torch.float32: (23, -126), torch.float16: (10, -14), torch.bfloat16: (7, -126)}  # bits, least exponent


@dataclass
class Args(MethodArgs):
    """What `bound` reads."""

    tuned: list[str] = field(default_factory=lambda: ["a"])


def weights_of_models(count, size=100_000, dtype=torch.float32):
    """A base of rms 0.02 and `count` models fine-tuned from it by 2e-4, in fp32 with the values of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(size, generator=generator)
    tuned = [base + 2e-4 * torch.randn(size, generator=generator) for _ in range(count)]
    return [one.to(dtype).float() for one in (base, *tuned)]


def numpy64(*tensors):
    return [one.numpy().astype(np.float64) for one in tensors]


def ulp(values, dtype=torch.float32):
    """Distance of neighbours in `dtype`, at float64 `values`."""
    bits, least = PRECISIONS[dtype]
    return np.exp2(np.maximum(np.frexp(values)[1] - 1, least) - bits)


def errors(result, reference, dtype=torch.float32, at=None):
    """Distance from a float64 reference after rounding to `dtype`, in ulps at `at` (none: at the reference)."""
    rounded = result.to(dtype).double().numpy()
    return np.abs(rounded - reference) / ulp(reference if at is None else at, dtype)


def bits(tensor):
    return tensor.view(torch.int32).tolist()


def every_method(count=2):
    """{name: function(base, *tuned)} with all options set; the origin is the first tuned model."""
    weights = [1 / count] * count
    return {
        "weighted_sum": lambda base, one, *_, **o: weighted_sum(base, one, **o),
        "add_difference": lambda base, one, *_, **o: add_difference(base, one, one, **o),
        "train_difference": lambda base, one, *_, **o: train_difference(base, one, one, **o),
        "slerp": lambda base, one, *_, **o: slerp(base, one, **o),
        "soup": partial(soup, weights=weights),
        "ties": partial(ties, weights=weights, density=0.5),
        "dare": partial(dare, weights=weights, drop_rate=0.5, key=(0, "w")),
    }


# -- against NumPy in float64 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("ratio", [*RATIOS, 0.4999, 0.001])
def test_weighted_sum_is_within_one_ulp_of_float64(dtype, ratio):
    base, tuned = weights_of_models(1, dtype=dtype)
    tuned[::7] *= -1  # opposite signs
    tuned[::11] = base[::11] * 1e-3
    a, b = numpy64(base, tuned)
    reference = a + ratio * (b - a)
    result = weighted_sum(base, tuned, ratio=ratio)
    largest = np.max(np.abs([a, b, reference]), axis=0)
    assert errors(result, reference, dtype, at=largest).max() <= 1


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ["add_difference", "train_difference", "linear_combination", "soup", "slerp"])
def test_the_others_are_float64_rounded_once(name, dtype, ratio):
    base, tuned, third = weights_of_models(2, dtype=dtype)
    tuned[::7] *= -1
    a, b, c = numpy64(base, tuned, third)
    if name == "add_difference":
        result, reference = add_difference(base, tuned, third, ratio=ratio), a + ratio * (b - c)
    elif name == "train_difference":
        result = train_difference(base, tuned, third, ratio=ratio)
        total = np.abs(b - a) + np.abs(b - c)
        scale = np.divide(np.abs(b - a), total, out=np.zeros_like(a), where=total > 0)
        reference = a + 1.8 * ratio * scale * (b - c)
    elif name == "linear_combination":
        result = linear_combination(base, tuned, third, weights=[ratio, -0.3])
        reference = a + ratio * (b - a) - 0.3 * (c - a)
    elif name == "soup":
        result = soup(base, tuned, third, ratio=ratio, weights=[0.25, 0.75])
        reference = (1 - ratio) * a + ratio * (0.25 * b + 0.75 * c)
    else:
        result = slerp(base, tuned, ratio=ratio)
        angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        reference = (np.sin((1 - ratio) * angle) * a + np.sin(ratio * angle) * b) / np.sin(angle)
    assert errors(result, reference).max() <= 0.5001  # half an ulp is rounding once
    assert errors(result, reference, dtype).max() <= 0.51  # fp32 stands between float64 and fp16


# -- where nothing may change ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", METHODS)
def test_equal_inputs_come_back_bit_for_bit(name, ratio):
    (base,) = weights_of_models(0, size=70_000)  # more than one block
    base[:4] = torch.tensor([-0.0, 0.0, 1e-42, -3e38])
    base[-1] = -0.0
    result = every_method()[name](base, base.clone(), base.clone(), ratio=ratio)
    assert torch.equal(result.view(torch.int32), base.view(torch.int32))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("function", [add_difference, train_difference])
def test_a_difference_of_nothing_leaves_the_base(function, ratio):
    base, tuned = weights_of_models(1, size=100)
    base[0] = -0.0
    assert bits(function(base, tuned, tuned.clone(), ratio=ratio)) == bits(base)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_stay_and_out_takes_the_result(name):
    inputs = weights_of_models(2, size=70_000)
    inputs = [one.reshape(70, 1000) for one in inputs]
    before = [one.clone() for one in inputs]
    out = torch.full((70, 1000), float("nan"))
    function = every_method()[name]
    expected = function(*inputs, ratio=0.3)
    returned = function(*inputs, ratio=0.3, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected) and expected.shape == (70, 1000) and expected.dtype == torch.float32
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.whole])
def test_methods_that_need_no_whole_tensor_give_the_same_in_chunks(name):
    inputs = weights_of_models(2, size=70_001)
    function = partial(every_method()[name], ratio=0.3)
    chunks = [
        function(*(one[part] for one in inputs)) for part in (slice(0, 999), slice(999, 66_000), slice(66_000, None))
    ]
    assert torch.equal(torch.cat(chunks), function(*inputs))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (0,)])
def test_tensors_of_one_element_and_of_none(name, shape):
    base, first, second = (torch.full(shape, value) for value in (1.0, 3.0, 3.0))
    result = every_method()[name](base, first, second, ratio=0.5)
    assert result.shape == shape and torch.isfinite(result).all()
    if name in ("weighted_sum", "slerp", "soup", "ties"):
        assert torch.equal(result, torch.full(shape, 2.0))


# -- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_slerp_turns_unit_vectors_as_a_rotation_does(ratio):
    """Unit quaternions a half angle apart: scipy interpolates the rotations that they stand for."""
    quaternions = Rotation.from_euler("z", [[20], [110]], degrees=True).as_quat()
    expected = Slerp([0, 1], Rotation.from_quat(quaternions))(ratio).as_quat()
    base, tuned = torch.tensor(quaternions, dtype=torch.float32)
    np.testing.assert_allclose(slerp(base, tuned, ratio=ratio).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(
    "tuned",
    [[0.0, 0.0], [3.0, 3.0], [-1.0, -1.0], [1.0, 1.00001]],
    ids=["zero", "parallel", "opposite", "nearly parallel"],
)
def test_slerp_without_an_angle_is_the_weighted_sum(tuned):
    base, tuned = torch.tensor([1.0, 1.0]), torch.tensor(tuned)
    assert torch.equal(slerp(base, tuned, ratio=0.3), weighted_sum(base, tuned, ratio=0.3))
    assert torch.equal(slerp(tuned, base, ratio=0.3), weighted_sum(tuned, base, ratio=0.3))


def test_soup_of_one_model_at_one_is_that_model_however_far_the_base_is():
    base, tuned = torch.tensor([1e30, 1.0]), torch.tensor([1e-30, -0.0])
    assert bits(soup(base, tuned, tuned.clone(), ratio=1.0, weights=[0.5, 0.5])) == bits(tuned)


def test_ties_trims_elects_and_takes_the_mean_of_those_that_agree():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    first = base + torch.tensor([4.0, 3.0, -0.5, 2.0])
    second = base + torch.tensor([2.0, -1.0, 4.0, -2.5])
    # half of each stays: [4, 3, 0, 0] and [0, 0, 4, -2.5]
    result = ties(base, first, second, ratio=1.0, weights=[0.5, 0.5], density=0.5)
    assert result.tolist() == [5.0, 4.0, 5.0, -1.5]
    # all stays: 4 and 2 agree, 3 outvotes -1, 4 outvotes -0.5, -2.5 outvotes 2
    result = ties(base, first, second, ratio=0.5, weights=[0.5, 0.5], density=1.0)
    assert result.tolist() == [2.5, 2.5, 3.0, -0.25]
    # the first has most of the weight: the mean of the first element leans to it, and its 2 outvotes -2.5
    result = ties(base, first, second, ratio=1.0, weights=[0.75, 0.25], density=1.0)
    assert result.tolist() == [4.5, 4.0, 5.0, 3.0]


def test_ties_leaves_the_base_where_the_votes_cancel():
    base, step = torch.tensor([1.0, -0.0]), torch.tensor([2.0, 1.0])
    assert bits(ties(base, base + step, base - step, ratio=1.0, weights=[0.5, 0.5], density=1.0)) == bits(base)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.37, 1.0])
def test_ties_of_one_model_moves_exactly_its_largest_changes_all_the_way(density):
    base, tuned = weights_of_models(1, size=1000)
    result = ties(base, tuned, ratio=1.0, weights=[1.0], density=density)
    moved = result != base
    assert torch.equal(result[moved], tuned[moved]) and moved.sum() == round(density * 1000)
    change = (tuned - base).abs()
    assert not (~moved).any() or change[moved].min() >= change[~moved].max()


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_ties_of_more_than_one_block_is_what_numpy_makes_of_it(density):
    inputs, weights = weights_of_models(3), np.array([0.2, 0.3, 0.5])
    base, *tuned = numpy64(*inputs)
    vectors = np.stack([one - base for one in tuned])
    magnitudes = np.abs(vectors)
    thresholds = np.quantile(magnitudes, 1 - density, axis=1, method="higher")[:, None]
    vectors[magnitudes < thresholds] = 0
    elected = np.sign(weights @ vectors)
    shares = weights[:, None] * ((np.sign(vectors) == elected) & (vectors != 0))
    mean = (shares * vectors).sum(0) / np.maximum(shares.sum(0), 1e-9)
    result = ties(*inputs, ratio=0.7, weights=weights.tolist(), density=density)
    sure = (np.abs(magnitudes - thresholds) > 1e-8).all(0)  # not at a threshold, where several may tie
    assert sure.mean() > 0.99
    assert errors(result, base + 0.7 * mean)[sure].max() <= 0.51


def test_ties_takes_evenly_spaced_ones_of_those_that_tie_at_the_threshold():
    tuned = torch.ones(10)
    tuned[5] = 2
    result = ties(torch.zeros(10), tuned, ratio=1.0, weights=[1.0], density=0.4)
    assert result.tolist() == [1, 0, 0, 1, 0, 2, 0, 1, 0, 0]


def test_dare_draws_for_each_model_and_adds_them_by_weight():
    base, options = torch.zeros(1000), {"ratio": 1.0, "drop_rate": 0.5, "key": (3, "w")}
    together = dare(base, base + 1, base + 1, weights=[0.25, 0.75], **options)
    assert set(together.tolist()) == {0.0, 0.5, 1.5, 2.0}
    expected = sum(
        weight * 2 * (torch.rand(1000, generator=torch_generator(3, "dare w", index)) >= 0.5)
        for index, weight in enumerate([0.25, 0.75])
    )
    assert torch.equal(together, expected)


def test_dare_repeats_itself_and_differs_by_seed_and_by_tensor():
    base, tuned = weights_of_models(1, size=100)
    draw = partial(dare, base, tuned, ratio=1.0, weights=[1.0], drop_rate=0.5)
    first = draw(key=(0, "unet.a"))
    others = [draw(key=(1, "unet.a")), draw(key=(0, "unet.b"))]
    torch.rand(7)  # what else is drawn does not matter
    assert torch.equal(draw(key=(0, "unet.a")), first)
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(dare(base.view(10, 10), tuned.view(10, 10), ratio=1.0, weights=[1.0], drop_rate=0.5,
                            key=(0, "unet.a")).flatten(), first)  # fmt: skip


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_is_bound_computes_the_method_with_the_flags(method):
    count = 3 if METHODS[method].many else 1
    args = Args(method=method, origin="o", tuned=["a"] * count, density=0.3, drop_rate=0.4, drop_seed=5)
    args.tuned_weights = [1.0, 1.0, 2.0] if METHODS[method].many else None
    base, *tuned = weights_of_models(count, size=500)
    origin = [base * 0.9] if METHODS[method].needs_origin else []
    options = {
        "soup": {"weights": [0.25, 0.25, 0.5]},
        "ties": {"weights": [0.25, 0.25, 0.5], "density": 0.3},
        "dare": {"weights": [0.25, 0.25, 0.5], "drop_rate": 0.4, "key": (5, "unet.w")},
    }
    expected = METHODS[method].function(base, *tuned, *origin, ratio=0.3, **options.get(method, {}))
    assert torch.equal(bound(args, "unet.w", 0.3)(base, *tuned, *origin, out=torch.empty(500)), expected)
    assert not torch.equal(expected, base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("curve", ["linear", "smoothstep", "inverse_smoothstep"])
def test_at_the_ends_an_input_itself_is_the_result(method, curve):
    args = Args(method=method, curve=curve)
    assert bound(args, "w", 0.0) == 0
    at_one = bound(args, "w", 1.0)
    assert at_one == 1 if method in ("weighted_sum", "slerp") else callable(at_one)


def test_the_curve_bends_the_ratio():
    base, tuned = weights_of_models(1, size=10)
    result = bound(Args(curve="smoothstep"), "w", 0.25)(base, tuned)
    assert torch.equal(result, weighted_sum(base, tuned, ratio=0.15625))


def test_weights_that_are_not_given_are_equal():
    result = bound(Args(method="soup", tuned=["a", "b"]), "w", 1.0)(
        torch.zeros(1), torch.ones(1), torch.full((1,), 3.0)
    )
    assert result.tolist() == [2.0]


def problems_of(words):
    usual = [] if "--tuned " in words else ["--tuned", "a"]
    return read(MergeArgs, "", [*usual, "--base", "b", "--output_dir", "new", *words.split()])[1]


@pytest.mark.parametrize("words", [
    "", "--ratio 0 1.2 -0.3", "--method add_difference --origin c --ratio 1.5",
    "--method ties --tuned a b --density 1 --tuned_weights 1 3", "--method dare --drop_rate 0",
    "--method slerp --ratio 0 1 --curve smoothstep",
])  # fmt: skip
def test_flags_that_can_work(words):
    assert problems_of(words) == []


@pytest.mark.parametrize(("words", "named"), [
    ("--tuned a b", "--tuned names 2 models"),
    ("--method add_difference", "--method add_difference needs --origin"), ("--method soup --origin c", "--origin"),
    ("--tuned_weights 1", "--tuned_weights"),
    ("--method soup --tuned a b --tuned_weights 1", "--tuned_weights: 1 numbers for 2"),
    ("--method soup --tuned_weights 0", "--tuned_weights 0"),
    ("--method soup --tuned_weights nan", "--tuned_weights nan"),
    ("--method soup --tuned_weights inf", "--tuned_weights inf"), ("--method ties --density 0", "--density 0"),
    ("--method ties --density 1.1", "--density 1.1"), ("--density 0.5", "--density"),
    ("--method dare --drop_rate 1", "--drop_rate 1"), ("--method dare --drop_rate -0.1", "--drop_rate -0.1"),
    ("--drop_rate 0.5", "--drop_rate"), ("--drop_seed 5", "--drop_seed"), ("--ratio 0.5 0.5", "--ratio 0.5 0.5"),
    ("--ratio 0.1234567 0.1234568", "--ratio 0.1234567 0.1234568"), ("--block_ratios much", "--block_ratios much"),
    ("--block_ratios unet.*=2 --curve inverse_smoothstep", "--block_ratios 2"), ("--dtype int8", "--dtype int8"),
    ("--ratio half", "--ratio half"), ("--ratio 0.5 nan", "--ratio nan"),
    ("--ratio inf --curve smoothstep", "--ratio inf"),
    ("--method slerp --ratio 1.2", "--ratio 1.2 must be between 0 and 1 with --method slerp"),
    ("--ratio -0.1 --curve smoothstep", "--ratio -0.1 must be between 0 and 1 with --curve smoothstep"),
])  # fmt: skip
def test_flags_that_cannot_work_are_named(words, named):
    (problem,) = problems_of(words)
    assert problem.startswith(named)
