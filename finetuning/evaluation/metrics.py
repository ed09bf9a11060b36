"""The metrics by name, and the error that an evaluation raises."""

from dataclasses import dataclass

from finetuning.cli import UserError


class EvaluationError(UserError):
    """An evaluation that cannot be made as asked; the message names the file or flag and the fix."""


@dataclass(frozen=True)
class Metric:
    """What a metric is: `per` is "row" (a value for each image) or "set" (one for all images together)."""

    title: str
    means: str  # one line for a reader who has never heard of it
    better: str  # "higher" or "lower"
    per: str


# The order of every table: KID before FID, which is biased for few images.
METRICS = {
    "shapes": Metric("right shapes", "share of images with the shape and colour of their caption", "higher", "row"),
    "style": Metric("chalk style", "share of the things in an image that are drawn in chalk", "higher", "row"),
    "clip_score": Metric("CLIP score", "100 x cosine of image and caption: does it show the text?", "higher", "row"),
    "clip_image": Metric("CLIP image", "100 x cosine of image and true image: is it the same?", "higher", "row"),
    "lpips": Metric("LPIPS", "perceptual distance to the true image of the same caption", "lower", "row"),
    "kid": Metric("KID", "distance of the two sets of images, unbiased at any number of images", "lower", "set"),
    "fid": Metric("FID", "distance of the two sets of images, too large for few images", "lower", "set"),
}  # fmt: skip
