"""The sweep: the same prompts and seeds at every ratio, side by side, and the ratio that gives most for what it costs.

The merged weights are made in memory and put into one pipeline; none are written. What can be measured stands in
measures.py.

Written to --output_dir: ratio-R/*.png, grid.png (a row for each prompt, a column for each ratio), sweep.json with all
that made them and every row's results; with a metric also curve.png and frontier.md. A sweep that was interrupted goes
on where it was, and one with more ratios draws only those.
"""

import json
import os
import re
import shlex
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, as_dict, flag
from finetuning.evaluation.grid import labelled_grid
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import SCHEDULERS
from finetuning.files import sha256, write_json
from finetuning.merging import frontier
from finetuning.merging.blend import Blend
from finetuning.merging.measures import METRICS
from finetuning.merging.methods import MethodArgs, bound, ratio_problems
from finetuning.merging.models import TunedArgs
from finetuning.merging.ratios import BlockRatios, parse_ratios
from finetuning.merging.recipe import recipe_of
from finetuning.rng import torch_generator
from finetuning.shapes.scenes import parse

SETTINGS = "settings.json"
MAY_CHANGE = (  # flags that no image depends on
    "output_dir", "ratios", "batch_size", "grid_side", "metric", "fit_dataset", "retain_dataset", "loss_rows",
    "cache_dir",
)  # fmt: skip


@dataclass
class SweepArgs(MethodArgs, TunedArgs):
    """Sweep"""

    output_dir: str = flag(REQUIRED, "where images, grid.png and sweep.json go; one that is there is gone on with")
    ratios: list[str] = flag(["0:1:0.1"], "ratios to try: numbers, or FROM:TO:STEP")
    block_ratios: list[str] | None = flag(None, "ratios of single blocks at every ratio of the sweep, as for a merge")
    prompts_in: list[str] | None = flag(
        None, "prompts of what was trained: texts, or text files with one on each line (a value that names a file is "
        "read)",
    )  # fmt: skip
    prompts_out: list[str] | None = flag(None, "prompts of what was not, which the base can draw; as --prompts_in")
    seed: list[int] = flag([0], "seeds of the images; each gives every prompt one")
    guidance_scale: float = flag(7.5, "classifier-free guidance scale; 1 is none")
    num_inference_steps: int = flag(25, "sampling steps")
    scheduler: str | None = flag("dpm++", "sampler", choices=tuple(SCHEDULERS))
    size: str | None = flag(None, "side in pixels, or HEIGHTxWIDTH (none: the model's own)")
    batch_size: int = flag(4, "images drawn, or rows measured, together")
    metric: str | None = flag(
        None, "what is measured: loss on two datasets; shapes, read off images of the shapes world; or none (without "
        "the flag: loss where both datasets are given)",
        choices=(*METRICS, "none"),
    )  # fmt: skip
    fit_dataset: str | None = flag(
        None, "for loss: folder of what was trained; its validation split, or all of a folder without splits"
    )
    retain_dataset: str | None = flag(None, "for loss: the same of what should be kept")
    loss_rows: int = flag(256, "for loss: rows of each dataset at most")
    grid_side: int = flag(160, "about how large an image of the grid is, in pixels")

    @property
    def ratio(self):
        """The ratios as numbers, ascending; none where they cannot be read."""
        try:
            return sorted(parse_ratios(self.ratios))
        except ValueError:
            return []

    @property
    def height_and_width(self):
        """(height, width) in pixels, or None for the model's own."""
        sides = [int(side) for side in self.size.split("x")] if self.size else []
        return (sides[0], sides[-1]) if sides else None

    @property
    def measured_by(self):
        """A key of METRICS, or "none"."""
        return self.metric or ("loss" if self.fit_dataset and self.retain_dataset else "none")

    def problems(self):
        try:
            parse_ratios(self.ratios)
        except ValueError as problem:
            yield f"--ratios {problem}"
        yield from ratio_problems("--ratios", self.ratio, self.method, self.curve)
        try:
            yield from ratio_problems("--block_ratios", BlockRatios(self.block_ratios).values, self.method, self.curve)
        except ValueError as problem:
            yield f"--block_ratios {problem}"
        for name in ("prompts_in", "prompts_out"):
            yield from _prompt_problems(f"--{name}", getattr(self, name) or [])
        if not (self.prompts_in or self.prompts_out or self.measured_by == "loss"):
            yield "say what to draw, --prompts_in and --prompts_out, or what to measure, --fit_dataset and so on"
        if self.size and not re.fullmatch(r"\d+(x\d+)?", self.size):
            yield f"--size {self.size} must be one side in pixels or HEIGHTxWIDTH"
        elif self.size and any(int(side) % 8 or not int(side) for side in self.size.split("x")):
            yield f"--size {self.size} must be a multiple of 8"
        for name in ("num_inference_steps", "batch_size", "loss_rows", "grid_side"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} must be at least 1"
        if len(set(self.seed)) < len(self.seed):
            yield f"--seed {' '.join(map(str, self.seed))} names a seed twice"
        inputs = [self.base, *self.tuned, *([self.origin] if self.origin else [])]
        if any(Path(self.output_dir).resolve() == Path(name).resolve() for name in inputs):
            yield f"--output_dir {self.output_dir} is one of the models: name another folder"
        yield from self._metric_problems()

    def _metric_problems(self):
        if self.measured_by != "none" and self.ratio and not {0.0, 1.0} <= {*self.ratio}:
            yield f"--ratios {' '.join(self.ratios)}: a metric needs 0 (the base) and 1 (the tuned model) among them"
        for name in ("fit_dataset", "retain_dataset"):
            given = getattr(self, name)
            if self.measured_by == "loss" and not given:
                yield f"--metric loss needs --{name}"
            elif given and self.measured_by != "loss":
                yield f"--{name} only goes with --metric loss, which needs both datasets"
        if self.measured_by == "shapes":
            for name in ("prompts_in", "prompts_out"):
                if not getattr(self, name):
                    yield f"--metric shapes needs --{name}"
                yield from _not_shapes(f"--{name}", getattr(self, name) or [])


def sweep(args, device="cpu", dtype=torch.float32):
    """Draw and measure at every ratio; returns lines for a person. Raises ModelError.

    device, dtype   of the pipeline; merging itself is fp32 on the CPU
    """
    sources, folder = args.open_models(args.origin), Path(args.output_dir)
    prompts_in, prompts_out = _prompts(args.prompts_in), _prompts(args.prompts_out)
    hashes = {path: sha256(path) for source in sources for path in source.files}
    recipe = recipe_of("sweep", as_dict(args), sources, hashes)
    recipe["run"] |= {"prompts_in": prompts_in, "prompts_out": prompts_out, "dtype": str(dtype)}
    blend = Blend(args, sources, args.scheduler, device, dtype)
    metric = METRICS.get(args.measured_by)
    measure, facts = metric.prepare(args, blend, prompts_in, prompts_out) if metric else (None, {})
    _claim(folder, _settings(recipe))
    measured = folder / f"measured-{args.measured_by}.json"
    known = _known(measured, {"metric": args.measured_by, **facts})

    asked = [list(product(prompts, args.seed)) for prompts in (prompts_in, prompts_out)]
    columns = []  # [ratios] of the images, as small as the grid shows them
    with tqdm(total=len(args.ratio) * (1 + sum(map(len, asked))), desc="sweep") as bar:
        for ratio in args.ratio:
            place = folder / f"ratio-{ratio:g}"
            drawn = [_draw(args, blend, ratio, place, *kind, bar) for kind in zip(("in", "out"), asked, strict=True)]
            columns.append([_reduced(image, args.grid_side) for images in drawn for image in images])
            if metric and f"{ratio:g}" not in known["ratios"]:
                learned, kept = measure(ratio, *drawn)
                known["ratios"][f"{ratio:g}"] = {"learned": learned.tolist(), "kept": kept.tolist()}
                _write_whole(measured, partial(write_json, content=known))
            bar.update()

    lines = [note for source in sources for note in source.notes] + blend.notes
    if any(asked):
        _grid(args, asked, columns).save(folder / "grid.png")
        lines.append(f"{sum(map(len, asked))} images at each of {len(args.ratio)} ratios: {folder / 'grid.png'}")
    if metric:
        results = [known["ratios"][f"{ratio:g}"] for ratio in args.ratio]
        summary, told = _judge(args, metric, results, folder)
        recipe["run"] |= {**known, "ratios": dict(zip(args.ratio, results, strict=True)), "summary": summary}
        lines += told
    write_json(folder / "sweep.json", recipe)
    return lines


# -- images ------------------------------------------------------------------------------------------------------


def _draw(args, blend, ratio, folder, kind, rows, bar):
    """The PIL images of `rows` [(prompt, seed)]; those that are in the folder are read, the others drawn and written.

    What is drawn together is drawn together again if any of it is missing: another number of rows may round otherwise.
    """
    names = [f"{kind}-{index // len(args.seed):03d}-seed{seed}.png" for index, (_, seed) in enumerate(rows)]
    size = dict(zip(("height", "width"), args.height_and_width or (), strict=False))
    images = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        paths = [folder / name for name in names[start : start + args.batch_size]]
        if not all(path.is_file() for path in paths):
            blend.set(ratio)
            drawn = blend.pipeline(
                [prompt for prompt, _ in part],
                guidance_scale=args.guidance_scale,
                num_inference_steps=args.num_inference_steps,
                generator=[torch_generator(seed, "picture") for _, seed in part],  # as generate_images.py has it
                **size,
            ).images
            folder.mkdir(parents=True, exist_ok=True)
            for path, image in zip(paths, drawn, strict=True):
                _write_whole(path, partial(image.save, format="PNG"))
        images += [Image.open(path).convert("RGB") for path in paths]
        bar.update(len(part))
    return images


def _grid(args, asked, columns):
    """A row for each prompt and seed, those of --prompts_out last; a column for each ratio."""
    kinds = ("", "unrelated: ") if all(asked) else ("", "")
    seeds = len(args.seed) > 1
    labels = [
        f"{kind}{prompt}" + (f" (seed {seed})" if seeds else "")
        for kind, rows in zip(kinds, asked, strict=True)
        for prompt, seed in rows
    ]
    return labelled_grid(list(zip(*columns, strict=True)), labels, _headings(args), args.grid_side)


def _headings(args):
    """The ratios, and the names of base and tuned model where the result is one of them as it is."""
    results = {ratio: None if args.block_ratios else bound(args, "", ratio) for ratio in args.ratio}
    names = {ratio: ("base", "tuned")[result] for ratio, result in results.items() if isinstance(result, int)}
    return [f"{ratio:g} {names.get(ratio, '')}".strip() for ratio in args.ratio]


def _reduced(image, side):
    """The image, at most `side` pixels high and wide."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _prompts(words):
    """The prompts of --prompts_in or --prompts_out, each once: lines of files, and texts."""
    found = []
    for word in words or []:
        lines = Path(word).read_text(encoding="utf-8").splitlines() if os.path.isfile(word) else [word]
        found += [line.strip() for line in lines if line.strip()]
    return list(dict.fromkeys(found))


def _prompt_problems(name, words):
    for word in words:
        try:
            if not _prompts([word]):
                yield f"{name} {word} has no prompts in it"
        except (OSError, UnicodeDecodeError) as error:
            yield f"{name} {word} cannot be read: {error}"
        if word.endswith(".txt") and not os.path.isfile(word):
            yield f"{name} {word}: there is no such file"


def _not_shapes(name, words):
    """What --metric shapes cannot read."""
    try:
        prompts = _prompts(words)
    except (OSError, UnicodeDecodeError):  # said already
        return
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError as problem:
            yield f"--metric shapes: {name}: {problem}"


# -- results -------------------------------------------------------------------------------------------------------


def _judge(args, metric, results, folder):
    """(summary, lines for a person); writes curve.png and frontier.md."""
    learned, kept = ([one[what] for one in results] for what in ("learned", "kept"))
    summary = frontier.summary(args.ratio, learned, kept)
    frontier.plot({"merge": summary}, folder / "curve.png", metric.learned, metric.kept)
    text = f"# Ratios from base (0) to tuned (1)\n\n{metric.learned}; {metric.kept}\n\n{frontier.table(summary)}"
    (folder / "frontier.md").write_text(text, encoding="utf-8")
    best, lines = summary["knee"]["ratio"], [f"curve: {folder / 'curve.png'}, table: {folder / 'frontier.md'}"]
    lines.append(f"knee: {summary['knee']['says']}")
    if best is not None:
        share = next(point["knee_share"] for point in summary["points"] if point["ratio"] == best)
        lines[-1] += f" (it is the knee in {share:.0%} of {summary['resamples']} resamples of the rows)"
        lines.append(f"this writes it: {_merge_command(args, best)}")
    return summary, lines


def _merge_command(args, ratio):
    """The command that writes the model of a ratio."""
    words = ["python", "merge_checkpoints.py"]
    for field in [*fields(TunedArgs), *fields(MethodArgs), *(f for f in fields(args) if f.name == "block_ratios")]:
        value, default = getattr(args, field.name), field.default
        if value is not None and value != default:
            words += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--ratio", f"{ratio:g}", "--output_dir", f"{Path(args.output_dir)}-merged"])


# -- what was done before ------------------------------------------------------------------------------------------


def _settings(recipe):
    """All that the images depend on, ready for JSON."""
    flags = {name: value for name, value in recipe.items() if name not in (*MAY_CHANGE, "run")}
    return flags | {name: recipe["run"][name] for name in ("prompts_in", "prompts_out", "dtype", "inputs")}


def _claim(folder, settings):
    """Take the folder for these settings. Raises ModelError where it holds a sweep of others."""
    path = folder / SETTINGS
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings | known if settings.get(name) != known.get(name)]
        if changed:
            raise ModelError(
                f"--output_dir {folder} holds a sweep with other settings ({', '.join(changed)}): name another folder, "
                "or remove it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(path, partial(write_json, content=settings))


def _known(path, facts):
    """What was measured before under the same facts: {**facts, "ratios": {ratio: results}}."""
    known = {**facts, "ratios": {}}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {**kept, "ratios": {}} == known:
            return kept
    return known


def _write_whole(path, write):
    """Let write(path) make a file that is whole or not there."""
    aside = path.with_name(f".{path.name}.incomplete")
    write(aside)
    os.replace(aside, path)
