"""The report of an evaluation, for programs (report.json, report.csv), for a README (report.md), for people (.html).

    write_report("build/evaluation", report)

`report` is what report.json holds; measuring.summarise and forgetting.forgetting make its parts. Paths of images are
relative to the folder. The CSV has a line for each row and model; the Markdown has the metrics with their intervals,
and a table of images.

The HTML is one file with images, style and script inside it, and asks for nothing. The fragment of its address is its
state: report.html#sort=-lpips:tuned&filter=cat opens with the images of cats sorted by the LPIPS of the model "tuned",
largest first. Its template, style and script lie beside this module as report_page.html, .css and .js.
"""

import base64
import csv
import hashlib
import io
import json
import re
import shlex
from html import escape
from pathlib import Path
from urllib.parse import quote

from finetuning.cli import first_few
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.threads import in_order
from finetuning.evaluation import words
from finetuning.evaluation.statistics import mean_of
from finetuning.evaluation.words import estimate_at, number, row_metrics, value_at, width_of, written
from finetuning.files import write_text

IN_MARKDOWN, MARKDOWN_SIDE = 24, 128  # rows that the Markdown shows, and how wide its images are, pixels
EMBEDDED = 200  # rows whose images are inside the page
EXTREMES, SHOWN = 40, 4  # how many best and worst rows keep their images; how many stand in front
THUMBNAIL, TINY = 256, 128  # longest side of an image inside the page; up to TINY it is shown without smoothing
PUBLISHED = {True: "published", False: "not the published ones", None: "not known whether published"}


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
    view = RowTable(report, rows)
    return _template("report.md.jinja").render(
        report=report,
        models=report["models"],
        shown=rows[:: -(-len(rows) // IN_MARKDOWN) or 1],
        labels=view.labels,
        writers=view.writers,
        side=MARKDOWN_SIDE,
    )


def page(report, folder):
    """The page as text. `report` is what report.json holds; its images are looked for in `folder`."""
    from markupsafe import Markup

    rows, prompts = report["rows"], (report["forgetting"] or {}).get("prompts", [])
    embedded = _embedded(rows, words.best_and_worst(report, EXTREMES)) + _embedded(prompts, None)
    thumbnails, unreadable = _thumbnails(Path(folder), [path for row in embedded for path in _images_of(row)])
    warnings = words.notes(report)
    if unreadable:
        many = "s" * (len(unreadable) > 1)
        warnings.append(f"{len(unreadable)} image{many} cannot be shown: {first_few(unreadable, 8)}")
    style, script = (
        Path(__file__).with_name(f"report_page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    reference, tuned = report["reference"], [model["label"] for model in words.tuned_models(report)]
    facts = [(one["label"], one["source"] + ", the noise floor" * one["noise_floor"]) for one in report["models"]]
    weights = [
        (one["name"], f"{one['origin']}: {PUBLISHED[one['published']]}; sha256 {one['sha256']}")
        for one in report["weights"]
    ]
    return _template("report_page.html", autoescape=True).render(
        report=report,
        models=report["models"],
        title=f"{words.listed(tuned)} against {reference}" if tuned else f"Evaluation of {reference}",
        style=Markup(style),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        warnings=warnings,
        total=len(rows) + len(prompts),
        embedded=len(embedded),
        thumbnails={path: Markup(attributes) for path, attributes in thumbnails.items()},
        extremes=words.best_and_worst(report, SHOWN),
        rows_view=RowTable(report, rows),
        prompts_view=RowTable(report, prompts),
        model_facts=facts,
        measured_with=[("protocol", report["protocol"]), ("policy of sizes", report["policy"]), *weights],
        left_out_in_full=[(words.titles_of(report, metrics), why) for metrics, why in words.left_out(report)],
        by_category=_by_category,
        chart=lambda curve: Markup(chart(curve)),
        forest=lambda *which: Markup(forest(*which)),
    )


# -- templates -----------------------------------------------------------------------------------------------------


def _template(name, **options):
    """A template of this folder, which may call all functions of words.py."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, **options,
    )  # fmt: skip
    found.globals |= {name: value for name, value in vars(words).items() if callable(value)}
    found.filters |= {
        "md": _markdown, "address": lambda path: quote(Path(path).as_posix(), errors="surrogateescape"),
        "with_flags": _with_flags, "plain": _plain, "command": _command,
    }  # fmt: skip
    return found.get_template(name)


def _markdown(text):
    """Text that stays text in a Markdown table."""
    text = escape(" ".join(text.split()), quote=False)
    # an underscore inside a word, as in --clip_model, means nothing there
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", lambda mark: f"&#{ord(mark[0])};", text)


def _with_flags(text):
    """Text as HTML in which --flags are not broken at the end of a line."""
    from markupsafe import Markup

    return Markup(re.sub(r"(?<!\S)--\w+", r"<code>\g<0></code>", escape(text)))


def _plain(value):
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _command(command):
    """The command as it is typed, a line for each flag."""
    ends = [" \\\n    " if word.startswith("--") else " " for word in command[1:]]
    return "".join(part for pair in zip(map(shlex.quote, command), [*ends, ""], strict=True) for part in pair)


# -- tables ----------------------------------------------------------------------------------------------------------


class RowTable:
    """What the table of rows needs: which columns there are, and how their values are written.

    columns  of the models: for each its image (metric None) and its metrics; `at` is the number of a column, `place`
             and `down` where it stands in the card that a row becomes on a narrow screen
    """

    def __init__(self, report, rows):
        self.rows = rows
        metrics = row_metrics(report, rows)
        self.writers = {metric: words.row_number(rows, metric) for metric in metrics}
        self.labels = [one["label"] for one in report["models"] if any(one["label"] in row["images"] for row in rows)]
        self.plain = ["row", "caption"] + ["category"] * any(row.get("category") for row in rows)
        self.has_truth = any(row.get("truth") for row in rows)
        self.columns, self.width = [], {}
        for place, label in enumerate(self.labels, 1 + self.has_truth):
            own = [None, *(one for one in metrics if any(value_at(row, one, label) is not None for row in rows))]
            self.width[label] = len(own)
            for down, metric in enumerate(own, 5):
                at = len(self.plain) + self.has_truth + len(self.columns)
                column = {"label": label, "metric": metric, "key": f"{metric}:{label}", "at": at}
                self.columns.append(column | {"place": place, "down": down})

    def text_of(self, row):
        """What the filter looks in."""
        return " ".join("" if row[key] is None else str(row[key]) for key in self.plain).lower()


def _by_category(report):
    """[{"metric", "labels", "lines"}] of the means of each metric in each category of the general prompts."""
    prompts = report["forgetting"]["prompts"]
    categories = list(dict.fromkeys(row["category"] for row in prompts))
    tables = []
    for metric in row_metrics(report, prompts) if len(categories) > 1 else ():
        labels = [one["label"] for one in report["models"]]
        labels = [label for label in labels if any(value_at(row, metric, label) is not None for row in prompts)]
        lines = []
        for category in categories:
            own = [row for row in prompts if row["category"] == category]
            known = [[value_at(row, metric, label) for row in own] for label in labels]
            known = [[value for value in values if value is not None] for values in known]
            # one row has no interval
            cells = [mean_of(own).as_dict() if len(own) > 1 else number(own[0] if own else None) for own in known]
            lines.append((category, max(map(len, known)), cells))
        tables.append({"metric": metric, "labels": labels, "lines": lines})
    return tables


# -- images ----------------------------------------------------------------------------------------------------------


def _embedded(rows, extremes):
    """The rows whose images go inside the page: all, or the best, the worst and an even sample of the others."""
    if len(rows) <= EMBEDDED:
        return rows
    _, _, best, worst = extremes or (None, None, [], [])
    chosen = {id(row) for row in best + worst}
    others = [row for row in rows if id(row) not in chosen]
    step = -(-len(others) // (EMBEDDED - len(chosen)))
    chosen |= {id(row) for row in others[::step]}
    return [row for row in rows if id(row) in chosen]


def _images_of(row):
    return [path for path in (row.get("truth"), *row["images"].values()) if path]


def _thumbnails(folder, paths):
    """({path: the attributes of its <img>}, what cannot be read)."""
    made = dict(in_order(lambda path: _thumbnail(folder, path), dict.fromkeys(paths)))
    unreadable = [f"{path} ({one})" for path, one in made.items() if isinstance(one, UnreadableImage)]
    return {path: one for path, one in made.items() if isinstance(one, str)}, unreadable


def _thumbnail(folder, path):
    try:
        image = open_rgb(folder / path)
    except UnreadableImage as error:
        return UnreadableImage(str(error.__cause__).replace(str(folder / path), path))
    is_tiny = max(image.size) <= TINY
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG" if is_tiny else "JPEG", quality=85, optimize=True)
    kind, data = "png" if is_tiny else "jpeg", base64.b64encode(file.getvalue()).decode("ascii")
    width, height = image.size
    return f'{"class=tiny " * is_tiny}width="{width}" height="{height}" src="data:image/{kind};base64,{data}"'


# -- charts ----------------------------------------------------------------------------------------------------------


def chart(curve):
    """SVG of lines with their 95 % intervals shaded, text in the page's colour; `curve` is one of report["curves"]."""
    import matplotlib
    from matplotlib.figure import Figure

    options = {"svg.fonttype": "none", "svg.hashsalt": curve["title"], "text.parse_math": False}
    options |= {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"]}
    options |= {"axes.edgecolor": "gray", "xtick.color": "gray", "ytick.color": "gray", "grid.color": "gray"}
    options |= {"xtick.labelcolor": "black", "ytick.labelcolor": "black"}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        axes = figure.add_subplot(xlabel=curve["x_title"], ylabel=curve["y_title"])
        for line, dashes in zip(curve["lines"], ["-", "--", ":", "-."] * len(curve["lines"]), strict=False):
            points = sorted(line["points"], key=lambda point: point["x"])
            x, y, low, high = ([point[key] for point in points] for key in ("x", "y", "low", "high"))
            (drawn,) = axes.plot(x, y, dashes, marker="o", markersize=4, label=line["label"])
            if None not in low + high:
                axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.18, linewidth=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if curve["lines"]:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    name = escape(f"{curve['title']}: {curve['y_title']} over {curve['x_title']}")
    return text.getvalue()[text.getvalue().index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def forest(report, metric, side, label):
    """SVG of a difference and its interval, 200 wide with 0 in its middle, the noise floor shaded; "" without one.

    All differences of a metric share a scale.
    """
    difference = estimate_at(report["differences"], metric, side, label)
    if difference is None or width_of(difference) is None:
        return ""
    floor = words.noise_floor(report, metric, side) or 0.0
    every = report["differences"][metric][str(side)].values()
    most = max([floor, *(abs(one[key]) for one in every for key in ("low", "high") if one[key] is not None)]) or 1.0
    at = lambda value: round(100 + 94 * value / most, 1)
    return (
        f'<svg class="forest" viewBox="0 0 200 30" role="img" aria-label="{escape(written(difference, sign=True))}">'
        f'<rect class="noise" x="{at(-floor)}" y="2" width="{round(at(floor) - at(-floor), 1)}" height="26"/>'
        '<line class="zero" x1="100" y1="0" x2="100" y2="30" stroke-width="2"/>'
        f'<line class="bar" x1="{at(difference["low"])}" y1="15" x2="{at(difference["high"])}" y2="15"/>'
        f'<circle cx="{at(difference["value"])}" cy="15" r="5"/></svg>'
    )
