"""Which rows make up which optimizer step, on which process, in which micro-batch.

The order of an epoch is a permutation drawn from (seed, epoch). It is cut into groups of one optimizer step each:
batch x accumulation x processes rows, the last group of an epoch being whatever is left. A group is cut into
micro-batches in one way only, so 1 x 8, 2 x 4 and 4 accumulated x 2 train on the same rows with the same weights.

All rows of a group are of one bucket, so that their images have one size: each bucket is cut into groups by itself
(the last of each may be short), and the groups stand where their first row stands in the permutation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from finetuning.rng import torch_generator


@dataclass(frozen=True)
class SampleIndex:
    """What the dataset is indexed by: a row and its place in the run, from which everything random is drawn.

    `weight` is the row's share of the step's loss; 0 for padding.
    """

    row: int
    epoch: int
    step: int
    weight: float
    ends_step: bool


@dataclass(frozen=True)
class BatchSampler:
    """The order of the whole run, on one process. It has no state: any step can be asked for."""

    rows: int
    micro_batch: int
    accumulation: int
    processes: int
    process: int
    seed: int
    buckets: Sequence = ()  # [rows] what each row's bucket is called; empty: all are of one

    @property
    def total_batch_size(self):
        return self.micro_batch * self.accumulation * self.processes

    @cached_property
    def rows_in_bucket(self):
        """{bucket: how many rows}."""
        return Counter(self.buckets) or Counter({None: self.rows})

    @property
    def steps_per_epoch(self):
        return sum(-(-count // self.total_batch_size) for count in self.rows_in_bucket.values())

    @property
    def short_steps(self):
        """How many steps of an epoch have fewer rows than the others: at most one for each bucket."""
        return sum(count % self.total_batch_size > 0 for count in self.rows_in_bucket.values())

    def permutation(self, epoch):
        return torch.randperm(self.rows, generator=torch_generator(self.seed, "order", epoch)).tolist()

    def groups(self, epoch):
        """The rows of each step of the epoch, [[row, ...], ...]."""
        groups, unfinished = [], {}
        for row in self.permutation(epoch):
            bucket = self.buckets[row] if self.buckets else None
            if len(unfinished.get(bucket, ())) in (0, self.total_batch_size):
                unfinished[bucket] = []
                groups.append(unfinished[bucket])
            unfinished[bucket].append(row)
        return groups

    def micro_batches(self, first_step, last_step):
        """Yield lists of SampleIndex for the steps first_step <= step < last_step; a step's last list ends it."""
        groups_of = None
        for step in range(first_step, last_step):
            epoch, group = divmod(step, self.steps_per_epoch)
            if groups_of != epoch:
                groups, groups_of = self.groups(epoch), epoch
            yield from self._cut(groups[group], epoch, step)

    def _cut(self, rows, epoch, step):
        together = self.micro_batch * self.processes
        for start in range(0, len(rows), together):
            ends_step = start + together >= len(rows)
            mine = rows[start : start + together][self.process * self.micro_batch :][: self.micro_batch]
            if mine:
                yield [SampleIndex(row, epoch, step, 1 / len(rows), ends_step) for row in mine]
            else:  # every process has to take part in every micro-batch: this one with a row that counts for nothing
                yield [SampleIndex(rows[0], epoch, step, 0.0, ends_step)]
