"""Aspect-ratio buckets: images of several shapes are trained on, each at the shape nearest to its own.

A bucket is a size (height, width) in pixels. No image is distorted: it is resized until it covers its bucket, and
what stands out is cropped.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

from finetuning.cli import flag


@dataclass
class BucketArgs:
    """Aspect-ratio buckets"""

    aspect_buckets: bool = flag(
        False,
        "train each image at the nearest of several shapes, each of at most --resolution x --resolution pixels; "
        "every step has one shape",
    )
    bucket_step: int = flag(64, "the buckets' sides are multiples of this, in pixels", min=1, requires="aspect_buckets")
    min_side: int | None = flag(
        None, "shortest side of a bucket (none: half of --resolution)", min=1, requires="aspect_buckets"
    )
    max_side: int | None = flag(
        None, "longest side of a bucket (none: twice --resolution)", min=1, requires="aspect_buckets"
    )
    max_upscale: float = flag(
        1.5,
        "enlarge no image more than this, 1: none; too small ones go to a smaller bucket",
        min=1,
        requires="aspect_buckets",
    )

    def problems(self):
        if self.aspect_buckets and getattr(self, "check_images", "full") == "none":
            yield "--aspect_buckets needs every image's size: --check_images header is the quickest that tells it"
        if not self.aspect_buckets:
            return
        if getattr(self, "random_resized_crop_scale", None) is not None:
            yield "--aspect_buckets keeps as much of an image as fits: leave --random_resized_crop_scale out"
        sides = set(self.resolution.lower().split("x"))
        if len(sides) > 1:
            yield f"--aspect_buckets finds the shapes by itself: --resolution {self.resolution} must be one side"
        elif all(side.isdecimal() for side in sides):  # what else it can be, the dataset's flags complain of
            yield from self._problems_with_the_side(*map(int, sides))

    def _problems_with_the_side(self, side):
        step = self.bucket_step
        if side % step:
            near = max(step, round(side / step) * step)
            yield f"--resolution {side} must be a multiple of --bucket_step {step}, e.g. {near}; or lower --bucket_step"
        if self.min_side is not None and self.min_side > side:
            yield f"--min_side {self.min_side} must be at most --resolution {side}"
        if self.max_side is not None and self.max_side < side:
            yield f"--max_side {self.max_side} must be at least --resolution {side}"


def bucket_sizes(args, height=math.inf, width=math.inf):
    """[(height, width)] of the buckets, for each side the largest other one; none higher or wider than is said here.

    `args`: BucketArgs with the dataset's --resolution.
    """
    side, step = args.size[0], args.bucket_step
    shortest = side // 2 if args.min_side is None else args.min_side
    longest = 2 * side if args.max_side is None else args.max_side
    sides = range(max(1, -(-shortest // step)) * step, longest + 1, step)
    return _sizes(sides, side * side, min(height, longest), min(width, longest))


@cache
def _sizes(sides, area, height, width):
    fitting = [(h, w) for h in sides for w in sides if h * w <= area and h <= height and w <= width]
    widest = {h: w for h, w in fitting}  # the last of a key stays, and that is the largest
    highest = {w: h for h, w in fitting}
    return sorted({*widest.items(), *((h, w) for w, h in highest.items())})


def bucket_of(args, size):
    """The bucket of an image of `size`, both (height, width); None where --max_upscale lets it fill none."""
    most = [side * args.max_upscale for side in size]
    bucket = _nearest(bucket_sizes(args), size)
    if bucket[0] <= most[0] and bucket[1] <= most[1]:
        return bucket
    sides = [side // args.bucket_step * args.bucket_step for side in most]  # few cases, so that they are worth a cache
    return _nearest(bucket_sizes(args, *sides), size)


def _nearest(buckets, size):
    """By the logarithm of the aspect ratio."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - aspect), default=None)


def sort_into_buckets(args, rows, sizes, findings):
    """(rows, their buckets), of rows whose images have `sizes`, all (height, width). Without --aspect_buckets, one.

    Images too small for any bucket are errors; what is enlarged and cropped, and by how much, are warnings.
    """
    if not args.aspect_buckets:
        return rows, [args.size] * len(rows)
    fitting = cache(lambda size: bucket_of(args, size))
    kept, placed = [], []
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        bucket = fitting(size)
        if bucket is None:
            findings.error("image_too_small", row.origin, _shown(size))
        else:
            kept.append(number)
            placed.append((row, size, bucket))
    _note(args, placed, findings)
    return rows.take(kept), [bucket for _, _, bucket in placed]


def _note(args, placed, findings):
    for bucket, count in Counter(bucket for _, _, bucket in placed).most_common():
        findings.warn("buckets", f"{_shown(bucket)}: {count}")
    full = set(bucket_sizes(args))
    for row, size, bucket in placed:
        if bucket not in full:
            findings.warn("smaller_bucket", row.origin, _shown(size))
    factors = [(_enlargement(size, bucket), row.origin) for row, size, bucket in placed]
    enlarged = sorted((one for one in factors if one[0] > 1), reverse=True)
    for factor, origin in enlarged:
        findings.warn("enlarged", origin, f"by {factor:.2f}", most=f"{enlarged[0][0]:.2f}")
    shares = [(_cropped(size, bucket), row.origin) for row, size, bucket in placed]
    cropped = sorted((one for one in shares if one[0] > 0), reverse=True)
    mean = sum(share for share, _ in cropped) / max(1, len(cropped))
    for share, origin in cropped:
        findings.warn("cropped", origin, f"{share:.1%}", mean=f"{mean:.1%}", most=f"{cropped[0][0]:.1%}")


def _enlargement(size, bucket):
    return max(bucket[0] / size[0], bucket[1] / size[1])


def _cropped(size, bucket):
    """The share of the image's area that does not fit into the bucket."""
    across, along = bucket[0] * size[1], bucket[1] * size[0]
    return 1 - min(across, along) / max(across, along)


def _shown(size):
    return "x".join(map(str, size))
