"""Whether a fine-tune forgot: general prompts, and losses on what should be kept, against the original model.

The general prompts have no true images: there the original's own images are what drift is measured from.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from finetuning.cli import flag
from finetuning.data.reading import SPLIT_NAMES, DatasetError
from finetuning.diffusion.objective import NoiseSchedule
from finetuning.evaluation import generation as generating
from finetuning.evaluation import measuring, statistics
from finetuning.evaluation.denoising import load_rows, row_losses
from finetuning.evaluation.metrics import EvaluationError, table
from finetuning.evaluation.retention import RETENTION_MEASURES, learned_and_kept, retention_measure
from finetuning.families.sd import StableDiffusion

DRIFTS = {metric.drift_of: name for name, metric in table().items() if metric.drift_of}
UNKNOWN = "cannot be said: too little was measured"


@dataclass
class ForgettingArgs:
    """Forgetting"""

    general_prompts: str = flag(
        "shipped", "prompts of what should not be forgotten: shipped, a file (text with one on each line, or JSON), or "
        "none",
    )  # fmt: skip
    retain_dataset: str | None = flag(None, "folder with metadata.jsonl of what should be kept, for its denoising loss")
    retain_split: str | None = flag(
        None, "its split (none: validation, or all of a folder without splits)", choices=tuple(SPLIT_NAMES)
    )
    fit_split: str | None = flag(
        None, "split of the dataset whose loss is taken (none: the one that is drawn)", choices=tuple(SPLIT_NAMES)
    )
    loss_rows: int = flag(256, "rows of each dataset that the loss is taken over at most")

    def general_rows(self):
        """The general prompts as rows; none of them with `none`. Raises EvaluationError."""
        if self.general_prompts == "none":
            return []
        return generating.general_rows(None if self.general_prompts == "shipped" else Path(self.general_prompts))

    def problems(self):
        if self.general_prompts not in ("shipped", "none") and not Path(self.general_prompts).is_file():
            yield f"--general_prompts {self.general_prompts}: there is no such file (or write shipped, or none)"
        if self.retain_dataset and not Path(self.retain_dataset).is_dir():
            yield f"--retain_dataset {self.retain_dataset}: there is no such folder"
        for name in ("retain_split", "fit_split"):
            if getattr(self, name) and not self.retain_dataset:
                yield f"--{name} only goes with --retain_dataset"
        if self.loss_rows < 2:
            yield f"--loss_rows {self.loss_rows} must be at least 2: one row has no interval"


# -- the loss --------------------------------------------------------------------------------------------------------


def pipeline_losses(
    pipeline, folder, *, split=None, most=256, seed=0, batch_size=4, size=None, caption_column="text", say=print
):  # fmt: skip
    """The denoising loss of a Stable Diffusion pipeline on rows of a folder, float64 [rows] (see denoising.row_losses).

    size  (height, width) in pixels; none: the model's own

    The same rows, timesteps and noise for every model that is asked with the same seed. Raises EvaluationError.
    """
    own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    try:
        images, rows = load_rows(
            folder, pipeline.tokenizer, size or (own, own), split=split, most=most, seed=seed,
            caption_column=caption_column, say=say,
        )  # fmt: skip
    except DatasetError as problem:
        raise EvaluationError(str(problem)) from problem
    if len(rows) < 2:
        raise EvaluationError(f"{folder} has {len(rows)} row(s): the loss needs at least 2 for an interval")
    model = StableDiffusion.of_pipeline(pipeline)
    device, dtype = pipeline.device, pipeline.unet.dtype
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    schedule = NoiseSchedule.of(pipeline.scheduler)
    return row_losses(
        model, images, rows, schedule, seed=seed, batch_size=batch_size, device=device, autocast=autocast
    ).numpy()


# -- the report's part -----------------------------------------------------------------------------------------------


def forgetting(rows, images, opened, args, device="cpu", *, dataset=None, losses=None, folder="."):
    """The "forgetting" of report.json: {"prompts", "summary", "by", "learned", "kept", "words", "all", ...}.

    rows      the general prompts as generating.Row; may be empty
    images  {label: {row number: path}}: what each model drew of them; the first label is the reference
    opened    measuring.Networks
    args      measuring.EvalNetworkArgs
    dataset   Measured of the dataset's captions with the same reference, or None
    losses    {"fit": {label: float64 [rows]}, "retain": {...}}, the reference first, or None
    folder    of the report: paths are relative to it

    "all" has learned and kept by every yardstick that can be had, the rest of them by the one that "by" names.
    """
    measured, metrics = _measured(rows, images, opened, args, device), opened.table
    figures = _figures(measured)
    for name in ("fit", "retain") if losses else ():
        figures[f"{name}_loss"] = losses[name]
    left_out = [] if measured is None else [one | {"metric": _drift(one["metric"])} for one in measured.left_out]
    every, measures = {}, _measures(opened.checker)
    for by, pair in _pairs(figures, dataset, measures).items():
        results, failed = _judge(by, measures[by], *pair, next(iter(pair[0])))
        left_out += failed
        if results["learned"]:
            every[by] = results
    known = set() if dataset is None else set(dataset.warnings)
    shown = next(iter(every), None)
    chosen = every.get(shown, {"learned": {}, "kept": {}, "words": dict.fromkeys(("learned", "kept"), UNKNOWN)})
    return {
        "prompts": [] if measured is None else _records(measured, figures, folder),
        "summary": {
            name: {label: statistics.mean_of(values).as_dict() for label, values in by_label.items()}
            for name, by_label in figures.items()
        },
        "by": shown,
        "retained_metric": measures[shown].retain if shown else None,
        "learned": chosen["learned"],
        "kept": chosen["kept"],
        "words": {**chosen["words"], **{name: metrics[name].means for name in figures}},
        "all": every,
        "left_out": left_out,
        "warnings": [] if measured is None else [f"general prompts: {w}" for w in measured.warnings if w not in known],
    }


def _measures(checker):
    """{by: RetentionMeasure} of all that could be measured, in the order of trust."""
    own = {"checker": retention_measure("checker", checker)} if checker and checker.has_roles else {}
    return own | RETENTION_MEASURES


def _measured(rows, images, opened, args, device):
    """Measured of the general prompts, the reference's images in place of the true ones; None without prompts."""
    if not rows:
        return None
    reference = next(iter(images.values()))
    rows = [replace(row, image=reference.get(row.number)) for row in rows]
    drifts = [metric.drift_of for metric in opened.table.values() if metric.drift_of]
    offered = [name for name, metric in opened.table.items() if metric.measured_on == "both"] + drifts
    offered = tuple(name for name in offered if not args.metrics or name in args.metrics)
    # What cannot be had on these prompts is left out with its reason, even where it was named for the dataset.
    return measuring.measure(rows, images, opened, replace(args, metrics=None, resolutions=None), device, offered)


def _figures(measured):
    """{figure: {label: float64 [prompts]}}; the reference has no drift from itself."""
    if measured is None:
        return {}
    figures = {_drift(metric): dict(by[measured.sides[-1]]) for metric, by in measured.values.items()}
    for name in DRIFTS.values():
        figures.get(name, {}).pop(measured.models[0], None)
    if "drift_clip" in figures:
        figures["drift_clip"] = {label: 100 - values for label, values in figures["drift_clip"].items()}
    return {name: by_label for name, by_label in figures.items() if by_label}


def _drift(metric):
    """The name of a metric on the general prompts, where the original's image stands for the true one."""
    return DRIFTS.get(metric, metric)


def _pairs(figures, dataset, measures):
    """{by: ({label: what was trained}, {label: what should be kept})} of those that can be had, in order."""
    last = {} if dataset is None else {name: by_side[dataset.sides[-1]] for name, by_side in dataset.values.items()}
    fit = last | {name: figures[name] for name in figures if name.endswith("_loss")}
    pairs = {by: (fit.get(measure.fit), figures.get(measure.retain)) for by, measure in measures.items()}
    return {by: pair for by, pair in pairs.items() if None not in pair}


def _judge(by, measure, fit, retain, reference):
    """({"learned": {label: ...}, "kept": ..., "words": ...}, what has no share) of every model but the reference."""
    results = {"learned": {}, "kept": {}, "words": {"learned": measure.learned, "kept": measure.kept}}
    failed = []
    for label in (label for label in fit if label != reference and label in retain):
        try:
            learned, kept = learned_and_kept(by, (fit[label], fit[reference]), (retain[label], retain[reference]))
        except EvaluationError as problem:
            failed.append({"metric": f"learned and kept by {by}", "why": f"{label}: {problem}"})
            continue
        results["learned"][label], results["kept"][label] = learned.as_dict(), kept.as_dict()
    return results, failed


def _records(measured, figures, folder):
    """A line for each general prompt: {"row", "caption", "category", "images", "values"}."""
    of_prompts = {name: by_label for name, by_label in figures.items() if not name.endswith("_loss")}
    return [
        {
            "row": record["row"],
            "caption": record["caption"],
            "category": row.category,
            "images": record["images"],
            "values": {
                name: {label: float(values[index]) for label, values in by_label.items()}
                for name, by_label in of_prompts.items()
            },
        }
        for index, (row, record) in enumerate(zip(measured.rows, measuring.row_records(measured, folder), strict=True))
    ]
