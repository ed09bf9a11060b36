"""The audit as text, and as one HTML page: everything is inside it, and it asks for nothing from anywhere."""

import base64
import io
import math
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from finetuning.cli import first_few
from finetuning.data.buckets import bucket_of, bucket_sizes
from finetuning.data.folders import SPLIT_NAMES
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.threads import in_order

ASPECTS = ((1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1))
SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
GROUPS, OF_A_GROUP, SAMPLE = 12, 4, 24  # how many are shown of each concern, of a group, and of the dataset as it is
THUMBNAIL = 144  # longest side, pixels


def report(audit, shown=3, bar=28):
    """The audit as text: the verdict, then what is wrong, worst first, then what the dataset is like."""
    lines = [f"{audit.path}: {audit.verdict[1]}"]
    if audit.refusal:
        return printable("\n".join([*lines, f"  {audit.refusal}"]))
    for title, findings in (("a training run says", audit.findings), ("the test split", audit.test_findings)):
        if text := findings.report():
            lines += ["", title, text]
    if audit.concerns:
        lines += ["", "worth a look"]
    for concern in audit.concerns:
        lines.append(f"  {concern.title} ({len(concern.groups)}): {concern.advice}")
        for group in concern.groups[:shown]:
            names = [audit.shown(one) for one in dict.fromkeys(group)]
            lines.append(f"      {first_few(names, 4)}")
    lines += ["", "  split       images  captions   shorter side: least  median    most"]
    for split in SPLIT_NAMES:
        own = [one for one in audit.seen if one.split == split]
        sides = [min(one.measures.width, one.measures.height) for one in own] or [0]
        captions = sum(map(len, (one.captions for one in own)))
        lines.append(
            f"  {split:<11}{len(own):>9}{captions:>10}{min(sides):>22}{int(np.median(sides)):>8}{max(sides):>8}"
        )
    for title, counts in histograms(audit):
        most = max((count for _, count in counts), default=1)
        lines += ["", f"  {title}"]
        lines += [f"    {label:<14}{count:>7}  {'#' * max(1, round(bar * count / most))}" for label, count in counts]
    return printable("\n".join(lines))


def page(audit):
    """The page of an Audit as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    sample = audit.seen[:: max(1, -(-len(audit.seen) // SAMPLE))]
    of_a_group = lambda group: list(dict.fromkeys(group))[:OF_A_GROUP]
    shown = [one for concern in audit.concerns for group in concern.groups[:GROUPS] for one in of_a_group(group)]
    thumbnails = dict(in_order(_thumbnail, dict.fromkeys(one.image for one in [*shown, *sample])))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["of_a_group"] = of_a_group
    level, verdict = audit.verdict
    return environment.get_template("audit_page.html.jinja").render(
        audit=audit,
        level=level,
        verdict=verdict,
        findings=[("What a training run says", audit.findings), ("The test split", audit.test_findings)],
        splits=[(split, [one for one in audit.seen if one.split == split]) for split in SPLIT_NAMES],
        histograms=histograms(audit) if audit.seen else [],
        sample=sample,
        thumbnails=thumbnails,
        most=GROUPS,
    )


def _thumbnail(path):
    """A JPEG as a data: address; None where the image has become unreadable meanwhile."""
    try:
        image = open_rgb(path)
    except UnreadableImage:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def printable(text):
    """Text that any terminal and file takes: file names may hold bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def histograms(audit):
    """[(title, [(label, count), ...]), ...] of sizes, shapes, caption lengths and words; empty bins are left out."""
    sides, shapes = Counter(), Counter()
    for one in audit.seen:
        width, height = one.measures.width, one.measures.height
        sides[np.searchsorted(SIDES, min(width, height), side="right")] += 1
        shapes[min(ASPECTS, key=lambda a: abs(math.log(width / height) - math.log(a[0] / a[1])))] += 1
    labels = [f"below {SIDES[0]}", *(f"from {side}" for side in SIDES)]
    found = [
        ("shorter side of the images, in pixels", [(labels[i], sides[i]) for i in range(len(labels)) if sides[i]]),
        ("shape of the images, width : height", [(f"{w}:{h}", shapes[w, h]) for w, h in ASPECTS if shapes[w, h]]),
    ]
    if buckets := _buckets(audit):
        found.append(("sizes they would be trained at with --aspect_buckets, height x width", buckets))
    if audit.lengths:
        step = max(1, math.ceil((max(audit.lengths) + 1) / 12))
        bins = Counter(length // step for length in audit.lengths)
        named = [(f"{i * step}-{(i + 1) * step - 1}" if step > 1 else str(i), bins[i]) for i in sorted(bins)]
        found.append((f"length of the captions in {audit.length_unit}", named))
        found.append(("words that stand in most captions", audit.words.most_common(15)))
    return found


def _buckets(audit):
    """[(bucket, count), ...], the fullest first; none where --resolution makes no buckets."""
    training = audit.args.training()
    if training.size[0] != training.size[1] or not bucket_sizes(training):
        return []
    fitting = cache(lambda size: bucket_of(training, size))
    counts = Counter(fitting((one.measures.height, one.measures.width)) for one in audit.seen).most_common()
    return [("x".join(map(str, size)) if size else "too small", count) for size, count in counts]
