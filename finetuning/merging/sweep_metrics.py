"""What a sweep measures at each ratio: how much of the new was learned, and how much of the old is retained."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tqdm.auto import tqdm

from finetuning.evaluation.checkers import load_checker
from finetuning.families.generation import parse_size
from finetuning.files import sha256
from finetuning.merging.model_flags import open_all


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

    how = {"size": parse_size(args.size), "max_rows": args.loss_rows, "seed": args.seed[0], "say": tqdm.write}
    losses = open_all(
        [partial(PipelineLoss, merged.pipeline, folder, **how) for folder in (args.fit_dataset, args.retain_dataset)]
    )

    def measure(ratio, images_in, images_out):
        merged.set(ratio)
        return [-loss(args.batch_size) for loss in losses]

    facts = {"size": list(losses[0].size), "datasets": [_content(one.images, one.rows) for one in losses]}
    words = (f"{what}: minus the loss on --{flag}_dataset" for what, flag in zip(AXES, ("fit", "retain"), strict=True))
    return SweepMetric(measure, facts, *words)


def _content(images, chosen):
    """{"rows": ..., "sha256": ...} of the rows that are measured: their images and captions."""
    digest = hashlib.sha256()
    for row in (images.rows[number] for number in chosen):
        digest.update(repr((sha256(row.image), row.captions)).encode())
    return {"rows": chosen, "sha256": digest.hexdigest()}


AXES = ("learned", "retained")
METRICS = {"loss": loss_metric, "checker": checker_metric}
