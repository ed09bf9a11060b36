"""The report of an evaluation as one HTML page: images, style and script are inside it, and it asks for nothing.

The fragment of its address is its state: report.html#sort=-lpips:tuned&filter=cat opens with the images of cats
sorted by the LPIPS of the model "tuned", largest first. Style and script lie beside this module, as report_page.css
and report_page.js.
"""

import base64
import hashlib
import io
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

from finetuning.conversion.audit import printable
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.evaluation.charts import chart, forest
from finetuning.evaluation.statistics import mean_of
from finetuning.evaluation.words import (
    best_and_worst,
    estimate_at,
    folded_warnings,
    is_beyond_noise,
    is_not_published,
    listed,
    noise_floor,
    noise_floors,
    notes,
    number,
    parts,
    reasons,
    row_metrics,
    row_number,
    standing,
    title_of,
    tuned_models,
    value_at,
    verdict,
    width_of,
)  # fmt: skip

EMBEDDED = 200  # rows whose images are inside the page
EXTREMES, SHOWN = 40, 4  # how many best and worst rows keep their images; how many stand in front
THUMBNAIL, TINY = 256, 128  # longest side of an image inside the page; up to TINY it is shown without smoothing
STYLE, SCRIPT = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))


# -- the page ------------------------------------------------------------------------------------------------------


def page(report, folder):
    """The page as text. `report` is what report.json holds; its images are looked for in `folder`."""
    rows, prompts = report["rows"], (report["forgetting"] or {}).get("prompts", [])
    embedded = _embedded(rows, best_and_worst(report, EXTREMES)), _embedded(prompts, None)
    images = [path for part in embedded for row in part for path in _images_of(row).values()]
    thumbnails = _thumbnails(Path(folder), images)
    content = [
        _head(report),
        _notes(report, thumbnails, [len(rows) + len(prompts), sum(map(len, embedded))]),
        _summary(report),
        _forgetting(report),
        _curves(report["curves"]),
        _front(report, thumbnails),
        _table("Image by image", "", rows, report, thumbnails),
        _table("General prompts one by one", "prompts-", prompts, report, thumbnails),
        _made(report),
    ]
    digest = base64.b64encode(hashlib.sha256(printable(SCRIPT).encode()).digest()).decode("ascii")
    return printable(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">"
        f"<title>{escape(_title(report))}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(content)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def _title(report):
    tuned = [model["label"] for model in tuned_models(report)]
    return f"{listed(tuned)} against {report['reference']}" if tuned else f"Evaluation of {report['reference']}"


def _head(report):
    sides = listed([f"{side} px" for side in report["sides"]])
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict(report))
    return (
        f"<h1>{escape(_title(report))}</h1>"
        f'<p class="soft">Every model drew an image of each of {len(report["rows"])} captions, from seeds fixed by '
        f"row. They are compared with the captions and with the true images, at {sides}.</p>"
        + (f'<div class="verdict">{said}</div>' if said else "")
    )


def _notes(report, thumbnails, counts):
    lines = notes(report)
    unread = [f"{path} ({error})" for path, (_, error) in thumbnails.items() if error]
    if unread:
        few = "; ".join(unread[:8]) + " …" * (len(unread) > 8)
        lines.append(f"{len(unread)} image{'s' * (len(unread) > 1)} cannot be shown: {few}")
    loud = "".join(f"<li>{_with_flags(line)}</li>" for line in lines)
    found = [f'<section class="warnings"><h2>Before you read on</h2><ul>{loud}</ul></section>'] if loud else []
    total, shown = counts
    if shown < total:
        found.append(
            f'<p class="soft">Of {total} rows, {shown} have their images inside this page: the best, the worst and '
            "an even sample. The others name the files, which lie beside report.html.</p>"
        )
    return "".join(found)


def _with_flags(text):
    """Text as HTML in which --flags are not broken at the end of a line."""
    return re.sub(r"(?<!\S)--\w+", r"<code>\g<0></code>", escape(text))


def _summary(report):
    bodies = []
    for metric in report["metrics"]:
        for index, side in enumerate(report["sides"]):
            if report["summary"].get(metric, {}).get(str(side)):
                bodies.append(_metric(report, metric, side, explain=index == 0))
    if not bodies:
        return "<h2>Figures</h2><p>No metric was measured.</p>"
    against = f"against {escape(report['reference'])}"
    noise = " The noise floor is the reference drawn again from other seeds." if noise_floors(report) else ""
    return (
        '<h2>Figures</h2><p class="soft">Small below each figure: its 95 % interval. A difference is told apart where '
        f"its interval leaves out 0.{noise}</p>"
        '<div class="wide"><table class="figures whole"><thead><tr><th scope="col">model</th><th scope="col">value</th>'
        '<th scope="col">n</th><th scope="col">difference</th>'
        f'<th scope="col" class="forest-cell left">{against}</th>'
        f'<th scope="col" class="left">says</th></tr></thead>{"".join(bodies)}</table></div>'
    )


def _metric(report, metric, side, explain):
    facts = report["metrics"][metric]
    size = f" at {side} px" if len(report["sides"]) > 1 else ""
    tag = ' <span class="tag bad">not the published weights: not comparable</span>' * is_not_published(report, metric)
    about = f"<br>{escape(facts['means'])}" if explain else ""
    lines = [
        f'<tbody><tr><th class="about" colspan="6" scope="rowgroup"><strong>{escape(facts["title"])}{size}</strong> '
        f'<span class="soft">{facts["better"]} is better{about}</span>{tag}</th></tr>'
    ]
    for model in report["models"]:
        label = model["label"]
        estimate = estimate_at(report["summary"], metric, side, label)
        if estimate is None:
            continue
        difference = estimate_at(report["differences"], metric, side, label)
        every = report["differences"].get(metric, {}).get(str(side), {}).values()
        drawn = forest(difference, every, noise_floor(report, metric, side))
        lines.append(
            f"<tr{' class=floor' * bool(model['noise_floor'])}><td>{escape(label)}</td><td>{_cell(estimate)}</td>"
            f"<td>{estimate['n']}</td><td>{_cell(difference, sign=True) if difference else ''}</td>"
            f'<td class="forest-cell">{drawn}</td>'
            f'<td class="left">{_said(report, metric, side, model)}</td></tr>'
        )
    return "".join(lines) + "</tbody>"


def _said(report, metric, side, model):
    if model["label"] == report["reference"]:
        return '<span class="soft">reference</span>'
    if model["noise_floor"]:
        return "noise floor"
    word = standing(report, metric, side, model["label"])
    if word in (None, "not told apart"):
        return f'<span class="soft">{word or ""}</span>'
    beyond = is_beyond_noise(report, metric, side, model["label"])
    within = '<span class="range">within the noise floor</span>' if beyond is False else ""
    mark, color = ("✓", "good") if word == "better" else ("✗", "bad")
    return f'<strong class="{color}">{mark} {word}</strong>{within}'


def _cell(estimate, sign=False):
    value, interval = parts(estimate, sign)
    return f'{value}<span class="range">{interval}</span>'


def _counted(estimate):
    """A cell with n, where the table has no column for it."""
    n = f'<span class="range">n {estimate["n"]}</span>' if estimate and width_of(estimate) != 0 else ""
    return _cell(estimate) + n if estimate else ""


def _forgetting(report):
    forgetting = report["forgetting"]
    if not forgetting:
        return ""
    words, labels = forgetting["words"], [model["label"] for model in report["models"]]
    found = ["<h2>Learned and kept</h2>"]
    if forgetting["learned"]:
        judged = [label for label in labels if label in forgetting["learned"]]
        lines = [(label, [_counted(forgetting[name].get(label)) for name in ("learned", "kept")]) for label in judged]
        found += [_words(report, words, ("learned", "kept")), _grid("model", ("learned", "kept"), lines)]
    if figures := forgetting["summary"]:
        lines = [(label, [_counted(of.get(label)) for of in figures.values()]) for label in labels]
        found += ["<h3>What was measured for it</h3>", _words(report, words, figures)]
        found.append(_grid("model", [title_of(report, figure) for figure in figures], lines))
    prompts = forgetting["prompts"]
    if len({row["category"] for row in prompts}) > 1:
        tables = "".join(
            f"<div>{_by_category(report, prompts, figure, labels)}</div>" for figure in row_metrics(report, prompts)
        )
        found.append(f'<div class="charts">{tables}</div>')
    return "".join(found)


def _words(report, words, names):
    lines = [
        f"<li><strong>{escape(title_of(report, name))}</strong>: {escape(words[name])}</li>"
        for name in names
        if name in words
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _by_category(report, prompts, figure, labels):
    """A table of the means of a figure in each category of prompts."""
    labels = [label for label in labels if any(value_at(row, figure, label) is not None for row in prompts)]
    lines = []
    for category in dict.fromkeys(row["category"] for row in prompts):
        own = [row for row in prompts if row["category"] == category]
        of_labels = [[value_at(row, figure, label) for row in own] for label in labels]
        known = [[value for value in values if value is not None] for values in of_labels]
        cells = [_category_cell(values) for values in known]
        lines.append((category or "no category", [str(max(map(len, known))), *cells]))
    return f"<h3>{escape(title_of(report, figure))} by category</h3>{_grid('category', ['n', *labels], lines)}"


def _category_cell(values):
    if len(values) < 2:  # one row has no interval
        return number(values[0] if values else None)
    return _cell(mean_of(values).as_dict())


def _grid(corner, columns, lines):
    """A table of [(heading, [cell, ...]), ...]; the cells are HTML already."""
    heads = "".join(f'<th scope="col">{escape(one)}</th>' for one in (corner, *columns))
    body = "".join(
        f"<tr><td>{escape(heading)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for heading, cells in lines
    )
    return (
        f'<div class="wide"><table class="figures"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _curves(curves):
    charts = "".join(f"<div><h3>{escape(curve['title'])}</h3>{chart(curve)}</div>" for curve in curves)
    return f'<h2>Curves</h2><div class="charts">{charts}</div>' if charts else ""


# -- rows ----------------------------------------------------------------------------------------------------------


def _front(report, thumbnails):
    """The best and the worst rows, as cards."""
    found = best_and_worst(report, SHOWN)
    if not found:
        return ""
    metric, label, best, worst = found
    metrics = row_metrics(report, report["rows"])
    writers = {one: row_number(report["rows"], one) for one in metrics}
    cards = lambda rows: "".join(_card(row, report, metrics, writers, thumbnails) for row in rows)
    return (
        f'<h2>Best and worst</h2><p class="soft">By {escape(title_of(report, metric))} of {escape(label)}.</p>'
        f'<h3>Best</h3><div class="cards">{cards(best)}</div>'
        + (f'<h3>Worst</h3><div class="cards">{cards(worst)}</div>' if worst else "")
    )


def _card(row, report, metrics, writers, thumbnails):
    cells = [f"<div><strong>truth</strong>{_image(row['truth'], 'truth', thumbnails)}</div>"] if row["truth"] else []
    for model in report["models"]:
        label = model["label"]
        if label in row["images"] and not model["noise_floor"]:
            values = "".join(
                f"{escape(title_of(report, one))} {writers[one](value_at(row, one, label))}<br>"
                for one in metrics
                if value_at(row, one, label) is not None
            )
            image = _image(row["images"][label], label, thumbnails)
            cells.append(f"<div><strong>{escape(label)}</strong>{image}{values}</div>")
    return (
        f"<figure><figcaption>{escape(str(row['row']))}. {escape(row['caption'])}</figcaption>"
        f'<div class="strip" style="--images:{len(cells)}">{"".join(cells)}</div></figure>'
    )


def _table(title, name, rows, report, thumbnails):
    """All rows as a table that the script sorts and filters; on a narrow screen each row is a card."""
    if not rows:
        return ""
    metrics = row_metrics(report, rows)
    writers = {metric: row_number(rows, metric) for metric in metrics}
    labels = [one["label"] for one in report["models"] if any(one["label"] in row["images"] for row in rows)]
    plain = [("row", "row"), ("caption", "caption")] + [("category", "category")] * any(
        row.get("category") for row in rows
    )
    has_truth = any(row.get("truth") for row in rows)
    own = {label: [m for m in metrics if any(value_at(row, m, label) is not None for row in rows)] for label in labels}

    heads = "".join(_sortable_head(key, word, column, 2) for column, (key, word) in enumerate(plain))
    heads += '<th rowspan="2" scope="col" class="left">truth</th>' * has_truth
    below, column = "", len(plain) + has_truth
    options = "".join(f'<option value="{key}">{word}</option>' for key, word in plain)
    for label in labels:
        heads += f'<th colspan="{1 + len(own[label])}" scope="colgroup" class="of">{escape(label)}</th>'
        below += '<th scope="col" class="first left">image</th>'
        for offset, metric in enumerate(own[label], 1):
            key, word = escape(f"{metric}:{label}"), escape(title_of(report, metric))
            below += _sortable_head(key, word, column + offset, 1)
            options += f'<option value="{key}">{word} of {escape(label)}</option>'
        column += 1 + len(own[label])

    body = "".join(_table_row(report, row, plain, has_truth, own, writers, thumbnails) for row in rows)
    return (
        f'<h2>{title}</h2><div class="sortable" data-name="{name}"><div class="controls" hidden>'
        f'<input type="search" placeholder="filter by text" aria-label="filter: {title}">'
        f'<select class="narrow" aria-label="sort by: {title}">{options}</select>'
        '<button type="button" class="narrow"></button><output class="soft"></output></div>'
        f'<div class="wide"><table class="rows" style="--images:{len(labels) + has_truth}">'
        f"<thead><tr>{heads}</tr><tr>{below}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _sortable_head(key, word, column, span):
    side = ' class="left"' * (key in ("caption", "category"))
    return (
        f'<th scope="col" rowspan="{span}" data-key="{key}" data-column="{column}"{side}>'
        f'<button type="button">{word}</button></th>'
    )


def _table_row(report, row, plain, has_truth, own, writers, thumbnails):
    cells = [f'<td class="plain" data-value="{row["row"]}">{row["row"]}</td>']
    cells += [f'<td class="caption">{escape(row[key] or "")}</td>' for key, _ in plain[1:]]
    if has_truth:
        cells.append(
            f'<td class="image" data-label="truth" style="--at:1;--down:5">'
            f"{_image(row.get('truth'), 'truth', thumbnails)}</td>"
        )
    for at, label in enumerate(own, 1 + has_truth):
        cells.append(
            f'<td class="image first" data-label="{escape(label)}" style="--at:{at};--down:5">'
            f"{_image(row['images'].get(label), label, thumbnails)}</td>"
        )
        for down, metric in enumerate(own[label], 6):
            value = value_at(row, metric, label)
            raw = "" if value is None else repr(float(value))
            cells.append(
                f'<td data-label="{escape(title_of(report, metric))}" data-value="{raw}" '
                f'style="--at:{at};--down:{down}">'
                f"{writers[metric](value)}</td>"
            )
    text = " ".join([str(row["row"]), *(str(row[key] or "") for key, _ in plain[1:])]).lower()
    return f'<tr data-text="{escape(text)}">{"".join(cells)}</tr>\n'


def _image(path, label, thumbnails):
    """The image itself, or the name of its file where it is not inside the page."""
    if not path:
        return '<span class="soft">none</span>'
    image, _ = thumbnails.get(path, (None, None))
    return f'<img {image} alt="{escape(label)}">' if image else f'<span class="file">{escape(path)}</span>'


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
    return ({"truth": row["truth"]} if row.get("truth") else {}) | row["images"]


def _thumbnails(folder, paths):
    """{path: (the attributes of its <img>, None), or (None, what is wrong with the file)}."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(paths, pool.map(lambda path: _thumbnail(folder, path), paths), strict=True))


def _thumbnail(folder, path):
    try:
        image = open_rgb(folder / path)
    except UnreadableImage as error:
        return None, str(error.__cause__).replace(str(folder / path), path)
    is_tiny = max(image.size) <= TINY
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG" if is_tiny else "JPEG", quality=85, optimize=True)
    kind, data = "png" if is_tiny else "jpeg", base64.b64encode(file.getvalue()).decode("ascii")
    width, height = image.size
    tiny = 'class="tiny" ' * is_tiny
    return f'{tiny}width="{width}" height="{height}" src="data:image/{kind};base64,{data}"', None


# -- how it was made -----------------------------------------------------------------------------------------------


def _made(report):
    made = report["made"]
    published = {True: "published", False: "not the published ones", None: "not known whether published"}
    weights = [
        (one["name"], f"{one['origin']}: {published[one['published']]}; sha256 {one['sha256']}")
        for one in report["weights"]
    ]
    models = [
        (one["label"], f"{one['source']}{', the noise floor' * bool(one['noise_floor'])}") for one in report["models"]
    ]
    measured = [("protocol", report["protocol"]), ("policy of sizes", report["policy"])]
    left_out = reasons(report)
    missing = f"<h3>Not measured, and why</h3>{_facts(left_out)}" if left_out else ""
    folded = "".join(f"<li>{escape(line)}</li>" for line in folded_warnings(report))
    return (
        f"<h2>Make it again</h2><pre>{escape(_command(made['command']))}</pre>"
        f"<h3>Models</h3>{_facts(models)}<h3>Measured with</h3>{_facts(measured + weights)}{missing}"
        + (f"<h3>Warnings in full</h3><ul>{folded}</ul>" if folded else "")
        + f"<details><summary>Every flag</summary>{_facts(made['args'].items())}</details>"
        f"<details><summary>Versions</summary>{_facts(made['versions'].items())}</details>"
    )


def _command(words):
    """The command as it is typed, a line for each flag."""
    ends = [" \\\n    " if word.startswith("--") else " " for word in words[1:]]
    return "".join(part for pair in zip(map(shlex.quote, words), [*ends, ""], strict=True) for part in pair)


def _facts(pairs):
    lines = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{_with_flags(_plain(value))}</td></tr>" for key, value in pairs
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _plain(value):
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
