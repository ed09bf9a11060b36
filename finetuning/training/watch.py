"""Learned and kept while training: how far the run has come, and how much is left of what the base could do.

Measured on the same rows, timesteps, noise, prompts and seeds every time, and compared row by row with step 0, whose
values stay in output_dir/validation/base_evaluation.json: a resumed run compares with the same base. Looking changes
nothing of what is trained. The figures are those of finetuning/evaluation/retention.py.

MEASURES is the table: a line there, and one function.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from finetuning.cli import flag
from finetuning.data.reading import SPLIT_NAMES
from finetuning.evaluation.denoising import chosen_rows, load_rows, row_losses
from finetuning.evaluation.generation import general_rows
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.retention import RETENTION_MEASURES, learned_and_kept
from finetuning.evaluation.statistics import mean_of
from finetuning.files import write_json
from finetuning.rng import torch_generator
from finetuning.shapes.checker import right, share_in_chalk
from finetuning.shapes.scenes import parse

# CLIP is imported in the function that needs it: a run that does not look at itself should not wait for it.


@dataclass
class WatchArgs:
    """Learned and retained"""

    evaluate_every: int = flag(
        0, "every N optimizer steps log how much is learned and retained, and the validation loss, with 95 % "
        "intervals; 0: off",
        min=0, affects_result=False,
    )  # fmt: skip
    evaluate_with: str = flag(
        "loss", "what measures them. loss: held-out rows, and --retain_dataset; clip: CLIP scores of images of the "
        "validation prompts, and of --general_prompts; shapes: the same for the shapes world, read off the pixels",
        choices=("loss", "shapes", "clip"), requires="evaluate_every", affects_result=False,
    )  # fmt: skip
    retain_dataset: str | None = flag(
        None, "for loss: folder with metadata.jsonl of what should not be forgotten", requires="evaluate_every",
        affects_result=False,
    )  # fmt: skip
    retain_split: str | None = flag(
        None, "its split (none: validation, or all of a folder without splits)", choices=tuple(SPLIT_NAMES),
        requires="evaluate_every", affects_result=False,
    )  # fmt: skip
    retain_rows: int = flag(
        64, "rows of --retain_dataset for the loss, at most", min=2, requires="retain_dataset", affects_result=False
    )
    general_prompts: str | None = flag(
        None, "for shapes and clip: prompts of what should not be forgotten, .txt with one on each line, or .json "
        "(none: for clip the project's own 60)",
        requires="evaluate_every", affects_result=False,
    )  # fmt: skip
    clip_model: str | None = flag(
        None, "for clip: a folder, or a name on the Hub (none: openai/clip-vit-base-patch32)",
        requires="evaluate_every", affects_result=False,
    )  # fmt: skip
    stop_when_retention_below: float | None = flag(
        None, "end the run, with a checkpoint and the finished result, where retention falls below this share of the "
        "base's",
        above=0, below=1, requires="evaluate_every", affects_result=False, was="stop_when_kept_below",
    )  # fmt: skip

    def problems(self):
        if self.evaluate_every <= 0:
            return
        for name, kinds in (
            ("retain_dataset", ("loss",)), ("retain_split", ("loss",)), ("general_prompts", ("shapes", "clip")),
            ("clip_model", ("clip",)),
        ):  # fmt: skip
            if getattr(self, name) is not None and self.evaluate_with not in kinds:
                yield f"--{name} only goes with --evaluate_with {' or '.join(kinds)}"
        if self.evaluate_with == "loss":
            yield from self._dataset_problems()
        else:
            yield from self._prompt_problems()

    def _dataset_problems(self):
        if not self.retain_dataset:
            yield "--evaluate_with loss needs --retain_dataset, a folder of what should not be forgotten"
        elif not Path(self.retain_dataset).is_dir():
            yield f"--retain_dataset {self.retain_dataset}: there is no such folder"

    def _prompt_problems(self):
        if self.evaluate_with == "shapes" and not self.general_prompts:
            yield "--evaluate_with shapes needs --general_prompts, captions of the shapes world"
            return
        try:
            asked = [row.caption for row in general_rows(self.general_prompts)]
        except EvaluationError as problem:
            yield str(problem)
            return
        if len(asked) < 2:
            yield f"--general_prompts {self.general_prompts} must have at least 2 prompts: one has no interval"
        for prompt in asked if self.evaluate_with == "shapes" else []:
            try:
                parse(prompt)
            except ValueError as problem:
                yield f"--evaluate_with shapes: --general_prompts: {problem}"


def build_watch(args, run, model, ema, schedule, held_out, first_step, total_steps):
    """What --evaluate_every asks for, ready for `first_step`. Raises DatasetError or EvaluationError.

    args  all of the script's: WatchArgs, and those of the validation, the dataset and the noise
    """
    if not args.evaluate_every:
        return NoWatch()
    watch = Watch(args, run, model, ema, schedule, held_out, total_steps)
    if first_step:
        watch.take_base()
    return watch


class Watch:
    """Looks at the averaged weights (at the raw ones without EMA) at step 0, every so often, and at the end."""

    def __init__(self, args, run, model, ema, schedule, held_out, total_steps):
        self.args, self.run, self.ema, self.total_steps = args, run, ema, total_steps
        self.path = Path(run.output_dir) / "validation" / "base_evaluation.json"
        self.losses_of = partial(
            row_losses, model, schedule=schedule, args=args, seed=args.seed, batch_size=args.train_batch_size,
            device=run.device, autocast=run.accelerator.autocast,
        )  # fmt: skip
        # The rows of the validation loss; one alone has no interval
        most = min(len(held_out or ()), args.validation_loss_rows)
        self.held_out = (held_out, chosen_rows(len(held_out), most, args.seed)) if most > 1 else None
        self.measure = MEASURES[args.evaluate_with](args, run, model, self.losses_of, self.held_out)
        self.base = None  # the values of step 0
        words = RETENTION_MEASURES[args.evaluate_with]
        run.say(
            f"evaluation every {args.evaluate_every} steps: learned is {self.measure.no_fit or words.learned}; kept is "
            f"{words.kept} (the original is step 0)"
        )

    def due(self, step):
        """Whether step 0, the step or the end asks for it."""
        return step % self.args.evaluate_every == 0 or step == self.total_steps

    def look(self, step):
        """Measure and log where `step` asks for it. Whether the run should end because too much is forgotten.

        The main process measures, the others wait and get the same answer. Raises EvaluationError where the base has
        nothing that could be forgotten.
        """
        if not self.due(step):
            return False
        return self.run.any(self.run.is_main and self._look(step))

    def take_base(self):
        """Read what a run that is resumed compares with. Raises EvaluationError where it cannot be had."""
        advice = "leave --evaluate_every out, which changes nothing of what is trained, or start a new run"
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"--evaluate_every compares with step 0, and {self.path} cannot be read ({error}): copy it from the "
                f"run that the checkpoint is of, {advice}"
            ) from error
        facts = self.measure.facts
        if changed := [name for name in facts | known["facts"] if facts.get(name) != known["facts"].get(name)]:
            raise EvaluationError(
                f"--evaluate_every compares with step 0, and {self.path} is of another measurement "
                f"({', '.join(changed)}): ask for the same, {advice}"
            )
        self.base = known["fit"], known["retain"]

    def _look(self, step):
        """Measure and log; whether too much is forgotten."""
        with self.ema.averaged_weights(), torch.no_grad():
            losses = self.losses_of(*self.held_out).tolist() if self.held_out else None
            fit, retain = self.measure.values(losses)
        if step == 0:
            self._keep_base(fit, retain)
        figures = self._figures(fit, retain, losses)
        ends = lambda one: (("", one.value), ("_low", one.low), ("_high", one.high))
        self.run.log({f"{name}{end}": value for name, one in figures.items() for end, value in ends(one)}, step)
        kept, limit = figures["kept"], self.args.stop_when_retention_below
        if limit is None or kept.value >= limit:
            return False
        self.run.say(
            f"step {step}: kept {kept.value:.3f} ({kept.low:.3f} to {kept.high:.3f}) is below "
            f"--stop_when_retention_below {limit}: the run ends here; --resume_from_checkpoint latest with a lower "
            "value goes on"
        )
        return True

    def _figures(self, fit, retain, losses):
        """{name: Estimate}, without those that there is nothing to take from."""
        kind, (base_fit, base_retain) = self.args.evaluate_with, self.base
        pair = retain, base_retain
        try:
            learned, kept = learned_and_kept(kind, (fit, base_fit) if fit else pair, pair)
        except ValueError as problem:  # the base has nothing to keep, or not all is finite
            raise EvaluationError(f"--evaluate_with {kind}: {problem}") from problem
        figures = ({"learned": learned} if fit else {}) | {"kept": kept}
        return figures | ({"validation_loss": mean_of(losses)} if losses else {})

    def _keep_base(self, fit, retain):
        """The file is whole or not there."""
        self.base = fit, retain
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.incomplete")
        write_json(aside, {"facts": self.measure.facts, "fit": fit, "retain": retain})
        os.replace(aside, self.path)


class NoWatch:
    """The same call with --evaluate_every off."""

    def look(self, step):
        """Nothing to look at, so nothing to end for."""
        return False


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """One way to measure, made ready.

    values  (held-out losses [rows] or None) -> (values [rows] on what is trained or None, [rows] on what should be
            kept) of the model as it is now, as yardsticks.learned_and_kept takes them
    facts   what the values depend on besides the weights, ready for JSON
    no_fit  why there are no values on what is trained, in words; empty where there are
    """

    values: Callable
    facts: dict
    no_fit: str


def _by_loss(args, run, model, losses_of, held_out):
    images, rows = load_rows(
        args.retain_dataset, model.tokenizer, args.size, split=args.retain_split, most=args.retain_rows,
        seed=args.seed, say=run.say,
    )  # fmt: skip
    if len(rows) < 2:
        raise EvaluationError(f"--retain_dataset {args.retain_dataset} must have at least 2 rows, it has {len(rows)}")
    facts = {
        "with": "loss", "seed": args.seed, "size": list(args.size),
        "loss": [args.prediction_type, args.loss_type, args.huber_c],
        "held-out rows": held_out and [held_out[0].fingerprint(), len(held_out[1])],
        "rows to retain": [images.fingerprint(), len(rows)],
    }  # fmt: skip
    none = "" if held_out else "not measured, no rows are held out (--validation_fraction 0.1 keeps some back)"
    return Measure(lambda losses: (losses, losses_of(images, rows).tolist()), facts, none)


def _by_shapes(args, run, model, losses_of, held_out):
    fit, retain = _prompts(args)
    scenes = [parse(prompt) for prompt in retain]

    def values(losses):
        drawn = _draw(args, run, model, fit + retain)
        kept = [right(*pair) for pair in zip(scenes, drawn[len(fit) :], strict=True)]
        return [share_in_chalk(image) for image in drawn[: len(fit)]] or None, kept

    return Measure(values, _drawing_facts(args, fit, retain), "" if fit else NO_PROMPTS)


def _by_clip(args, run, model, losses_of, held_out):
    from finetuning.evaluation import networks

    fit, retain = _prompts(args)
    scorer, weights = networks.clip(args.clip_model or networks.CLIP, run.device)
    texts = scorer.texts(fit + retain)  # [prompts, d]

    def values(losses):
        images = scorer.images(_draw(args, run, model, fit + retain))
        scores = (100 * np.maximum((images * texts).sum(1), 0)).tolist()
        return scores[: len(fit)] or None, scores[len(fit) :]

    facts = _drawing_facts(args, fit, retain) | {"CLIP": weights.sha256}
    return Measure(values, facts, "" if fit else NO_PROMPTS)


MEASURES = {"loss": _by_loss, "shapes": _by_shapes, "clip": _by_clip}
NO_PROMPTS = "not measured, there are not two --validation_prompts"


def _prompts(args):
    """(validation prompts, general prompts); none of the first where one alone would have no interval."""
    retain = [row.caption for row in general_rows(args.general_prompts)]
    return args.prompts if len(args.prompts) > 1 else [], retain


def _drawing_facts(args, fit, retain):
    """All that the images depend on."""
    return {
        "with": args.evaluate_with, "seed": args.seed, "size": list(args.size), "validation prompts": fit,
        "general prompts": retain, "guidance scale": args.validation_guidance_scale,
        "sampling steps": args.validation_inference_steps,
    }  # fmt: skip


def _draw(args, run, model, prompts):
    """A PIL image of each prompt; the same number always starts from the same noise."""
    images, (height, width) = [], args.size
    with model.pipeline() as pipeline, run.accelerator.autocast():
        for start in range(0, len(prompts), args.train_batch_size):
            part = prompts[start : start + args.train_batch_size]
            images += pipeline(
                part,
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=[torch_generator(args.seed, "evaluation", start + i) for i in range(len(part))],
                height=height,
                width=width,
            ).images
    return images
