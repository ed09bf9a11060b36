"""Style learned against concepts kept, over the ratios of a merge: the frontier, and the ratio on its knee.

`learned` and `kept` are results row by row, higher is better: [ratios, rows] each, the same rows at every ratio. The
two may have different rows (prompts of the new style, prompts of unrelated concepts). Ratio 0 is the base, ratio 1 the
tuned model, and both must be among the ratios: all is measured between them. Rows are resampled as if they were
independent: where there are several images of one prompt, make one row of them, their mean.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from finetuning.rng import python_random

NOTHING = 1e-9  # a gain this small is rounding


@dataclass(frozen=True)
class Knee:
    """The ratio that lies farthest above the chord, or None where there is no such ratio.

    gain   how far, 0 to 1: share of the style that is learned, plus share of what the tuned model forgets that is kept,
           minus the 1 that every point of the chord has
    says   the same in words
    """

    ratio: float | None
    gain: float
    says: str


def normalised(ratios, learned, kept):
    """Means [ratios] of both in shares of the way from base to tuned: the base is at (0, 1), the tuned model at (1, 0).

    Raises ValueError where that cannot be said: nothing was learned, or nothing forgotten.
    """
    base, tuned = _ends(ratios)
    if said := _no_trade(learned[[base, tuned]], kept[[base, tuned]]):
        raise ValueError(said)
    return (
        (learned - learned[base]) / (learned[tuned] - learned[base]),
        (kept - kept[tuned]) / (kept[base] - kept[tuned]),
    )


def knee(ratios, learned, kept):
    """The Knee of means [ratios]: the point farthest above the straight line from the base's to the tuned model's."""
    base, tuned = _ends(ratios)
    if said := _no_trade(learned[[base, tuned]], kept[[base, tuned]]):
        return Knee(None, 0.0, said)
    gains = _gains(ratios, learned, kept)
    best = int(gains.argmax())
    if gains[best] <= NOTHING:
        return Knee(None, 0.0, "no ratio lies above the straight line from base to tuned: a merge only trades evenly")
    style, concepts = (shares[best] for shares in normalised(ratios, learned, kept))
    return Knee(
        float(ratios[best]),
        float(gains[best]),
        f"ratio {ratios[best]:g} learns {style:.0%} of the style and keeps {concepts:.0%} of what the tuned model "
        "forgets",
    )


def pareto(ratios, learned, kept):
    """The ratios of means [ratios] that no other ratio beats: as good in both, and better in one."""
    points = np.stack([learned, kept], -1)
    at_least = (points[:, None] >= points).all(-1)  # [i, j]: i is as good as j in both
    better = (points[:, None] > points).any(-1)
    beaten = (at_least & better).any(0)
    return [float(ratio) for ratio, is_beaten in zip(ratios, beaten, strict=True) if not is_beaten]


def bootstrap(values, resamples, seed, name):
    """Means [resamples, ratios] of `values` [ratios, rows]: each resample draws its rows once, for all ratios.

    `name` (learned or kept) keeps the draws of the two apart.
    """
    rows = values.shape[1]
    generator = np.random.default_rng(python_random(seed, f"bootstrap of {name}").getrandbits(64))
    counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # [resamples, rows]
    return counts @ values.T / rows


def summary(ratios, learned, kept, *, resamples=2000, seed=0):
    """All that the rows say of a sweep, ready for JSON: {"knee", "points", "pareto", ...}.

    learned, kept  [ratios, rows], higher is better. Intervals hold 95 % of the bootstrap's means. `knee_share` is the
                   share of resamples in which a ratio is the knee; `no_knee_share` that of those without one.
    Raises ValueError: ratios that do not ascend or lack 0 or 1, another number of rows than ratios, NaN.
    """
    ratios = np.asarray(ratios, dtype=np.float64)
    learned, kept = _checked(ratios, learned=learned, kept=kept)
    means = learned.mean(1), kept.mean(1)
    resampled = bootstrap(learned, resamples, seed, "learned"), bootstrap(kept, resamples, seed, "kept")
    gains = np.stack([_gains(ratios, *pair) for pair in zip(*resampled, strict=True)])  # [resamples, ratios]
    won = np.where(gains.max(1) > NOTHING, gains.argmax(1), -1)
    found, not_beaten = knee(ratios, *means), pareto(ratios, *means)
    points = [
        {
            "ratio": float(ratio),
            "learned": _interval(means[0][index], resampled[0][:, index]),
            "kept": _interval(means[1][index], resampled[1][:, index]),
            "knee_share": float((won == index).mean()),
            "beaten": float(ratio) not in not_beaten,
        }
        for index, ratio in enumerate(ratios)
    ]
    says = found.says
    gain = None
    if found.ratio is not None:
        gain = _interval(found.gain, gains[:, list(ratios).index(found.ratio)])
        if gain["low"] <= 0:
            says += "; with these few rows that may be chance: its gain's interval reaches 0"
    return {
        "knee": {"ratio": found.ratio, "gain": gain, "says": says},
        "pareto": not_beaten,
        "points": points,
        "no_knee_share": float((won == -1).mean()),
        "rows": {"learned": learned.shape[1], "kept": kept.shape[1]},
        "resamples": resamples,
        "seed": seed,
    }


def table(summary):
    """Markdown: a line for each ratio, means with their 95 % intervals, and what the knee is in words."""
    lines = ["| ratio | learned (95 %) | kept (95 %) | knee in | |", "|---|---|---|---|---|"]
    for point in summary["points"]:
        remarks = ["**knee**"] * (point["ratio"] == summary["knee"]["ratio"])
        remarks += ["another is better"] * point["beaten"]
        cells = [f"{point['ratio']:g}", _written(point["learned"]), _written(point["kept"])]
        lines.append(f"| {' | '.join(cells)} | {point['knee_share']:.0%} | {', '.join(remarks)} |")
    return "\n".join([*lines, "", _sentence(summary["knee"]["says"])]) + "\n"


def plot(curves, path, x_label="style learned", y_label="concepts kept"):
    """Draw {label: summary} as PNG: a point for each ratio with its 95 % intervals, the chord, a star on the knee."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    for label, one in curves.items():
        ratios = [point["ratio"] for point in one["points"]]
        xs, ys = (np.array([point[what]["mean"] for point in one["points"]]) for what in ("learned", "kept"))
        x_error, y_error = (_bars(one["points"], what) for what in ("learned", "kept"))
        ends = list(_ends(ratios))
        best = one["knee"]["ratio"]
        color = axes.plot(xs, ys, marker="o", markersize=4, label=label)[0].get_color()
        axes.errorbar(xs, ys, xerr=x_error, yerr=y_error, fmt="none", ecolor=color, elinewidth=0.6, alpha=0.4)
        axes.plot(xs[ends], ys[ends], color=color, linestyle=":", linewidth=1, alpha=0.5)
        for ratio, x, y in zip(ratios, xs, ys, strict=True):
            if ratio == best:
                axes.plot(x, y, marker="*", markersize=14, color=color)
            if len(curves) <= 2 or ratio in (0, best, 1):  # the numbers of more curves would cover one another
                style = dict(xytext=(6, 4), textcoords="offset points", fontsize=8, color=color)
                axes.annotate(f"{ratio:g}", (x, y), **style)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="numbers: ratio; star: knee", title_fontsize=8)
    figure.savefig(path, dpi=110)


def _ends(ratios):
    """Where the base and the tuned model stand among the ratios."""
    ratios = list(ratios)
    if 0 not in ratios or 1 not in ratios:
        given = ", ".join(f"{ratio:g}" for ratio in ratios)
        raise ValueError(f"the ratios must have 0 (the base) and 1 (the tuned model) among them, not only {given}")
    return ratios.index(0), ratios.index(1)


def _no_trade(learned, kept):
    """Why there is no frontier between base and tuned model [2], in words; empty where there is one."""
    said = []
    if learned[1] <= learned[0]:
        said.append("the tuned model has learned nothing: it is no better than the base in the new style")
    if kept[1] >= kept[0]:
        said.append("the tuned model has forgotten nothing: it keeps as much as the base")
    return "; ".join(said)


def _gains(ratios, learned, kept):
    """How far each ratio lies above the chord [ratios]; 0 where there is no frontier."""
    base, tuned = _ends(ratios)
    if _no_trade(learned[[base, tuned]], kept[[base, tuned]]):
        return np.zeros(len(ratios))
    return sum(normalised(ratios, learned, kept)) - 1


def _checked(ratios, **results):
    """The results as float64 arrays."""
    _ends(ratios)
    if (np.diff(ratios) <= 0).any():
        raise ValueError(f"the ratios must ascend, each once, not {', '.join(f'{ratio:g}' for ratio in ratios)}")
    for name, values in results.items():
        results[name] = values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or len(values) != len(ratios) or not values.size:
            raise ValueError(f"{name} must be [{len(ratios)} ratios, rows], not {list(values.shape)}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has {(~np.isfinite(values)).sum()} values that are not finite numbers")
    return results.values()


def _interval(mean, resampled):
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _bars(points, what):
    """How far the intervals reach below and above the means [2, ratios]."""
    intervals = [point[what] for point in points]
    return np.array([(one["mean"] - one["low"], one["high"] - one["mean"]) for one in intervals]).T


def _written(interval):
    return f"{interval['mean']:.3g} ({interval['low']:.3g} to {interval['high']:.3g})"


def _sentence(words):
    return words[:1].upper() + words[1:] + "."
