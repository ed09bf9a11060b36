"""Did it learn, and what did it forget? Models drawn on the same captions and seeds, measured, in one report.

    python evaluate_model.py --dataset datasets/chalk --split validation --model original=models/mini-sd \\
        --model tuned=runs/chalk --general_prompts datasets/left_out_of_chalk.txt --guidance_scale 3 \\
        --output_dir runs/report

Reads   a folder of captioned images, of which --split is the truth; --model label=PATH, each a pipeline, Hub name or
        checkpoint-N, the first is the reference; --lora label=PATH, put on that first model; --images label=FOLDER,
        drawn elsewhere. --general_prompts are what should not be forgotten: 60 are shipped, a file replaces them.
Writes  into --output_dir: report.html (one file, for people), report.json, report.csv, report.md, and the images.
        Every figure has its n and a 95 % interval; the reference drawn with a second seed shows what is noise.
Go on   after an interruption: the same command again draws only what is missing.
Figures of FID, KID, LPIPS and CLIP need networks: the libraries' own downloads, or files named by --inception_weights,
--lpips_trunk and --clip_model. What cannot be had is left out, and the report says why.
"""

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from accelerate import PartialState

from finetuning.cli import REQUIRED, as_dict, flag, parse
from finetuning.data.reading import SPLIT_NAMES
from finetuning.evaluation.forgetting import ForgettingArgs, forgetting, pipeline_losses
from finetuning.evaluation.generation import DrawArgs, dataset_rows, draw, images_in
from finetuning.evaluation.measuring import EvalNetworkArgs, measure, open_networks, summarise
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.report import write_report
from finetuning.evaluation.words import verdict
from finetuning.families.lora_files import adaptable_components, attach, detach, read_lora, set_scale
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import ModelSource, open_pipeline

PACKAGES = ("torch", "diffusers", "transformers", "torch-fidelity", "lpips")


@dataclass
class Args(ForgettingArgs, EvalNetworkArgs, DrawArgs):
    """What is evaluated"""

    dataset: str = flag(REQUIRED, "folder of captioned images: the captions are drawn, the images are the truth")
    model: list[str] = flag(REQUIRED, "label=PATH of each model; the first is the reference", repeated=True)
    output_dir: str = flag(REQUIRED, "where the report and the images go")
    split: str | None = flag(
        None, "of the dataset (none: test, or all of a folder without splits)", choices=tuple(SPLIT_NAMES)
    )
    caption_column: str = flag("text", "where the captions stand in the metadata")
    max_rows: int | None = flag(None, "captions at most, drawn with --seed")
    lora: list[str] | None = flag(None, "label=PATH of LoRAs, each put on the first model", repeated=True)
    images: list[str] | None = flag(None, "label=FOLDER of images that were drawn elsewhere", repeated=True)
    by_order: bool = flag(False, "pair the --images with the captions by their order alone")
    noise_floor: bool = flag(True, "draw the reference with a second seed as well, to see what is noise")
    weights: str = flag("ema", "which weights of a run or checkpoint", choices=("ema", "raw"))
    base: str | None = flag(None, "the rest of the model for checkpoint folders (none: what the run started from)")
    vae: str | None = flag(None, "another autoencoder, e.g. stabilityai/sd-vae-ft-mse")
    dtype: str | None = flag(None, "none: fp16 on a GPU, fp32 without", choices=("fp16", "bf16", "fp32"))

    def problems(self):
        labels = [one.label for one in self.drawn] + [ModelSource.parse(text).label for text in self.images or []]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            yield f"two models would be called {', '.join(twice)}: name them, --model label=PATH"
        if len({one.folder for one in self.drawn}) < len(self.drawn):
            yield f"the labels {', '.join(labels)} differ in signs only: name them by other letters"
        if nameless := [label for label in labels if not re.search(r"\w", label)]:
            yield f"the label {' and '.join(map(repr, nameless))} has no letter or number in it: write label=PATH"
        if self.max_rows is not None and self.max_rows < 2:
            yield f"--max_rows {self.max_rows} must be at least 2"
        if self.by_order and not self.images:
            yield "--by_order does nothing without --images"

    @property
    def drawn(self):
        """[Candidate]: all that draws, the reference first, its second seed last."""
        models = [Candidate(one.label, one.path) for one in map(ModelSource.parse, self.model)]
        loras = [replace(models[0], label=one.label, lora=one.path) for one in map(ModelSource.parse, self.lora or [])]
        floor = [replace(models[0], label=f"{models[0].label}, seed {self.seed + 1}", is_noise_floor=True)]
        return models + loras + floor * self.noise_floor


@dataclass(frozen=True)
class Candidate:
    """A model that draws."""

    label: str
    path: str
    lora: str | None = None
    is_noise_floor: bool = False

    @property
    def folder(self):
        """Its images' folder."""
        return re.sub(r"[^\w.]+", "-", self.label)

    @property
    def run(self):
        """The folder that it lies in, with the other steps or ratios."""
        return Path(self.lora or self.path).parent


def main(argv=None):
    """Draw, measure, write the report, and return the exit status."""
    args = parse(Args, __doc__, argv)
    try:
        return evaluate(args)
    except (EvaluationError, ModelError) as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 1


def evaluate(args):
    """The whole evaluation."""
    device, folder = PartialState().device, Path(args.output_dir)
    name = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    rows = dataset_rows(args.dataset, args.split, args.caption_column, args.max_rows, args.seed)
    general = args.general_rows()
    # Before anything is drawn: what was asked for and cannot be had is said now
    networks, ready = open_networks(args, device), ready_images(args, rows)

    # What is drawn: the dataset's captions, the general prompts; and the losses, while a model is open
    drawn, general_drawn, losses = {}, {}, {"fit": {}, "retain": {}}
    for one in args.drawn:
        pipeline = open_pipeline(
            one.path, weights=args.weights, base=args.base, vae=args.vae, scheduler=args.scheduler, device=device,
            dtype=dtype,
        )  # fmt: skip
        place, lora = folder / "images" / one.folder, {"lora": one.lora, "weights": args.weights}
        how = replace(args, seed=args.seed + one.is_noise_floor)
        drawn[one.label] = draw(pipeline, rows, place / "dataset", how, **lora)
        if general:
            general_drawn[one.label] = draw(pipeline, general, place / "general", how, **lora)
        if args.retain_dataset and not one.is_noise_floor:
            with _with_lora(pipeline, one, args):
                for kind, found in _losses(pipeline, args).items():
                    losses[kind][one.label] = found
        del pipeline  # or the next is opened beside it
    drawn |= ready

    # What is measured
    measured = measure(rows, drawn, networks, args, device)
    report = summarise(measured, folder)
    report["forgetting"] = None
    if general or args.retain_dataset:
        known = forgetting(
            general, general_drawn, networks, args, device, dataset=measured,
            losses=losses if args.retain_dataset else None, folder=folder,
        )  # fmt: skip
        for what in ("left_out", "warnings"):
            report[what] = report[what] + [one for one in known.pop(what) if one not in report[what]]
        report["forgetting"] = known
    sources = {one.label: one.path if one.lora is None else f"{one.path} with {one.lora}" for one in args.drawn}
    sources |= {one.label: one.path for one in map(ModelSource.parse, args.images or [])}
    floors = {one.label for one in args.drawn if one.is_noise_floor}
    report["models"] = [
        {"label": label, "source": sources[label], "noise_floor": label in floors} for label in measured.models
    ]
    report["curves"] = curves(report["forgetting"], args.drawn)
    report["made"] = {
        "command": ["python", *sys.argv], "versions": {one: version(one) for one in PACKAGES},
        "args": as_dict(args) | {"device": str(device), "dtype": name},
    }  # fmt: skip
    page = write_report(folder, report)
    print("\n".join(verdict(report)))
    print(f"the whole report: {page}")
    return 0


def ready_images(args, rows):
    """{label: {row number: path}} of --images, of these rows or of the whole split. Raises EvaluationError."""
    how, found = {"by_order": args.by_order, "caption_column": args.caption_column}, {}
    for source in map(ModelSource.parse, args.images or []):
        try:
            found[source.label] = images_in(source.path, rows, **how)
        except EvaluationError:
            if args.max_rows is None:
                raise
            every = dataset_rows(args.dataset, args.split, args.caption_column, say=lambda _: None)
            pairs = images_in(source.path, every, **how)
            found[source.label] = {row.number: pairs[row.number] for row in rows}
    return found


@contextmanager
def _with_lora(pipeline, one, args):
    if one.lora is None:
        yield
        return
    attach(pipeline, read_lora(one.lora, adaptable_components(pipeline), args.weights))
    set_scale(pipeline, args.lora_scale)
    yield
    detach(pipeline)


def _losses(pipeline, args):
    """{"fit": [rows], "retain": [rows]}: denoising losses on the dataset and on what should be kept."""
    how = {"most": args.loss_rows, "seed": args.seed, "batch_size": args.batch_size, "size": args.height_and_width}
    how["caption_column"] = args.caption_column
    return {
        "fit": pipeline_losses(pipeline, args.dataset, split=args.fit_split or args.split, **how),
        "retain": pipeline_losses(pipeline, args.retain_dataset, split=args.retain_split, **how),
    }


def curves(known, candidates):
    """Learned and kept over the steps of a run's checkpoints, or the ratios of a merge, where there are several."""
    if not known or not known["learned"]:
        return []
    reference, *others = candidates
    others = [one for one in others if one.label in known["learned"] and not one.is_noise_floor]
    found, runs = [], dict.fromkeys(one.run for one in others)
    for (x_title, place_of), run in product((("step", _step), ("ratio", _ratio)), runs):
        places = {one.label: place_of(one) for one in others if one.run == run and place_of(one) is not None}
        if len(places) < 2:
            continue
        lines = []
        for what, start in (("learned", 0.0), ("kept", 1.0)):  # of the reference
            points = [{"x": place_of(reference) or 0, "y": start, "low": start, "high": start}]
            for label, place in places.items():
                one = known[what][label]
                points.append({"x": place, "y": one["value"], "low": one["low"], "high": one["high"]})
            lines.append({"label": what, "points": sorted(points, key=lambda point: point["x"])})
        title = f"Learned and kept over the {x_title}s of {run}, from {reference.label}"
        found.append({"title": title, "x_title": x_title, "y_title": "share", "lines": lines})
    return found


def _step(one):
    """N of a checkpoint-N, of a model or a LoRA."""
    found = re.fullmatch(r"checkpoint-(\d+)", Path(one.lora or one.path).name)
    return int(found[1]) if found else None


def _ratio(one):
    """The ratio that merge_checkpoints.py made the model at."""
    recipe = Path(one.path) / "merge.json"
    if one.lora or not recipe.is_file():
        return None
    ratios = json.loads(recipe.read_text(encoding="utf-8")).get("ratio", [])
    return ratios[0] if len(ratios) == 1 else None


if __name__ == "__main__":
    sys.exit(main())
