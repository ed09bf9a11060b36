"""What a reader has to know before the numbers: notes, each a code with fields, and the sentences made of them.

    note("few_images", images=12)                             # {"code": "few_images", "images": 12}
    note("no_truth", metric="lpips", rows=[3, 4], of=9)       # why a metric was left out

The code that measures makes notes, report.json holds them, and only this module turns them into sentences, where notes
that differ in their model, side or metric alone become one.
"""

from finetuning.cli import first_few
from finetuning.evaluation.metrics import NETWORK_FLAGS

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
WITHOUT_WEIGHTS = "the weights of {whose} are not on this machine. {flags} {name}"


def note(code, **fields):
    """A note for report.json. Raises KeyError for a code that has no sentence."""
    assert code in WARNINGS or code in REASONS, code
    return {"code": code, **fields}


def warning_sentences(notes):
    """The warnings as sentences, each once."""
    return [_sentence(WARNINGS, group) for group in _groups(notes, ("model", "side", "bias", "value"))]


def reasons(notes):
    """[([metric, ...], why)] of the metrics that were left out, in full."""
    return [
        ([*dict.fromkeys(one["metric"] for one in group)], _sentence(REASONS, group))
        for group in _groups(notes, ("metric", "model"))
    ]


def reason(one):
    """Why a metric was left out, as a sentence."""
    return _sentence(REASONS, [one])


def short_reasons(notes):
    """[([metric, ...], why)] with all networks whose weights are missing in one, and the flags that name them."""
    without = [one for one in notes if one["code"] == "no_weights"]
    found = reasons([one for one in notes if one not in without])
    if without:
        metrics = [*dict.fromkeys(one["metric"] for one in without)]
        flags = [*dict.fromkeys(NETWORK_FLAGS[one["network"]] for one in without)]
        many = len(flags) > 1
        text = WITHOUT_WEIGHTS.format(
            whose="their networks" if many else "its network" if len(metrics) == 1 else "their network",
            flags=listed(flags),
            name="name local files" if many else "names a local file",
        )
        found.insert(0, (metrics, text))
    return found


def listed(words):
    """a, b and c"""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _groups(notes, apart):
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
        fields["sides"] = listed(list(map(str, fields["sides"])))
    return table[fields["code"]].format(**fields)


def _model(one):
    """The model of a note, with what is only true of it."""
    where = f" at {one['side']} px" if "side" in one else ""
    if "bias" not in one:
        return f"{one['model']}{where}"
    return f"{one['model']}{where}: at least about {one['bias']:+.3g} of its {one['value']:.3g}"
