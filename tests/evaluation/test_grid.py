"""A grid shows every image once, in its place, with its labels clear of the images."""

import numpy as np
import pytest
from PIL import Image

from finetuning.evaluation.grid import GAP, labelled_grid

PAPER = (252, 252, 252)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(color, size=(40, 30)):
    return Image.new("RGB", size, color)


def box(sheet, color):
    """(left, top, right, bottom) of the pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def dark(sheet):
    """Where the labels' ink is: [height, width] of bools."""
    return np.asarray(sheet.convert("L")) < 60


def test_cells_stand_in_rows_and_columns_a_gap_apart():
    sheet = labelled_grid([[plain(RED), plain(GREEN)], [plain(BLUE), None]], [], [])
    assert sheet.mode == "RGB"
    assert sheet.size == (GAP + 2 * (40 + GAP), 2 * GAP + 2 * (30 + GAP))
    left, top = GAP, 2 * GAP
    assert box(sheet, RED) == (left, top, left + 40, top + 30)
    assert box(sheet, GREEN) == (left + 40 + GAP, top, left + 80 + GAP, top + 30)
    assert box(sheet, BLUE) == (left, top + 30 + GAP, left + 40, top + 60 + GAP)


def test_cells_may_be_empty_and_rows_of_different_lengths():
    sheet = labelled_grid([[None, plain(RED)], [plain(BLUE)]], [], [])
    assert sheet.width == GAP + 2 * (40 + GAP)
    assert box(sheet, RED) == (GAP + 40 + GAP, 2 * GAP, GAP + 80 + GAP, 2 * GAP + 30) and box(sheet, BLUE)[0] == GAP


@pytest.mark.parametrize(("scale_to", "side"), [(None, 8), (8, 8), (20, 16), (32, 32), (33, 32)])
def test_small_images_are_enlarged_by_whole_factors_without_smoothing(scale_to, side):
    checkers = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    sheet = np.asarray(labelled_grid([[checkers]], [], [], scale_to))
    cell = sheet[2 * GAP : 2 * GAP + side, GAP : GAP + side]
    factor = side // 8
    assert np.array_equal(cell, np.asarray(checkers).repeat(factor, 0).repeat(factor, 1))
    assert sheet.shape[:2] == (3 * GAP + side, 2 * GAP + side)


def test_labels_stand_beside_their_row_and_above_their_column():
    cells = [[plain(RED, (60, 60)), plain(GREEN, (60, 60))], [plain(BLUE, (60, 60)), None]]
    sheet = labelled_grid(cells, ["first", "second"], ["base", "tuned"])
    left, top, *_ = box(sheet, RED)
    ink = dark(sheet)
    second_column, second_row = box(sheet, GREEN)[0], box(sheet, BLUE)[1]
    assert ink[:top, left : left + 60].any()
    assert ink[:top, second_column:].any()
    assert ink[top : top + 60, :left].any()
    assert ink[second_row:, :left].any()
    assert not ink[:top, :left].any()


LONG = "a small red circle to the left of a large purple triangle on a gray background (seed 1)"


@pytest.mark.parametrize(
    "label", [LONG, "W" * 40, "i" * 60, "MMMM WWWW " * 6, ""], ids=["words", "W", "i", "MW", "none"]
)
def test_long_labels_are_wrapped_and_leave_the_images_whole(label):
    cells = [[plain(RED, (96, 96)), plain(GREEN, (96, 96))], [plain(BLUE, (96, 96)), plain((250, 250, 0), (96, 96))]]
    sheet = labelled_grid(cells, [label] * 2, [label] * 2)
    for color in (RED, GREEN, BLUE, (250, 250, 0)):
        left, top, right, bottom = box(sheet, color)
        assert (right - left, bottom - top) == (96, 96)
        assert (np.asarray(sheet)[top:bottom, left:right] == color).all()
    left = box(sheet, RED)[0]
    bare = labelled_grid(cells, [""] * 2, [label] * 2)
    # Ink beside the images comes from the row labels alone, and ends before the images begin.
    assert not dark(sheet)[:, left - GAP : left].any()
    gap = slice(box(sheet, RED)[2], box(sheet, GREEN)[0])
    assert not dark(sheet)[:, gap].any()
    assert not dark(sheet)[-GAP:].any()
    assert bare.height <= sheet.height


def test_a_label_that_fits_stays_on_one_line():
    """Narrow letters take less room than they are counted for."""
    short = labelled_grid([[plain(RED, (20, 20))]], ["o"], [])
    for label in ("illicit", "0.25", "little hill"):
        wide = labelled_grid([[plain(RED, (120, 20))]], [label], [])
        rows = np.flatnonzero(dark(wide)[:, : box(wide, RED)[0]].any(1))
        assert np.ptp(rows) < 16, label
    assert short.height == wide.height


def test_no_row_label_covers_the_next_row():
    cells = [[plain(RED, (64, 20))], [plain(GREEN, (64, 20))]]
    sheet = labelled_grid(cells, [LONG, "short"], [])
    ink = dark(sheet)[:, : box(sheet, RED)[0]].any(1)
    second = box(sheet, GREEN)[1]
    assert ink[: second - GAP].any()
    assert not ink[second - GAP : second].any()
