"""The report of an evaluation as one HTML page: pictures, style and script are inside it, and it asks for nothing.

The fragment of its address is its state: report.html#sort=-lpips:tuned&filter=cat opens with the pictures of cats
sorted by the LPIPS of the model "tuned", largest first. What other forms of the report share stands here too: how a
figure is written (`number`, `written`), what a difference says (`standing`), and the verdict.
"""

import base64
import hashlib
import io
import math
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

from finetuning.data.audit import printable
from finetuning.data.pictures import UnreadablePicture, open_rgb
from finetuning.evaluation.contract import METRICS
from finetuning.evaluation.statistics import mean_of

EMBEDDED = 200  # rows whose pictures are inside the page
EXTREMES, SHOWN = 40, 4  # how many best and worst rows keep their pictures; how many stand in front
THUMBNAIL, TINY = 256, 128  # longest side of a picture inside the page; up to TINY it is shown without smoothing
RANKED_BY = ("lpips", "clip_image", "clip_score", "style", "shapes")  # the first that is there says what is best
NETWORKS = {"kid": "inception", "fid": "inception", "lpips": "lpips", "clip_score": "clip", "clip_image": "clip"}
LINES = 6  # colours of curves

STYLE = """
:root { color-scheme: light dark; --ink: #1b1d20; --page: #fbfbf9; --card: #fff; --soft: #63676c; --line: #dededa;
  --good: #17713a; --bad: #b3261e; --loud: #fff1d6; --loudline: #c98a12; --band: #e4e7ea;
  --c0: #0b66ad; --c1: #bf5308; --c2: #1b7f4b; --c3: #8646ad; --c4: #806400; --c5: #b3264f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e7e4; --page: #15171a; --card: #1d2024; --soft: #a0a4a9;
  --line: #363a40; --good: #6fcb8a; --bad: #f58a82; --loud: #33270e; --loudline: #d9a036; --band: #30353b;
  --c0: #6db3ec; --c1: #f0975a; --c2: #68c795; --c3: #c698e6; --c4: #d3b64a; --c5: #f08bab; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 84rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .4rem 0; max-width: 48rem; }
.soft, figcaption, .range { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { background: var(--card); border: 1px solid var(--line); border-left: .35rem solid var(--c0);
  border-radius: .4rem; padding: .6rem 1rem; margin: 1rem 0; } .verdict p { font-size: 1.08rem; max-width: none; }
.warnings { background: var(--loud); border: 1px solid var(--loudline); border-left-width: .35rem;
  border-radius: .4rem; padding: .6rem 1rem; margin: 1rem 0; } .warnings h2 { margin: 0; font-size: 1rem; }
ul { margin: .3rem 0; padding-left: 1.2rem; } li { margin: .2rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } .left { text-align: left; } .range { display: block; font-size: .8rem; white-space: nowrap; }
.figures { min-width: min(100%, 34rem); } .whole { width: 100%; }
.figures th:first-child, .figures td:first-child { padding-left: 0; text-align: left; }
.figures .about { padding-top: 1.3rem; font-weight: 400; text-align: left; } .figures .about strong { font-size: 1rem; }
.tag { display: inline-block; border: 1px solid; border-radius: .3rem; padding: 0 .35rem; font-size: .78rem; }
.floor td { color: var(--soft); font-style: italic; }
svg { display: block; fill: currentColor; font: 12px system-ui, sans-serif; }
.forest { width: 9rem; height: 1.4rem; } .forest .zero, .chart .grid { stroke: var(--line); }
.forest .noise { fill: var(--band); } .forest .bar { stroke-width: 2; stroke: currentColor; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem 2rem; }
.chart { width: 100%; height: auto; max-width: 40rem; } .chart text { fill: var(--soft); }
.chart .path { fill: none; stroke-width: 2; } .chart .area { opacity: .16; stroke: none; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; font-size: .85rem; }
.legend svg { display: inline-block; width: 1.8rem; height: .7rem; margin-right: .4rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; }
figcaption { font-size: .85rem; margin-bottom: .4rem; }
.strip { display: grid; grid-template-columns: repeat(var(--pictures), minmax(0, 1fr)); gap: .5rem; font-size: .8rem; }
.strip div { font-variant-numeric: tabular-nums; } .strip strong { display: block; line-height: 1.25; }
img { display: block; max-width: 100%; height: auto; border-radius: 3px; outline: 1px solid var(--line); }
.tiny { image-rendering: pixelated; }
.strip img { width: 100%; } .rows img { width: 5.6rem; } .rows .picture { min-width: 5.6rem; text-align: left; }
.file, .facts td { overflow-wrap: anywhere; }
.file { font: .7rem/1.2 ui-monospace, monospace; color: var(--soft); }
.controls { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .6rem 0; }
[hidden] { display: none !important; }
input, select, .controls button { font: inherit; color: inherit; background: var(--card); padding: .35rem .6rem;
  border: 1px solid var(--soft); border-radius: .35rem; max-width: 100%; } .controls input { flex: 1 1 14rem; }
.rows { font-size: .86rem; } .rows th, .rows td { padding: .3rem .4rem; }
.rows .caption { text-align: left; min-width: 9rem; max-width: 16rem; }
.rows thead th { vertical-align: bottom; } .rows thead button { all: unset; cursor: pointer; font-weight: 600; }
.rows thead .of { text-align: left; border-left: 2px solid var(--line); }
.rows .first { border-left: 2px solid var(--line); }
.rows thead button:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
.rows thead button::after { content: " \\2195"; color: var(--soft); font-weight: 400; }
[aria-sort=ascending] button::after { content: " \\2191" !important; color: var(--c0) !important; }
[aria-sort=descending] button::after { content: " \\2193" !important; color: var(--c0) !important; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; margin: .4rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.4 ui-monospace, monospace; }
code { font: .85em ui-monospace, monospace; } details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.facts td, .facts th { text-align: left; } .facts td:first-child { padding-left: 0; white-space: nowrap; }
@media (min-width: 48.01rem) { .narrow { display: none; } }
@media (max-width: 48rem) {
  body { padding: 1rem .8rem 3rem; } .range { white-space: normal; } .figures { min-width: 100%; }
  .whole .range { white-space: nowrap; font-size: .68rem; } .whole .left .range { white-space: normal; }
  th, td { padding: .25rem .4rem; } .whole td, .whole th { padding: .25rem .2rem; } .forest-cell { display: none; }
  .facts td:first-child { white-space: normal; min-width: 6.5rem; }
  .rows, .rows tbody { display: block; } .rows thead { display: none; }
  .rows tr { display: grid; grid-template-columns: repeat(var(--pictures), minmax(3.2rem, 1fr)); gap: .1rem .4rem;
    background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; margin: .7rem 0;
    overflow-x: auto; }
  .rows td { display: block; border: 0 !important; padding: 0; grid-column: var(--at); grid-row: var(--down);
    text-align: left; font-size: .8rem; }
  .rows td.caption, .rows td.plain { grid-column: 1 / -1; grid-row: auto; max-width: none; font-size: .95rem; }
  .rows td[data-label]::before { content: attr(data-label); display: block; color: var(--soft); }
  .rows td.picture { min-width: 0; } .rows td.picture::before { font-weight: 600; }
  .rows img { width: 100%; }
}
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: 11px; }
  .controls { display: none; } tr, figure, .chart { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .rows img { width: 4.5rem; } .rows .picture { min-width: 4.5rem; } .wide { overflow: visible; } }
"""

SCRIPT = """
"use strict";
window.onerror = message => { document.documentElement.dataset.error = message; };
const state = () => new URLSearchParams(location.hash.slice(1));
for (const box of document.querySelectorAll(".sortable")) {
  const name = box.dataset.name, body = box.querySelector("tbody"), rows = [...body.rows];
  const heads = [...box.querySelectorAll("th[data-key]")], search = box.querySelector("input");
  const select = box.querySelector("select"), turn = box.querySelector(".controls button");
  const said = box.querySelector("output");
  const put = (what, value) => {
    const now = state();
    if (value) now.set(name + what, value); else now.delete(name + what);
    history.replaceState(null, "", "#" + now);
    apply();
  };
  const held = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (column, sign) => (a, b) => {
    const [x, y] = [held(a, column), held(b, column)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  };
  const apply = () => {
    const asked = state().get(name + "sort") || "row", down = asked.startsWith("-");
    const head = heads.find(one => one.dataset.key === (down ? asked.slice(1) : asked)) || heads[0];
    for (const one of heads) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    select.value = head.dataset.key;
    turn.textContent = down ? "\\u2193 descending" : "\\u2191 ascending";
    body.append(...[...rows].sort(compare(Number(head.dataset.column), down ? -1 : 1)));
    const text = (state().get(name + "filter") || "").toLowerCase();
    if (search.value.toLowerCase() !== text) search.value = text;
    let left = 0;
    for (const row of rows) left += !(row.hidden = !row.dataset.text.includes(text));
    said.textContent = `${left} of ${rows.length} rows`;
  };
  const sorted = () => state().get(name + "sort") || "row";
  for (const head of heads) head.querySelector("button").addEventListener("click", () =>
    put("sort", sorted() === head.dataset.key ? "-" + head.dataset.key : head.dataset.key));
  select.addEventListener("change", () => put("sort", select.value));
  turn.addEventListener("click", () => put("sort", sorted().startsWith("-") ? sorted().slice(1) : "-" + sorted()));
  search.addEventListener("input", () => put("filter", search.value));
  addEventListener("hashchange", apply);
  box.querySelector(".controls").hidden = false;
  apply();
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
document.documentElement.dataset.ready = "yes";
"""


# -- figures in words ----------------------------------------------------------------------------------------------


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
    return f"{float(value):{'+' if sign else ''}z{form}}"


def width_of(estimate):
    """high - low, or None where there is no interval."""
    return None if estimate["low"] is None or estimate["high"] is None else estimate["high"] - estimate["low"]


def written(estimate, sign=False):
    """An estimate in one line: 0.712 (0.700 to 0.724)."""
    value, interval = _parts(estimate, sign)
    return f"{value} ({interval})"


def title_of(figure):
    return METRICS[figure].title if figure in METRICS else figure.replace("_", " ")


def row_number(rows, metric):
    """A function that writes the values of a metric in `rows`, all to as many digits as their spread asks for."""
    values = [value for row in rows for value in row["values"].get(metric, {}).values() if value is not None]
    if all(value == int(value) for value in values):
        return lambda value: number(value)
    return lambda value: number(value, (max(values) - min(values)) / 5)


def row_metrics(rows):
    """The metrics that rows have values of, known ones first in the order of METRICS."""
    there = dict.fromkeys(metric for row in rows for metric in row["values"])
    return [*(metric for metric in METRICS if metric in there), *(metric for metric in there if metric not in METRICS)]


def estimate_at(table, metric, side, label):
    """The estimate of a metric at a side in report["summary"] or report["differences"]; None where there is none."""
    return table.get(metric, {}).get(str(side), {}).get(label)


def noise_floor(report, metric, side):
    """How far apart two runs of the reference may be: the farther end of their difference's interval; or None."""
    floors = [estimate_at(report["differences"], metric, side, one["label"]) for one in _models(report, True)]
    ends = [abs(end) for one in floors if one for end in (one["value"], one["low"], one["high"]) if end is not None]
    return max(ends, default=None)


def standing(report, metric, side, label):
    """Better, worse or not told apart from the reference, by the interval of the difference; None without one."""
    difference = estimate_at(report["differences"], metric, side, label)
    if difference is None:
        return None
    if not difference["excludes_zero"]:
        return "not told apart"
    return "better" if (difference["value"] > 0) == (METRICS[metric].better == "higher") else "worse"


def is_beyond_noise(report, metric, side, label):
    """Whether the difference from the reference is larger than the noise floor; None where one of them is missing."""
    difference = estimate_at(report["differences"], metric, side, label)
    floor = noise_floor(report, metric, side)
    return None if difference is None or floor is None else abs(difference["value"]) > floor


def verdict(report):
    """A sentence for each tuned model: did it learn, is that more than noise, what did it forget."""
    return [_verdict_on(report, model["label"]) for model in _models(report, False)]


def _verdict_on(report, label):
    side, reference = report["sides"][-1], report["reference"]
    found = {metric: standing(report, metric, side, label) for metric in METRICS}
    groups = {word: [m for m in found if found[m] == word] for word in ("better", "worse", "not told apart")}
    if not any(groups.values()):
        learned = f"{label} was not compared with {reference}"
    else:
        parts = [f"{word}: {_listed([title_of(metric) for metric in groups[word]])}" for word in groups if groups[word]]
        learned = (
            f"Against {reference}, {label} {_learned_word(groups)} ({'; '.join(parts)}): "
            f"{_noise_words(report, side, label, groups)}"
        )
    return f"{learned}. {_kept_words(report, label)}."


def _learned_word(groups):
    if groups["better"]:
        return "has learned, but not in everything" if groups["worse"] else "has learned"
    return "has become worse" if groups["worse"] else "has not measurably learned"


def _noise_words(report, side, label, groups):
    told = groups["better"] + groups["worse"]
    beyond = {metric: is_beyond_noise(report, metric, side, label) for metric in told}
    if not _models(report, True):
        return "the noise between two seeds was not measured"
    if not told:
        return "no difference is larger than chance"
    yes = [title_of(metric) for metric in told if beyond[metric]]
    if len(yes) == len(told):
        return "all of these differences are beyond the noise floor"
    return f"beyond the noise floor: {_listed(yes)}" if yes else "none of these differences is beyond the noise floor"


def _kept_words(report, label):
    forgetting = report["forgetting"]
    kept = (forgetting or {}).get("kept", {}).get(label)
    if kept is None:
        return "What it forgot was not measured"
    if kept["high"] is not None and kept["high"] < 1:
        told = "It has forgotten"
    elif kept["low"] is not None and kept["low"] > 1:
        told = "It has forgotten nothing that was measured"
    else:
        told = "That it has forgotten anything cannot be told"
    return f"{told}: kept {written(kept)}, where 1 is all that {report['reference']} can do"


def warnings(report):
    """All that a reader has to know before the figures: warnings, and what was left out and why, each once."""
    parts = report, report["forgetting"] or {}
    lines = [line for part in parts for line in part.get("warnings", [])]
    left_out = [one for part in parts for one in part.get("left_out", [])]
    return list(dict.fromkeys(lines + [f"{title_of(one['metric'])} was left out: {one['why']}" for one in left_out]))


def best_and_worst(report, most):
    """(metric, label, best rows, worst rows), at most `most` of each, by the first tuned model; None without values."""
    models, rows = _models(report, False) or report["models"], report["rows"]
    ranks = [(metric, model["label"]) for metric in RANKED_BY for model in models]
    ranks = [pair for pair in ranks if any(_value(row, *pair) is not None for row in rows)]
    if not ranks:
        return None
    metric, label = ranks[0]
    rows = [row for row in rows if _value(row, metric, label) is not None]
    rows.sort(key=lambda row: _value(row, metric, label), reverse=METRICS[metric].better == "higher")
    most = min(most, -(-len(rows) // 2))
    return metric, label, rows[:most], rows[: -most - 1 : -1][: len(rows) - most]


def is_not_published(report, metric):
    """Whether a metric was made with weights that are known not to be the published ones."""
    network = NETWORKS.get(metric)
    return any(one["published"] is False and one["name"].startswith(network) for one in report["weights"] if network)


def _models(report, noise):
    """The models that are noise floors (True) or tuned (False): all but the reference."""
    own = report["reference"]
    return [one for one in report["models"] if bool(one["noise_floor"]) == noise and one["label"] != own]


def _parts(estimate, sign=False):
    width = width_of(estimate)
    if width is None:
        return number(estimate["value"], sign=sign), "no interval"
    low, value, high = (number(estimate[key], width, sign) for key in ("low", "value", "high"))
    return value, f"{low} to {high}"


def _listed(words):
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# -- the page ------------------------------------------------------------------------------------------------------


def page(report, folder):
    """The page as text. `report` is what report.json holds; its pictures are looked for in `folder`."""
    rows, prompts = report["rows"], (report["forgetting"] or {}).get("prompts", [])
    embedded = _embedded(rows, best_and_worst(report, EXTREMES)), _embedded(prompts, None)
    pictures = [path for part in embedded for row in part for path in _pictures_of(row).values()]
    thumbnails = _thumbnails(Path(folder), pictures)
    content = [
        _head(report),
        _warnings(report, thumbnails, [len(rows) + len(prompts), sum(map(len, embedded))]),
        _summary(report),
        _forgetting(report),
        _curves(report["curves"]),
        _front(report, thumbnails),
        _table("Picture by picture", "", rows, report["models"], thumbnails),
        _table("General prompts one by one", "prompts-", prompts, report["models"], thumbnails),
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
    tuned = [model["label"] for model in _models(report, False)]
    return f"{_listed(tuned)} against {report['reference']}" if tuned else f"Evaluation of {report['reference']}"


def _head(report):
    sides = _listed([f"{side} px" for side in report["sides"]])
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict(report))
    return (
        f"<h1>{escape(_title(report))}</h1>"
        f'<p class="soft">Every model drew a picture of each of {len(report["rows"])} captions, from seeds fixed by '
        f"row. They are compared with the captions and with the true pictures, at {sides}.</p>"
        + (f'<div class="verdict">{said}</div>' if said else "")
    )


def _warnings(report, thumbnails, counts):
    lines = warnings(report)
    unread = [f"{path} ({error})" for path, (_, error) in thumbnails.items() if error]
    if unread:
        lines.append(f"{len(unread)} pictures cannot be shown: {'; '.join(unread[:8])}{' …' * (len(unread) > 8)}")
    loud = "".join(f"<li>{escape(line)}</li>" for line in lines)
    parts = [f'<section class="warnings"><h2>Before you read on</h2><ul>{loud}</ul></section>'] if loud else []
    total, shown = counts
    if shown < total:
        parts.append(
            f'<p class="soft">Of {total} rows, {shown} have their pictures inside this page: the best, the worst and '
            "an even sample. The others name the files, which lie beside report.html.</p>"
        )
    return "".join(parts)


def _summary(report):
    parts = []
    for metric in METRICS:
        for index, side in enumerate(report["sides"]):
            if report["summary"].get(metric, {}).get(str(side)):
                parts.append(_metric(report, metric, side, explain=index == 0))
    if not parts:
        return "<h2>Figures</h2><p>No metric was measured.</p>"
    against = f"against {escape(report['reference'])}"
    noise = " The noise floor is the reference drawn again from other seeds." if _models(report, True) else ""
    return (
        '<h2>Figures</h2><p class="soft">Small below each figure: its 95 % interval. A difference is told apart where '
        f"its interval leaves out 0.{noise}</p>"
        '<div class="wide"><table class="figures whole"><thead><tr><th scope="col">model</th><th scope="col">value</th>'
        '<th scope="col">n</th><th scope="col">difference</th>'
        f'<th scope="col" class="forest-cell left">{against}</th>'
        f'<th scope="col" class="left">says</th></tr></thead>{"".join(parts)}</table></div>'
    )


def _metric(report, metric, side, explain):
    facts = METRICS[metric]
    size = f" at {side} px" if len(report["sides"]) > 1 else ""
    tag = ' <span class="tag bad">not the published weights: not comparable</span>' * is_not_published(report, metric)
    about = f"<br>{escape(facts.means)}" if explain else ""
    lines = [
        f'<tbody><tr><th class="about" colspan="6" scope="rowgroup"><strong>{escape(facts.title)}{size}</strong> '
        f'<span class="soft">{facts.better} is better{about}</span>{tag}</th></tr>'
    ]
    for model in report["models"]:
        label = model["label"]
        estimate = estimate_at(report["summary"], metric, side, label)
        if estimate is None:
            continue
        difference = estimate_at(report["differences"], metric, side, label)
        lines.append(
            f"<tr{' class=floor' * bool(model['noise_floor'])}><td>{escape(label)}</td><td>{_cell(estimate)}</td>"
            f"<td>{estimate['n']}</td><td>{_cell(difference, sign=True) if difference else ''}</td>"
            f'<td class="forest-cell">{_forest(report, metric, side, difference)}</td>'
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
    value, interval = _parts(estimate, sign)
    return f'{value}<span class="range">{interval}</span>'


def _forest(report, metric, side, difference):
    """The difference and its interval as a drawing 200 wide, 0 in its middle, the noise floor shaded."""
    if difference is None or width_of(difference) is None:
        return ""
    floor = noise_floor(report, metric, side) or 0.0
    every = report["differences"][metric][str(side)].values()
    most = max([floor, *(abs(one[key]) for one in every for key in ("low", "high") if one[key] is not None)]) or 1.0
    at = lambda value: round(100 + 94 * value / most, 1)
    return (
        f'<svg class="forest" viewBox="0 0 200 30" role="img" aria-label="{escape(written(difference, True))}">'
        f'<rect class="noise" x="{at(-floor)}" y="2" width="{round(at(floor) - at(-floor), 1)}" height="26"/>'
        '<line class="zero" x1="100" y1="0" x2="100" y2="30" stroke-width="2"/>'
        f'<line class="bar" x1="{at(difference["low"])}" y1="15" x2="{at(difference["high"])}" y2="15"/>'
        f'<circle cx="{at(difference["value"])}" cy="15" r="5"/></svg>'
    )


def _forgetting(report):
    forgetting = report["forgetting"]
    if not forgetting:
        return ""
    words, labels = forgetting["words"], [model["label"] for model in report["models"]]
    parts = ["<h2>Learned and kept</h2>"]
    if forgetting["learned"]:
        judged = [label for label in labels if label in forgetting["learned"]]
        lines = [(label, [_maybe(forgetting[name].get(label)) for name in ("learned", "kept")]) for label in judged]
        parts += [_words(words, ("learned", "kept")), _grid("model", ("learned", "kept"), lines)]
    if forgetting["summary"]:
        figures = forgetting["summary"]
        lines = [(label, [_maybe(of.get(label)) for of in figures.values()]) for label in labels]
        parts += [
            "<h3>What was measured for it</h3>",
            _words(words, figures),
            _grid("model", map(title_of, figures), lines),
        ]
    figures = row_metrics(forgetting["prompts"])
    tables = "".join(f"<div>{_by_category(forgetting['prompts'], figure, labels)}</div>" for figure in figures)
    return "".join([*parts, f'<div class="charts">{tables}</div>' if tables else ""])


def _words(words, names):
    lines = [
        f"<li><strong>{escape(title_of(name))}</strong>: {escape(words[name])}</li>" for name in names if name in words
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _by_category(prompts, figure, labels):
    """A table of the means of a figure in each category of prompts."""
    labels = [label for label in labels if any(_value(row, figure, label) is not None for row in prompts)]
    lines = []
    for category in dict.fromkeys(row["category"] for row in prompts):
        own = [row for row in prompts if row["category"] == category]
        of_labels = [[_value(row, figure, label) for row in own] for label in labels]
        known = [[value for value in values if value is not None] for values in of_labels]
        cells = [_category_cell(values) for values in known]
        lines.append((category or "no category", [str(max(map(len, known))), *cells]))
    return f"<h3>{escape(title_of(figure))} by category</h3>{_grid('category', ['n', *labels], lines)}"


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


def _maybe(estimate):
    return _cell(estimate) if estimate else ""


def _value(row, metric, label):
    return row["values"].get(metric, {}).get(label)


# -- curves --------------------------------------------------------------------------------------------------------

LEFT, RIGHT, TOP, BOTTOM, WIDE, HIGH = 56, 12, 10, 44, 460, 270  # margins and size of a chart


def _curves(curves):
    charts = "".join(f"<div><h3>{escape(curve['title'])}</h3>{_chart(curve)}</div>" for curve in curves)
    return f'<h2>Curves</h2><div class="charts">{charts}</div>' if charts else ""


def _chart(curve):
    """Lines with their 95 % intervals shaded, as SVG, and a legend above it."""
    points = [point for line in curve["lines"] for point in line["points"]]
    if not points:
        return '<p class="soft">no points</p>'
    x_low, x_high = _span(point["x"] for point in points)
    y_low, y_high = _span(point[key] for point in points for key in ("y", "low", "high") if point[key] is not None)
    x = lambda value: round(LEFT + (value - x_low) / (x_high - x_low) * (WIDE - LEFT - RIGHT), 1)
    y = lambda value: round(TOP + (y_high - value) / (y_high - y_low) * (HIGH - TOP - BOTTOM), 1)
    floor = HIGH - BOTTOM
    parts = [
        f'<line class="grid" x1="{LEFT}" y1="{y(at)}" x2="{WIDE - RIGHT}" y2="{y(at)}"/>'
        f'<text x="{LEFT - 6}" y="{y(at) + 4}" text-anchor="end">{number(at)}</text>'
        for at in _ticks(y_low, y_high)
    ]
    parts += [
        f'<text x="{x(at)}" y="{floor + 16}" text-anchor="middle">{number(at)}</text>' for at in _ticks(x_low, x_high)
    ]
    parts.append(
        f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 8}" text-anchor="middle">{escape(curve["x_title"])}</text>'
        f'<text transform="translate(12 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(curve['y_title'])}</text>"
    )
    parts += [_line(index, line, x, y) for index, line in enumerate(curve["lines"])]
    legend = "".join(
        f'<li><svg viewBox="0 0 36 12" aria-hidden="true"><line x1="0" y1="6" x2="36" y2="6" stroke-width="3" '
        f"{_pen(index)}/></svg>{escape(line['label'])}</li>"
        for index, line in enumerate(curve["lines"])
    )
    name = escape(f"{curve['title']}: {curve['y_title']} over {curve['x_title']}")
    return (
        f'<ul class="legend">{legend}</ul>'
        f'<svg class="chart" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    )


def _line(index, line, x, y):
    points = sorted(line["points"], key=lambda point: point["x"])
    banded = [point for point in points if point["low"] is not None and point["high"] is not None]
    around = [(point["x"], point["high"]) for point in banded] + [(point["x"], point["low"]) for point in banded[::-1]]
    joined = lambda pairs: " ".join(f"{x(left)},{y(up)}" for left, up in pairs)
    dots = "".join(
        f'<circle cx="{x(point["x"])}" cy="{y(point["y"])}" r="3.5" style="fill:{_color(index)}">'
        f"<title>{escape(line['label'])} at {number(point['x'])}: {escape(_told(point))}</title></circle>"
        for point in points
    )
    band = f'<polygon class="area" points="{joined(around)}" style="fill:{_color(index)}"/>' if banded else ""
    middle = joined((point["x"], point["y"]) for point in points)
    return f'{band}<polyline class="path" points="{middle}" {_pen(index)}/>{dots}'


def _told(point):
    return written({"value": point["y"], "low": point["low"], "high": point["high"]})


def _color(index):
    return f"var(--c{index % LINES})"


def _pen(index):
    """Colour and dashes, so that lines differ without colours too."""
    dashes = ("", "7 4", "2 3", "9 3 2 3")[index % 4]
    return f'style="stroke:{_color(index)};stroke-dasharray:{dashes or "none"}"'


def _span(values):
    """(low, high) of the values with a little room, never empty."""
    values = list(values)
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _ticks(low, high, most=6):
    """Round numbers between low and high, at most about `most`."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


# -- rows ----------------------------------------------------------------------------------------------------------


def _front(report, thumbnails):
    """The best and the worst rows, as cards."""
    found = best_and_worst(report, SHOWN)
    if not found:
        return ""
    metric, label, best, worst = found
    metrics = row_metrics(report["rows"])
    writers = {one: row_number(report["rows"], one) for one in metrics}
    cards = lambda rows: "".join(_card(row, report["models"], metrics, writers, thumbnails) for row in rows)
    return (
        f'<h2>Best and worst</h2><p class="soft">By {escape(title_of(metric))} of {escape(label)}.</p>'
        f'<h3>Best</h3><div class="cards">{cards(best)}</div>'
        + (f'<h3>Worst</h3><div class="cards">{cards(worst)}</div>' if worst else "")
    )


def _card(row, models, metrics, writers, thumbnails):
    cells = [f"<div><strong>truth</strong>{_picture(row['truth'], 'truth', thumbnails)}</div>"] if row["truth"] else []
    for model in models:
        label = model["label"]
        if label in row["pictures"] and not model["noise_floor"]:
            values = "".join(
                f"{escape(title_of(one))} {writers[one](_value(row, one, label))}<br>"
                for one in metrics
                if _value(row, one, label) is not None
            )
            picture = _picture(row["pictures"][label], label, thumbnails)
            cells.append(f"<div><strong>{escape(label)}</strong>{picture}{values}</div>")
    return (
        f"<figure><figcaption>{escape(str(row['row']))}. {escape(row['caption'])}</figcaption>"
        f'<div class="strip" style="--pictures:{len(cells)}">{"".join(cells)}</div></figure>'
    )


def _table(title, name, rows, models, thumbnails):
    """All rows as a table that the script sorts and filters; on a narrow screen each row is a card."""
    if not rows:
        return ""
    metrics = row_metrics(rows)
    writers = {metric: row_number(rows, metric) for metric in metrics}
    labels = [one["label"] for one in models if any(one["label"] in row["pictures"] for row in rows)]
    plain = [("row", "row"), ("caption", "caption")] + [("category", "category")] * any("category" in r for r in rows)
    has_truth = any(row.get("truth") for row in rows)
    own = {label: [m for m in metrics if any(_value(row, m, label) is not None for row in rows)] for label in labels}

    heads = "".join(_sortable_head(key, word, column, 2) for column, (key, word) in enumerate(plain))
    heads += '<th rowspan="2" scope="col" class="left">truth</th>' * has_truth
    below, column = "", len(plain) + has_truth
    options = "".join(f'<option value="{key}">{word}</option>' for key, word in plain)
    for label in labels:
        heads += f'<th colspan="{1 + len(own[label])}" scope="colgroup" class="of">{escape(label)}</th>'
        below += '<th scope="col" class="first left">picture</th>'
        for offset, metric in enumerate(own[label], 1):
            key, word = escape(f"{metric}:{label}"), escape(title_of(metric))
            below += _sortable_head(key, word, column + offset, 1)
            options += f'<option value="{key}">{word} of {escape(label)}</option>'
        column += 1 + len(own[label])

    body = "".join(_table_row(row, plain, has_truth, own, writers, thumbnails) for row in rows)
    return (
        f'<h2>{title}</h2><div class="sortable" data-name="{name}"><div class="controls" hidden>'
        f'<input type="search" placeholder="filter by text" aria-label="filter: {title}">'
        f'<select class="narrow" aria-label="sort by: {title}">{options}</select>'
        '<button type="button" class="narrow"></button><output class="soft"></output></div>'
        f'<div class="wide"><table class="rows" style="--pictures:{len(labels) + has_truth}">'
        f"<thead><tr>{heads}</tr><tr>{below}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _sortable_head(key, word, column, span):
    side = ' class="left"' * (key in ("caption", "category"))
    return (
        f'<th scope="col" rowspan="{span}" data-key="{key}" data-column="{column}"{side}>'
        f'<button type="button">{word}</button></th>'
    )


def _table_row(row, plain, has_truth, own, writers, thumbnails):
    cells = [f'<td class="plain" data-value="{row["row"]}">{row["row"]}</td>']
    cells += [f'<td class="caption">{escape(row[key] or "")}</td>' for key, _ in plain[1:]]
    if has_truth:
        cells.append(
            f'<td class="picture" data-label="truth" style="--at:1;--down:5">'
            f"{_picture(row.get('truth'), 'truth', thumbnails)}</td>"
        )
    for at, label in enumerate(own, 1 + has_truth):
        cells.append(
            f'<td class="picture first" data-label="{escape(label)}" style="--at:{at};--down:5">'
            f"{_picture(row['pictures'].get(label), label, thumbnails)}</td>"
        )
        for down, metric in enumerate(own[label], 6):
            value = _value(row, metric, label)
            raw = "" if value is None else repr(float(value))
            cells.append(
                f'<td data-label="{escape(title_of(metric))}" data-value="{raw}" style="--at:{at};--down:{down}">'
                f"{writers[metric](value)}</td>"
            )
    text = " ".join([str(row["row"]), *(str(row[key] or "") for key, _ in plain[1:])]).lower()
    return f'<tr data-text="{escape(text)}">{"".join(cells)}</tr>\n'


def _picture(path, label, thumbnails):
    """The picture itself, or the name of its file where it is not inside the page."""
    if not path:
        return '<span class="soft">none</span>'
    image, _ = thumbnails.get(path, (None, None))
    return f'<img {image} alt="{escape(label)}">' if image else f'<span class="file">{escape(path)}</span>'


def _embedded(rows, extremes):
    """The rows whose pictures go inside the page: all, or the best, the worst and an even sample of the others."""
    if len(rows) <= EMBEDDED:
        return rows
    _, _, best, worst = extremes or (None, None, [], [])
    chosen = {id(row) for row in best + worst}
    others = [row for row in rows if id(row) not in chosen]
    step = -(-len(others) // (EMBEDDED - len(chosen)))
    chosen |= {id(row) for row in others[::step]}
    return [row for row in rows if id(row) in chosen]


def _pictures_of(row):
    return ({"truth": row["truth"]} if row.get("truth") else {}) | row["pictures"]


def _thumbnails(folder, paths):
    """{path: (the attributes of its <img>, None), or (None, what is wrong with the file)}."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(paths, pool.map(lambda path: _thumbnail(folder, path), paths), strict=True))


def _thumbnail(folder, path):
    try:
        picture = open_rgb(folder / path)
    except UnreadablePicture as error:
        return None, str(error.__cause__).replace(str(folder / path), path)
    is_tiny = max(picture.size) <= TINY
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "PNG" if is_tiny else "JPEG", quality=85, optimize=True)
    kind, data = "png" if is_tiny else "jpeg", base64.b64encode(file.getvalue()).decode("ascii")
    width, height = picture.size
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
    return (
        f"<h2>Make it again</h2><pre>{escape(shlex.join(made['command']))}</pre>"
        f"<h3>Models</h3>{_facts(models)}<h3>Measured with</h3>{_facts(measured + weights)}"
        f"<details><summary>Every flag</summary>{_facts(made['args'].items())}</details>"
        f"<details><summary>Versions</summary>{_facts(made['versions'].items())}</details>"
    )


def _facts(pairs):
    lines = "".join(f"<tr><td>{escape(str(key))}</td><td>{escape(_plain(value))}</td></tr>" for key, value in pairs)
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _plain(value):
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
