"""Optimizers and learning-rate schedules, all from libraries, behind one call each."""

import re
from dataclasses import dataclass

import torch

from finetuning.cli import flag

SCHEDULES = (  # diffusers' SchedulerType
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant",
)  # fmt: skip
FROM_FLAGS = ("lr", "betas", "weight_decay", "eps")


@dataclass
class OptimArgs:
    """Optimizer and schedule"""

    learning_rate: float = flag(1e-4, "learning rate of the denoiser", min=0)
    text_encoder_lr: list[float] | None = flag(
        None, "learning rate of the text encoders, or one for each (none: as the denoiser)", min=0,
        requires="train_text_encoder",
    )  # fmt: skip
    scale_lr: bool = flag(False, "multiply the learning rates by batch size x accumulation x processes")
    lr_scheduler: str = flag("constant", "learning-rate schedule", choices=SCHEDULES)
    lr_warmup_steps: int = flag(500, "optimizer steps of linear warm-up, for the schedules that have one", min=0)
    lr_num_cycles: int = flag(1, "restarts of cosine_with_restarts", requires="lr_scheduler=cosine_with_restarts")
    lr_power: float = flag(1.0, "power of the polynomial schedule", requires="lr_scheduler=polynomial")
    lr_step_rules: str | None = flag(None, "rules of piecewise_constant, e.g. 1:10,0.1:20,0.01")
    optimizer: str = flag("adamw", "optimizer", choices=("adamw", "adamw8bit", "adafactor", "prodigy"))
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit states from bitsandbytes; the same as --optimizer adamw8bit")
    adam_beta1: float = flag(0.9, "decay of the first moment (GLIDE's momentum)", min=0, below=1)
    adam_beta2: float = flag(0.999, "decay of the second moment", min=0, below=1)
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay", min=0)
    adam_epsilon: float = flag(1e-8, "epsilon of Adam", min=0)
    max_grad_norm: float = flag(1.0, "clip the norm of the whole gradient at this; 0 only measures it", min=0)

    def problems(self):
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            yield f"--optimizer prodigy finds the learning rate itself: set --learning_rate 1, not {self.learning_rate}"
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            yield f"--use_8bit_adam and --optimizer {self.optimizer} name two optimizers: give one"
        if self.optimizer == "prodigy" and set(self.text_encoder_lr or ()) - {self.learning_rate}:
            yield "--text_encoder_lr: --optimizer prodigy finds one learning rate for all: leave the flag out"
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            yield "--lr_scheduler piecewise_constant and --lr_step_rules go together"
        elif self.lr_step_rules and not re.fullmatch(r"(\d+:[\d.e+-]+,)*[\d.e+-]+", self.lr_step_rules):
            yield f"--lr_step_rules {self.lr_step_rules} must look like 1:10,0.1:20,0.01"


def build_optimizer(args: OptimArgs, model, total_batch_size):
    """The optimizer of a model's trained parameters; `total_batch_size` rows make one optimizer step."""
    groups = model.parameter_groups(*learning_rates(args, total_batch_size))
    common = {"lr": groups[0]["lr"], "weight_decay": args.adam_weight_decay}
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, **common}
    kind = "adamw8bit" if args.use_8bit_adam else args.optimizer
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **adam)
    if kind == "adafactor":
        return torch.optim.Adafactor(groups, **common)
    if kind == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, **adam, safeguard_warmup=True, use_bias_correction=True)
    # One kernel for all weights on a GPU; on a CPU the plain one, whose last bits older checkpoints were trained with.
    return torch.optim.AdamW(groups, **adam, fused=groups[0]["params"][0].is_cuda or None)


def learning_rates(args: OptimArgs, total_batch_size):
    """(denoiser's peak learning rate, [that of all text encoders, or of each]).

    total_batch_size   rows that make one optimizer step
    """
    factor = total_batch_size if args.scale_lr else 1
    return args.learning_rate * factor, [rate * factor for rate in args.text_encoder_lr or [args.learning_rate]]


def load_optimizer(optimizer, state):
    """Take over a checkpoint's moments; what the flags say (learning rate, betas, decay) stays as the flags say."""
    chosen = [{key: group[key] for key in FROM_FLAGS if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, chosen, strict=True):
        group.update(own)


def build_schedule(args: OptimArgs, optimizer, total_steps, first_step=0):
    """A diffusers schedule over an optimizer whose groups hold their peak rates; it stands at `first_step`.

    A schedule is a function of the step alone, so there is nothing of it to save: on resume it is built again from
    the flags, and a changed --learning_rate is really used. It is never prepared by accelerate, which would step it
    once per process and so run its clock faster.
    """
    from diffusers.optimization import get_scheduler

    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max(total_steps, args.lr_warmup_steps + 1),  # polynomial divides by what warm-up leaves
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    schedule.last_epoch = first_step
    for group, peak, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * factor(first_step)
    return schedule
