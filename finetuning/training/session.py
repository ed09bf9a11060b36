"""A run, step by step: all that happens around the mathematics of a step.

The training script computes losses and calls the optimizer; a Session resumes, hands out the batches, logs, saves,
evaluates, and stops on a signal or where too much is forgotten.
"""

import math

import torch

from finetuning.files import atomic_result
from finetuning.rng import key
from finetuning.training.checkpoint import Checkpointer, NonFinite
from finetuning.training.evaluator import Evaluator
from finetuning.training.hub import build_upload
from finetuning.training.optim import build_schedule


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
        self.encode, self.optimizer = encoder, optimizer  # encode(batch) -> latents [n, c, h, w], conditioning
        self.total_steps = data.total_steps
        self.checkpoints = Checkpointer(args, model, ema, optimizer, run, data)
        self.first_step = self.step = self.checkpoints.resume(self.total_steps)
        self.lr_scheduler = build_schedule(args, optimizer, self.total_steps, self.first_step)
        encoder.build()
        self.evaluator = Evaluator(args, run, model, ema, data, self.first_step)
        self.prepared = (*run.prepare(model.denoiser, optimizer), self.lr_scheduler)
        self.upload = build_upload(run, model.hub_tags)
        self.stopping = self.forgets = False

    def steps(self):
        """Yield a Step for each optimizer step that is left; fewer on a signal, or where too much is forgotten."""
        run, last_step = self.run, self.total_steps
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

    def after(self, step):
        """What belongs after an optimizer step: log, save, evaluate."""
        self.step += 1
        values = {"train_loss": step.loss, "lr": step.learning_rate, "grad_norm": step.grad_norm}
        if step.overflowed:  # the loss scaler has passed over the step; an infinite norm is not JSON
            values |= {"grad_norm": None, "skipped": 1}
        self.run.log(values, self.step)
        self.run.tick(loss=step.loss, lr=step.learning_rate)
        self.stopping = self.run.any(self.run.stop_signal is not None)
        is_last = self.step == self.total_steps
        if self.stopping or is_last or self.run.any(self.checkpoints.due(self.step)):
            self.checkpoints.save(self.step)
        if self.stopping:
            return
        self.forgets = self.evaluator.evaluate(self.step)
        if self.forgets:
            self.checkpoints.save(self.step)

    def finish(self, write, key="model_index.json", loads="from_pretrained"):
        """Let `write(folder)` make the finished result, compare it with the base, and return the exit status.

        key    the file by which readers know the result
        loads  what loads it, for the message
        """
        run = self.run
        if self.stopping:
            run.finish()
            run.say(f"stopped after step {self.step} of {self.total_steps}: --resume_from_checkpoint latest goes on")
            return 128 + (run.stop_signal or 15)
        self.evaluator.evaluate(self.step, last=True)
        if run.is_main:
            atomic_result(run.output_dir, write, key)
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

    def __init__(self, session, batches):
        self.session, self.run, self.batches = session, session.run, batches
        self.loss, self.rows = 0.0, []
        self.grad_norm = self.learning_rate = None
        self.overflowed = False

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
        """Clip the whole gradient. Raises NonFinite, naming the rows of the step, before anything reaches the weights.

        Under fp16 an overflowing gradient is ordinary: the loss scaler passes over that step and lowers its scale.
        """
        run, optimizer = self.run, self.session.optimizer
        fused = self.session.args.fused_backward_pass  # then no gradient is left
        self.loss, norm = run.total(self.loss), optimizer.take_gradient_norm() if fused else run.clip(parameters)
        self.grad_norm, self.learning_rate = norm.item(), optimizer.param_groups[0]["lr"]
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            return
        self.overflowed = math.isfinite(self.loss) and run.scaler is not None and run.scaler.get_scale() >= 1
        if self.overflowed:
            return
        what = "gradient's norm" if math.isfinite(self.loss) else "loss"
        value = self.grad_norm if math.isfinite(self.loss) else self.loss
        raise NonFinite(
            f"the {what} is {value}; the rows of this step were\n"
            f"{self.session.data.training.describe(run.gathered(self.rows))}\n"
            "Usual causes: too high a --learning_rate, fp16 where --mixed_precision bf16 would do, or a broken image. "
            f"{self.session.checkpoints.advice()}"
        )
