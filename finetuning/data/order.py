"""Which rows make up which optimizer step, on which process, in which micro-batch.

The order of an epoch is a permutation drawn from (seed, epoch). It is cut into groups of one optimizer step each:
batch x accumulation x processes rows, the last group of an epoch being whatever is left. A group is cut into
micro-batches in one way only, so 1 x 8, 2 x 4 and 4 accumulated x 2 train on the same rows with the same weights.
"""

from dataclasses import dataclass

import torch

from finetuning.draws import torch_generator


@dataclass(frozen=True)
class Place:
    """One row's place in the run. `weight` is its share of the step's loss; 0 for padding."""

    row: int
    epoch: int
    step: int
    weight: float
    ends_step: bool


@dataclass(frozen=True)
class Order:
    """The order of the whole run, on one process. It has no state: any step can be asked for."""

    rows: int
    micro_batch: int
    accumulation: int
    processes: int
    process: int
    seed: int

    @property
    def group_size(self):
        return self.micro_batch * self.accumulation * self.processes

    @property
    def steps_per_epoch(self):
        return -(-self.rows // self.group_size)

    def permutation(self, epoch):
        return torch.randperm(self.rows, generator=torch_generator(self.seed, "order", epoch)).tolist()

    def micro_batches(self, first_step, last_step):
        """Yield lists of Place for the steps first_step <= step < last_step; each step's last list ends the group."""
        permutation_of = None
        for step in range(first_step, last_step):
            epoch, group = divmod(step, self.steps_per_epoch)
            if permutation_of != epoch:
                permutation, permutation_of = self.permutation(epoch), epoch
            rows = permutation[group * self.group_size : (group + 1) * self.group_size]
            yield from self._cut(rows, epoch, step)

    def _cut(self, rows, epoch, step):
        together = self.micro_batch * self.processes
        for start in range(0, len(rows), together):
            ends_step = start + together >= len(rows)
            mine = rows[start : start + together][self.process * self.micro_batch :][: self.micro_batch]
            if mine:
                yield [Place(row, epoch, step, 1 / len(rows), ends_step) for row in mine]
            else:  # every process has to take part in every micro-batch: this one with a row that counts for nothing
                yield [Place(rows[0], epoch, step, 0.0, ends_step)]
