"""The report of an evaluation, for programs (report.json, report.csv), for a README (report.md), for people (.html).

    write_report("build/evaluation", report)

`report` is what report.json holds: REQUIRED names its keys. Paths of images are relative to the folder. The CSV has a
line for each row and model; the Markdown has the figures with their intervals, and a table of images.
"""

import csv
import io
import json
import math
import os
import re
from html import escape
from pathlib import Path
from urllib.parse import quote

from finetuning.conversion.audit import printable
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.report_page import page
from finetuning.evaluation.words import (
    estimate_at,
    is_beyond_noise,
    is_not_published,
    notes,
    row_metrics,
    row_number,
    standing,
    title_of,
    value_at,
    verdict,
    width_of,
    written,
)  # fmt: skip

IN_MARKDOWN, MARKDOWN_SIDE = 24, 128  # rows that the Markdown shows, and how wide its images are, pixels

ESTIMATE = ("value", "low", "high", "n")
REQUIRED = {
    "made": dict, "protocol": str, "policy": str, "sides": list, "reference": str, "metrics": dict, "weights": list,
    "left_out": list, "warnings": list, "models": list, "summary": dict, "differences": dict, "rows": list,
    "forgetting": dict | None, "curves": list,
}  # fmt: skip
REQUIRED_WITHIN = {
    "made": ("command", "versions", "args"),
    "weights": ("name", "origin", "sha256", "published"),
    "left_out": ("metric", "why"),
    "models": ("label", "source", "noise_floor"),
    "rows": ("row", "caption", "truth", "images", "values"),
    "forgetting": ("prompts", "summary", "learned", "kept", "words"),
    "prompts": ("row", "caption", "category", "images", "values"),
    "curves": ("title", "x_title", "y_title", "lines"),
    "lines": ("label", "points"),
    "points": ("x", "y", "low", "high"),
}


def write_report(folder, report):
    """Write report.json, report.csv, report.md and report.html; returns the path of the last.

    Raises EvaluationError with all that the report lacks; then nothing is written.
    """
    found = list(faults(report))
    if found:
        raise EvaluationError("this report cannot be written:\n" + "\n".join(f"  - {fault}" for fault in found))
    report = json.loads(json.dumps(report))  # sides become text, tuples become lists, as they are in the file
    folder = Path(folder)
    texts = {
        "report.json": json.dumps(report, indent=2, ensure_ascii=False) + "\n",
        "report.csv": as_csv(report),
        "report.md": as_markdown(report),
        "report.html": page(report, folder),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        aside = folder / f".{name}.incomplete"
        aside.write_text(printable(text), encoding="utf-8", newline="")
        os.replace(aside, folder / name)
    return folder / "report.html"


# -- what a report must have ---------------------------------------------------------------------------------------


def faults(report):
    """All that keeps a report from being written, in words."""
    missing = [*_missing(report)]
    yield from missing
    yield from _no_json("report", report)
    if missing:
        return
    if not report["sides"]:
        yield "sides is empty: name the side, in pixels, that was measured at"
        return
    labels = [model["label"] for model in report["models"]]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield f"models has {label!r} twice: each needs a label of its own"
    if report["reference"] not in labels:
        yield f"reference is {report['reference']!r}, which is none of the models ({', '.join(labels)})"
    for name, keys in (("summary", ESTIMATE), ("differences", (*ESTIMATE, "excludes_zero"))):
        yield from _wrong_estimates(report, name, keys, labels)
    prompts = (report["forgetting"] or {}).get("prompts", [])
    for where, rows in (("rows", report["rows"]), ("forgetting.prompts", prompts)):
        for row in rows:
            used = {*row["images"], *(label for by_label in row["values"].values() for label in by_label)}
            for label in sorted(used - set(labels)):
                yield f"{where}, row {row['row']} names {label!r}, which is none of the models"
    for metric in sorted({metric for row in report["rows"] for metric in row["values"]} - report["metrics"].keys()):
        yield f"rows have values of {metric!r}, which is none of {', '.join(report['metrics'])}"


def _missing(report):
    for key, kind in REQUIRED.items():
        if key not in report:
            yield f"{key} is missing"
        elif not isinstance(report[key], kind):
            yield f"{key} is a {type(report[key]).__name__}, not what the report needs there"
        else:
            yield from _missing_within(key, key, report[key])


def _missing_within(where, name, content):
    """Keys that are missing in a dict, or in each dict of a list, and in what hangs below them."""
    if isinstance(content, list):
        for index, one in enumerate(content):
            if name in REQUIRED_WITHIN:
                yield from _missing_within(f"{where}[{index}]", name, one)
        return
    for key in REQUIRED_WITHIN.get(name, ()) if content is not None else ():
        if key not in content:
            yield f"{where}.{key} is missing"
        elif key in REQUIRED_WITHIN:
            yield from _missing_within(f"{where}.{key}", key, content[key])


def _no_json(where, content):
    """Values that JSON has no word for: NaN and infinity, paths, arrays."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _no_json(f"{where}.{key}", value)
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _no_json(f"{where}[{index}]", value)
    elif isinstance(content, float) and not math.isfinite(content):
        yield f"{where} is {content}: write null where there is no figure"
    elif not isinstance(content, str | int | float | None):
        yield f"{where} is a {type(content).__name__}, which JSON does not know"


def _wrong_estimates(report, name, keys, labels):
    sides = set(map(str, report["sides"]))
    for metric, by_side in report[name].items():
        if metric not in report["metrics"]:
            yield f"{name}.{metric} is none of the metrics {', '.join(report['metrics'])}"
        for side, by_label in by_side.items():
            if str(side) not in sides:
                yield f"{name}.{metric}.{side} is none of the sides {', '.join(sorted(sides))}"
            for label, estimate in by_label.items():
                if label not in labels:
                    yield f"{name}.{metric}.{side} names {label!r}, which is none of the models"
                for key in keys:
                    if key not in estimate:
                        yield f"{name}.{metric}.{side}.{label}.{key} is missing"


# -- for programs --------------------------------------------------------------------------------------------------


def as_csv(report):
    """A line for each row and model: row, caption, model, image, and each metric that rows have, in full digits."""
    metrics = row_metrics(report, report["rows"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "caption", "model", "truth", "image", *metrics])
    for row in report["rows"]:
        for model in report["models"]:
            label = model["label"]
            values = [value_at(row, metric, label) for metric in metrics]
            if label in row["images"] or any(value is not None for value in values):
                writer.writerow([row["row"], row["caption"], label, row["truth"], row["images"].get(label), *values])
    return text.getvalue()


# -- for a README --------------------------------------------------------------------------------------------------


def as_markdown(report):
    """The verdict, the warnings, the figures with n and intervals, and the images side by side."""
    parts = [f"**{_text(sentence)}**" for sentence in verdict(report)]
    parts += [f"> **Note:** {_text(line)}" for line in notes(report)]
    parts += [_figures(report), _learned_and_kept(report), _images(report)]
    parts.append(f"Protocol `{report['protocol']}`. {_text(report['policy'])}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _figures(report):
    """The summary: a line for each metric and side, a column for each model."""
    labels = [model["label"] for model in report["models"]]
    lines = [_line(["metric", "n", *map(_text, labels)]), "|---|" + "---:|" * (len(labels) + 1)]
    for metric in report["metrics"]:
        for side in report["sides"]:
            estimates = [estimate_at(report["summary"], metric, side, label) for label in labels]
            if any(estimates):
                counts = dict.fromkeys(str(one["n"]) for one in estimates if one)
                cells = [_estimate_cell(report, metric, side, *pair) for pair in zip(labels, estimates, strict=True)]
                lines.append(_line([_metric_cell(report, metric, side), " / ".join(counts), *cells]))
    if len(lines) == 2:
        return ""
    note = (
        f"In brackets: 95 % intervals. Better or worse: than {_text(report['reference'])}, where the interval of the "
        "paired difference leaves out 0."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _learned_and_kept(report):
    forgetting = report["forgetting"] or {}
    if not forgetting.get("learned"):
        return ""
    names = ("learned", "kept")
    lines = [_line(["model", *names]), "|---|---:|---:|"]
    for label in forgetting["learned"]:
        cells = [_counted(forgetting[name].get(label)) for name in names]
        lines.append(_line([_text(label), *cells]))
    words = [
        f"{name.capitalize()}: {_text(forgetting['words'][name])}." for name in names if name in forgetting["words"]
    ]
    return "\n".join(lines) + f"\n\n{' '.join(words)}"


def _counted(estimate):
    """An estimate with its n, where the table has no column for it."""
    if estimate is None:
        return ""
    return f"{written(estimate)}, n {estimate['n']}" if width_of(estimate) != 0 else written(estimate)


def _metric_cell(report, metric, side):
    facts = report["metrics"][metric]
    size = f" at {side} px" if len(report["sides"]) > 1 else ""
    tag = ", **not comparable** (not the published weights)" if is_not_published(report, metric) else ""
    return f"{facts['title']}{size}, {facts['better']} is better{tag}"


def _estimate_cell(report, metric, side, label, estimate):
    if estimate is None:
        return ""
    word = standing(report, metric, side, label)
    noise = any(model["label"] == label and model["noise_floor"] for model in report["models"])
    if noise or word in (None, "not told apart"):
        return written(estimate)
    within = ", within the noise floor" if is_beyond_noise(report, metric, side, label) is False else ""
    return f"{written(estimate)} **{word}**{within}"


def _images(report):
    """The images of an even choice of rows: truth, then each model with its figures below."""
    rows = report["rows"]
    if not rows:
        return ""
    shown = rows[:: -(-len(rows) // IN_MARKDOWN)]
    labels = [model["label"] for model in report["models"] if any(model["label"] in row["images"] for row in rows)]
    writers = {metric: row_number(rows, metric) for metric in row_metrics(report, rows)}
    lines = [_line(["caption", "ground truth", *map(_text, labels)]), "|---|" + "---|" * (len(labels) + 1)]
    for row in shown:
        cells = [_text(row["caption"]), _image(row["truth"], "ground truth")]
        for label in labels:
            values = [
                f"{_text(title_of(report, metric))} {write(value_at(row, metric, label))}"
                for metric, write in writers.items()
                if value_at(row, metric, label) is not None
            ]
            cells.append("<br>".join([_image(row["images"].get(label), label), *values]))
        lines.append(_line(cells))
    more = f"{len(shown)} of {len(rows)} rows; report.csv has the figures of all." if len(shown) < len(rows) else ""
    return "\n".join(lines) + (f"\n\n{more}" if more else "")


def _image(path, label):
    source = quote(Path(path).as_posix(), errors="surrogateescape") if path else ""
    return f'<img src="{source}" width="{MARKDOWN_SIDE}" alt="{escape(label)}">' if path else "none"


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _text(text):
    """Text that stays text in a Markdown table."""
    text = escape(" ".join(text.split()), quote=False)
    # an underscore inside a word, as in --clip_model, means nothing there
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", lambda mark: f"&#{ord(mark[0])};", text)
