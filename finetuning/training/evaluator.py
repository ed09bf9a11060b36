"""Evaluation while training: images of the same prompts and seeds, the loss on the same held-out rows, and how much is
learned and retained, each compared with the base (step 0) row by row.

All is measured with the averaged weights (with the raw ones without EMA) and changes nothing of what is trained. The
base's values stay in output_dir/validation/base_evaluation.json: a resumed run compares with the same base.

MEASURES is the table of what learned and retained can be taken from: a line there, and one function.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from finetuning.cli import flag
from finetuning.data.folders import folder_problems
from finetuning.data.images import open_rgb
from finetuning.data.reading import SPLIT_NAMES
from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.denoising import chosen_rows, load_rows, row_losses
from finetuning.evaluation.generation import general_rows
from finetuning.evaluation.grid import labelled_grid
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.retention import learned_and_kept, retention_measure
from finetuning.evaluation.statistics import mean_of, paired_difference
from finetuning.families.generation import generate
from finetuning.families.model_args import ModelError
from finetuning.files import write_image, write_json
from finetuning.rng import torch_generator


@dataclass
class ValidationArgs:
    """Validation"""

    affects_result = False

    validation_prompts: list[str] | None = flag(
        None, "prompts of images that are generated with fixed seeds, by the base first (step 0)"
    )
    validation_image: list[str] | None = flag(
        None, "for an upscaler: the small image of each validation prompt",
        requires=("validation_prompts", "validation_prompt"),
    )  # fmt: skip
    validation_prompt: str | None = flag(None, "one prompt more, as in diffusers' LoRA script")
    num_validation_images: int = flag(1, "images per prompt; 0: none", min=0)
    validation_epochs: int = flag(
        5, "validate every N epochs, unless --validation_steps is given; 0: only at the start and the end", min=0
    )
    validation_steps: int | None = flag(None, "validate every N optimizer steps", min=1)
    validation_guidance_scale: float = flag(7.5, "guidance scale of the validation images")
    validation_inference_steps: int = flag(25, "sampling steps of the validation images (DPM-Solver++)", min=1)
    validation_fraction: float = flag(
        0.0, "hold out this share of the rows for the validation loss, where the dataset has no validation split",
        min=0, below=1, affects_result=True,
    )  # fmt: skip
    validation_loss_rows: int = flag(256, "rows for the validation loss, at most; 0: no validation loss", min=0)

    def problems(self):
        for path in self.validation_image or []:
            if not Path(path).is_file():
                yield f"--validation_image {path}: there is no such file"

    @property
    def prompts(self):
        """All prompts to generate images of."""
        if not self.num_validation_images:
            return []
        return [*(self.validation_prompts or []), *([self.validation_prompt] if self.validation_prompt else [])]


@dataclass
class RetentionArgs:
    """Learned and retained"""

    affects_result = False

    evaluate_every: int = flag(
        0, "every N optimizer steps log how much is learned and retained, and the validation loss, with 95 % "
        "intervals; 0: off", min=0,
    )  # fmt: skip
    evaluate_with: str = flag(
        "loss", "what measures them. loss: held-out rows, and --retain_dataset; clip: CLIP scores of images of the "
        "validation prompts, and of --general_prompts; checker: the scores that --checker gives to the same images",
        choices=("loss", "clip", "checker"), requires="evaluate_every",
    )  # fmt: skip
    checker: str | None = flag(
        None, "for checker: the module that judges images, e.g. my_checker.py or finetuning.shapes.checker (see "
        "docs/evaluation.md)", requires="evaluate_with=checker",
    )  # fmt: skip
    retain_dataset: str | None = flag(
        None, "for loss: folder with metadata.jsonl of what should not be forgotten", requires="evaluate_every",
        reads=True,
    )  # fmt: skip
    retain_split: str | None = flag(
        None, "its split (none: validation, or all of a folder without splits)", choices=tuple(SPLIT_NAMES),
        requires="retain_dataset",
    )  # fmt: skip
    retain_rows: int = flag(64, "rows of --retain_dataset for the loss, at most", min=2, requires="retain_dataset")
    general_prompts: str | None = flag(
        None, "for clip and checker: prompts of what should not be forgotten, .txt with one on each line, or .json "
        "(none: for clip the project's own 60)", requires=("evaluate_with=clip", "evaluate_with=checker"),
    )  # fmt: skip
    clip_model: str | None = flag(
        None, "for clip: a folder, or a name on the Hub (none: openai/clip-vit-base-patch32)",
        requires="evaluate_with=clip", reads=True,
    )  # fmt: skip
    stop_when_retention_below: float | None = flag(
        None, "end the run, with a checkpoint and the finished result, where retention falls below this share of the "
        "base's", above=0, below=1, requires="evaluate_every", was="stop_when_kept_below",
    )  # fmt: skip

    def problems(self):
        if self.evaluate_every <= 0:
            return
        if self.evaluate_with == "loss":
            if not self.retain_dataset:
                yield "--evaluate_with loss needs --retain_dataset, a folder of what should not be forgotten"
            else:
                yield from folder_problems("--retain_dataset", self.retain_dataset)
            return
        if self.retain_dataset:
            yield "--retain_dataset only goes with --evaluate_with loss"
        if self.evaluate_with == "checker" and not (self.checker and self.general_prompts):
            yield "--evaluate_with checker needs --checker, and --general_prompts of what should not be forgotten"
            return
        try:
            prompts = [row.caption for row in general_rows(self.general_prompts)]
            if len(prompts) < 2:
                yield f"--general_prompts {self.general_prompts} must have at least 2 prompts: one has no interval"
            if self.evaluate_with == "checker":
                load_checker(self.checker).check(prompts)
        except EvaluationError as error:
            yield str(error)


class Evaluator:
    """What is measured at step 0, every so often, and at the end, on all processes together.

    Written below output_dir/validation: step-N/*.png and grid.png, base_evaluation.json; and comparison.png.
    """

    def __init__(self, args, run, model, ema, data, first_step):
        self.args, self.run, self.model, self.ema, self.data = args, run, model, ema, data
        self.folder = Path(run.output_dir) / "validation"
        self.held_out = self.measure = None
        if data.held_out and args.validation_loss_rows:
            rows = chosen_rows(len(data.held_out), args.validation_loss_rows, args.seed)
            self.held_out = data.held_out, rows
        if args.evaluate_every:
            self.measure = MEASURES[args.evaluate_with](self)
            words = self.measure.words
            run.say(
                f"evaluation every {args.evaluate_every} steps: learned is {self.measure.no_fit or words.learned}; "
                f"retention is {words.kept} (the original is step 0)"
            )
        self.base = self._read_base() if first_step else None
        self.done = (None, set())  # step, and what was measured there

    # -- when ------------------------------------------------------------------------------------------------------

    def due(self, step, last=False):
        """What is to be measured after `step` and has not been yet; `last`: the run ends here."""
        args = self.args
        every = args.validation_steps or args.validation_epochs * (self.data.batch_sampler.steps_per_epoch or 0)
        kinds = {"images", "loss"} if step == 0 or last or (every and step % every == 0) else set()
        if self.measure and (step % args.evaluate_every == 0 or step == self.data.total_steps):
            kinds |= {"retention", "loss"}
        kinds -= {kind for kind, known in (("images", args.prompts), ("loss", self.held_out)) if not known}
        return kinds - (self.done[1] if self.done[0] == step else set())

    def evaluate(self, step, last=False):
        """Measure what `step` asks for, and log it. Whether the run should end because too much is forgotten.

        Raises EvaluationError where the base has nothing that could be forgotten.
        """
        kinds = self.due(step, last)
        if not kinds:
            return False
        self.done = step, kinds | (self.done[1] if self.done[0] == step else set())
        with self.ema.averaged_weights(), self.model.loaded(), self.run.forward_passes(), torch.no_grad():
            losses = self.losses_of(*self.held_out) if "loss" in kinds else None
            values = self.measure.values(losses) if "retention" in kinds else (None, None)
            if "images" in kinds:
                self._validation_images(step)
        measured = {"losses": losses, "fit": values[0], "retain": values[1]}
        if step == 0:
            self._write_base(measured)
        estimates = self._estimates(measured)
        if estimates:
            self.run.log({name: value for one in estimates.items() for name, value in _with_interval(*one)}, step)
        return self._forgets(step, estimates.get("retention"))

    def _forgets(self, step, retention):
        limit = self.args.stop_when_retention_below
        if retention is None or limit is None or retention.value >= limit:
            return False
        self.run.say(
            f"step {step}: retention {retention.value:.3f} ({retention.low:.3f} to {retention.high:.3f}) is below "
            f"--stop_when_retention_below {limit}: the run ends here; --resume_from_checkpoint latest with a lower "
            "value goes on"
        )
        return True

    # -- what ------------------------------------------------------------------------------------------------------

    def losses_of(self, images, rows):
        """The denoising loss of each row, [rows]; the processes share them out."""
        args = self.args
        compute = lambda own: row_losses(
            self.model, images, rows, self.model.schedule, args, seed=args.seed, batch_size=args.train_batch_size,
            device=self.run.device, autocast=self.run.autocast, only=own,
        ).tolist()  # fmt: skip
        return self.run.shared(rows, compute)

    def images_of(self, prompts, purpose, small=None):
        """A PIL image of each prompt, always from the same noise; the processes share them out. `small` are the
        images that an upscaler enlarges.

        Raises ModelError, on every process alike, where one has values that are not finite.
        """
        args = self.args

        def compute(own):
            generators = [torch_generator(args.seed, purpose, number) for number, _ in own]
            with self.model.pipeline() as pipeline, self.run.autocast():
                images = generate(
                    pipeline, [prompt for _, prompt in own], generators, batch_size=args.train_batch_size,
                    images=small and [small[number] for number, _ in own], size=args.size,
                    num_inference_steps=args.validation_inference_steps,
                    guidance_scale=args.validation_guidance_scale,
                )  # fmt: skip
                try:
                    return list(images)
                except ModelError as error:  # raised here, it would leave the other processes waiting
                    return [error] * len(own)

        images = self.run.shared(list(enumerate(prompts)), compute)
        for error in (image for image in images if isinstance(image, ModelError)):
            raise error
        return images

    def _estimates(self, measured):
        """{name: Estimate} of what was measured."""
        found, losses = {}, measured["losses"]
        base = self.base or {}
        if measured["retain"] is not None:
            pairs = [values and (values, base[name]) for name, values in measured.items() if name != "losses"]
            try:
                learned, retention = learned_and_kept(self.args.evaluate_with, *pairs)
            except (EvaluationError, ValueError) as error:  # the base has nothing to keep, or not all is finite
                raise EvaluationError(f"--evaluate_with {self.args.evaluate_with}: {error}") from error
            found = {"learned": learned, "retention": retention} if learned else {"retention": retention}
        if losses:
            found["validation_loss"] = mean_of(losses) if len(losses) > 1 else losses[0]
        before = base.get("losses") or ()
        if losses and len(losses) == len(before) > 1 and losses is not before:
            found["validation_loss_change"] = paired_difference(losses, before)
        return found

    # -- the base --------------------------------------------------------------------------------------------------

    @property
    def _base_path(self):
        return self.folder / "base_evaluation.json"

    def _write_base(self, measured):
        self.base = measured
        if self.run.is_main and any(values is not None for values in measured.values()):
            facts = self.measure.facts if self.measure else {}
            write_json(self._base_path, {"facts": facts, **measured})

    def _read_base(self):
        """The base's values of a run that is resumed. Raises EvaluationError where --evaluate_every needs them."""
        try:
            known = json.loads(self._base_path.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                raise ValueError("it holds no values by name")
            facts = self.measure.facts if self.measure else {}
            if changed := [name for name in facts if facts[name] != known["facts"].get(name)]:
                raise ValueError(f"it is of another measurement: {', '.join(changed)}")
            return known
        except (OSError, ValueError, KeyError, AttributeError) as error:
            if self.measure is None:
                return None
            raise EvaluationError(
                f"--evaluate_every compares with step 0, and {self._base_path} cannot be used ({error}): copy it from "
                "the run that the checkpoint is of, or leave --evaluate_every out, which changes nothing of what is "
                "trained, or start a new run"
            ) from error

    # -- images ----------------------------------------------------------------------------------------------------

    def _validation_images(self, step):
        count, prompts = self.args.num_validation_images, self.args.prompts
        try:
            small = [open_rgb(path) for path in self.args.validation_image or [] for _ in range(count)]
            images = self.images_of([prompt for prompt in prompts for _ in range(count)], "validation picture", small)
        except ModelError as error:  # an autoencoder that overflows in fp16, say: the training itself is sound
            self.run.say(f"step {step}: no validation images: {error}")
            return
        if not self.run.is_main:
            return
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in zip(self._names(), images, strict=True):
            write_image(folder / name, image)
        rows = [images[start : start + count] for start in range(0, len(images), count)]
        grid = labelled_grid(rows, prompts, [f"step {step}"] + [""] * (count - 1), scale_to=192)
        write_image(folder / "grid.png", grid)
        self.run.log_images("validation", images, step)
        self.run.log_images("validation grid", [grid], step)

    def compare(self, step):
        """A grid of the base beside the model as it is at `step`; its path, or None without prompts."""
        base, tuned = self.folder / "step-0", self.folder / f"step-{step}"
        if not (self.args.prompts and base.is_dir() and tuned.is_dir()):
            return None
        rows = [[Image.open(folder / name).convert("RGB") for folder in (base, tuned)] for name in self._names()]
        labels = [prompt for prompt in self.args.prompts for _ in range(self.args.num_validation_images)]
        path = Path(self.run.output_dir) / "comparison.png"
        write_image(path, labelled_grid(rows, labels, ["base", f"fine-tuned, step {step}"], scale_to=192))
        return path

    def _names(self):
        count = self.args.num_validation_images
        return [f"prompt{p:02d}-{i}.png" for p in range(len(self.args.prompts)) for i in range(count)]


def _with_interval(name, estimate):
    if isinstance(estimate, float):  # of one row there is no interval
        return ((name, estimate),)
    return ((name, estimate.value), (f"{name}_low", estimate.low), (f"{name}_high", estimate.high))


# -- what learned and retained are taken from ------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """One way to measure, made ready.

    values  (held-out losses [rows] or None) -> (values [rows] on what is trained or None, [rows] on what should be
            retained) of the model as it is now, as retention.learned_and_kept takes them
    facts   what the values depend on besides the weights, ready for JSON
    words   evaluation.retention.RetentionMeasure
    no_fit  why there are no values on what is trained, in words; empty where there are
    """

    values: Callable
    facts: dict
    words: object
    no_fit: str


def _by_loss(evaluator):
    args, held_out = evaluator.args, evaluator.held_out
    images, rows = load_rows(
        args.retain_dataset, evaluator.model.tokenize, args.size, split=args.retain_split, max_rows=args.retain_rows,
        seed=args.seed, say=evaluator.run.say,
    )  # fmt: skip
    if len(rows) < 2:
        raise EvaluationError(f"--retain_dataset {args.retain_dataset} must have at least 2 rows, it has {len(rows)}")
    enough = held_out and len(held_out[1]) > 1  # one row has no interval
    facts = {
        "with": "loss", "seed": args.seed, "size": list(args.size),
        "loss": [args.prediction_type, args.loss_type, args.huber_c, *["zero SNR"] * args.rescale_betas_zero_snr],
        "held-out rows": [held_out[0].fingerprint(), len(held_out[1])] if enough else None,
        "rows to retain": [images.fingerprint(), len(rows)],
    }  # fmt: skip
    values = lambda losses: (losses if enough else None, evaluator.losses_of(images, rows))
    none = "" if enough else "not measured, no rows are held out (--validation_fraction 0.1 keeps some back)"
    return Measure(values, facts, retention_measure("loss"), none)


def _by_checker(evaluator):
    checker = load_checker(evaluator.args.checker)
    words = retention_measure("checker", checker)
    return _by_images(
        evaluator, words, checker.facts,
        lambda images, prompts, of: checker.values(getattr(checker, of), images, prompts).tolist(),
    )  # fmt: skip


def _by_clip(evaluator):
    from finetuning.evaluation import networks

    scorer, weights = networks.clip(evaluator.args.clip_model or networks.CLIP, evaluator.run.device)

    def score(images, prompts, of):
        cosines = (scorer.images(images) * scorer.texts(prompts)).sum(1)
        return (100 * np.maximum(cosines, 0)).tolist()

    return _by_images(evaluator, retention_measure("clip"), {"CLIP": weights.sha256}, score)


def _by_images(evaluator, words, facts, score):
    """The Measure of score(images, prompts, "learned" or "retained"), of generated images."""
    args = evaluator.args
    fit = args.prompts if len(args.prompts) > 1 else []  # one alone has no interval
    retain = [row.caption for row in general_rows(args.general_prompts)]

    def values(losses):
        images = evaluator.images_of(fit + retain, "evaluation")
        learned = score(images[: len(fit)], fit, "learned") if fit else None
        return learned, score(images[len(fit) :], retain, "retained")

    facts = facts | {
        "with": args.evaluate_with, "seed": args.seed, "size": list(args.size), "validation prompts": fit,
        "general prompts": retain, "guidance scale": args.validation_guidance_scale,
        "sampling steps": args.validation_inference_steps,
    }  # fmt: skip
    none = "" if fit else "not measured, there are not two --validation_prompts"
    return Measure(values, facts, words, none)


MEASURES = {"loss": _by_loss, "clip": _by_clip, "checker": _by_checker}
