"""Datasets that are read as they come: WebDataset tars, Parquet files, and datasets of the Hub that are not downloaded.

The order is a function of (seed, epoch): the shards are permuted and shared out among the processes, and each process
reads its own one after another through a buffer from which the next sample is drawn. A process goes from its last
sample of an epoch to its first of the next one by itself, so every step is full, and the processes, whose shards differ
in length, need not be in the same epoch.

A resumed run reads its stream again up to the step where it goes on: the headers and captions of tars, whole rows of
Parquet files and Hub datasets, which are fetched again. Nothing is decoded, and an epoch whose shards were counted when
an earlier one was read is passed over. Which sample stands where never depends on whether its image can be decoded.
"""

import itertools
import re
import sys
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from finetuning.cli import flag
from finetuning.data.batch_sampler import SampleIndex
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.images import UnreadableImage
from finetuning.data.samples import Sample
from finetuning.data.shards import Shards, open_shards
from finetuning.data.training_set import CaptionedImages
from finetuning.data.transforms import Transform
from finetuning.rng import python_random

NEEDS_THE_WHOLE_DATASET = {
    "aspect_buckets": "leave it out",
    "cached_crops": "leave it out",
    "checkpointing_epochs": "use --checkpointing_steps",
    "max_train_samples": "name fewer shards",
    "validation_fraction": "leave it out: there is no validation loss with --streaming",
}


@dataclass
class StreamArgs:
    """Streaming"""

    streaming: bool = flag(
        False, "read the dataset as it comes, in flat memory: a Hub dataset, or in --train_data_dir a folder of tars "
        "(WebDataset) or Parquet files, or a pattern in quotes, 'shards/{00000..00012}.tar'",
    )  # fmt: skip
    shuffle_buffer: int = flag(
        1000, "draw each sample of a stream from this many; Parquet and Hub images wait in memory, as encoded; "
        "1: the order of the files", min=1, requires="streaming",
    )  # fmt: skip

    def problems(self):
        if not self.streaming:
            return
        if self.max_train_steps is None:
            yield "--streaming needs --max_train_steps: how long an epoch is is not known"
        for name, fix in NEEDS_THE_WHOLE_DATASET.items():
            if getattr(self, name, None):
                yield f"--{name} needs a dataset that is known as a whole, which --streaming does not: {fix}"
        if getattr(self, "prompts", None) and self.validation_epochs and self.validation_steps is None:
            yield "--validation_epochs: with --streaming epochs have no known end: use --validation_steps"


@dataclass(frozen=True)
class StreamSampleIndex(SampleIndex):
    """A place in the run with the sample that stands there. `row` counts the process's samples of the epoch."""

    sample: Sample


@dataclass(frozen=True)
class StreamBatchSampler:
    """The order of the whole run, on one process: which samples make up which step. It has no state."""

    shards: Shards
    micro_batch: int
    accumulation: int
    processes: int
    process: int
    seed: int
    shuffle_buffer: int
    # What a BatchSampler knows, and a stream does not
    rows = steps_per_epoch = None

    @property
    def total_batch_size(self):
        return self.micro_batch * self.accumulation * self.processes

    def shards_of(self, epoch):
        """The numbers of the shards that this process reads in the epoch, in their order."""
        numbers = list(range(len(self.shards)))
        python_random(self.seed, "shards", epoch).shuffle(numbers)
        return numbers[self.process :: self.processes]

    def samples(self, epoch):
        """Yield this process's samples of the epoch."""
        rng = python_random(self.seed, "shuffle buffer", epoch, self.process)
        unshuffled = (sample for number in self.shards_of(epoch) for sample in self.shards.read(number))
        return _through_buffer(unshuffled, self.shuffle_buffer, rng)

    def micro_batches(self, first_step, last_step):
        """Yield lists of StreamSampleIndex for the steps first_step <= step < last_step; a step's last ends it."""
        places = self._places(first_step * self.micro_batch * self.accumulation)
        for step, part in itertools.product(range(first_step, last_step), range(self.accumulation)):
            ends_step = part == self.accumulation - 1
            yield [
                StreamSampleIndex(row, epoch, step, 1 / self.total_batch_size, ends_step, sample)
                for row, epoch, sample in itertools.islice(places, self.micro_batch)
            ]

    def _places(self, start):
        """Yield (row, epoch, sample) without end, from the process's `start`-th sample of the run."""
        for epoch in itertools.count():
            lengths = [self.shards.lengths.get(number) for number in self.shards_of(epoch)]
            if None not in lengths and 0 < sum(lengths) <= start:
                start -= sum(lengths)
                continue
            length = 0
            for position, sample in enumerate(self.samples(epoch)):
                length = position + 1
                if position >= start:
                    yield position * self.processes + self.process, epoch, sample
            if not length:
                names = ", ".join(self.shards.names[number] for number in self.shards_of(epoch)[:5])
                raise DatasetError(f"no row of {self.shards.source} is left to train on, in {names}")
            start = max(0, start - length)


def _through_buffer(samples, size, rng):
    """The same samples in another order: each is drawn from `size` that were read."""
    waiting = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
        else:
            drawn = rng.randrange(size)
            yield waiting[drawn]
            waiting[drawn] = sample
    rng.shuffle(waiting)
    yield from waiting


class StreamedImages(CaptionedImages):
    """Images that come with their indices: how many there are is not known."""

    def __init__(self, shards, transform, tokenize, args, seed):
        super().__init__(transform, tokenize, args, seed)
        self.shards = shards
        self.origins = {}  # {step: {row: where it stands}} of the step that is being trained on, and of the one before

    def __getstate__(self):
        """For the loader's workers: they get their samples with the indices, and what reads shards does not pickle."""
        return self.__dict__ | {"shards": None}

    def row_at(self, index):
        return index.sample

    def transform_at(self, index):
        """One size for all."""
        return self.transform

    def open(self, row):
        return row.open()

    def __getitem__(self, index):
        """(index, fp32 [3, height, width] or None, sizes, caption or why the image cannot be read)."""
        try:
            return super().__getitem__(index)
        except UnreadableImage as error:
            return index, None, None, re.sub(r" <.*? at 0x\w+>", "", str(error))  # each time the address is another

    def collate(self, items):
        """(Batch, {row: where it stands}, why images cannot be read); the share of those goes to the others."""
        good = [item for item in items if item[1] is not None]
        blank = torch.zeros(3, self.transform.height, self.transform.width), (0,) * 6
        batch = super().collate(good or [(items[0][0], *blank, "")])
        batch.weights *= len(items) / len(good) if good else 0.0
        origins = {index.row: index.sample.origin for index, *_ in items}
        return batch, origins, [reason for _, pixels, _, reason in items if pixels is None]

    def fingerprint(self):
        """A hash of which shards there are, not of all that is in them."""
        return self.shards.fingerprint()

    def caption_prefix(self):
        """The words that are put before every caption. Whether all begin with the same ones is not known."""
        return self.args.caption_prefix

    def describe(self, numbers, step):
        """Where the rows of this step, or of the one before, stand; those that another process has read by numbers."""
        known, elsewhere = self.origins.get(step, {}), "read by another process, as its number {} of the epoch"
        return "\n".join(f"  {known.get(number, elsewhere.format(number))}" for number in numbers)

    def summary(self):
        """How much there is, for a message."""
        return f"a stream of {len(self.shards)} shards"

    def loader(self, sampler, first_step, last_step, workers, pin_memory=False):
        """Micro-batches of the steps first_step <= step < last_step. Raises DatasetError where the stream breaks."""
        try:
            for batch, origins, reasons in super().loader(sampler, first_step, last_step, workers, pin_memory):
                if reasons:
                    findings = Findings()
                    for reason in reasons:
                        findings.error("unreadable_image", reason)
                    self.shards.tell(findings)
                before = {step: rows for step, rows in self.origins.items() if step >= batch.step - 1}
                self.origins = before | {batch.step: before.get(batch.step, {}) | origins}
                yield batch
        except DatasetError as error:
            if sampler.process:  # the script prints the main process's
                tqdm.write(f"process {sampler.process}: {error}", file=sys.stderr)
            raise


def open_stream(args, tokenize, seed, say=print, cache_dir=None):
    """The StreamedImages that the flags name."""
    shards = open_shards(args, say, cache_dir)
    return StreamedImages(shards, Transform.of(args, seed), tokenize, args, seed)


def stream_sampler(args, shards, **cut):
    """The order of a stream on this process. Raises DatasetError where it cannot be shared out."""
    if len(shards) < cut["processes"]:
        too_few = f"{shards.source} has {len(shards)} shards for {cut['processes']} processes, and each reads its own"
        raise DatasetError(f"{too_few}: start at most as many processes, or write the dataset in more shards")
    return StreamBatchSampler(shards=shards, shuffle_buffer=args.shuffle_buffer, **cut)
