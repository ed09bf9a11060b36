"""From an image to training pixels: positions worked out by hand, draws named by (seed, epoch, row)."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.data.transforms import INTERPOLATIONS, Draw, Transform


def transform(height=8, width=8, center_crop=True, random_flip=False, interpolation="nearest", scale=None, seed=0):
    return Transform(height, width, center_crop, random_flip, interpolation, scale, seed)


def cut(transform, image, epoch=0, row=0):
    """(pixels, sizes) of a row in an epoch."""
    return transform.apply(image, transform.draw(epoch, row))


def coordinates(width, height):
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def columns_and_rows(pixels):
    """Of a transformed `coordinates` image: its source columns along the first line, its source rows."""
    values = ((pixels + 1) * 127.5).round().int()
    return values[0, 0].tolist(), values[1, :, 0].tolist()


# -- the pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "columns", "rows"),
    [
        ((12, 8), range(2, 10), range(8)),
        ((8, 14), range(8), range(3, 11)),
        ((8, 8), range(8), range(8)),
        # 4 x 2 becomes 16 x 8; the middle 8 columns are the source columns 1 and 2
        ((4, 2), [1] * 4 + [2] * 4, [0] * 4 + [1] * 4),
    ],
)
def test_centre_crop_takes_the_middle(size, columns, rows):
    assert columns_and_rows(cut(transform(), coordinates(*size))[0]) == ([*columns], [*rows])


def test_non_square_crop_covers_height_by_width():
    # 20 x 20 becomes 16 x 16, of which the middle 8 lines are kept: 4/16 above and below are cut off.
    image = Image.new("RGB", (20, 20), "red")
    image.paste((0, 255, 0), (0, 5, 20, 15))
    pixels, _ = cut(transform(height=8, width=16), image)
    assert torch.equal(pixels, torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 8, 16))


@pytest.mark.parametrize("size", [(2, 2), (3, 50), (50, 3), (7, 9), (513, 511)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_any_size_of_image_gives_the_size_asked_for(size, scale):
    pixels, _ = cut(transform(height=8, width=24, center_crop=False, scale=scale), Image.new("RGB", size))
    assert pixels.shape == (3, 8, 24)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_keeps_a_plain_colour(interpolation):
    pixels, _ = cut(transform(interpolation=interpolation), Image.new("RGB", (30, 20), (255, 0, 255)))
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 8, 8))


def test_interpolation_is_the_one_asked_for():
    # Lines of black and white, halved: the nearest pixel is black or white, a box is their mean.
    lines = np.zeros((16, 16, 3), np.uint8)
    lines[1::2] = 255
    values = {mode: cut(transform(interpolation=mode), Image.fromarray(lines))[0] for mode in ("nearest", "box")}
    assert set(values["nearest"].unique().tolist()) <= {-1.0, 1.0}
    assert values["box"].abs().max() < 0.01


# -- the draws -------------------------------------------------------------------------------------------------------

RANDOM = [{"center_crop": False}, {"random_flip": True}, {"scale": 0.3}, {"scale": 0.3, "random_flip": True}]


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_draws_are_a_function_of_seed_epoch_and_row(options):
    draw = lambda seed, epoch, row: transform(seed=seed, **options).draw(epoch, row)
    places = [(seed, epoch, row) for seed in range(2) for epoch in range(3) for row in range(5)]
    forwards = [draw(*place) for place in places]
    assert forwards == [draw(*place) for place in reversed(places)][::-1]  # no history
    for varied in ([(0, 0, row) for row in range(20)], [(0, n, 0) for n in range(20)], [(n, 0, 0) for n in range(20)]):
        assert len({draw(*place) for place in varied}) > 1  # row, epoch and seed each count


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_global_generators_are_left_alone(options):
    before = random.getstate(), torch.get_rng_state()
    cut(transform(**options), coordinates(20, 20))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_what_is_not_random_is_not_drawn():
    assert transform().draw(0, 0) == Draw()
    draws = [transform(center_crop=False, scale=0.3, random_flip=True).draw(0, row) for row in range(200)]
    assert all(0 <= one.u < 1 and 0 <= one.v < 1 and 0.3 <= one.area <= 1 for one in draws)
    assert {transform(center_crop=False).draw(0, row).area for row in range(20)} == {1.0}


def test_half_of_the_images_are_mirrored_where_it_is_allowed():
    flips = [transform(random_flip=True).draw(0, row).flip for row in range(400)]
    assert 150 < sum(flips) < 250  # five deviations of a binomial
    assert not any(transform(random_flip=True).draw(0, row, may_flip=False).flip for row in range(20))
    assert not any(transform().draw(0, row).flip for row in range(20))


def test_flip_does_not_move_the_random_crop():
    plain, flipped = transform(center_crop=False), transform(center_crop=False, random_flip=True)
    for row in range(20):
        one, other = plain.draw(0, row), flipped.draw(0, row)
        assert (one.u, one.v) == (other.u, other.v)


# -- where the crop lies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "places"), [((12, 8), (1, 5)), ((8, 11), (4, 1))])
def test_the_random_crop_lies_at_all_places_equally_often(size, places):
    found = Counter()
    for row in range(600):
        pixels, (_, _, top, left, *_) = cut(transform(center_crop=False), coordinates(*size), 0, row)
        assert columns_and_rows(pixels) == ([*range(left, left + 8)], [*range(top, top + 8)])
        found[top, left] += 1
    down, across = places
    assert set(found) == {(top, left) for top in range(down) for left in range(across)}
    mean = 600 / (down * across)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in found.values())  # five deviations of a binomial


@pytest.mark.parametrize("share", [0.0, 0.5, 1 - 2**-53])
def test_no_draw_leads_outside(share):
    pixels, (_, _, top, left, *_) = transform().apply(coordinates(12, 8), Draw(share, share))
    assert (top, left) == (0, int(share * 5)) and columns_and_rows(pixels)[0] == [*range(left, left + 8)]


@pytest.mark.parametrize(
    ("size", "options", "draw", "sizes"),
    [
        ((12, 8), {}, Draw(), (8, 12, 0, 2, 8, 8)),
        ((24, 16), {}, Draw(), (16, 24, 0, 2, 8, 8)),  # resized to 12 x 8: the place is in the resized image
        ((4, 2), {}, Draw(), (2, 4, 0, 4, 8, 8)),
        ((12, 8), {"center_crop": False}, Draw(0.5, 0.99), (8, 12, 0, 4, 8, 8)),
        ((13, 8), {}, Draw(flip=True), (8, 13, 0, 3, 8, 8)),  # 2 columns to the left, 3 to the right
        ((12, 8), {"center_crop": False}, Draw(0.5, 0.2, True), (8, 12, 0, 3, 8, 8)),
        ((20, 20), {"height": 8, "width": 16}, Draw(), (20, 20, 4, 0, 8, 16)),
        ((100, 100), {"scale": 0.25}, Draw(0.0, 0.999, area=0.25), (100, 100, 0, 8, 8, 8)),
        ((100, 100), {"scale": 0.25}, Draw(0.999, 0.999, True, 0.25), (100, 100, 8, 0, 8, 8)),
        ((100, 100), {"scale": 0.25}, Draw(0.5, 0.5, area=1.0), (100, 100, 0, 0, 8, 8)),
    ],
)
def test_sizes_say_where_the_crop_lies(size, options, draw, sizes):
    """(original height, width; crop top, left; height, width), in the mirrored image where it is mirrored."""
    assert transform(**options).apply(coordinates(*size), draw)[1] == sizes


def test_mirrored_pixels_are_those_of_the_mirrored_image():
    image = coordinates(13, 8)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for v in (None, 0.0, 0.3, 0.9):
        pixels, (_, _, _, left, *_) = transform().apply(image, Draw(None if v is None else 0.0, v, flip=True))
        assert columns_and_rows(pixels)[0] == [mirrored.getpixel((left + column, 0))[0] for column in range(8)]


# -- random resized crops --------------------------------------------------------------------------------------------


def crop_sizes(image, height, width, scale, count=200):
    """(width, height) in source pixels of random resized crops: no source pixel is skipped when enlarging."""
    for row in range(count):
        columns, rows = columns_and_rows(cut(transform(height=height, width=width, scale=scale), image, 0, row)[0])
        yield max(columns) - min(columns) + 1, max(rows) - min(rows) + 1


def test_resized_crop_keeps_at_least_the_share_asked_for():
    # Of 100 x 100 pixels: sides are whole pixels, so a share of 0.25 is a side of 50, and at most all.
    sides = list(crop_sizes(coordinates(100, 100), 100, 100, 0.25))
    assert all(width == height for width, height in sides)
    assert 50 <= min(sides)[0] < 58
    assert 93 < max(sides)[0] <= 100
    share = np.mean([width * height for width, height in sides]) / 100**2
    assert share == pytest.approx(0.625, abs=0.08)  # drawn evenly from 0.25 to 1


def test_resized_crop_has_the_aspect_of_the_output():
    for width, height in crop_sizes(coordinates(100, 60), 60, 120, 0.2, count=100):
        assert width == pytest.approx(2 * height, abs=2)
