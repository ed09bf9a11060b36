"""The table of metrics, and the error that an evaluation raises.

METRICS is the one place that says what a metric is. A new metric is one entry here and the code that computes it
(measuring.py); a judge of images of your own needs neither: see checkers.py, whose metrics join this table.
"""

from dataclasses import dataclass

from finetuning.cli import UserError


class EvaluationError(UserError):
    """An evaluation that cannot be made as asked; the message names the file or flag and the fix."""


@dataclass(frozen=True)
class Metric:
    """One metric, all that a table or a sentence needs to know of it.

    means        one line for a reader who has never heard of it
    better       "higher" or "lower"
    per          "row" (a value for each image) or "set" (one for all images together)
    role         what a checker's metric says in "learned and kept": "learned" (has the model learned the new?),
                 "retained" (can it still do the old?) or "quality" (neither)
    network      the network it needs, a key of NETWORK_FLAGS
    needs_truth  whether it compares with the true image
    measured_on  "dataset" (its captions), "both" (the general prompts too), "prompts" (only them) or "losses"
    drift_of     on the general prompts, the metric that it is computed from, with the original's image as the truth
    verdict      for what should be kept: the sentence's words, with {kept} and {reference}
    """

    title: str
    means: str
    better: str = "higher"
    per: str = "row"
    role: str = "quality"
    network: str | None = None
    needs_truth: bool = False
    measured_on: str = "dataset"
    drift_of: str | None = None
    verdict: str = ""


NETWORK_FLAGS = {"inception": "--inception_weights", "lpips": "--lpips_trunk", "clip": "--clip_model"}

# The order of every table, after a checker's metrics: KID before FID, which is biased for few images.
# The last metric here that has a value for each row decides which rows are shown as the best and the worst.
METRICS = {
    "clip_score": Metric(
        "CLIP score", "100 x cosine of image and caption: does it show the text?", network="clip", measured_on="both",
        verdict="on the general prompts its CLIP score is {kept} of {reference}'s",
    ),
    "clip_image": Metric(
        "CLIP image", "100 x cosine of image and true image: is it the same?", network="clip", needs_truth=True
    ),
    "lpips": Metric(
        "LPIPS", "perceptual distance to the true image of the same caption", "lower", network="lpips",
        needs_truth=True,
    ),
    "kid": Metric(
        "KID", "distance of the two sets of images, unbiased at any number of images", "lower", "set",
        network="inception", needs_truth=True,
    ),
    "fid": Metric(
        "FID", "distance of the two sets of images, too large for few images", "lower", "set", network="inception",
        needs_truth=True,
    ),
    "drift_clip": Metric(
        "CLIP drift", "100 - 100 x cosine of an image and the original's of the same general prompt and seed", "lower",
        network="clip", measured_on="prompts", drift_of="clip_image",
    ),
    "drift_lpips": Metric(
        "LPIPS drift", "LPIPS of an image and the original's of the same general prompt and seed", "lower",
        network="lpips", measured_on="prompts", drift_of="lpips",
    ),
    "fit_loss": Metric(
        "loss on the dataset", "denoising loss on the dataset", "lower", measured_on="losses"
    ),
    "retain_loss": Metric(
        "loss on what should be kept", "denoising loss on the dataset that should be kept", "lower",
        measured_on="losses", verdict="on what should be kept, the loss of {reference} is {kept} of its own",
    ),
}  # fmt: skip


def dataset_metrics(checker=None):
    """The names of the metrics of a dataset's images, in the order of every table; a checker's come first."""
    return tuple(name for name, metric in table(checker).items() if metric.measured_on in ("dataset", "both"))


def table(checker=None):
    """{name: Metric} with those of a checkers.Checker, if there is one."""
    return METRICS if checker is None else {**checker.metrics, **METRICS}
