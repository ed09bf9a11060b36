"""The audit as one HTML page: everything is inside it, and it asks for nothing from anywhere."""

import base64
import io
from pathlib import Path

from finetuning.conversion.audit_report import histograms
from finetuning.data.folders import SPLIT_NAMES
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.threads import in_order

GROUPS, OF_A_GROUP, SAMPLE = 12, 4, 24  # how many are shown of each concern, of a group, and of the dataset as it is
THUMBNAIL = 144  # longest side, pixels


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
