"""The data of a run: what is trained on, what is held out, and in which order, whole or as a stream."""

from dataclasses import dataclass

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.streams import StreamBatchSampler, StreamedImages, open_stream, stream_sampler
from finetuning.data.training_set import ImageDataset, load_images


@dataclass
class TrainingData:
    """What a run trains on."""

    training: ImageDataset | StreamedImages
    held_out: ImageDataset | None
    batch_sampler: BatchSampler | StreamBatchSampler
    total_steps: int  # optimizer steps of the whole run

    def summary(self):
        """How much there is, for a message."""
        return self.training.summary() + (f", {len(self.held_out)} held out" if self.held_out else "")


def load_training(args, tokenize, run):
    """The TrainingData that the flags name, as this process has to read it. Raises DatasetError.

    args      the script's, with all groups of finetuning/data
    tokenize  families.family.Tokenizers
    run       training.run.Run: `say`, and how many processes there are
    """
    cut = {
        "micro_batch": args.train_batch_size, "accumulation": args.gradient_accumulation_steps,
        "processes": run.processes, "process": run.process, "seed": args.seed,
    }  # fmt: skip
    if args.streaming:
        training = open_stream(args, tokenize, args.seed, run.say, args.cache_dir)
        return TrainingData(training, None, stream_sampler(args, training.shards, **cut), args.max_train_steps)
    training, held_out = load_images(args, tokenize, args.seed, args.validation_fraction, run.say, args.cache_dir)
    sampler = BatchSampler(rows=len(training), buckets=training.sizes, **cut)
    total_steps = args.max_train_steps or args.num_train_epochs * sampler.steps_per_epoch
    return TrainingData(training, held_out, sampler, total_steps)
