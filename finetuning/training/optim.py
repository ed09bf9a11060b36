"""Optimizers and learning-rate schedules, all from libraries, behind one call each."""

import re
from dataclasses import dataclass
from functools import partial

import torch

from finetuning.cli import flag
from finetuning.families.sharding import like
from finetuning.rng import torch_generator

SCHEDULES = (  # diffusers' SchedulerType
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant",
)  # fmt: skip
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
OWN_SETTINGS = ("lr", "betas", "weight_decay", "eps", "fused")  # of a run: by its flags, and by its device


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
    lr_power: float = flag(1.0, "power of the polynomial schedule", min=0, requires="lr_scheduler=polynomial")
    lr_step_rules: str | None = flag(None, "rules of piecewise_constant, e.g. 1:10,0.1:20,0.01")
    optimizer: str = flag("adamw", "optimizer", choices=("adamw", "adamw8bit", "adafactor", "prodigy"))
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit states from bitsandbytes; the same as --optimizer adamw8bit")
    adam_beta1: float = flag(0.9, "decay of the first moment (GLIDE's momentum)", min=0, below=1)
    adam_beta2: float = flag(0.999, "decay of the second moment", min=0, below=1)
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay", min=0)
    adam_epsilon: float = flag(1e-8, "epsilon of Adam", min=0)
    max_grad_norm: float = flag(1.0, "clip the norm of the whole gradient at this; 0 only measures it", min=0)
    weights_precision: str = flag(
        "fp32", "precision of the trained weights; bf16 halves them, rounds each update at random so that small ones "
        "are not lost, and needs --mixed_precision bf16", choices=("fp32", "bf16"),
    )  # fmt: skip
    fused_backward_pass: bool = flag(
        False, "update each weight within the backward pass and let go of its gradient; needs --max_grad_norm 0, for "
        "the whole gradient never exists; not with --compile, whose backward pass gives all gradients at once",
        conflicts=("gradient_accumulation_steps", "compile"), affects_result=False,
    )  # fmt: skip

    def problems(self):
        if self.optimizer == "prodigy" and (self.fused_backward_pass or self.weights_precision != "fp32"):
            flags = "--fused_backward_pass" if self.fused_backward_pass else "--weights_precision bf16"
            yield f"{flags} updates one weight after the other, and --optimizer prodigy looks at all: take adafactor"
        if self.fused_backward_pass and self.max_grad_norm:
            yield (
                f"--fused_backward_pass and --max_grad_norm {self.max_grad_norm}: weights are updated before the norm "
                "of the whole gradient is known, so it cannot be clipped: set --max_grad_norm 0"
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            yield f"--optimizer prodigy finds the learning rate itself: set --learning_rate 1, not {self.learning_rate}"
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            yield f"--use_8bit_adam and --optimizer {self.optimizer} name two optimizers: give one"
        of_8_bits = self.use_8bit_adam or self.optimizer == "adamw8bit"
        whole = self.weights_precision == "fp32" and not hasattr(self, "rank")  # what is trained are the weights
        if of_8_bits and whole and getattr(self, "channels_last", False):
            yield (
                "--channels_last: bitsandbytes' 8-bit Adam lays the weights out as usual again at its first step: "
                "leave one of the two out"
            )
        if self.optimizer == "prodigy" and set(self.text_encoder_lr or ()) - {self.learning_rate}:
            yield "--text_encoder_lr: --optimizer prodigy finds one learning rate for all: leave the flag out"
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            yield "--lr_scheduler piecewise_constant and --lr_step_rules go together"
        elif self.lr_step_rules and not re.fullmatch(rf"({NUMBER}:\d+,)*{NUMBER}", self.lr_step_rules):
            yield f"--lr_step_rules {self.lr_step_rules} must look like 1:10,0.1:20,0.01"
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            yield f"--lr_scheduler polynomial ends at 1e-7: --learning_rate {self.learning_rate} must be above that"


def build_optimizer(args: OptimArgs, model, total_batch_size):
    """The optimizer of a model's trained parameters; `total_batch_size` rows make one optimizer step."""
    groups = model.parameter_groups(*learning_rates(args, total_batch_size))
    if args.weights_precision == "fp32" and not args.fused_backward_pass:
        return _optimizer(args, groups)
    weights = [weight for group in groups for weight in group["params"]]
    if args.weights_precision == "bf16":
        for weight in weights:
            weight.data = weight.data.bfloat16()
        fp32_copy = lambda weight: torch.nn.Parameter(torch.empty(0, device=weight.device))
        groups = [{**group, "params": list(map(fp32_copy, group["params"]))} for group in groups]
    optimizer = OneByOne(_optimizer(args, groups), weights, args.seed)
    if args.fused_backward_pass:
        optimizer.update_in_backward()
    return optimizer


def _optimizer(args, groups):
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


class OneByOne(torch.optim.Optimizer):
    """An optimizer that updates one weight after another, and lets go of its gradient: nothing lies beside them all.

    optimizer  any that treats each parameter apart, of the weights themselves, or, where those are bf16, of one
               parameter for each, which holds its fp32 copy for the time of the update. Its state is fp32, and the
               checkpoint's
    weights    the trained parameters, in the order of the optimizer's
    seed       of the rounding to bf16, together with the step and the weight's number
    """

    def __init__(self, optimizer, weights, seed):
        self.optimizer, self.weights, self.seed = optimizer, weights, seed
        self.copies = [(n, one) for n, group in enumerate(optimizer.param_groups) for one in group["params"]]
        self.steps_done, self.norms = 0, {}

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)
        self.steps_done = max((int(one["step"]) for one in self.state.values()), default=0)

    def update_in_backward(self):
        """From here on, update each weight as soon as the backward pass has its gradient."""
        for number, weight in enumerate(self.weights):
            weight.register_post_accumulate_grad_hook(partial(self._update_in_backward, number))

    def _update_in_backward(self, number, weight):
        self.norms[number] = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
        self._update(number)

    def take_gradient_norm(self):
        """The norm of the whole gradient of the last backward pass, a scalar tensor."""
        norms, self.norms = self.norms, {}
        return torch.linalg.vector_norm(torch.stack([norms[number] for number in sorted(norms)]))

    def step(self, closure=None):
        """Update what the backward pass has not."""
        for number, weight in enumerate(self.weights):
            if weight.grad is not None:
                self._update(number)
        self.steps_done += 1

    def zero_grad(self, set_to_none=True):
        """Nothing: every gradient has gone with its update."""

    @torch.no_grad()
    def _update(self, number):
        weight, (group, copy), groups = self.weights[number], self.copies[number], self.optimizer.param_groups
        if copy is not weight:
            copy.data = weight.float()
            copy.grad, weight.grad = weight.grad.float(), None
        self.optimizer.param_groups = [{**groups[group], "params": [copy]}]
        self.optimizer.step()
        self.optimizer.param_groups = groups
        copy.grad = None
        if copy is not weight:
            generator = torch_generator(self.seed, "rounding", self.steps_done, number, device=weight.device)
            weight.copy_(rounded_at_random(copy.data, generator))
            copy.data = copy.data.new_empty(0)


def rounded_at_random(values, generator):
    """fp32 values to one of their two neighbours in bf16, the nearer the likelier: their mean is the value."""
    draws = torch.randint(1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = (values.view(torch.int32) + draws) & -(1 << 16)  # bf16 is the upper half of fp32
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()


def update_problems(args: OptimArgs, run):
    """Yield why this run's devices and precision do not go with the way that its weights are updated, as text."""
    precision = run.accelerator.mixed_precision
    if args.weights_precision == "bf16" and precision != "bf16":
        yield "--weights_precision bf16 goes with activations of the same precision: add --mixed_precision bf16"
    if args.fused_backward_pass and precision == "fp16":
        yield (
            "--fused_backward_pass updates weights before the loss scaler of fp16 could pass over a step: take "
            "--mixed_precision bf16"
        )
    if run.is_sharded or run.zero_stage:
        missing = {
            "--optimizer adamw": args.optimizer != "adamw" or args.use_8bit_adam,
            "--weights_precision fp32": args.weights_precision != "fp32",
            "no --offload_ema": args.offload_ema and run.is_sharded,
            "no --compile": args.compile,
            "no --channels_last": args.channels_last,
            "--mixed_precision bf16": precision == "fp16" and run.zero_stage,
        }
        if any(missing.values()):
            name = "FSDP" if run.is_sharded else "DeepSpeed"
            yield f"{name} goes with {', '.join(what for what, is_missing in missing.items() if is_missing)} here"
    if args.fused_backward_pass and run.processes > 1:
        yield (
            "--fused_backward_pass updates weights before the gradients of "
            f"{run.processes} processes are averaged: start one process, or leave it out"
        )


def learning_rates(args: OptimArgs, total_batch_size):
    """(denoiser's peak learning rate, [that of all text encoders, or of each]).

    total_batch_size   rows that make one optimizer step
    """
    factor = total_batch_size if args.scale_lr else 1
    return args.learning_rate * factor, [rate * factor for rate in args.text_encoder_lr or [args.learning_rate]]


def load_optimizer(optimizer, state):
    """Take over a checkpoint's moments; what the flags say (learning rate, betas, decay) stays as the flags say, and
    AdamW is fused on a GPU alone, wherever the checkpoint was made."""
    own = [{key: group[key] for key in OWN_SETTINGS if key in group} for group in optimizer.param_groups]
    groups = [saved | one for saved, one in zip(state["param_groups"], own, strict=True)]
    weights = getattr(optimizer, "weights", None) or [
        one for group in optimizer.param_groups for one in group["params"]
    ]
    moments = {
        number: {key: _moment_of(weights[number], value) if key != "step" else value for key, value in one.items()}
        for number, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments, "param_groups": groups})


def _moment_of(weight, value):
    """A saved moment sharded as its weight is, and laid out in memory as it is: AdamW's fused kernel takes no other."""
    if torch.is_tensor(value) and value.shape == weight.shape and value.stride() != weight.stride():
        value = torch.empty_strided(value.shape, weight.stride(), dtype=value.dtype).copy_(value)
    return like(weight, value)


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
