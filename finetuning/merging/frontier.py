"""What is learned against what is retained, over the ratios of a merge: the frontier, and the ratio on its knee.

`learned` and `retained` are results row by row, higher is better: [ratios, rows] each, the same rows at every ratio.
The two may have different rows (prompts of what was trained, prompts of unrelated concepts). Ratio 0 is the base, ratio
1 the tuned model, and both must be among the ratios: all is measured between them. Rows are resampled as if they were
independent: where there are several images of one prompt, make one row of them, their mean.
"""

from dataclasses import dataclass

import numpy as np

from finetuning.evaluation.statistics import ROUNDS, mean_of, resampled_means

NOTHING = 1e-9  # a gain this small is rounding
LABEL_PLACES = ((6, 4), (6, -12), (-18, 4), (-18, -12))  # of a ratio beside its point, in printer's points


@dataclass(frozen=True)
class Knee:
    """The ratio that lies farthest above the chord, or None where there is no such ratio.

    gain      how far, 0 to 1: share that is learned, plus share of what the tuned model forgets that is retained, minus
              the 1 that every point of the chord has
    sentence  the same in words
    """

    ratio: float | None
    gain: float
    sentence: str


def normalised(ratios, learned, retained):
    """Means [..., ratios] of both in shares of the way from base (0, 1) to tuned (1, 0).

    NaN where there is no frontier between them: nothing was learned, or nothing forgotten.
    """
    base, tuned = _ends(ratios)
    new, old = (np.moveaxis(np.asarray(one, np.float64), -1, 0) for one in (learned, retained))
    rise, fall = new[tuned] - new[base], old[base] - old[tuned]
    is_trade = (rise > 0) & (fall > 0)
    rise, fall = (np.where(is_trade, one, np.nan) for one in (rise, fall))
    return np.moveaxis((new - new[base]) / rise, 0, -1), np.moveaxis((old - old[tuned]) / fall, 0, -1)


def knee(ratios, learned, retained):
    """The Knee of means [ratios]: the point farthest above the straight line from the base's to the tuned model's."""
    base, tuned = _ends(ratios)
    reasons = []
    if learned[tuned] <= learned[base]:
        reasons.append("the tuned model has learned nothing: it is no better than the base in what was trained")
    if retained[tuned] >= retained[base]:
        reasons.append("the tuned model has forgotten nothing: it retains as much as the base")
    if reasons:
        return Knee(None, 0.0, "; ".join(reasons))
    new, old = normalised(ratios, learned, retained)
    gains = new + old - 1
    best = int(gains.argmax())
    if gains[best] <= NOTHING:
        return Knee(None, 0.0, "no ratio lies above the straight line from base to tuned: a merge only trades evenly")
    sentence = f"has {new[best]:.0%} of what the tuned model learned and retains {old[best]:.0%} of what it forgot"
    return Knee(float(ratios[best]), float(gains[best]), f"ratio {ratios[best]:g} {sentence}")


def pareto(ratios, learned, retained):
    """The ratios of means [ratios] that no other ratio beats: as good in both, and better in one."""
    points = np.stack([learned, retained], -1)
    at_least = (points[:, None] >= points).all(-1)  # [i, j]: i is as good as j in both
    better = (points[:, None] > points).any(-1)
    beaten = (at_least & better).any(0)
    return [float(ratio) for ratio, is_beaten in zip(ratios, beaten, strict=True) if not is_beaten]


def summary(ratios, learned, retained, *, seed=0):
    """All that the rows say of a sweep, ready for JSON: {"knee", "points", "pareto", ...}.

    learned, retained  [ratios, rows], higher is better. A result of one row has no interval. `knee_share` is the share
                       of resamples in which a ratio is the knee; `no_knee_share` that of those without one.
    `ratios` ascend. Raises ValueError where 0 or 1 is not among them, or a result is not a finite number.
    """
    ratios, learned, retained = (np.asarray(one, np.float64) for one in (ratios, learned, retained))
    for name, values in (("learned", learned), ("retained", retained)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has {(~np.isfinite(values)).sum()} values that are not finite numbers")
    means = learned.mean(1), retained.mean(1)
    # Each resample draws its rows once for all ratios, and those of learned and retained apart
    resampled = [resampled_means(rows, seed, "frontier", number).T for number, rows in enumerate((learned, retained))]
    gains = np.nan_to_num(sum(normalised(ratios, *resampled)) - 1)  # [resamples, ratios] above the chord
    won = np.where(gains.max(1) > NOTHING, gains.argmax(1), -1)
    found, not_beaten = knee(ratios, *means), pareto(ratios, *means)
    points = [
        {
            "ratio": float(ratio),
            "learned": _interval(learned[index], seed),
            "retained": _interval(retained[index], seed),
            "knee_share": float((won == index).mean()),
            "beaten": float(ratio) not in not_beaten,
        }
        for index, ratio in enumerate(ratios)
    ]
    sentence, gain = found.sentence, None
    if found.ratio is not None:
        low, high = np.quantile(gains[:, list(ratios).index(found.ratio)], (0.025, 0.975))
        gain = {"value": found.gain, "low": float(low), "high": float(high)}
        if low <= 0:
            sentence += "; with these few rows that may be chance: its gain's interval reaches 0"
    return {
        "knee": {"ratio": found.ratio, "gain": gain, "sentence": sentence},
        "pareto": not_beaten,
        "points": points,
        "no_knee_share": float((won == -1).mean()),
        "rows": {"learned": learned.shape[1], "retained": retained.shape[1]},
        "resamples": ROUNDS,
        "seed": seed,
    }


def table(summary):
    """Markdown: a line for each ratio, means with their 95 % intervals, and what the knee is in words."""
    rows = summary["rows"]
    lines = [
        f"| ratio | learned (95 %, n {rows['learned']}) | retained (95 %, n {rows['retained']}) | knee in | |",
        "|---|---|---|---|---|",
    ]
    for point in summary["points"]:
        remarks = ["**knee**"] * (point["ratio"] == summary["knee"]["ratio"])
        remarks += ["another is better"] * point["beaten"]
        cells = [f"{point['ratio']:g}", _cell(point["learned"]), _cell(point["retained"])]
        lines.append(f"| {' | '.join(cells)} | {point['knee_share']:.0%} | {', '.join(remarks)} |")
    sentence = summary["knee"]["sentence"]
    return "\n".join([*lines, "", f"{sentence[:1].upper()}{sentence[1:]}."]) + "\n"


def plot(curves, path, x_label="learned", y_label="retained"):
    """Plot {label: summary} as PNG: a point for each ratio with its 95 % intervals, the chord, a star on the knee."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    labels = []  # (ratio, place, color), those that matter most first
    for label, one in curves.items():
        ratios = [point["ratio"] for point in one["points"]]
        xs, ys = (np.array([point[what]["value"] for point in one["points"]]) for what in ("learned", "retained"))
        x_error, y_error = (_bars(one["points"], what) for what in ("learned", "retained"))
        ends = list(_ends(ratios))
        best = one["knee"]["ratio"]
        color = axes.plot(xs, ys, marker="o", markersize=4, label=label)[0].get_color()
        axes.errorbar(xs, ys, xerr=x_error, yerr=y_error, fmt="none", ecolor=color, elinewidth=0.6, alpha=0.4)
        axes.plot(xs[ends], ys[ends], color=color, linestyle=":", linewidth=1, alpha=0.5)
        for ratio, x, y in zip(ratios, xs, ys, strict=True):
            if ratio == best:
                axes.plot(x, y, marker="*", markersize=14, color=color)
            labels.append((ratio not in (0, best, 1), ratio, (x, y), color))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="numbers: ratio; star: knee", title_fontsize=8)
    figure.draw_without_rendering()  # so that places are known
    figure.set_layout_engine("none")
    taken = []
    for _, ratio, point, color in sorted(labels, key=lambda one: one[0]):
        _label(axes, f"{ratio:g}", point, color, taken)
    figure.savefig(path, dpi=110)


def _label(axes, text, point, color, taken):
    """Write a ratio beside its point where it covers no other; a ratio without room is left to the table."""
    for place in LABEL_PLACES:
        label = axes.annotate(text, point, xytext=place, textcoords="offset points", fontsize=8, color=color)
        box = label.get_window_extent()
        if not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return
        label.remove()


def _ends(ratios):
    """Where the base and the tuned model stand among the ratios."""
    return [*ratios].index(0), [*ratios].index(1)


def _interval(values, seed):
    if len(values) < 2:
        return {"value": float(values.mean()), "low": None, "high": None, "n": len(values)}
    return mean_of(values, seed=seed).as_dict()


def _bars(points, what):
    """How far the intervals reach below and above the means [2, ratios]; without intervals, nowhere."""
    value, low, high = (
        np.array([point[what][key] for point in points], np.float64) for key in ("value", "low", "high")
    )
    return np.nan_to_num([value - low, high - value])


def _cell(interval):
    if interval["n"] < 2:
        return f"{interval['value']:.3g}"
    return f"{interval['value']:.3g} ({interval['low']:.3g} to {interval['high']:.3g})"
