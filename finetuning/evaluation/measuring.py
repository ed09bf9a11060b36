"""The metrics of one or more models' images: row by row, and as sets beside the true images.

    opened = open_networks(args, device)
    measured = measure(rows, {"original": {0: Path(...), ...}, "tuned": {...}}, opened, args, device)
    report |= summarise(measured, folder)

The first model is the reference: every difference is against it, paired by row. A second run of the reference with
another seed, as one model more, shows how far two seeds lie apart: the noise floor.
"""

import os
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from finetuning.cli import first_few, flag
from finetuning.evaluation import networks, statistics
from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import EvaluationError, dataset_metrics, table
from finetuning.evaluation.preprocessing import POLICY, read_images
from finetuning.evaluation.words import note, reason

FEW = 50  # images; with fewer no metric is reliable


@dataclass
class EvalNetworkArgs:
    """Metrics"""

    checker: str | None = flag(
        None, "a judge of images of your own: a module or .py file with METRICS and scores() (docs/evaluation.md), "
        "e.g. finetuning.shapes.checker",
    )  # fmt: skip
    metrics: list[str] | None = flag(
        None, f"which, of {', '.join(dataset_metrics())} and those of the --checker (none: all that can be measured)"
    )
    protocol: str = flag(
        "clean", "how images are prepared for Inception: clean as clean-fid does, legacy as pytorch-fid and older "
        "papers do; metrics of the two are not comparable", choices=("clean", "legacy"),
    )  # fmt: skip
    resolutions: list[int] | None = flag(
        None,
        "sides in pixels that all images are brought to, each measured apart (none: the side of the "
        "first model's images)",
        min=8,
    )
    inception_weights: str | None = flag(None, "file of FID's Inception weights (none: torch-fidelity's download)")
    lpips_trunk: str | None = flag(None, "file of AlexNet's weights for LPIPS (none: torchvision's download)")
    clip_model: str = flag(networks.CLIP, "CLIP: a folder, or a name on the Hub", reads=True)
    feature_cache: str | None = flag(
        None, "folder where Inception's features are kept by content (none: nowhere)", affects_result=False
    )
    num_workers: int = flag(0, "processes that read images; 0: none beside the main one", min=0, affects_result=False)
    eval_batch_size: int = flag(16, "images that a network is given together", min=1)

    def problems(self):
        try:  # to know the metrics of a checker it has to be loaded
            known = dataset_metrics(self.load_checker())
        except EvaluationError as problem:
            yield str(problem)
        else:
            for name in (name for name in self.metrics or [] if name not in known):
                hint = "" if self.checker else "; a --checker adds its own"
                yield f"--metrics {name} must be one of {', '.join(known)}{hint}"
        for name in ("metrics", "resolutions"):
            given = getattr(self, name) or []
            if len(set(given)) < len(given):
                yield f"--{name} {' '.join(map(str, given))} names one twice"
        for name in ("inception_weights", "lpips_trunk"):
            if getattr(self, name) and not Path(getattr(self, name)).is_file():
                yield f"--{name} {getattr(self, name)}: there is no such file"

    def load_checker(self):
        """The Checker of --checker, or None. Raises EvaluationError."""
        return load_checker(self.checker) if self.checker else None


@dataclass(frozen=True)
class Networks:
    """What judges images: the opened networks {name: (network, Weights)}, why others are missing, and the Checker."""

    found: dict
    missing: dict
    checker: object = None

    @property
    def table(self):
        """{name: Metric} of all metrics."""
        return table(self.checker)


@dataclass
class Measured:
    """What was measured of several models on the same rows. `models` are their labels, the first is the reference.

    values    {metric: {side: {label: float64 [rows]}}} of the metrics that have a value for each row
    features  {side: {label: float64 [rows, 2048]}} of Inception, truth {side: float64 [rows, 2048]}
    """

    rows: list
    images: dict  # {label: [path of each row]}
    protocol: str
    sides: list
    metrics: dict  # {name: Metric} of those that were measured
    table: dict  # {name: Metric} of all
    values: dict = field(default_factory=dict)
    features: dict = field(default_factory=dict)
    truth: dict = field(default_factory=dict)
    weights: list = field(default_factory=list)
    left_out: list = field(default_factory=list)
    warnings: list = field(default_factory=list)

    @property
    def models(self):
        return list(self.images)


# -- networks --------------------------------------------------------------------------------------------------------


def open_networks(args, device="cpu"):
    """The Networks that the metrics need, those of --metrics or all.

    Raises EvaluationError where the weights of a metric that was asked for by name are not to be had.
    """
    openers = {
        "inception": partial(networks.inception, args.inception_weights, device),
        "lpips": partial(networks.lpips_network, args.lpips_trunk, device),
        "clip": partial(networks.clip, args.clip_model, device),
    }
    checker = args.load_checker()
    wanted = {table(checker)[name].network for name in args.metrics or dataset_metrics(checker)}
    found, missing = {}, {}
    for name in (name for name in openers if name in wanted):
        try:
            found[name] = openers[name]()
        except networks.Unavailable as problem:
            missing[name] = str(problem)
    if args.metrics and missing:
        raise EvaluationError("\n".join(missing.values()))
    return Networks(found, missing, checker)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(rows, images, opened, args, device="cpu", offered=None):
    """All metrics of all models, a Measured.

    rows      generation.Row: number, caption, and the true image or None
    images    {label: {row number: path}}; the first label is the reference
    opened    Networks
    offered   names of the metrics that make sense here (none: all of a dataset); with --metrics those that are named

    Raises EvaluationError: rows without an image, fewer than two rows, images that cannot be read, a metric asked
    for by name that cannot be had.
    """
    _check(rows, images)
    paths = {label: [Path(own[row.number]) for row in rows] for label, own in images.items()}
    sizes = _sizes([*(path for own in paths.values() for path in own), *(row.image for row in rows if row.image)])
    sides = args.resolutions or [min(min(sizes[path]) for path in next(iter(paths.values())))]
    metrics, left_out = _choose(rows, sides, opened, args, offered)
    measured = Measured(rows, paths, args.protocol, list(sides), metrics, opened.table, left_out=left_out)
    used = dict.fromkeys(metric.network for metric in metrics.values() if metric.network)
    for weights in (opened.found[name][1] for name in used):
        measured.weights += weights if isinstance(weights, list) else [weights]
    for side in sides:
        for metric, values in _row_values(measured, side, opened, args).items():
            measured.values.setdefault(metric, {})[side] = values
        if any(metric.network == "inception" for metric in metrics.values()):
            network, weights = opened.found["inception"]
            how = (side, network, args.protocol, weights, args.feature_cache, args.eval_batch_size, args.num_workers)
            measured.truth[side] = networks.features_of([row.image for row in rows], *how, device)
            measured.features[side] = {label: networks.features_of(own, *how, device) for label, own in paths.items()}
    _check_values(measured)
    measured.warnings = list(_warnings(measured, opened.found, sizes))
    return measured


def _check(rows, images):
    """Raises EvaluationError with all that does not fit together."""
    problems, numbers = [], [row.number for row in rows]
    if len(rows) < 2:
        problems.append(f"{len(rows)} row(s): an interval needs at least 2 captions with their images")
    for label, own in images.items():
        missing, stray = [number for number in numbers if number not in own], sorted(own.keys() - set(numbers))
        if missing:
            problems.append(f"{label}: no image for {len(missing)} of {len(rows)} captions: rows {first_few(missing)}")
        if stray:
            problems.append(f"{label}: {len(stray)} images belong to no caption: rows {first_few(stray)}")
    if problems:
        raise EvaluationError("\n".join(problems))


def _choose(rows, sides, opened, args, offered):
    """({name: Metric}, [note, ...]). Raises EvaluationError for those asked for by name."""
    offered = dataset_metrics(opened.checker) if offered is None else offered
    chosen, left_out = {}, []
    for name, metric in opened.table.items():
        if name in offered and (not args.metrics or name in args.metrics):
            if why := _why_not(name, metric, rows, sides, opened):
                left_out.append(why)
            else:
                chosen[name] = metric
    if args.metrics and left_out:
        raise EvaluationError("\n".join(f"--metrics {one['metric']}: {reason(one)}" for one in left_out))
    return chosen, left_out


def _why_not(name, metric, rows, sides, opened):
    """The note that says why a metric cannot be measured, or None."""
    without_truth = [row.number for row in rows if row.image is None]
    if opened.checker and name in opened.checker.metrics:
        strange = opened.checker.strange(row.caption for row in rows)
        if strange := [row.caption for row in rows if row.caption in strange]:
            return note("captions", metric=name, checker=opened.checker.name, captions=strange, of=len(rows))
    elif metric.needs_truth and without_truth:
        return note("no_truth", metric=name, rows=without_truth, of=len(rows))
    elif name == "lpips" and min(sides) < networks.SMALLEST_LPIPS:
        return note("too_small", metric=name, smallest=networks.SMALLEST_LPIPS, side=min(sides))
    elif metric.network and metric.network not in opened.found:
        why = opened.missing.get(metric.network, f"its network {metric.network} was not opened")
        return note("no_weights", metric=name, network=metric.network, reason=why)
    return None


def _row_values(measured, side, opened, args):
    """{metric: {label: float64 [rows]}} at one side: every image is read once, and all metrics are taken of it."""
    metrics = {name: metric for name, metric in measured.metrics.items() if metric.per == "row"}
    if not metrics:
        return {}
    captions, labels = [row.caption for row in measured.rows], measured.models
    clip, checker = opened.found.get("clip", [None])[0], opened.checker
    checked = [name for name in metrics if checker and name in checker.metrics]
    texts = clip.texts(captions) if "clip_score" in metrics else None
    values = {name: {label: [] for label in labels} for name in metrics}
    needs_truth = any(metric.needs_truth for metric in metrics.values())
    for start, sets in _batches(measured, side, args, with_truth=needs_truth):
        rows = slice(start, start + len(sets[0]))
        truth = sets.pop() if len(sets) > len(labels) else None
        true_images = clip.images(truth) if "clip_image" in metrics else None
        for label, generated in zip(labels, sets, strict=True):
            images = clip.images(generated) if {"clip_score", "clip_image"} & set(metrics) else None
            scores = [checker.scores(*pair) for pair in zip(generated, captions[rows], strict=True) if checked]
            for name in metrics:
                match name:
                    case "clip_score":
                        own = 100 * np.maximum((images * texts[rows]).sum(1), 0)
                    case "clip_image":
                        own = 100 * (images * true_images).sum(1)
                    case "lpips":
                        own = networks.lpips_of(opened.found["lpips"][0], generated, truth)
                    case _:
                        own = [one.get(name, np.nan) for one in scores]
                values[name][label].extend(own)
    return {name: {label: np.asarray(own, np.float64) for label, own in by.items()} for name, by in values.items()}


def _batches(measured, side, args, with_truth):
    """(first row, [PIL images of each model, and of the truth]) after another, read by one loader."""
    sets = [*measured.images.values(), *([[row.image for row in measured.rows]] if with_truth else [])]
    paths = [path for row in zip(*sets, strict=True) for path in row]
    size, title = args.eval_batch_size * len(sets), f"metrics at {side} px"
    start = 0
    for batch in read_images(paths, side, size, args.num_workers, title=title):
        images = [Image.fromarray(pixels) for pixels in batch]
        yield start, [images[index :: len(sets)] for index in range(len(sets))]
        start += len(images) // len(sets)


def _check_values(measured):
    """Raises EvaluationError where a value is not a finite number."""
    problems = [
        f"{metric} of {label} at {side} px is not a finite number: rows {first_few(bad)}"
        for metric, by_side in measured.values.items()
        for side, by_label in by_side.items()
        for label, values in by_label.items()
        if (bad := [measured.rows[index].number for index in np.flatnonzero(~np.isfinite(values))])
    ]
    if problems:
        raise EvaluationError("\n".join(problems))


# -- warnings --------------------------------------------------------------------------------------------------------


def _warnings(measured, found, sizes):
    if len(measured.rows) < FEW:
        yield note("few_images", images=len(measured.rows))
    if "fid" in measured.metrics:
        for side, label in product(measured.sides, measured.models):  # few images alone make an FID large
            own, truth = measured.features[side][label], measured.truth[side]
            images = min(len(own), len(truth))
            if 4 <= images < statistics.ENOUGH:
                bias, unbiased = statistics.frechet_bias(own, truth)
                yield note("fid_bias", model=label, side=side, images=images, bias=bias, value=bias + unbiased)
            elif images < 4:
                yield note("fid_bias_unknown", model=label, side=side, images=images)
    for weights in measured.weights:
        if not weights.published:
            code = "unknown_weights" if weights.published is None else "not_published"
            yield note(code, name=weights.name, origin=weights.origin)
    if "clip_score" in measured.metrics and (cut := found["clip"][0].truncated):
        yield note("cut_captions", captions=cut)
    if any(metric.needs_truth for metric in measured.metrics.values()):
        true = _span([sizes[row.image] for row in measured.rows])
        for label, paths in measured.images.items():
            own = _span([sizes[path] for path in paths])
            if own != true:
                yield note("unlike_sizes", model=label, own=own, truth=true, sides=measured.sides)


def _span(sizes):
    """Sizes in words, "64x64" or "32x64 to 512x512"."""
    ends = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    return " to ".join(f"{width}x{height}" for width, height in dict.fromkeys(ends))


def _sizes(paths):
    """{path: (width, height)} from the headers alone. Raises EvaluationError with all that cannot be opened."""
    sizes, problems = {}, []
    for path in dict.fromkeys(paths):
        try:
            with Image.open(path) as image:
                sizes[path] = image.size
        except Exception as error:  # on broken files the decoders also raise IndexError, TypeError, struct.error, ...
            problems.append(f"{path} cannot be read: {error}")
    if problems:
        raise EvaluationError("\n".join(problems))
    return sizes


# -- the summary -----------------------------------------------------------------------------------------------------


def summarise(measured, folder="."):
    """The parts of report.json that the metrics make: protocol, policy, sides, weights, summary, differences, rows, ...

    Paths are written relative to `folder`, the report's.
    """
    summary, differences, (reference, *others) = {}, {}, measured.models
    values = {metric: by_side[measured.sides[-1]] for metric, by_side in measured.values.items()}
    for metric in measured.metrics:
        summary[metric], differences[metric] = {}, {}
        for side in measured.sides:
            of = partial(_estimate, measured, metric, side)
            summary[metric][str(side)] = {label: of(label).as_dict() for label in measured.models}
            found = {label: of(label, reference) for label in others}
            differences[metric][str(side)] = {
                label: one.as_dict() | {"excludes_zero": bool(one.excludes_zero)} for label, one in found.items()
            }
    return {
        "protocol": measured.protocol,
        "policy": POLICY,
        "sides": measured.sides,
        "reference": reference,
        "weights": [asdict(one) for one in measured.weights],
        "metrics": {name: asdict(metric) for name, metric in measured.table.items()},
        "left_out": measured.left_out,
        "warnings": measured.warnings,
        "summary": summary,
        "differences": differences,
        "rows": row_records(measured, values, folder),
    }


def row_records(measured, values, folder="."):
    """[{"row", "caption", "truth", "images", "values"}] of {metric: {label: [rows]}}; paths relative to `folder`."""
    relative = lambda path: Path(os.path.relpath(path, folder)).as_posix()
    return [
        {
            "row": row.number,
            "caption": row.caption,
            "truth": row.image and relative(row.image),
            "images": {label: relative(paths[index]) for label, paths in measured.images.items()},
            "values": {name: {label: float(own[index]) for label, own in by.items()} for name, by in values.items()},
        }
        for index, row in enumerate(measured.rows)
    ]


def _estimate(measured, metric, side, label, reference=None):
    """The Estimate of a metric of a model, or of its paired difference from that of the reference."""
    if measured.metrics[metric].per == "row":
        own = measured.values[metric][side]
        return statistics.paired_difference(own[label], own[reference]) if reference else statistics.mean_of(own[label])
    own, truth = measured.features[side], measured.truth[side]
    if reference:
        return statistics.set_difference(metric, own[label], own[reference], truth)
    return statistics.set_estimate(metric, own[label], truth)
