"""How tensors become one: every method as a pure function on fp32 tensors, and the flags that choose one.

In all of them `base` is the model that the result starts from, `tuned` are the models that are mixed into it and
`ratio` says how much: 0 is the base. Where all inputs are equal the result is them, bit for bit, with -0.0 as well.
Tensors have one shape, any. `out` is as in torch: a tensor of that shape that takes the result and is no input. Inputs
are never changed.

Only `weighted_sum` computes in fp32, because it has to keep up with a disk: for 1 M elements it takes 0.25 ms where
float64 takes 1.3 ms (one core). The others compute in float64, block by block, and round once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from finetuning.cli import SEEDS, flag
from finetuning.merging.ratios import CURVES
from finetuning.rng import torch_generator

BLOCK = 65536  # elements that are float64 at a time
PARALLEL = 1e-4  # radians; here slerp and weighted sum differ by 1e-9 of the tensor, below the rounding of fp32
DENSITY, DROP_RATE = 0.2, 0.9


# -- one tuned model -----------------------------------------------------------------------------------------------


def weighted_sum(base, tuned, *, ratio, out=None):
    """base + r (tuned - base), or the same from the other end where that is nearer.

    For r in 0..1 within 0.8 ulp of fp32 at the larger of the two inputs, 1.1 where they have opposite signs. Where
    they almost cancel the result is smaller than they are, and its own ulp with it.
    """
    start, other, share = (base, tuned, ratio) if ratio < 0.5 else (tuned, base, 1 - ratio)
    # x - x is +0.0. Subtracted with a positive share, or added with a negative one, it leaves even -0.0 as it is.
    if share < 0:
        step = torch.sub(other, start, out=out)
        return torch.add(start, step, alpha=share, out=step)
    step = torch.sub(start, other, out=out)
    return torch.sub(start, step, alpha=share, out=step)


def add_difference(base, tuned, origin, *, ratio, out=None):
    """base + r (tuned - origin): what training made of `origin`, put on another model.

    Task arithmetic (arXiv 2212.04089); A1111's "add difference". diffusers' merger multiplies by 1 - r instead.
    """
    return _moved(lambda base, tuned, origin: ratio * (tuned - origin), base, tuned, origin, out=out)


def train_difference(base, tuned, origin, *, ratio, out=None):
    """base + 1.8 r (tuned - origin) d / (d + |tuned - origin|) with d = |tuned - base|, element by element.

    The difference counts most where the base is far from the tuned model, and not at all where it is there already,
    as in training. Known as trainDifference from sd-webui-supermerger, which chose the 1.8.
    """

    def step(base, tuned, origin):
        difference, distance = tuned - origin, (tuned - base).abs()
        whole = distance + difference.abs()
        return 1.8 * ratio * difference * distance / torch.where(whole > 0, whole, 1)

    return _moved(step, base, tuned, origin, out=out)


def slerp(base, tuned, *, ratio, out=None):
    """(sin((1 - r) t) base + sin(r t) tuned) / sin t, where t is the angle between the two flattened tensors.

    Spherical interpolation (Shoemake 1985) with its weights applied to the tensors as they are, not to unit vectors, as
    mergekit and most others do: where the lengths differ, the length goes from one to the other as well. Within 1e-4
    radians of parallel or opposite, and for a tensor of zeros, it is `weighted_sum`.
    """
    angle = _angle(base, tuned)
    if not PARALLEL <= angle <= math.pi - PARALLEL:
        return weighted_sum(base, tuned, ratio=ratio, out=out)
    here, there = (math.sin(share * angle) / math.sin(angle) for share in (1 - ratio, ratio))
    return _by_block(lambda base, tuned: here * base + there * tuned, base, tuned, out=out)


# -- several tuned models ------------------------------------------------------------------------------------------


def linear_combination(first, *others, weights, out=None):
    """first + sum_i w_i (other_i - first): the sum with weights w_i and 1 - sum_i w_i. Weights may be negative."""

    def step(first, *others):
        return sum(weight * (other - first) for weight, other in zip(weights, others, strict=True))

    return _moved(step, first, *others, out=out)


def soup(base, *tuned, ratio, weights, out=None):
    """base + r (sum_i w_i tuned_i - base), sum_i w_i = 1: at r = 1 a model soup (arXiv 2203.05482)."""
    if ratio < 0.5:
        return linear_combination(base, *tuned, weights=[ratio * weight for weight in weights], out=out)
    weights = [1 - ratio, *(ratio * weight for weight in weights[1:])]
    return linear_combination(tuned[0], base, *tuned[1:], weights=weights, out=out)


def ties(base, *tuned, ratio, weights, density, out=None):
    """base + r m, where m merges the task vectors tuned_i - base (TIES, arXiv 2306.01708, algorithm 1).

    Trim: of each task vector the share `density` of largest magnitude stays. Elect: an element's sign is that of the
    sum of what stayed, each times w_i. Merge: m is the mean, weighted by w_i, of what stayed and has that sign; 0 where
    nothing has. Each tensor is trimmed on its own, to round(density n) elements and at least 1.
    """
    kept = [_largest(one - base, density) for one in tuned]
    shares = torch.tensor(weights, dtype=torch.float64)[:, None]

    def step(base, *blocks):
        tuned, kept = torch.stack(blocks).chunk(2)  # [models, block] each
        vectors = (tuned - base) * kept
        elected = (shares * vectors).sum(0).sign()
        agreeing = shares * (vectors.sign() == elected)
        mass = agreeing.sum(0)
        return ratio * (agreeing * vectors).sum(0) / torch.where(mass > 0, mass, 1)

    return _moved(step, base, *tuned, *kept, out=out)


def dare(base, *tuned, ratio, weights, drop_rate, key, out=None):
    """base + r sum_i w_i k_i (tuned_i - base) / (1 - p) (DARE, arXiv 2311.03099, section 3).

    For each element k_i is 0 with probability p = `drop_rate`, otherwise 1. `key`, (seed, name of the tensor), and i
    name the draws, so that they depend neither on the order of the tensors nor on what was drawn before.
    """
    seed, name = key
    generators = [torch_generator(seed, f"dare {name}", index) for index in range(len(tuned))]
    kept = [torch.rand(base.numel(), generator=one) >= drop_rate for one in generators]

    def step(base, *blocks):
        tuned, kept = blocks[: len(weights)], blocks[len(weights) :]
        vectors = (weight * keep * (one - base) for weight, keep, one in zip(weights, kept, tuned, strict=True))
        return ratio / (1 - drop_rate) * sum(vectors)

    return _moved(step, base, *tuned, *kept, out=out)


# -- what they are made of -----------------------------------------------------------------------------------------


def _by_block(function, *tensors, out=None):
    """function(*tensors) computed in float64, as many elements at a time as fit the cache, and rounded once."""
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format) if out is None else out
    flat, result = [one.reshape(-1) for one in tensors], out.view(-1)
    for first in range(0, len(result), BLOCK):
        part = slice(first, first + BLOCK)
        result[part] = function(*(one[part].double() for one in flat))
    return out


def _moved(step, base, *others, out=None):
    """base + step(base, *others), where a step of 0 leaves even -0.0 as it is."""

    def move(base, *others):
        moved = step(base, *others)
        return torch.where(moved == 0, base, base + moved)

    return _by_block(move, base, *others, out=out)


def _angle(one, other):
    """Between two tensors, in radians; 0 where one of them is zero."""
    pairs = zip(one.reshape(-1).split(BLOCK), other.reshape(-1).split(BLOCK), strict=True)
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in pairs:
        x, y = x.double(), y.double()
        sums += torch.stack([x @ y, x @ x, y @ y])
    product, first, second = sums.tolist()
    lengths = math.sqrt(first) * math.sqrt(second)
    return math.acos(max(-1.0, min(1.0, product / lengths))) if lengths else 0.0


def _largest(vector, density):
    """Which elements are the share `density` of largest magnitude: bool [elements].

    Of those that tie at the threshold, evenly spaced ones are taken. In fp16 and bf16 files large parts of a task
    vector tie, and the first ones would all be in the first rows.
    """
    magnitude = vector.abs().reshape(-1)
    count = max(1, round(density * len(magnitude)))
    if count >= len(magnitude):
        return torch.ones(len(magnitude), dtype=torch.bool)
    place = len(magnitude) - count
    threshold = np.partition(magnitude.numpy(), place)[place].item()
    kept = magnitude > threshold
    if threshold > 0:  # zeros move nothing, kept or not
        tied = (magnitude == threshold).nonzero().squeeze(1)
        wanted = count - int(kept.sum())
        kept[tied[torch.arange(wanted) * len(tied) // wanted]] = True
    return kept


# -- the choice ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What a method asks of its inputs."""

    function: Callable
    whole: bool = False  # needs the whole tensor at once, not chunks of it
    many: bool = False  # takes several tuned models and their weights
    needs_origin: bool = False


METHODS = {
    "weighted_sum": Method(weighted_sum),
    "add_difference": Method(add_difference, needs_origin=True),
    "train_difference": Method(train_difference, needs_origin=True),
    "slerp": Method(slerp, whole=True),
    "soup": Method(soup, many=True),
    "ties": Method(ties, whole=True, many=True),
    "dare": Method(dare, whole=True, many=True),
}


def _named(wanted):
    """For flag(requires=): the methods that are so."""
    return tuple(f"method={name}" for name, one in METHODS.items() if wanted(one))


@dataclass
class MethodArgs:
    """Method"""

    method: str = flag(
        "weighted_sum", "how models become one; soup, ties and dare take several", choices=tuple(METHODS)
    )
    origin: str | None = flag(
        None, "the model that --tuned was trained from", requires=_named(lambda one: one.needs_origin), reads=True
    )
    tuned_weights: list[float] | None = flag(
        None, "shares of the --tuned models, whatever their sum (none: equal)", above=0,
        requires=_named(lambda one: one.many),
    )  # fmt: skip
    density: float = flag(
        DENSITY, "share of each tensor's changes that is kept, the largest ones", above=0, max=1, requires="method=ties"
    )
    drop_rate: float = flag(
        DROP_RATE, "probability that a change is dropped; the others grow to make up for it", min=0, below=1,
        requires="method=dare",
    )  # fmt: skip
    curve: str = flag("linear", "bends ratios between 0 and 1, also those of blocks", choices=tuple(CURVES))
    drop_seed: int = flag(0, "seed of what is dropped", requires="method=dare", **SEEDS)

    def problems(self):
        method = METHODS[self.method]
        if not method.many and len(self.tuned) > 1:
            several = ", ".join(name for name, one in METHODS.items() if one.many)
            yield f"--tuned names {len(self.tuned)} models, but --method {self.method} takes one: take {several}"
        if method.needs_origin and not self.origin:
            yield f"--method {self.method} needs --origin, the model that --tuned was trained from"
        if self.tuned_weights and len(self.tuned_weights) != len(self.tuned):
            yield f"--tuned_weights: {len(self.tuned_weights)} numbers for {len(self.tuned)} models, give one for each"


def ratio_problems(name, ratios, method, curve):
    """What is wrong with the ratios of the flag `name`. Outside 0..1 most methods extrapolate."""
    outside = " ".join(f"{ratio:g}" for ratio in ratios if not 0 <= ratio <= 1)
    if outside and method == "slerp":
        yield f"{name} {outside} must be between 0 and 1 with --method slerp"
    if outside and curve != "linear":
        yield f"{name} {outside} must be between 0 and 1 with --curve {curve}"


def bound(args: MethodArgs, name: str, ratio: float) -> Callable | int:
    """compute(base, *tuned, [origin,] out=...) for the tensor `name`; an int where the result is that input itself."""
    ratio = CURVES[args.curve](ratio)
    if ratio == 0:
        return 0
    if ratio == 1 and args.method in ("weighted_sum", "slerp"):
        return 1
    options = {"ratio": ratio}
    if METHODS[args.method].many:
        weights = args.tuned_weights or [1.0] * len(args.tuned)
        options["weights"] = [weight / math.fsum(weights) for weight in weights]
    if args.method == "ties":
        options["density"] = args.density
    if args.method == "dare":
        options |= {"drop_rate": args.drop_rate, "key": (args.drop_seed, name)}
    return partial(METHODS[args.method].function, **options)
