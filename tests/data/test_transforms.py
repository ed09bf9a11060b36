"""From an image to training pixels: positions worked out by hand, draws named by (seed, epoch, row)."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.data.transforms import INTERPOLATIONS, Transform


def transform(height=8, width=8, center_crop=True, random_flip=False, interpolation="nearest", scale=None, seed=0):
    return Transform(height, width, center_crop, random_flip, interpolation, scale, seed)


def coordinates(width, height):
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def columns_and_rows(pixels):
    """Of a transformed `coordinates` image: its source columns along the first line, its source rows."""
    values = ((pixels + 1) * 127.5).round().int()
    return values[0, 0].tolist(), values[1, :, 0].tolist()


def test_pixels_lie_in_minus_1_to_1():
    image = Image.new("RGB", (8, 8), (0, 128, 255))
    pixels = transform()(image, 0, 0)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1, 2 * 128 / 255 - 1, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("size", "columns", "rows"),
    [((12, 8), range(2, 10), range(8)), ((8, 14), range(8), range(3, 11)), ((8, 8), range(8), range(8))],
)
def test_centre_crop_takes_the_middle(size, columns, rows):
    assert columns_and_rows(transform()(coordinates(*size), 0, 0)) == ([*columns], [*rows])


def test_non_square_crop_covers_height_by_width():
    # 20 x 20 becomes 16 x 16, of which the middle 8 lines are kept: 4/16 above and below are cut off.
    image = Image.new("RGB", (20, 20), "red")
    image.paste((0, 255, 0), (0, 5, 20, 15))
    pixels = transform(height=8, width=16)(image, 0, 0)
    assert pixels.shape == (3, 8, 16)
    assert torch.equal(pixels, torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 8, 16))


def test_small_image_is_enlarged_until_it_covers():
    # 4 x 2 becomes 16 x 8; the middle 8 columns are the source columns 1 and 2.
    pixels = transform()(coordinates(4, 2), 0, 0)
    assert columns_and_rows(pixels) == ([1] * 4 + [2] * 4, [0] * 4 + [1] * 4)


@pytest.mark.parametrize("size", [(2, 2), (3, 50), (50, 3), (7, 9), (513, 511)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_any_size_of_image_gives_the_size_asked_for(size, scale):
    pixels = transform(height=8, width=24, center_crop=False, scale=scale)(Image.new("RGB", size), 0, 0)
    assert pixels.shape == (3, 8, 24)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_keeps_a_plain_colour(interpolation):
    pixels = transform(interpolation=interpolation)(Image.new("RGB", (30, 20), (255, 0, 255)), 0, 0)
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 8, 8))


def test_interpolation_is_the_one_asked_for():
    # Lines of black and white, halved: the nearest pixel is black or white, a box is their mean.
    lines = np.zeros((16, 16, 3), np.uint8)
    lines[1::2] = 255
    values = {mode: transform(interpolation=mode)(Image.fromarray(lines), 0, 0) for mode in ("nearest", "box")}
    assert set(values["nearest"].unique().tolist()) <= {-1.0, 1.0}
    assert values["box"].abs().max() < 0.01


RANDOM = [{"center_crop": False}, {"random_flip": True}, {"scale": 0.3}, {"scale": 0.3, "random_flip": True}]


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_draws_are_a_function_of_seed_epoch_and_row(options):
    image = coordinates(40, 30)
    draw = lambda seed, epoch, row: tuple(transform(seed=seed, **options)(image, epoch, row).flatten().tolist())
    places = [(seed, epoch, row) for seed in range(2) for epoch in range(3) for row in range(5)]
    forwards = [draw(*place) for place in places]
    backwards = [draw(*place) for place in reversed(places)]
    assert forwards == backwards[::-1]  # no history
    for varied in ([(0, 0, row) for row in range(20)], [(0, n, 0) for n in range(20)], [(n, 0, 0) for n in range(20)]):
        assert len({draw(*place) for place in varied}) > 1  # row, epoch and seed each count


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_global_generators_are_left_alone(options):
    before = random.getstate(), torch.get_rng_state()
    transform(**options)(coordinates(20, 20), 0, 0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_random_crop_reaches_every_place_and_nothing_outside():
    cut = transform(center_crop=False)
    found = [columns_and_rows(cut(coordinates(12, 8), 0, row)) for row in range(200)]
    assert {columns[0] for columns, _ in found} == {0, 1, 2, 3, 4}
    assert all(columns == list(range(columns[0], columns[0] + 8)) for columns, _ in found)
    assert all(rows == list(range(8)) for _, rows in found)


def test_flip_mirrors_about_half_of_the_images():
    image = coordinates(8, 8)
    flip = transform(random_flip=True)
    found = [columns_and_rows(flip(image, 0, row)) for row in range(400)]
    assert all(columns in ([*range(8)], [*range(7, -1, -1)]) for columns, _ in found)
    assert all(rows == [*range(8)] for _, rows in found)
    assert 150 < sum(columns[0] == 7 for columns, _ in found) < 250  # five deviations of a binomial


def test_flip_does_not_move_the_random_crop():
    image = coordinates(12, 8)
    for row in range(20):
        plain = columns_and_rows(transform(center_crop=False)(image, 0, row))[0]
        flipped = columns_and_rows(transform(center_crop=False, random_flip=True)(image, 0, row))[0]
        assert flipped in (plain, plain[::-1])


def crop_sizes(image, height, width, scale, count=200):
    """(width, height) in source pixels of random resized crops: no source pixel is skipped when enlarging."""
    cut = transform(height=height, width=width, scale=scale)
    for row in range(count):
        columns, rows = columns_and_rows(cut(image, 0, row))
        yield max(columns) - min(columns) + 1, max(rows) - min(rows) + 1


def test_resized_crop_keeps_at_least_the_share_asked_for():
    # Of 100 x 100 pixels: sides are whole pixels, so a share of 0.25 is a side of 50, and at most all.
    sides = list(crop_sizes(coordinates(100, 100), 100, 100, 0.25))
    assert all(width == height for width, height in sides)
    assert 50 <= min(sides)[0] < 58
    assert 93 < max(sides)[0] <= 100
    share = np.mean([width * height for width, height in sides]) / 100**2
    assert share == pytest.approx(0.625, abs=0.08)  # drawn evenly from 0.25 to 1


def test_resized_crop_of_share_1_is_the_whole_image():
    assert set(crop_sizes(coordinates(60, 60), 60, 60, 1.0, count=10)) == {(60, 60)}


def test_resized_crop_has_the_aspect_of_the_output():
    for width, height in crop_sizes(coordinates(100, 60), 60, 120, 0.2, count=100):
        assert width == pytest.approx(2 * height, abs=2)


def test_flips_say_which_rows_are_mirrored():
    flip = transform(random_flip=True)
    for row in range(20):
        mirrored = columns_and_rows(flip(coordinates(8, 8), 2, row))[0][0] == 7
        assert flip.flips(2, row) == mirrored
    assert not any(transform(random_flip=False).flips(2, row) for row in range(20))


@pytest.mark.parametrize("flip", [False, True])
def test_fixed_is_the_centre_crop_mirrored_or_not(flip):
    image = coordinates(20, 14)
    centre = transform(center_crop=True)(image, 0, 0)
    expected = centre.flip(-1) if flip else centre
    assert torch.equal(transform(center_crop=False, random_flip=True).fixed(image, flip), expected)


@pytest.mark.parametrize("options", [{}, {"center_crop": False}, {"center_crop": False, "random_flip": True}], ids=str)
def test_at_another_size_all_else_stays(options):
    image = coordinates(40, 30)
    for row in range(10):
        tall = transform(seed=3, **options).at((16, 8))
        assert torch.equal(tall(image, 1, row), transform(height=16, width=8, seed=3, **options)(image, 1, row))
        assert torch.equal(tall.fixed(image, True), transform(height=16, width=8, **options).fixed(image, True))
    assert transform(**options).at((8, 8)) == transform(**options)
