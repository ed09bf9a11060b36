"""Rows as Arrow columns act as a list of Row does."""

import pickle
from pathlib import Path

import pytest

from finetuning.data import rows as rows_module
from finetuning.data.rows import Row, Rows

SOME = [
    Row(Path("b/ä.png"), ("two", "zwei"), "line 1"),
    Row(Path("a.png"), ("one",), "line 2"),
    Row(Path("b.png"), ("three",), "line 3"),
    Row(Path("a.png"), ("first?",), "line 0"),
]


@pytest.fixture(params=[10_000, 1, 3])
def rows(request, monkeypatch):
    """The same, however many are made into columns together."""
    monkeypatch.setattr(rows_module, "TOGETHER", request.param)
    return Rows.of(iter(SOME))


def test_they_are_what_was_put_in(rows):
    assert rows == SOME and len(rows) == 4
    assert [rows[i] for i in range(-4, 4)] == SOME + SOME
    assert rows[1:3] == SOME[1:3] and rows[::-1] == SOME[::-1]
    assert rows.take([3, 0, 3]) == [SOME[3], SOME[0], SOME[3]]
    assert rows.take([]) == [] and not rows.take([])
    for outside in (4, -5):
        with pytest.raises(IndexError):
            rows[outside]


def test_they_are_sorted_by_image_and_keep_their_order_within_one(rows):
    assert rows.by_image() == sorted(SOME, key=lambda row: str(row.image))
    assert [row.origin for row in rows.by_image()][:2] == ["line 2", "line 0"]


def test_the_same_image_is_the_same_in_the_column(rows):
    images = rows.images()
    assert images[1] == images[3] and len(set(images)) == 3


def test_rows_of_a_hub_dataset_have_numbers():
    numbered = [Row(5, ("a",), "row 5"), Row(0, ("b", "c"), "row 0")]
    rows = Rows.of(numbered)
    assert rows == numbered and isinstance(rows[0].image, int) and rows.images() == [5, 0]


def test_names_that_are_not_utf8_stay_as_they_are():
    odd = Row(Path("\udcff\udc80.png"), ("a",), "line 1")
    assert Rows.of([odd])[0] == odd


def test_no_rows_are_falsy_and_can_be_asked_everything():
    empty = Rows.of([])
    assert not empty and list(empty) == [] and empty.by_image() == [] and empty.images() == [] and empty[:5] == []


def test_a_loader_process_can_be_sent_them(rows):
    assert pickle.loads(pickle.dumps(rows)) == rows
