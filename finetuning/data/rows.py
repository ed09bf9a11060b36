"""The rows of a dataset: which image, which captions, where they stand. A million of them fit in memory many times.

As Python objects a million rows take two gigabytes, and every loader process that looks at them copies its share. Here
they are Arrow columns; a Row is made of them when one is asked for.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

TOGETHER = 10_000  # rows that are Python objects at the same time: memory stays flat


@dataclass(frozen=True)
class Row:
    """One image and its captions. `image` is a path, or an index into a Hub dataset."""

    image: Path | int
    captions: tuple[str, ...]
    origin: str  # where a person finds it: "train/metadata.jsonl line 12"
    is_prior: bool = False  # of --prior_data_dir: there to be remembered, not to be learned


class Rows(Sequence):
    """Rows that cannot be changed; `take` gives some of them in a new order."""

    def __init__(self, table):
        self._table = table.combine_chunks()

    @classmethod
    def of(cls, rows):
        """From any iterable of Row."""
        import pyarrow as pa

        rows, tables = iter(rows), []
        while some := list(islice(rows, TOGETHER)):
            tables.append(_table(some))
        return cls(pa.concat_tables(tables) if tables else _table([]))

    def by_image(self):
        """Sorted by the image's path; rows of one image stay in the order they had."""
        import pyarrow.compute as pc

        return Rows(self._table.take(pc.sort_indices(self._table, [("image", "ascending")])))

    def take(self, indices):
        """The rows with these numbers, in this order."""
        import pyarrow as pa

        return Rows(self._table.take(pa.array(indices, pa.int64())))

    def with_prior(self, others, place):
        """These rows and, behind them, those of `place`, which are there to be remembered."""
        return Rows.of(chain(self, (replace(row, origin=f"{place}: {row.origin}", is_prior=True) for row in others)))

    def images(self):
        """The column of images, as paths or numbers that are equal where the image is the same."""
        return self._table["image"].to_pylist()

    def __len__(self):
        return self._table.num_rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return _row(*(column[index].as_py() for column in self._table.columns))

    def __iter__(self):
        for batch in self._table.to_batches(TOGETHER):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield _row(*values)

    def __eq__(self, other):
        return list(self) == list(other)


def _table(rows):
    import pyarrow as pa  # a slow import that `--help` does not need

    numbers = bool(rows) and isinstance(rows[0].image, int)
    images = [row.image if numbers else os.fsencode(row.image) for row in rows]  # names need not be UTF-8
    return pa.table({
        "image": pa.array(images, pa.int64() if numbers else pa.large_binary()),
        "captions": pa.array([row.captions for row in rows], pa.list_(pa.large_string())),
        "origin": pa.array([row.origin for row in rows], pa.large_string()),
        "is_prior": pa.array([row.is_prior for row in rows], pa.bool_()),
    })  # fmt: skip


def _row(image, captions, origin, is_prior):
    return Row(image if isinstance(image, int) else Path(os.fsdecode(image)), tuple(captions), origin, is_prior)
