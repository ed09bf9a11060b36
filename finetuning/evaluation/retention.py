"""What a fine-tune learned and how much it kept, as two numbers with their intervals.

    learned, kept = learned_and_kept("loss", (fit_tuned, fit_original), (retain_tuned, retain_original))

Both compare with the original model on the same rows, prompts and seeds: learned 0 and kept 1 are the original itself.
"""

from dataclasses import dataclass, replace

import numpy as np

from finetuning.evaluation import statistics
from finetuning.evaluation.metrics import EvaluationError


@dataclass(frozen=True)
class RetentionMeasure:
    """Which metrics learned and kept are taken from, by name, and what the two numbers are, in words."""

    fit: str
    retain: str
    learned: str
    kept: str


# In the order of trust, after "checker": a report shows the first that can be measured.
RETENTION_MEASURES = {
    "clip": RetentionMeasure(
        "clip_score", "clip_score",
        "rise of the CLIP score on the dataset's captions, against the original, in points of 100",
        "CLIP score on the general prompts, divided by the original's",
    ),
    "loss": RetentionMeasure(
        "fit_loss", "retain_loss", "1 - loss / the original's loss, on the dataset",
        "the original's loss / loss, on the dataset that should be kept",
    ),
}  # fmt: skip


class NothingToKeep(EvaluationError):
    """The original has nothing on average that could be kept, so that there is no share of it."""

    def __init__(self, mean, rows):
        super().__init__(
            f"the original has {mean:.3g} on average over {rows} rows, not clearly above 0: there is no share of it; "
            "take more rows, or others that it is good at"
        )
        self.mean, self.rows = mean, rows


def retention_measure(by, checker=None):
    """The RetentionMeasure by "checker" (a checkers.Checker with a metric of each role), "clip" or "loss"."""
    if by != "checker":
        return RETENTION_MEASURES[by]
    checker.require_roles()
    learned, retained = (checker.metrics[name].means for name in (checker.learned, checker.retained))
    return RetentionMeasure(
        checker.learned,
        checker.retained,
        f"rise of this on the dataset's captions, against the original: {learned}",
        f"this on the general prompts, divided by the original's: {retained}",
    )


def learned_and_kept(by, fit, retain):
    """(learned, kept), an Estimate each, by "checker", "clip" or "loss".

    fit     (tuned's, original's) values on what was trained, float64 [rows] each, of the same rows; None: learned is
            None
    retain  the same on what should be kept; none below 0

    Raises NothingToKeep, an EvaluationError, where the original has nothing that could be kept.
    """
    if by == "loss":  # lower is better: both shares are inverted
        kept = ratio_of_means(*retain[::-1])
        if fit is None:
            return None, kept
        left = ratio_of_means(*fit)
        return statistics.Estimate(1 - left.value, 1 - left.high, 1 - left.low, left.n), kept
    learned = None if fit is None else statistics.paired_difference(*fit)
    return learned, ratio_of_means(*retain)


def ratio_of_means(values, reference):
    """mean of `values` / mean of `reference`, [rows] each, none below 0, as an Estimate; row i of both pairs.

    The interval resamples what each row adds to the ratio, as all intervals of statistics.py do: with the ratio r that
    is (value - r reference) / mean reference. Raises NothingToKeep where the reference is not clearly above 0.
    """
    values, reference = (np.asarray(one, np.float64) for one in (values, reference))
    if not statistics.mean_of(reference).low > 0:
        raise NothingToKeep(float(reference.mean()), len(reference))
    ratio = values.mean() / reference.mean()
    found = statistics.mean_of(ratio + (values - ratio * reference) / reference.mean())
    return replace(found, low=max(found.low, 0.0))
