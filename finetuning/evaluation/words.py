"""What a report says in words: how a number is written, what a difference means, the verdict, and the notes before it.

    note("few_images", images=12)                             # {"code": "few_images", "images": 12}
    note("no_truth", metric="lpips", rows=[3, 4], of=9)       # why a metric was left out

The code that measures makes notes, each a code with fields, and report.json holds them; here they become sentences. The
other functions read report.json as it is in the file, where sides are text; every form of the report uses them.
"""

import math

from finetuning.cli import first_few
from finetuning.evaluation.metrics import NETWORK_FLAGS

# -- numbers -------------------------------------------------------------------------------------------------------


def number(value, width=None, sign=False):
    """A number as text: to two digits of half its interval's `width`, to four digits where it has none; None is a dash.

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
        alike = {0: "none of {}", 1: "all of {}"}.get(estimate["value"], "the same in all {}")
        return number(value, sign=sign), alike.format(estimate["n"])
    low, value, high = (number(one, scale * width, sign) for one in (low, value, high))
    return value, f"{low} to {high}"


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
    """The models that are the reference with another seed."""
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
    sign = {other: 1 if report["metrics"][other]["better"] == "higher" else -1 for other in others}
    value = lambda row, other: value_at(row, other, label)  # a missing one comes last
    goodness = lambda row: [-math.inf if value(row, one) is None else sign[one] * value(row, one) for one in others]
    rows = [row for row in report["rows"] if value_at(row, metric, label) is not None]
    rows.sort(key=goodness, reverse=True)
    most = min(most, -(-len(rows) // 2))
    worst = [row for row in rows[most:][::-1] if goodness(row) < goodness(rows[0])]
    return metric, label, rows[:most], worst[:most]


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
    """Better, worse or no clear difference from the reference, by the interval of the difference; None without one."""
    difference = estimate_at(report["differences"], metric, side, label)
    if difference is None:
        return None
    if not difference["excludes_zero"]:
        return "no clear difference"
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
        return f"No metric compares {label} with {reference}."
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
    if unclear := [title_of(report, metric) for metric in found if found[metric][0] == "no clear difference"]:
        clauses.append(f"in {listed(unclear)} any difference may be chance")
    unknown = "" if noise_floors(report) else f" How far two seeds of {reference} differ was not measured."
    counted = {word for word, beyond in found.values() if beyond is not False}  # beyond the noise floor
    if "better" in counted:
        progress = "has learned, but not in everything" if "worse" in counted else "has learned"
    else:
        progress = "has become worse" if "worse" in counted else "has not measurably learned"
    return f"Against {reference}, {label} {progress}: {'; '.join(clauses)}.{unknown}"


def _both(report, metric, side, label):
    """A metric with the values of a model and the reference, written as in the table."""
    pair = [estimate_at(report["summary"], metric, side, one) for one in (label, report["reference"])]
    if None in pair:
        return title_of(report, metric)
    return f"{title_of(report, metric)} ({' against '.join(parts(one)[0] for one in pair)})"


def _kept(report, label):
    forgetting = report["forgetting"] or {}
    kept = forgetting.get("kept", {}).get(label)
    if kept is None:
        return _not_kept(report, forgetting, label)
    if kept["high"] is not None and kept["high"] < 1:
        answer = "It has forgotten"
    elif kept["low"] is not None and kept["low"] >= 1:
        answer = "It has forgotten nothing that was measured"
    else:
        answer = "Whether it has forgotten anything is not clear"
    words = report["metrics"].get(forgetting.get("retained_metric"), {}).get("verdict") or (
        "it kept {kept} of what {reference} can do"
    )
    return f"{answer}: {words.format(kept=percent(kept), reference=report['reference'])}."


def _not_kept(report, forgetting, label):
    """What stands in place of a share that was kept: how far the images moved, or that nothing was measured."""
    drifts = [
        f"{title_of(report, metric)} {written(estimates[label])}"
        for metric, estimates in forgetting.get("summary", {}).items()
        if label in estimates and report["metrics"].get(metric, {}).get("drift_of")
    ]
    if drifts:
        return f"How much it kept was not measured; its images of the general prompts moved: {listed(drifts)}."
    return "What it forgot was not measured: --retain_dataset measures it without any network, --clip_model by images."


# -- notes ---------------------------------------------------------------------------------------------------------

WARNINGS = {
    "few_images": "{on}only {images} images of each model: no metric of so few is reliable. Its interval shows how far "
    "chance alone may move it; take at least 50, better some hundreds",
    "fid_bias": "FID of {images} images is biased by their number alone ({models}): look at KID, and compare FID only "
    "between models with as many images",
    "fid_bias_unknown": "FID of {images} images is biased, by how much cannot be measured below 4 ({models}): look at "
    "KID",
    "not_published": "{name}: the weights of {origin} are not the published ones: its metrics are not comparable with "
    "metrics from elsewhere",
    "unknown_weights": "{name}: whether the weights of {origin} are the published ones cannot be known: compare their "
    "sha256 before its metrics are compared with others",
    "cut_captions": "{on}{captions} captions are longer than CLIP reads: the CLIP score sees only their beginning",
    "unlike_sizes": "the images of {models} are {own}, the true ones {truth}: metrics of unlike sizes mean little, so "
    "all were brought to {sides} px first",
}
REASONS = {
    "no_truth": "{count} of {of} rows have no true image: rows {rows}",
    "captions": "{on}{checker} cannot judge {count} of {of} captions: {captions}",
    "too_small": "LPIPS needs images of at least {smallest} pixels, not {side}: raise --resolutions",
    "no_weights": "{reason}",
    "nothing_to_keep": "{models}: the original has {mean:.3g} on average over {rows} rows, not clearly above 0: there "
    "is no share of it; take more rows, or others that it is good at",
}
NOTHING_MEASURED = (
    "No metric of the images was measured. What helps: local weights (--clip_model, --lpips_trunk, "
    "--inception_weights), or a judge of your own (--checker)"
)
LOSS_NEEDS_NONE = ". --retain_dataset measures the denoising loss, which needs no network"


def note(code, **fields):
    """A note for report.json."""
    assert code in WARNINGS or code in REASONS, code
    return {"code": code, **fields}


def notes(report):
    """What a reader has to know before the numbers: the warnings, and what was not measured, as sentences."""
    warnings = _alike(all_notes(report, "warnings"), ("model", "side", "bias", "value"))
    lines = [_sentence(WARNINGS, group) for group in warnings]
    without = [one for one in all_notes(report, "left_out") if one["code"] == "no_weights"]
    if without:  # all networks in one sentence
        flags = listed(dict.fromkeys(NETWORK_FLAGS[one["network"]] for one in without))
        titles = titles_of(report, dict.fromkeys(one["metric"] for one in without))
        lines.append(f"{titles} not measured: the weights are not on this machine. Local files go with {flags}")
    for metrics, why in left_out(report, besides="no_weights"):
        lines.append(f"{titles_of(report, metrics)} not measured: {why}")
    if report["summary"]:
        return lines
    return [*lines, NOTHING_MEASURED + ("" if (report["forgetting"] or {}).get("kept") else LOSS_NEEDS_NONE)]


def left_out(report, besides=None):
    """[([metric, ...], why)] of what was not measured, but for the reason `besides`."""
    known = [one for one in all_notes(report, "left_out") if one["code"] != besides]
    return [
        ([*dict.fromkeys(one["metric"] for one in group)], _sentence(REASONS, group))
        for group in _alike(known, ("metric", "model"))
    ]


def reason(one):
    """Why a metric was left out, as a sentence."""
    return _sentence(REASONS, [one])


def all_notes(report, kind):
    """The "warnings" or "left_out" of the dataset and of the general prompts."""
    return [*report[kind], *(report["forgetting"] or {}).get(kind, [])]


def titles_of(report, metrics):
    """Their titles in one enumeration."""
    return listed(title_of(report, metric) for metric in metrics)


def listed(words):
    """a, b and c"""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def _alike(notes, apart):
    """Lists of notes that are alike in everything but the fields `apart`, in their order."""
    groups = {}
    for one in notes:
        groups.setdefault(repr({key: value for key, value in one.items() if key not in apart}), []).append(one)
    return groups.values()


def _sentence(table, group):
    """One sentence for notes of a code that differ in their models, sides or metrics alone."""
    fields = dict(group[0])
    fields["on"] = f"{fields['on']}: " if fields.get("on") else ""
    models = [*dict.fromkeys(_model(one) for one in group if "model" in one)]
    fields["models"] = "; ".join(models) if "bias" in fields else listed(models or [""])
    if "of" in fields:
        things = "rows" if "rows" in fields else "captions"
        fields["count"], fields[things] = len(fields[things]), first_few(dict.fromkeys(fields[things]))
    if "sides" in fields:
        fields["sides"] = listed(fields["sides"])
    return table[fields["code"]].format(**fields)


def _model(one):
    """The model of a note, with what is only true of it."""
    where = f" at {one['side']} px" if "side" in one else ""
    if "bias" not in one:
        return f"{one['model']}{where}"
    return f"{one['model']}{where}: at least about {one['bias']:+.3g} of its {one['value']:.3g}"
