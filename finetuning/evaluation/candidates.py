"""The models of an evaluation: what they are called, what each generates, and the curves over a run's checkpoints."""

import json
import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from finetuning.cli import REQUIRED, flag
from finetuning.data.findings import counted
from finetuning.evaluation.denoising import PipelineLoss, read_rows
from finetuning.evaluation.generation import generate_rows, with_lora
from finetuning.evaluation.metrics import EvaluationError
from finetuning.families.generation import DTYPES, parse_size
from finetuning.families.lora_files import adaptable_components, read_lora
from finetuning.families.pipelines import ModelSource, check_models, open_pipeline
from finetuning.files import file_names


@dataclass
class CandidateArgs:
    """Models"""

    model: list[str] = flag(REQUIRED, "label=PATH of each model; the first is the reference", repeated=True)
    lora: list[str] | None = flag(None, "label=PATH of LoRAs, each put on the first model", repeated=True)
    chain: list[str] | None = flag(
        None, "label=MODEL,UPSCALER: images of a model that an upscaler enlarges", repeated=True
    )
    images: list[str] | None = flag(None, "label=FOLDER of images made elsewhere", repeated=True, was="pictures")
    by_order: bool = flag(False, "pair the --images with the captions by their order alone", requires="images")
    noise_floor: bool = flag(True, "generate with a second seed of the reference as well, to see what is noise")
    weights: str = flag("ema", "which weights of a run or checkpoint", choices=("ema", "raw"))
    base: str | None = flag(None, "the rest of the model for checkpoint folders (none: their run's base)", reads=True)
    vae: str | None = flag(None, "another autoencoder, e.g. stabilityai/sd-vae-ft-mse", reads=True)
    dtype: str | None = flag(None, "none: fp16 on a GPU, fp32 without", choices=tuple(DTYPES))

    def problems(self):
        if halves := [text for text in self.chain or [] if ModelSource.parse(text).path.count(",") != 1]:
            yield f"--chain {halves[0]} must be label=MODEL,UPSCALER"
            return
        labels = [one.label for one in [*self.candidates, *self.ready]]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            yield f"two models would be called {', '.join(twice)}: name them, --model label=PATH"
        if nameless := [label for label in labels if not re.search(r"\w", label)]:
            yield f"the label {' and '.join(map(repr, nameless))} has no letter or number in it: write label=PATH"

    @property
    def candidates(self):
        """[Candidate] that generate images, the reference first, its second seed last."""
        models = [Candidate(one.label, one.path) for one in map(ModelSource.parse, self.model)]
        loras = [replace(models[0], label=one.label, lora=one.path) for one in map(ModelSource.parse, self.lora or [])]
        floor = [replace(models[0], label=f"{models[0].label}, seed {self.seed + 1}", is_noise_floor=True)]
        chains = [(one.label, *one.path.partition(",")[::2]) for one in map(ModelSource.parse, self.chain or [])]
        chains = [Candidate(label, path, upscaler=upscaler) for label, path, upscaler in chains]
        return models + loras + chains + floor * self.noise_floor

    @property
    def ready(self):
        """[ModelSource] of folders of images."""
        return [ModelSource.parse(text) for text in self.images or []]


@dataclass(frozen=True)
class Candidate:
    """A model that generates images."""

    label: str
    path: str
    lora: str | None = None
    upscaler: str | None = None
    is_noise_floor: bool = False

    @property
    def source(self):
        """What it is, for the report."""
        if self.upscaler:
            return f"{self.path}, enlarged by {self.upscaler}"
        return self.path if self.lora is None else f"{self.path} with {self.lora}"

    @property
    def _last(self):
        """What its images come from last."""
        return Path(self.upscaler or self.lora or self.path)

    @property
    def run(self):
        """The folder that it lies in, with the other steps or ratios."""
        return self._last.parent

    @property
    def step(self):
        """N of a checkpoint-N, of a model or a LoRA; or None."""
        found = re.fullmatch(r"checkpoint-(\d+)", self._last.name)
        return int(found[1]) if found else None

    @property
    def ratio(self):
        """The ratio that merge_checkpoints.py made the model at, or None."""
        recipe = self._last / "merge.json"
        if self.upscaler or self.lora or not recipe.is_file():
            return None
        ratios = json.loads(recipe.read_text(encoding="utf-8")).get("ratio", [])
        return ratios[0] if len(ratios) == 1 else None


@dataclass
class Generated:
    """What the candidates made: {label: {row number: path}} of both sets, and losses {kind: {label: [rows]}}."""

    dataset: dict = field(default_factory=dict)
    general: dict = field(default_factory=dict)
    losses: dict = field(default_factory=lambda: {"fit": {}, "retain": {}})


def generate_all(args, rows, general, device, dtype):
    """Open every candidate in turn, so that one at a time is in memory, and return what is Generated.

    args  all of evaluate_model.py's. The losses are taken while a model is open, with --retain_dataset.
    """
    made, images = Generated(), Path(args.output_dir) / "images"
    folders = file_names([one.label for one in args.candidates])
    how = {"weights": args.weights, "base": args.base}
    reference, *others = dict.fromkeys(one.path for one in args.candidates)
    check_models([reference], [one.lora for one in args.candidates if one.lora], vae=args.vae, **how)
    check_models(others, upscalers=[one.upscaler for one in args.candidates], vae=args.vae, **how)
    sets = loss_sets(args)
    for one in sets.values():
        _, chosen = read_rows(**one, usual="validation", say=lambda _: None)
        if len(chosen) < 2:
            raise EvaluationError(f"{one['folder']} has {counted(len(chosen), 'row')}: an interval needs at least 2")
    for one in args.candidates:
        options = how | {"scheduler": args.scheduler, "device": device, "dtype": dtype}
        pipeline = open_pipeline(one.path, vae=args.vae, **options)
        upscaler = open_pipeline(one.upscaler, **options) if one.upscaler else None
        settings = replace(args, seed=args.seed + one.is_noise_floor)
        of_one = {"name": one.path, "lora": one.lora, "weights": args.weights, "upscaler": upscaler}
        folder = images / folders[one.label]
        made.dataset[one.label] = generate_rows(pipeline, rows, folder / "dataset", settings, **of_one)
        if general:
            made.general[one.label] = generate_rows(pipeline, general, folder / "general", settings, **of_one)
        if sets and not (one.is_noise_floor or upscaler):
            adapter = read_lora(one.lora, adaptable_components(pipeline), args.weights) if one.lora else None
            with with_lora(pipeline, adapter, args.lora_scale):
                for kind, which in sets.items():
                    loss = PipelineLoss(pipeline, **which, size=parse_size(args.size))
                    made.losses[kind][one.label] = loss(args.batch_size).numpy()
        del pipeline, upscaler  # or the next is opened beside it
    return made


def loss_sets(args):
    """{"fit": {...}, "retain": {...}}: the rows that losses are taken of, as denoising.read_rows is asked for them."""
    if not args.retain_dataset:
        return {}
    common = {"max_rows": args.loss_rows, "seed": args.seed, "caption_column": args.caption_column}
    return {
        "fit": {"folder": args.dataset, "split": args.fit_split or args.split, **common},
        "retain": {"folder": args.retain_dataset, "split": args.retain_split, **common},
    }


def curves(known, candidates):
    """Learned and kept over the steps of a run's checkpoints, or the ratios of a merge, where there are several.

    known  the report's "forgetting", or None
    """
    if not known or not known["learned"]:
        return []
    reference, *others = candidates
    others = [one for one in others if one.label in known["learned"] and not one.is_noise_floor]
    found, runs = [], dict.fromkeys(one.run for one in others)
    for x_title, run in product(("step", "ratio"), runs):
        places = {one.label: getattr(one, x_title) for one in others if one.run == run}
        places = {label: place for label, place in places.items() if place is not None}
        if len(places) < 2:
            continue
        lines = []
        for what, start in (("learned", 0.0), ("kept", 1.0)):  # of the reference
            points = [{"x": getattr(reference, x_title) or 0, "y": start, "low": start, "high": start}]
            for label, place in places.items():
                one = known[what][label]
                points.append({"x": place, "y": one["value"], "low": one["low"], "high": one["high"]})
            lines.append({"label": what, "points": sorted(points, key=lambda point: point["x"])})
        title = f"Learned and kept over the {x_title}s of {run}, from {reference.label}"
        found.append({"title": title, "x_title": x_title, "y_title": "share", "lines": lines})
    return found
