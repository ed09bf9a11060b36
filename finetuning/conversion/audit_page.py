"""The audit as one HTML page: everything is inside it, and it asks for nothing from anywhere."""

import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

from finetuning.conversion.audit import histograms, printable
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.reading import SPLIT_NAMES

GROUPS, OF_A_GROUP, SAMPLE = 12, 4, 24  # how many are shown of each concern, of a group, and of the dataset as it is
THUMBNAIL = 144  # longest side, pixels
LABEL, BAR, LINE = 110, 200, 18  # pixels of a histogram

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --page: #fcfcfa; --soft: #6a6e73; --line: #dcdcd6; --bar: #4c78a8;
  --good: #1d7a3a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --page: #17181a; --soft: #9a9ea3; --line: #3a3c40;
  --bar: #7aa6d6; --good: #6cc287; --bad: #f2877f; } }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--page); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; } p { margin: .3rem 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .soft, figcaption { color: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr { border-bottom: 1px solid var(--line); }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
.group { display: contents; } .several { display: flex; gap: .8rem; overflow-x: auto; grid-column: 1 / -1;
  border-left: 3px solid var(--line); padding-left: .6rem; }
figure { margin: 0; min-width: 8rem; max-width: 12rem; } figcaption { font-size: .75rem; line-height: 1.3; }
img { display: block; max-width: 100%; border-radius: 3px; }
svg { display: block; width: 100%; max-width: 26rem; height: auto; fill: currentColor; font: 12px sans-serif; }
rect { fill: var(--bar); } li { margin: .2rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem; }
"""


def write_page(audit, path):
    """Write the page of an Audit to a file; the folders above it are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page(audit), encoding="utf-8")


def page(audit):
    """The page of an Audit as text."""
    verdict = "Training would accept it." if audit.accepted else "Training would refuse it."
    every = audit.seen[:: max(1, -(-len(audit.seen) // SAMPLE))]
    wanted = {one.image for concern in audit.concerns for group in concern.groups[:GROUPS] for one in _few(group)}
    thumbnails = _thumbnails([*wanted, *(one.image for one in every)])
    parts = [
        f"<h1>{escape(str(audit.path))}</h1>",
        f'<p class="{"good" if audit.accepted else "bad"}"><strong>{verdict}</strong></p>',
        f'<p class="bad">{escape(audit.refusal)}</p>' if audit.refusal else "",
        _findings("What a training run says", audit.findings),
        _findings("The test split", audit.test_findings),
        *(_concern(audit, concern, thumbnails) for concern in audit.concerns),
    ]
    if audit.seen:
        charts = "".join(f"<div><h2>{escape(title)}</h2>{_bars(counts)}</div>" for title, counts in histograms(audit))
        sample = "".join(_figure(audit, one, thumbnails) for one in every)
        parts += [
            _counts(audit),
            f'<div class="charts">{charts}</div>',
            f'<h2>A sample</h2><div class="images">{sample}</div>',
        ]
    return printable(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(audit.path.name)}: dataset check</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _findings(title, findings):
    kinds = [(True, *item) for item in findings.faults.items()] + [(False, *item) for item in findings.notes.items()]
    if not kinds:
        return ""
    lines = "".join(
        f'<li><strong class="{"bad" if is_fault else "soft"}">{len(examples)} {escape(kind)}</strong> '
        f"{escape('; '.join(examples[:GROUPS]))}{_more(len(examples) - GROUPS)}</li>"
        for is_fault, kind, examples in kinds
    )
    return f"<h2>{title}</h2><ul>{lines}</ul>"


def _concern(audit, concern, thumbnails):
    groups = "".join(
        f'<div class="{"several" if len(group) > 1 else "group"}">'
        + "".join(_figure(audit, one, thumbnails) for one in _few(group))
        + f"{_more(len(group) - OF_A_GROUP)}</div>"
        for group in concern.groups[:GROUPS]
    )
    return (
        f"<h2>{len(concern.groups)} {escape(concern.kind)}</h2><p>{escape(concern.advice)}</p>"
        f'<div class="images">{groups}</div>{_more(len(concern.groups) - GROUPS)}'
    )


def _figure(audit, one, thumbnails):
    lines = [audit.shown(one), f"{one.measures.width} x {one.measures.height}", *map(_short, one.captions)]
    source = thumbnails[one.image]
    image = f'<img src="{source}" alt="" loading="lazy">' if source else ""
    return f"<figure>{image}<figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>"


def _counts(audit):
    rows = ""
    for split in SPLIT_NAMES:
        own = [one for one in audit.seen if one.split == split]
        rows += f"<tr><td>{split}</td><td>{len(own)}</td><td>{sum(len(one.captions) for one in own)}</td></tr>"
    return f"<h2>Splits</h2><table><tr><th>split</th><th>images</th><th>captions</th></tr>{rows}</table>"


def _bars(counts):
    """A histogram of [(label, count), ...] as SVG."""
    most = max((count for _, count in counts), default=1)
    lines = []
    for index, (label, count) in enumerate(counts):
        width = max(1, round(BAR * count / most))
        y = LINE * index
        lines.append(
            f'<text x="{LABEL - 6}" y="{y + 13}" text-anchor="end">{escape(_short(label, 16))}</text>'
            f'<rect x="{LABEL}" y="{y + 3}" width="{width}" height="{LINE - 5}"/>'
            f'<text x="{LABEL + width + 5}" y="{y + 13}">{count}</text>'
        )
    return f'<svg viewBox="0 0 {LABEL + BAR + 60} {LINE * len(counts) + 2}" role="img">{"".join(lines)}</svg>'


def _thumbnails(images):
    """{image: JPEG as a data: address}; None where it has become unreadable meanwhile."""
    images = list(dict.fromkeys(images))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(images, pool.map(_thumbnail, images), strict=True))


def _thumbnail(path):
    try:
        image = open_rgb(path)
    except UnreadableImage:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _few(group):
    return list(dict.fromkeys(group))[:OF_A_GROUP]


def _short(text, most=160):
    return text if len(text) <= most else text[: most - 1] + "…"


def _more(count):
    return f'<p class="soft">and {count} more</p>' if count > 0 else ""
