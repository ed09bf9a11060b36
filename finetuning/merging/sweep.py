"""The sweep: the same prompts and seeds at every ratio, side by side, and the ratio that gives most for what it costs.

The merged weights are made in memory and put into one pipeline; none are written.

Writes to --output_dir: ratio-R/*.png, grid.png (a row for each prompt, a column for each ratio), sweep.json with all
that made them and every row's results; with a metric also curve.png and frontier.md. The same command continues a sweep
that was interrupted, and one with more ratios generates only those.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, SEEDS, UserError, as_dict, flag, flags_of, flags_without_effect, paths_read
from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import EvaluationError
from finetuning.families import generation
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import SCHEDULERS
from finetuning.files import atomic_file, output_problems, read_text, sha256, write_image, write_json, write_text
from finetuning.merging.methods import bound
from finetuning.merging.model_flags import MixArgs, open_all
from finetuning.merging.ratios import parse_ratios
from finetuning.merging.recipe import recipe_of
from finetuning.rng import torch_generator

SETTINGS = "settings.json"
SHAPES_CHECKER = "finetuning.shapes.checker"  # what --metric shapes named before there was --checker


@dataclass
class SweepArgs(MixArgs):
    """Sweep"""

    output_dir: str = flag(
        REQUIRED, "where images, grid.png and sweep.json go; a sweep that is there is continued", affects_result=False
    )
    ratios: list[str] = flag(["0:1:0.1"], "ratios to try: numbers, or FROM:TO:STEP", affects_result=False)
    prompts_in: list[str] | None = flag(
        None, "prompts of what was trained: texts, or names of text files with one on each line"
    )
    prompts_out: list[str] | None = flag(None, "prompts of what was not, which the base can generate; as --prompts_in")
    seed: list[int] = flag([0], "seeds of the images; each gives every prompt one", **SEEDS)
    guidance_scale: float = flag(7.5, "classifier-free guidance scale; 1 is none")
    num_inference_steps: int = flag(25, "sampling steps", min=1)
    scheduler: str | None = flag("dpm++", "sampler", choices=tuple(SCHEDULERS))
    size: str | None = flag(None, "side in pixels, or HEIGHTxWIDTH (none: the model's own)")
    batch_size: int = flag(4, "images generated, or rows measured, together", min=1, affects_result=False)
    metric: str | None = flag(
        None, "what is measured: loss on two datasets, what --checker reads off the images, or none (without the flag: "
        f"what is given; shapes is --checker {SHAPES_CHECKER})",
        choices=("loss", "checker", "shapes", "none"), affects_result=False,
    )  # fmt: skip
    checker: str | None = flag(
        None, "module or .py file that judges images, with a metric for what is learned, on --prompts_in, and one for "
        "what is retained, on --prompts_out (docs/evaluation.md)", affects_result=False,
    )  # fmt: skip
    fit_dataset: str | None = flag(
        None, "for loss: folder of what was trained; its validation split, or all of a folder without splits",
        affects_result=False, reads=True,
    )  # fmt: skip
    retain_dataset: str | None = flag(
        None, "for loss: the same of what should be kept", affects_result=False, reads=True
    )
    loss_rows: int = flag(256, "for loss: rows of each dataset at most", min=1, affects_result=False)
    grid_side: int = flag(160, "about how large an image of the grid is, in pixels", min=1, affects_result=False)

    @property
    def ratio(self):
        """The ratios as numbers, ascending; none where they cannot be read."""
        try:
            return sorted(parse_ratios(self.ratios))
        except ValueError:
            return []

    @property
    def ratio_flag(self):
        return "--ratios", self.ratio

    @property
    def checker_named(self):
        return self.checker or (SHAPES_CHECKER if self.metric == "shapes" else None)

    @property
    def measured_by(self):
        """A key of METRICS, or "none"."""
        if self.metric == "shapes":
            return "checker"
        given = "checker" if self.checker else "loss" if self.fit_dataset and self.retain_dataset else "none"
        return self.metric or given

    def problems(self):
        try:
            parse_ratios(self.ratios)
        except ValueError as problem:
            yield f"--ratios {problem}"
        for name in ("prompts_in", "prompts_out"):
            yield from _prompt_problems(f"--{name}", getattr(self, name) or [])
        if not (self.prompts_in or self.prompts_out or self.measured_by == "loss"):
            yield "say what to generate, --prompts_in and --prompts_out, or what to measure, --fit_dataset and so on"
        yield from generation.size_problems(self.size)
        if len(set(self.seed)) < len(self.seed):
            yield f"--seed {' '.join(map(str, self.seed))} names a seed twice"
        yield from output_problems(self.output_dir, paths_read(self), around=True)
        yield from self._metric_problems()

    def _metric_problems(self):
        if self.measured_by != "none" and self.ratio and not {0.0, 1.0} <= {*self.ratio}:
            yield f"--ratios {' '.join(self.ratios)}: a metric needs 0 (the base) and 1 (the tuned model) among them"
        for name in ("fit_dataset", "retain_dataset"):
            if (self.measured_by == "loss") != bool(getattr(self, name)):
                yield f"--{name} goes with --metric loss, which needs both datasets"
        if self.measured_by == "checker" and not self.checker_named:
            yield "--metric checker needs --checker"
        elif self.measured_by == "checker":
            for name in ("prompts_in", "prompts_out"):
                if not getattr(self, name):
                    yield f"--checker needs --{name}"
            yield from _checker_problems(self.checker_named, self.prompts_in or [], self.prompts_out or [])


def sweep(args):
    """Generate and measure at every ratio on the device that accelerate finds; returns lines. Raises ModelError."""
    from accelerate import PartialState

    device = PartialState().device
    return sweep_on(args, device, torch.float32 if device.type == "cpu" else torch.float16)


def sweep_on(args, device="cpu", dtype=torch.float32):
    """The same with the device and the precision of the pipeline; merging itself is fp32 on the CPU."""
    from finetuning.merging.merged_pipeline import MergedPipeline

    sources, folder = args.open_models(args.origin), Path(args.output_dir)
    prompts = {"in": _prompts(args.prompts_in), "out": _prompts(args.prompts_out)}
    recipe = recipe_of("sweep", as_dict(args), sources)
    recipe["run"] |= {f"prompts_{kind}": own for kind, own in prompts.items()} | {"dtype": str(dtype)}
    merged = MergedPipeline(args, sources, args.scheduler, device, dtype)
    metric = METRICS[args.measured_by](args, merged, *prompts.values()) if args.measured_by != "none" else None
    harmless = {*flags_without_effect(SweepArgs), "run"}  # all that the images depend on, ready for JSON
    settings = {name: value for name, value in recipe.items() if name not in harmless}
    _claim(folder, settings | {name: recipe["run"][name] for name in ("prompts_in", "prompts_out", "dtype", "inputs")})
    measured = folder / f"measured-{args.measured_by}.json"
    known = _known(measured, {"metric": args.measured_by, **metric.facts} if metric else {})

    rows = {kind: list(product(own, args.seed)) for kind, own in prompts.items()}
    columns = []  # [ratios] of the images, as small as the grid shows them
    with tqdm(total=len(args.ratio) * (1 + sum(map(len, rows.values()))), desc="sweep") as bar:
        for ratio in args.ratio:
            place = folder / f"ratio-{ratio:g}"
            images = [_generate(args, merged, ratio, place, kind, own, bar) for kind, own in rows.items()]
            columns.append([image.copy() for own in images for image in own])
            for image in columns[-1]:
                image.thumbnail((args.grid_side, args.grid_side), Image.Resampling.LANCZOS)
            if metric and f"{ratio:g}" not in known["ratios"]:
                learned, retained = metric.measure(ratio, *images)
                known["ratios"][f"{ratio:g}"] = {"learned": learned.tolist(), "retained": retained.tolist()}
                write_json(measured, known)
            bar.update()

    lines = [warning for source in sources for warning in source.warnings] + merged.warnings
    if any(rows.values()):
        write_image(folder / "grid.png", _grid(args, rows, columns))
        lines.append(
            f"{sum(map(len, rows.values()))} images at each of {len(args.ratio)} ratios: {folder / 'grid.png'}"
        )
    if metric:
        results = [known["ratios"][f"{ratio:g}"] for ratio in args.ratio]
        summary, more = _judge(args, metric, results, folder)
        recipe["run"] |= {**known, "ratios": dict(zip(args.ratio, results, strict=True)), "summary": summary}
        lines += more
    write_json(folder / "sweep.json", recipe)
    return lines


# -- images ------------------------------------------------------------------------------------------------------


def _generate(args, merged, ratio, folder, kind, rows, bar):
    """The PIL images of `rows` [(prompt, seed)]; those that are in the folder are read, the others generated."""
    from finetuning.evaluation.generation import generate_missing

    def make(part):
        merged.set(ratio)
        prompts, seeds = zip(*rows[part], strict=True)
        generators = [torch_generator(seed, "picture") for seed in seeds]  # as generate_images.py has it
        return generation.generate(
            merged.pipeline, prompts, generators, batch_size=len(prompts), size=generation.parse_size(args.size),
            guidance_scale=args.guidance_scale, num_inference_steps=args.num_inference_steps,
        )  # fmt: skip

    paths = [folder / f"{kind}-{index // len(args.seed):03d}-seed{seed}.png" for index, (_, seed) in enumerate(rows)]
    generate_missing(paths, args.batch_size, make, bar.update)
    return [Image.open(path).convert("RGB") for path in paths]


def _grid(args, rows, columns):
    """A row for each prompt and seed, those of --prompts_out last; a column for each ratio."""
    from finetuning.evaluation.grid import labelled_grid

    prefix = {"in": "", "out": "unrelated: " if all(rows.values()) else ""}
    labels = [
        f"{prefix[kind]}{prompt}" + (f" (seed {seed})" if len(args.seed) > 1 else "")
        for kind, own in rows.items()
        for prompt, seed in own
    ]
    return labelled_grid(list(zip(*columns, strict=True)), labels, _headings(args), args.grid_side)


def _headings(args):
    """The ratios, and the names of base and tuned model where the result is one of them as it is."""
    results = [None if args.block_ratios else bound(args, "", ratio) for ratio in args.ratio]
    names = [f" {('base', 'tuned')[one]}" if isinstance(one, int) else "" for one in results]
    return [f"{ratio:g}{name}" for ratio, name in zip(args.ratio, names, strict=True)]


# -- prompts -----------------------------------------------------------------------------------------------------


def _prompts(words):
    """The prompts of --prompts_in or --prompts_out, each once: lines of files, and texts."""
    found = []
    for word in words or []:
        lines = read_text(word).splitlines() if os.path.isfile(word) else [word]
        found += [line.strip() for line in lines if line.strip()]
    return list(dict.fromkeys(found))


def _prompt_problems(name, words):
    for word in words:
        try:
            if not _prompts([word]):
                yield f"{name} {word} has no prompts in it"
        except (OSError, UserError) as error:
            yield f"{name} {word} cannot be read: {error}"
        if word.endswith(".txt") and not os.path.isfile(word):
            yield f"{name} {word}: there is no such file"


def _checker_problems(name, *words):
    """What keeps a checker from judging the prompts."""
    try:
        checker = load_checker(name)
        checker.require_roles()
        checker.check([prompt for own in words for prompt in _prompts(own)])
    except EvaluationError as problem:
        yield str(problem)
    except (OSError, UserError):  # _prompt_problems names the file
        return


# -- what is measured ----------------------------------------------------------------------------------------------

AXES = ("learned", "retained")


@dataclass(frozen=True)
class SweepMetric:
    """A measure of both, for one sweep.

    measure   (ratio, images of --prompts_in, images of --prompts_out) -> learned [rows] and retained [rows], float64,
              higher is better, the same rows at every ratio. The images stand by prompt and then by seed
    facts     what the results depend on besides the images, ready for JSON
    learned, retained  words for the axes
    """

    measure: Callable
    facts: dict
    learned: str
    retained: str


def checker_metric(args, merged, prompts_in, prompts_out):
    """The metrics of --checker with the roles "learned" and "retained". A row is a prompt: the mean over all seeds."""
    checker = load_checker(args.checker_named)
    checker.require_roles()
    captions_in, captions_out = ([one for one in prompts for _ in args.seed] for prompts in (prompts_in, prompts_out))

    def by_prompt(metric, images, captions):
        return torch.from_numpy(checker.values(metric, images, captions)).view(-1, len(args.seed)).mean(1)

    def measure(ratio, images_in, images_out):
        return (
            by_prompt(checker.learned, images_in, captions_in),
            by_prompt(checker.retained, images_out, captions_out),
        )

    titles = (checker.metrics[name].title for name in (checker.learned, checker.retained))
    return SweepMetric(measure, checker.facts, *(f"{what}: {title}" for what, title in zip(AXES, titles, strict=True)))


def loss_metric(args, merged, prompts_in, prompts_out):
    """Minus the denoising loss of each row of --fit_dataset (learned) and of --retain_dataset (retained)."""
    from finetuning.evaluation.denoising import PipelineLoss

    how = {
        "size": generation.parse_size(args.size),
        "max_rows": args.loss_rows,
        "seed": args.seed[0],
        "say": tqdm.write,
    }
    losses = open_all(
        [partial(PipelineLoss, merged.pipeline, folder, **how) for folder in (args.fit_dataset, args.retain_dataset)]
    )

    def measure(ratio, images_in, images_out):
        merged.set(ratio)
        return [-loss(args.batch_size) for loss in losses]

    facts = {"size": list(losses[0].size), "datasets": [_content(one.images, one.rows) for one in losses]}
    words = (f"{what}: minus the loss on --{of}_dataset" for what, of in zip(AXES, ("fit", "retain"), strict=True))
    return SweepMetric(measure, facts, *words)


def _content(images, chosen):
    """{"rows": ..., "sha256": ...} of the rows that are measured: their images and captions."""
    digest = hashlib.sha256()
    for row in (images.rows[number] for number in chosen):
        digest.update(repr((sha256(row.image), row.captions)).encode())
    return {"rows": chosen, "sha256": digest.hexdigest()}


METRICS = {"loss": loss_metric, "checker": checker_metric}

# -- results -----------------------------------------------------------------------------------------------------


def _judge(args, metric, results, folder):
    """(summary, lines to print); writes curve.png and frontier.md."""
    from finetuning.merging import frontier

    summary = frontier.summary(args.ratio, *([one[what] for one in results] for what in ("learned", "retained")))
    with atomic_file(folder / "curve.png") as temporary:
        frontier.plot({"merge": summary}, temporary, metric.learned, metric.retained)
    heading = "# Ratios from base (0) to tuned (1)"
    text = f"{heading}\n\n{metric.learned}; {metric.retained}\n\n{frontier.table(summary)}"
    write_text(folder / "frontier.md", text)
    best, lines = summary["knee"]["ratio"], [f"curve: {folder / 'curve.png'}, table: {folder / 'frontier.md'}"]
    lines.append(f"knee: {summary['knee']['sentence']}")
    if best is not None:
        share = next(point["knee_share"] for point in summary["points"] if point["ratio"] == best)
        lines[-1] += f" (it is the knee in {share:.0%} of {summary['resamples']} resamples of the rows)"
        lines.append(f"this writes it: {_merge_command(args, best)}")
    return summary, lines


def _merge_command(args, ratio):
    """The command that writes the model of a ratio."""
    words = ["python", "merge_checkpoints.py"]
    for name, one in flags_of(MixArgs).items():
        value = getattr(args, name)
        if value is not None and value != one.default:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--ratio", f"{ratio:g}", "--output_dir", f"{Path(args.output_dir)}-merged"])


# -- what was done before ----------------------------------------------------------------------------------------


def _claim(folder, settings):
    """Take the folder for these settings. Raises ModelError where it holds a sweep of others."""
    path = folder / SETTINGS
    if path.is_file():
        known = _json(path)
        changed = [name for name in settings | known if settings.get(name) != known.get(name)]
        if changed:
            raise ModelError(
                f"--output_dir {folder} holds a sweep with other settings ({', '.join(changed)}): name another folder, "
                "or remove it"
            )
        return
    write_json(path, settings)


def _known(path, facts):
    """What was measured before under the same facts: {**facts, "ratios": {ratio: results}}."""
    known = {**facts, "ratios": {}}
    if path.is_file():
        before = _json(path)
        if {**before, "ratios": {}} == known:
            return before
    return known


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is broken ({error}): remove it, and what it held is made again") from error
