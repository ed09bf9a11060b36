"""What a report says in words: how a figure is written, what a difference means, the verdict, and the notes before it.

All functions read report.json as it is in the file, where sides are text; every form of the report uses them.
"""

import math
import re

from finetuning.evaluation.metrics import NETWORK_FLAGS

KEPT = "it kept {kept} of what {reference} can do"  # where the metric has no words of its own
# statistics.small_sample_warning on one model at one side; "by" is missing where the bias could not be measured.
SMALL_SAMPLE = re.compile(
    r"(?P<who>.+ at \d+ px): (?P<what>FID of \d+ images is biased[^:]*)"
    r"(: (?P<by>.+) comes from .+)?: (?P<advice>look .+)"
)


# -- figures -------------------------------------------------------------------------------------------------------


def number(value, width=None, sign=False):
    """A figure as text: to two digits of half its interval's `width`, to four digits where it has none; None is a dash.

    `sign` writes a plus before what is above 0.
    """
    if value is None:
        return "-"
    if width:
        form = f".{min(max(0, 1 - math.floor(math.log10(width / 2))), 15)}f"
    else:
        form = ".4g" if abs(value) < 1000 else ".0f"
    return f"{float(value):{'+' if sign and value else ''}z{form}}"


def width_of(estimate):
    """high - low, or None where there is no interval."""
    return None if estimate["low"] is None or estimate["high"] is None else estimate["high"] - estimate["low"]


def parts(estimate, sign=False, scale=1):
    """(value, interval) as text, both times `scale`. An interval without width says of how many rows: all of 26."""
    low, value, high = (None if estimate[key] is None else scale * estimate[key] for key in ("low", "value", "high"))
    width = width_of(estimate)
    if width is None:
        return number(value, sign=sign), "no interval"
    if width == 0:
        return number(value, sign=sign), _alike(estimate)
    low, value, high = (number(one, scale * width, sign) for one in (low, value, high))
    return value, f"{low} to {high}"


def _alike(estimate):
    words = {0: "none of {}", 1: "all of {}"}.get(estimate["value"], "the same in all {}")
    return words.format(estimate["n"])


def written(estimate, sign=False):
    """An estimate in one line: 0.712 (0.700 to 0.724)."""
    value, interval = parts(estimate, sign)
    return f"{value} ({interval})"


def percent(estimate):
    """A share in one line: 35 % (15 to 54 %)."""
    value, interval = parts(estimate, scale=100)
    return f"{value} % ({interval}{' %' if width_of(estimate) else ''})"


def title_of(report, metric):
    """Of a metric in the report's table; of anything else its name."""
    return report["metrics"][metric]["title"] if metric in report["metrics"] else metric.replace("_", " ")


def row_number(rows, metric):
    """A function that writes the values of a metric in `rows`, all to as many digits as their spread asks for."""
    values = [value for row in rows for value in row["values"].get(metric, {}).values() if value is not None]
    if all(value == int(value) for value in values):
        return lambda value: number(value)
    return lambda value: number(value, (max(values) - min(values)) / 5)


def listed(words):
    """a, b and c"""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# -- what stands where in a report ---------------------------------------------------------------------------------


def row_metrics(report, rows):
    """The metrics that rows have values of, in the order of the table."""
    there = dict.fromkeys(metric for row in rows for metric in row["values"])
    return [*(metric for metric in report["metrics"] if metric in there)]


def value_at(row, metric, label):
    """The value of a metric in a row; None where there is none."""
    return row["values"].get(metric, {}).get(label)


def estimate_at(table, metric, side, label):
    """The estimate of a metric at a side in report["summary"] or report["differences"]; None where there is none."""
    return table.get(metric, {}).get(str(side), {}).get(label)


def noise_floors(report):
    """The models that are the reference drawn again."""
    return [one for one in report["models"] if one["noise_floor"] and one["label"] != report["reference"]]


def tuned_models(report):
    """The models that are judged: neither the reference nor a noise floor."""
    return [one for one in report["models"] if not one["noise_floor"] and one["label"] != report["reference"]]


def best_and_worst(report, most):
    """(metric, label, best rows, worst rows), at most `most` of each, by the first tuned model; None without values.

    Rows that are as good as the best are not among the worst.
    """
    models = tuned_models(report) or report["models"]
    is_there = lambda metric, label: any(value_at(row, metric, label) is not None for row in report["rows"])
    by = [*report["metrics"]][::-1]  # the first that is there ranks the rows, the others where it is even
    ranks = [(metric, one["label"]) for metric in by for one in models if is_there(metric, one["label"])]
    if not ranks:
        return None
    metric, label = ranks[0]
    others = [other for other, of in ranks if of == label]
    goodness = lambda row: [_goodness(report, other, value_at(row, other, label)) for other in others]
    rows = [row for row in report["rows"] if value_at(row, metric, label) is not None]
    rows.sort(key=goodness, reverse=True)
    most = min(most, -(-len(rows) // 2))
    worst = [row for row in rows[most:][::-1] if goodness(row) < goodness(rows[0])]
    return metric, label, rows[:most], worst[:most]


def _goodness(report, metric, value):
    """A value so that more is better; a missing one comes last."""
    if value is None:
        return -math.inf
    return value if report["metrics"][metric]["better"] == "higher" else -value


def is_not_published(report, metric):
    """Whether a metric was made with weights that are known not to be the published ones."""
    network = report["metrics"][metric]["network"]
    return any(one["published"] is False and one["name"].startswith(network) for one in report["weights"] if network)


# -- what a difference means ---------------------------------------------------------------------------------------


def noise_floor(report, metric, side):
    """How far apart two runs of the reference may be: the farther end of their difference's interval; or None."""
    floors = [estimate_at(report["differences"], metric, side, one["label"]) for one in noise_floors(report)]
    ends = [abs(end) for one in floors if one for end in (one["value"], one["low"], one["high"]) if end is not None]
    return max(ends, default=None)


def standing(report, metric, side, label):
    """Better, worse or not told apart from the reference, by the interval of the difference; None without one."""
    difference = estimate_at(report["differences"], metric, side, label)
    if difference is None:
        return None
    if not difference["excludes_zero"]:
        return "not told apart"
    return "better" if (difference["value"] > 0) == (report["metrics"][metric]["better"] == "higher") else "worse"


def is_beyond_noise(report, metric, side, label):
    """Whether the difference from the reference is larger than the noise floor; None where one of them is missing."""
    difference = estimate_at(report["differences"], metric, side, label)
    floor = noise_floor(report, metric, side)
    return None if difference is None or floor is None else abs(difference["value"]) > floor


# -- the verdict ---------------------------------------------------------------------------------------------------


def verdict(report):
    """Two sentences for each tuned model: did it learn, is that more than noise, and what did it forget."""
    return [f"{_learned(report, one['label'])} {_kept(report, one['label'])}" for one in tuned_models(report)]


def _learned(report, label):
    side, reference = report["sides"][-1], report["reference"]
    found = {
        metric: (word, is_beyond_noise(report, metric, side, label))
        for metric in report["metrics"]
        if (word := standing(report, metric, side, label))
    }
    if not found:
        return f"{label} was not compared with {reference}."
    suffixes = {
        True: f", beyond what two seeds of {reference} differ by",
        False: f", but no more than two seeds of {reference} may differ by",
        None: "",
    }
    clauses = []
    for word in ("better", "worse"):
        for beyond, suffix in suffixes.items():
            if own := [metric for metric in found if found[metric] == (word, beyond)]:
                clauses.append(f"{word} in {listed([_both(report, one, side, label) for one in own])}{suffix}")
    clauses = [f"it is {'; '.join(clauses)}"] * bool(clauses)
    if unclear := [title_of(report, metric) for metric in found if found[metric][0] == "not told apart"]:
        clauses.append(f"in {listed(unclear)} any difference may be chance")
    unknown = "" if noise_floors(report) else f" How far two seeds of {reference} differ was not measured."
    return f"Against {reference}, {label} {_progress(found.values())}: {'; '.join(clauses)}.{unknown}"


def _progress(found):
    """Whether it learned; what is within the noise floor does not count."""
    words = {word for word, beyond in found if beyond is not False}
    if "better" in words:
        return "has learned, but not in everything" if "worse" in words else "has learned"
    return "has become worse" if "worse" in words else "has not measurably learned"


def _both(report, metric, side, label):
    """A metric with the figures of a model and the reference, a digit shorter than in a table."""
    pair = [estimate_at(report["summary"], metric, side, one) for one in (label, report["reference"])]
    if None in pair:
        return title_of(report, metric)
    width = 10 * max(width_of(one) or 0 for one in pair)
    return f"{title_of(report, metric)} ({' against '.join(number(one['value'], width) for one in pair)})"


def _kept(report, label):
    forgetting = report["forgetting"] or {}
    kept = forgetting.get("kept", {}).get(label)
    if kept is None:
        return "What it forgot was not measured."
    if kept["high"] is not None and kept["high"] < 1:
        told = "It has forgotten"
    elif kept["low"] is not None and kept["low"] >= 1:
        told = "It has forgotten nothing that was measured"
    else:
        told = "Whether it has forgotten anything cannot be told"
    words = report["metrics"].get(forgetting.get("retained_metric"), {}).get("verdict") or KEPT
    return f"{told}: {words.format(kept=percent(kept), reference=report['reference'])}."


# -- notes ---------------------------------------------------------------------------------------------------------


def notes(report):
    """What a reader has to know before the figures, each once, and in one note what is said of several models."""
    lines, folded = _warned(report), folded_warnings(report)
    at = lines.index(folded[0]) if folded else 0
    kept = lambda some: [line for line in some if line not in folded]
    return [*kept(lines[:at]), *_small_samples(folded), *kept(lines[at:]), *_not_measured(report)]


def folded_warnings(report):
    """The warnings that notes() tells in one, in full."""
    found = [line for line in _warned(report) if SMALL_SAMPLE.fullmatch(line)]
    return found if len(found) > 1 else []


def reasons(report):
    """[(titles, why)] of all that was not measured, in full."""
    return [(_titles(report, metrics), why) for why, metrics in _left_out(report).items()]


def _small_samples(lines):
    """One note for the FID of all models at all sides."""
    found = [SMALL_SAMPLE.fullmatch(line) for line in lines]
    for what, advice in dict.fromkeys(one.group("what", "advice") for one in found):
        own = [one for one in found if one.group("what", "advice") == (what, advice)]
        known = [f"{one['who']}: {one['by']}" for one in own if one["by"]]
        of_whom = "Of " + listed([one["who"] for one in own])
        yield f"{what}: {advice}. {'From their number alone: ' + '; '.join(known) if known else of_whom}"


def _not_measured(report):
    """One note for all networks whose weights are not there, and one for each other reason."""
    left_out = _left_out(report)
    networks = {name: metric["network"] for name, metric in report["metrics"].items()}
    lacks_weights = lambda metric, why: networks.get(metric) and NETWORK_FLAGS[networks[metric]] in why
    without = [metric for why, metrics in left_out.items() for metric in metrics if lacks_weights(metric, why)]
    if without:
        flags = list(dict.fromkeys(NETWORK_FLAGS[networks[metric]] for metric in without))
        whose = "their networks'" if len(without) > 1 else "its network's"
        name = "name local files" if len(flags) > 1 else "names a local file"
        yield (
            f"{_were_not_measured(report, without)}: {whose} weights are not on this machine. {listed(flags)} {name}"
        )
    for why, metrics in left_out.items():
        if others := [metric for metric in metrics if metric not in without]:
            yield f"{_were_not_measured(report, others)}: {why}"


def _titles(report, metrics):
    return listed([title_of(report, metric) for metric in metrics])


def _were_not_measured(report, metrics):
    titles = _titles(report, metrics)
    return f"{titles} {'were' if ' and ' in titles else 'was'} not measured"


def _warned(report):
    return list(dict.fromkeys(line for part in _told(report) for line in part.get("warnings", [])))


def _left_out(report):
    """{why: [metrics]}, each once."""
    found = {}
    for one in (one for part in _told(report) for one in part.get("left_out", [])):
        found.setdefault(one["why"], {})[one["metric"]] = None
    return {why: list(metrics) for why, metrics in found.items()}


def _told(report):
    return report, report["forgetting"] or {}
