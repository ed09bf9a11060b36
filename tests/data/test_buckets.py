"""Aspect-ratio buckets: sizes worked out by hand, and what a dataset's report says of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.data.buckets import BucketArgs, bucket_of, bucket_sizes, sort_into_buckets
from finetuning.data.findings import Findings
from finetuning.data.rows import Row, Rows
from finetuning.data.transforms import Draw, Transform
from train_text_to_image import Args


def flags(resolution="512", **given):
    return Args(**({"dataset_name": "x", "aspect_buckets": True} | given), resolution=resolution)


# Which sizes there are


def test_the_sizes_at_512_are_those_of_kohya():
    wide = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    assert bucket_sizes(flags()) == sorted([*wide, (512, 512), *((w, h) for h, w in wide)])


@pytest.mark.parametrize(
    "given",
    [{}, {"bucket_step": 8}, {"bucket_step": 128}, {"min_side": 300}, {"max_side": 700}, {"min_side": 1}],
    ids=str,
)
def test_sizes_are_multiples_within_the_bounds_and_none_could_be_larger(given):
    args = flags(**given)
    step, least, most = args.bucket_step, args.min_side or 256, args.max_side or 1024
    sizes = bucket_sizes(args)
    assert (512, 512) in sizes and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % step == w % step == 0 and least <= min(h, w) and max(h, w) <= most and h * w <= 512**2
        fits = lambda h, w: h * w <= 512**2 and max(h, w) <= most
        assert not (fits(h + step, w) and fits(h, w + step))
    allowed = [side for side in range(step, most + 1, step) if side >= least]
    assert {h for h, _ in sizes} == {h for h in allowed if h * allowed[0] <= 512**2}


# Where an image goes


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((3000, 3000), (512, 512)),
        ((1000, 1010), (512, 512)),
        ((3000, 2000), (640, 384)),  # 1.5: 1.667 is nearer than 1.286 by the logarithm
        ((1000, 1250), (448, 576)),
        ((2000, 6000), (256, 832)),  # 3: ln 2.4 (320 x 768) is 0.22 away, ln 3.25 only 0.08
        ((900, 9000), (256, 1024)),
    ],
)
def test_an_image_goes_to_the_nearest_aspect_ratio(size, bucket):
    assert bucket_of(flags(), size) == bucket
    assert bucket_of(flags(), size[::-1]) == bucket[::-1]


@pytest.mark.parametrize(
    ("size", "most", "bucket"),
    [
        ((512, 512), 1, (512, 512)),
        ((511, 511), 1, (448, 448)),  # the largest square that needs no enlargement
        ((511, 511), 1.01, (512, 512)),
        ((256, 256), 2, (512, 512)),  # exactly the bound
        ((500, 400), 1, (448, 384)),  # 1.25: of the sizes that fit in it, 1.167 is nearer than 1.4 and 1
        ((255, 2000), 1, None),
        ((171, 171), 1.5, (256, 256)),
        ((170, 171), 1.5, None),
    ],
)
def test_enlargement_is_bounded_by_a_smaller_bucket(size, most, bucket):
    args = flags(max_upscale=most)
    assert bucket_of(args, size) == bucket
    assert bucket_of(args, size[::-1]) == (bucket and bucket[::-1])


def test_no_image_is_enlarged_beyond_the_bound_and_a_larger_bound_never_loses_one():
    rng = np.random.default_rng(0)
    for size in rng.integers(100, 900, (300, 2)).tolist():
        found = [bucket_of(flags(max_upscale=most), tuple(size)) for most in (1.0, 1.3, 2.0)]
        for most, bucket in zip((1.0, 1.3, 2.0), found, strict=True):
            assert bucket is None or max(bucket[0] / size[0], bucket[1] / size[1]) <= most
        assert found == sorted(found, key=lambda bucket: bucket is not None)


def test_no_image_is_distorted():
    """A circle stays as wide as high, and the bucket is filled to its edges."""
    y, x = np.mgrid[:90, :200]
    circle = Image.fromarray(np.where((y - 45) ** 2 + (x - 100) ** 2 < 30**2, 255, 128).astype(np.uint8)).convert("RGB")
    args = flags("64", bucket_step=8)
    bucket = bucket_of(args, (90, 200))
    assert bucket == (40, 88)
    pixels, sizes = Transform(64, 64, True, False, "bilinear", None, 0).at(bucket).apply(circle, Draw())
    assert pixels.shape == (3, 40, 88) and sizes == (90, 200, 0, 0, 40, 88)
    white = pixels[0] > 0.5
    assert white.any(0).sum() == pytest.approx(white.any(1).sum(), abs=1) == pytest.approx(60 * 40 / 90, abs=3)
    assert torch.all(pixels[0] > -0.01)


# What is reported


def sorted_rows(sizes, **given):
    """(numbers of the rows kept, their buckets, {code: [(row, reason)]} of errors, the same of warnings)."""
    findings = Findings()
    rows = Rows.of(Row(index, ("",), f"row {index}") for index in range(len(sizes)))
    kept, buckets = sort_into_buckets(flags(**given), rows, sizes, findings)
    listed = lambda found: {code: [(one.where, one.reason) for one in examples] for code, examples in found.items()}
    return [row.image for row in kept], buckets, listed(findings.errors), listed(findings.warnings)


def test_without_the_flag_all_rows_have_the_resolution():
    found = sorted_rows([(10, 10), (3, 900)], aspect_buckets=False, resolution="32x40")
    assert found == ([0, 1], [(32, 40), (32, 40)], {}, {})


def test_too_small_images_are_errors_with_their_size():
    kept, buckets, errors, _ = sorted_rows([(100, 2000), (512, 512), (170, 170)])
    assert (kept, buckets) == ([1], [(512, 512)])
    assert errors == {"image_too_small": [("row 0", "100x2000"), ("row 2", "170x170")]}


def test_warnings_count_the_buckets_and_say_what_is_enlarged_and_cropped():
    _, buckets, _, warnings = sorted_rows([(1000, 1000), (512, 512), (400, 400), (512, 640), (300, 300)])
    assert buckets == [(512, 512), (512, 512), (512, 512), (448, 576), (448, 448)]
    assert warnings == {
        "buckets": [("512x512: 3", ""), ("448x576: 1", ""), ("448x448: 1", "")],
        "smaller_bucket": [("row 4", "300x300")],
        "enlarged": [("row 4", "by 1.49"), ("row 2", "by 1.28")],
        # 512 x 640 covers 448 x 576 at 460.8 x 576: of 640 columns all, of 512 lines 448 / 460.8 = 97.2 %
        "cropped": [("row 3", "2.8%")],
    }


# Flags


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, []),
        ({"aspect_buckets": False, "resolution": "500x20", "random_resized_crop_scale": 0.5}, []),
        ({"resolution": "big"}, []),  # the dataset's flags say so
        ({"resolution": "512x768"}, ["--resolution 512x768"]),
        ({"check_images": "none"}, ["--check_images"]),
        ({"random_resized_crop_scale": 0.5}, ["--random_resized_crop_scale"]),
        ({"resolution": "500"}, ["--resolution 500 must be a multiple of --bucket_step 64, e.g. 512"]),
        ({"min_side": 576}, ["--min_side 576 must be at most --resolution 512"]),
        ({"max_side": 448}, ["--max_side 448 must be at least --resolution 512"]),
        ({"min_side": 600, "bucket_step": 100}, ["--resolution", "--min_side"]),
    ],
    ids=str,
)
def test_each_wrong_flag_is_named(given, named):
    problems = list(BucketArgs.problems(flags(**given)))
    assert len(problems) == len(named)
    assert all(words in problem for words, problem in zip(named, problems, strict=True))
