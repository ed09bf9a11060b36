"""A run, step by step: all that happens around the mathematics of a step.

The training script computes losses and calls the optimizer; a Session resumes, hands out the batches, logs, saves,
evaluates, and stops on a signal or where too much is forgotten.
"""

import math
from collections import deque
from dataclasses import replace

import torch

from finetuning.families.sharding import gathered
from finetuning.files import atomic_result
from finetuning.rng import key, queues
from finetuning.training.checkpoint import Checkpointer, NonFinite
from finetuning.training.evaluator import Evaluator
from finetuning.training.hub import build_upload
from finetuning.training.optim import build_schedule
from finetuning.training.preflight import clock, forecast, largest_step, prepare_memory, undoing


class Session:
    """One run from the first step, or from a checkpoint, to the last.

    model      families.model.Model, or training.adapters.AdaptedModel
    data       data.loading.TrainingData
    encoder    data.cache.Encoder
    ema        training.ema.AveragedWeights, or NoAverage
    optimizer  of the model's trained parameters

    `prepared` is (denoiser, optimizer, learning-rate schedule), ready for this run's devices and precision.
    """

    def __init__(self, args, run, model, data, encoder, ema, optimizer):
        self.args, self.run, self.model, self.data, self.ema = args, run, model, data, ema
        self.optimizer = optimizer = run.divide(optimizer, model)
        self.encode = encoder  # encode(batch) -> latents [n, c, h, w], conditioning
        self.total_steps = data.total_steps
        self.checkpoints = Checkpointer(args, model, ema, optimizer, run, data)
        self.first_step = self.step = self.checkpoints.resume(self.total_steps)
        self.lr_scheduler = build_schedule(args, optimizer, self.total_steps, self.first_step)
        encoder.build()
        self.evaluator = Evaluator(args, run, model, ema, data, self.first_step)
        self.prepared = (*run.prepare(model.denoiser, optimizer), self.lr_scheduler)
        self.stopping = self.forgets = False
        self.unread = deque()  # steps whose loss and norm nobody has looked at yet: on a GPU the newest

    @property
    def rehearses(self):
        """Whether the largest step is tried out before the first: it takes too long to do so on a CPU unasked."""
        return self.args.preflight or queues(self.run.device)

    def steps(self):
        """Yield a Step for each optimizer step that is left; fewer on a signal, or where too much is forgotten.

        Two more come first on a GPU, and with --preflight nothing but these: a rehearsal, of which nothing remains.
        """
        run, last_step = self.run, self.total_steps
        if self.rehearses:
            yield from self._rehearse()
        if self.args.preflight:
            return
        self.upload = build_upload(run, self.model.hub_tags)
        self.checkpoints.load()
        run.begin(self.first_step, last_step)
        self.forgets = self.evaluator.evaluate(self.first_step)
        if self.forgets:
            return
        loader = self.data.training.loader(
            self.data.batch_sampler, self.first_step, last_step, self.args.dataloader_num_workers,
            pin_memory=run.device.type != "cpu",
        )  # fmt: skip
        batches = iter(loader)
        while self.step < last_step and not (self.stopping or self.forgets):
            yield Step(self, batches)

    def _rehearse(self):
        """Yield two steps of the run's largest batches, undo what they did, and say what a step takes.

        The second finds the optimizer's state in memory, so the peak is its own; so is the time, without warming up.
        """
        run, sampler, images = self.run, self.data.batch_sampler, self.data.training
        prepare_memory(self.args, run.device)
        step = largest_step(sampler, images)
        batches = list(images.loader(sampler, step, step + 1, workers=0))
        # A loss of 0 costs the same and cannot overflow, in which case the loss scaler would pass over the optimizer
        batches = [replace(batch, weights=0 * batch.weights) for batch in batches]
        owners = [self.optimizer, self.lr_scheduler, *([run.scaler] if run.scaler else [])]
        undo = undoing(self.model.trained_parameters(), self.ema, owners)
        for _ in range(2):
            started = clock(run.device)
            yield Step(self, iter(batches), is_rehearsal=True)
        seconds = clock(run.device) - started
        undo()
        rows = run.processes * sum(len(batch.rows) for batch in batches)
        run.say(forecast(run.device, rows, seconds, self.total_steps - self.first_step))

    def after(self, step):
        """What belongs after an optimizer step: save, evaluate. Raises NonFinite."""
        if step.is_rehearsal:
            return
        self.step += 1
        self.stopping = self.run.any(self.run.stop_signal is not None)
        is_last = self.step == self.total_steps
        saves = self.stopping or is_last or self.run.any(self.checkpoints.due(self.step))
        if saves or self.evaluator.due(self.step):
            self.settle()
        if saves:
            self.checkpoints.save(self.step)
        if self.stopping:
            return
        self.forgets = self.evaluator.evaluate(self.step)
        if self.forgets:
            self.checkpoints.save(self.step)

    def settle(self, all_but=0):
        """Check and log the steps, oldest first, all but the newest. Raises NonFinite."""
        while len(self.unread) > all_but:
            self.unread.popleft().settle()

    def finish(self, write, key="model_index.json", loads="from_pretrained"):
        """Make the finished result, compare it with the base, and return the exit status.

        write  called with (folder, the trained weights by parameter name, their average likewise or None)
        key    the file by which readers know the result
        loads  what loads it, for the message
        """
        run = self.run
        if self.args.preflight:
            run.finish()
            return 0
        if self.stopping:
            run.finish()
            run.say(f"stopped after step {self.step} of {self.total_steps}: --resume_from_checkpoint latest goes on")
            return 128 + (run.stop_signal or 15)
        self.evaluator.evaluate(self.step, last=True)
        trained = gathered([self.model.trained_parameters(), self.ema.shadow], keep=run.is_main)
        if run.is_main:
            atomic_result(run.output_dir, lambda folder: write(folder, *trained), key)
            run.say(f"finished: {run.output_dir} ({loads} loads it)")
            if grid := self.evaluator.compare(self.step):
                run.say(f"base beside fine-tuned: {grid}")
        uploaded = self.upload.push()
        run.finish()
        return 0 if uploaded else 1

    def facts(self):
        """What a LoRA file says of the run that made it."""
        args, training = self.args, self.data.training
        return {
            "steps": self.step,
            "images": self.data.batch_sampler.rows,
            "dataset": args.train_data_dir or args.dataset_name,
            "dataset_hash": training.fingerprint(),
            "caption_prefix": training.caption_prefix(),
        }


class Step:
    """One optimizer step, of one or several micro-batches."""

    def __init__(self, session, batches, is_rehearsal=False):
        self.session, self.run, self.batches, self.is_rehearsal = session, session.run, batches, is_rehearsal
        self.number, self.loss, self.rows = session.step + 1, 0.0, []

    def micro_batches(self):
        """Yield the batches of this step, on the run's device."""
        for batch in self.batches:
            if not self.rows:
                # Dropout draws from torch's own generator. Seeded by the step, it is the same after a resume; another
                # split of the step into micro-batches or processes draws another.
                torch.manual_seed(key(self.session.args.seed, "modules", batch.step, self.run.process))
            self.rows += batch.rows
            yield batch.to(self.run.device)
            if batch.ends_step:
                return

    def backward(self, losses, batch):
        """Add the gradient of the micro-batch's losses [n], weighted by its rows' shares of the step."""
        self.loss += self.run.backward(losses, batch.weights)

    def clip_and_check(self, parameters):
        """Clip the whole gradient, and look at loss and norm: those of this step, on a GPU those of the step before,
        which are there already. All are looked at before anything is saved or measured. Raises NonFinite.
        """
        run, optimizer = self.run, self.session.optimizer
        fused = self.session.args.fused_backward_pass  # then no gradient is left
        loss, norm = run.total(self.loss), optimizer.take_gradient_norm() if fused else run.clip(parameters)
        if self.is_rehearsal:
            return
        scale = run.scaler.scale(torch.ones_like(loss)) if run.scaler else torch.zeros_like(loss)
        self.learning_rate, self.floats = optimizer.param_groups[0]["lr"], run.floats(loss, norm, scale)
        self.session.unread.append(self)
        self.session.settle(all_but=run.lag)

    def settle(self):
        """Log the step. Raises NonFinite, naming its rows, where its loss or gradient is not a number.

        Under fp16 an overflowing gradient is ordinary: the loss scaler passes over that step and lowers its scale.
        """
        loss, norm, scale = self.floats()
        what, value = ("gradient's norm", norm) if math.isfinite(loss) else ("loss", loss)
        overflowed = not math.isfinite(norm) and math.isfinite(loss) and scale >= 1
        if not math.isfinite(value) and not overflowed:
            images = self.session.data.training
            raise NonFinite(
                f"the {what} is {value}; the rows of this step were\n"
                f"{images.describe(self.run.gathered(self.rows), self.number - 1)}\n"
                "Usual causes: too high a --learning_rate, fp16 where --mixed_precision bf16 would do, or a broken "
                f"image. {self.session.checkpoints.advice()}"
            )
        values = {"train_loss": loss, "lr": self.learning_rate, "grad_norm": norm}
        if overflowed:  # an infinite norm is not JSON
            values |= {"grad_norm": None, "skipped": 1}
        self.run.log(values, self.number)
        self.run.tick(loss=loss, lr=self.learning_rate)
