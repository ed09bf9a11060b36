"""Whether a fine-tune forgot: general prompts, and losses on what should be kept, against the original model.

The general prompts have no true images: there the original's own images are what drift is measured from.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from finetuning.cli import flag
from finetuning.data.folders import folder_problems
from finetuning.data.reading import SPLIT_NAMES
from finetuning.evaluation import generation, measuring, statistics
from finetuning.evaluation.metrics import table
from finetuning.evaluation.retention import RETENTION_MEASURES, NothingToKeep, learned_and_kept, retention_measure
from finetuning.evaluation.words import note

DRIFTS = {metric.drift_of: name for name, metric in table().items() if metric.drift_of}
UNKNOWN = "not known: too little was measured"


@dataclass
class ForgettingArgs:
    """Forgetting"""

    general_prompts: str = flag(
        "shipped", "prompts of what should not be forgotten: shipped, none, or a .txt (one on each line) or .json file"
    )
    retain_dataset: str | None = flag(
        None, "folder with metadata.jsonl of what should be kept, for its denoising loss", reads=True
    )
    retain_split: str | None = flag(
        None,
        "its split (none: validation, or all without splits)",
        choices=tuple(SPLIT_NAMES),
        requires="retain_dataset",
    )
    fit_split: str | None = flag(
        None, "split of --dataset for the loss (none: --split)", choices=tuple(SPLIT_NAMES), requires="retain_dataset"
    )
    loss_rows: int = flag(256, "rows of each dataset that the loss is taken over at most", min=2)

    def general_rows(self):
        """The general prompts as rows; none of them with `none`. Raises EvaluationError."""
        if self.general_prompts == "none":
            return []
        return generation.general_rows(None if self.general_prompts == "shipped" else Path(self.general_prompts))

    def problems(self):
        if self.general_prompts not in ("shipped", "none") and not Path(self.general_prompts).is_file():
            yield f"--general_prompts {self.general_prompts}: there is no such file (or write shipped, or none)"
        if self.retain_dataset:
            yield from folder_problems("--retain_dataset", self.retain_dataset)


def forgetting(rows, images, opened, args, device="cpu", *, dataset=None, losses=None, folder="."):
    """The "forgetting" of report.json: {"prompts", "summary", "by", "learned", "kept", "words", "all", ...}.

    rows      the general prompts as generation.Row; may be empty
    images    {label: {row number: path}}: what each model generated of them; the first label is the reference
    opened    measuring.Networks
    args      measuring.EvalNetworkArgs
    dataset   Measured of the dataset's captions with the same reference, or None
    losses    {"fit": {label: float64 [rows]}, "retain": {...}}, the reference first, or None
    folder    of the report: paths are relative to it

    "all" has kept, and learned where it was measured, by every measure that there are values for. "by" names the first
    that has both, or else the first: the other entries are by it.
    """
    measured = _measured(rows, images, opened, args, device)
    values = _values(measured) | {f"{name}_loss": by_label for name, by_label in (losses or {}).items()}
    fit = {} if dataset is None else {name: by_side[dataset.sides[-1]] for name, by_side in dataset.values.items()}
    fit |= {name: values[name] for name in values if name.endswith("_loss")}
    warnings, known = (one.warnings if one else [] for one in (measured, dataset))
    every, left_out, measures = {}, measured.left_out if measured else [], RETENTION_MEASURES
    if opened.checker and opened.checker.has_roles:  # what can be measured, in the order of trust
        measures = {"checker": retention_measure("checker", opened.checker)} | measures
    for by, measure in measures.items():
        if measure.retain in values:
            results, nothing = _judge(by, measure, fit.get(measure.fit), values[measure.retain])
            left_out = left_out + nothing
            if results["kept"]:
                every[by] = results
    shown = next((by for by in every if every[by]["learned"]), next(iter(every), None))
    chosen = every.get(shown, {"learned": {}, "kept": {}, "words": dict.fromkeys(("learned", "kept"), UNKNOWN)})
    return {
        "prompts": [] if measured is None else _records(measured, values, folder),
        "summary": {
            name: {label: statistics.mean_of(own).as_dict() for label, own in by_label.items()}
            for name, by_label in values.items()
        },
        "by": shown,
        "retained_metric": measures[shown].retain if shown else None,
        "learned": chosen["learned"],
        "kept": chosen["kept"],
        "words": {**chosen["words"], **{name: opened.table[name].means for name in values}},
        "all": every,
        "left_out": [
            one | {"metric": _drift(one["metric"])} | ({"on": "general prompts"} if one["code"] == "captions" else {})
            for one in left_out
        ],
        "warnings": [one | {"on": "general prompts"} for one in warnings if one not in known],
    }


def _measured(rows, images, opened, args, device):
    """Measured of the general prompts, the reference's images in place of the true ones; None without prompts."""
    if not rows:
        return None
    reference = next(iter(images.values()))
    rows = [replace(row, image=reference.get(row.number)) for row in rows]
    offered = [name for name, metric in opened.table.items() if metric.measured_on == "both" or name in DRIFTS]
    offered = [name for name in offered if not args.metrics or name in args.metrics]
    # What cannot be measured on these prompts is left out with its reason, even where it was named for the dataset
    return measuring.measure(rows, images, opened, replace(args, metrics=None, resolutions=None), device, offered)


def _values(measured):
    """{metric: {label: float64 [prompts]}}; the reference has no drift from itself."""
    if measured is None:
        return {}
    found = {_drift(metric): dict(by[measured.sides[-1]]) for metric, by in measured.values.items()}
    for name in DRIFTS.values():
        found.get(name, {}).pop(measured.models[0], None)
    if "drift_clip" in found:
        found["drift_clip"] = {label: 100 - values for label, values in found["drift_clip"].items()}
    return {name: by_label for name, by_label in found.items() if by_label}


def _drift(metric):
    """The name of a metric on the general prompts, where the reference's image stands for the true one."""
    return DRIFTS.get(metric, metric)


def _judge(by, measure, fit, retain):
    """({"learned": {label: ...}, "kept": ..., "words": ...}, notes on what has no share) of all but the reference."""
    results, nothing = {"learned": {}, "kept": {}, "words": {"learned": measure.learned, "kept": measure.kept}}, []
    reference, *others = retain
    for label in others:
        pair = (fit[label], fit[reference]) if fit and label in fit else None
        try:
            learned, kept = learned_and_kept(by, pair, (retain[label], retain[reference]))
        except NothingToKeep as problem:
            metric = f"learned and kept by {by}"
            nothing.append(note("nothing_to_keep", metric=metric, model=label, mean=problem.mean, rows=problem.rows))
            continue
        results["kept"][label] = kept.as_dict()
        if learned is not None:
            results["learned"][label] = learned.as_dict()
    return results, nothing


def _records(measured, values, folder):
    """A line for each general prompt: {"row", "caption", "category", "images", "values"}."""
    of_prompts = {name: by_label for name, by_label in values.items() if not name.endswith("_loss")}
    records = measuring.row_records(measured, of_prompts, folder)
    for record, row in zip(records, measured.rows, strict=True):
        record["category"] = row.category
        del record["truth"]  # the reference's image, which stands among the images
    return records
