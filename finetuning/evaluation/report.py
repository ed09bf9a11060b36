"""The report of an evaluation, for programs (report.json, report.csv), for a README (report.md), for people (.html).

    write_report("build/evaluation", report)

`report` is what report.json holds; measuring.summarise and forgetting.forgetting make its parts. Paths of images are
relative to the folder. The CSV has a line for each row and model; the Markdown has the metrics with their intervals,
and a table of images.
"""

import csv
import io
import json
import re
from html import escape
from pathlib import Path
from urllib.parse import quote

from finetuning.evaluation.report_page import RowTable, environment, page
from finetuning.evaluation.words import row_metrics, value_at
from finetuning.files import write_text

IN_MARKDOWN, MARKDOWN_SIDE = 24, 128  # rows that the Markdown shows, and how wide its images are, pixels


def write_report(folder, report):
    """Write report.json, report.csv, report.md and report.html; returns the path of the last.

    Raises ValueError where a number is not finite, or TypeError where something is no JSON: then nothing is written.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    report = json.loads(text)  # sides become text, as they are in the file
    folder = Path(folder)
    texts = {"report.json": text, "report.csv": as_csv(report), "report.md": as_markdown(report)}
    for name, text in (texts | {"report.html": page(report, folder)}).items():
        write_text(folder / name, text)
    return folder / "report.html"


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


def as_markdown(report):
    """The verdict, the notes, the metrics with n and intervals, and the images of an even choice of rows."""
    rows = report["rows"]
    view, found = RowTable(report, rows), environment()
    found.filters |= {"md": _markdown, "address": lambda path: quote(Path(path).as_posix(), errors="surrogateescape")}
    return found.get_template("report.md.jinja").render(
        report=report,
        models=report["models"],
        shown=rows[:: -(-len(rows) // IN_MARKDOWN) or 1],
        labels=view.labels,
        writers=view.writers,
        side=MARKDOWN_SIDE,
    )


def _markdown(text):
    """Text that stays text in a Markdown table."""
    text = escape(" ".join(text.split()), quote=False)
    # an underscore inside a word, as in --clip_model, means nothing there
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", lambda mark: f"&#{ord(mark[0])};", text)
