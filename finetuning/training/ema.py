"""The exponential moving average of the trained weights ("shadow weights").

Where the average starts is a choice with a name, because it decides how much of the base remains in the result:

warm   the decay is constant from the first step, so after N steps exactly decay^N of the weights that the average
       started from are left in it (0.9999^1,000 = 0.905, 0.9999^15,000 = 0.223): an implicit merge with the base, and
       what CompVis's own continuation of SD 1.x did.
ramp   the decay grows as (1 + n) / (10 + n), and is 0 at the first step: nothing of the start is left from then on.
       This is what diffusers' EMAModel does.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from finetuning.cli import flag
from finetuning.families.sharding import like

TOGETHER = 32  # tensors in one of torch's multi-tensor operations


@dataclass
class EMAArgs:
    """Averaged weights (EMA)"""

    use_ema: bool = flag(False, "keep an exponential moving average of the trained weights, and export it")
    ema_decay: float = flag(
        0.9999, "share of the average that remains at each step", min=0, below=1, requires="use_ema"
    )
    ema_start: str | None = flag(
        None, "warm: constant decay, decay^N of the loaded EMA weights remains; ramp: decay (1+n)/(10+n), the start is "
        "forgotten at step 1 (diffusers). none: warm where non-EMA weights were loaded apart, else ramp",
        choices=("warm", "ramp"), requires="use_ema",
    )  # fmt: skip
    offload_ema: bool = flag(
        False, "keep the average in the CPU's memory: slower, saves one copy of the model on the GPU",
        requires="use_ema", affects_result=False,
    )  # fmt: skip
    foreach_ema: bool = flag(
        False, "accepted; the average always uses torch's multi-tensor operations", requires="use_ema",
        affects_result=False,
    )  # fmt: skip


class AveragedWeights:
    """The average of named parameters, fp32, beside the weights that are trained.

    `start` gives the average's first values by name; parameters that it does not name start as they are.
    """

    def __init__(self, parameters, decay, start_kind, start=None, device=None):
        self.parameters = dict(parameters)
        self.decay, self.start_kind, self.updates = decay, start_kind, 0
        start = start or {}
        first = {name: like(one, start[name]) if name in start else one for name, one in self.parameters.items()}
        self.shadow = {
            name: first[name].detach().to(device or one.device, torch.float32, copy=True)
            for name, one in self.parameters.items()
        }

    def decay_at(self, update):
        """The decay of the given update, the first being 1."""
        if self.start_kind == "warm":
            return self.decay
        return 0.0 if update <= 1 else min(self.decay, update / (9 + update))  # (1+n)/(10+n) with n = update - 1

    @torch.no_grad()
    def update(self):
        """Move the average towards the weights as they are now: shadow <- decay * shadow + (1 - decay) * weights."""
        self.updates += 1
        pairs = [(average, self.parameters[name]) for name, average in self.shadow.items()]
        # Of weights in bf16, or with --offload_ema, these are copies: never of all weights at once
        for start in range(0, len(pairs), TOGETHER):
            some = pairs[start : start + TOGETHER]
            weights = [weight.to(average.device, average.dtype) for average, weight in some]
            torch._foreach_lerp_([average for average, _ in some], weights, 1 - self.decay_at(self.updates))

    @contextmanager
    def averaged_weights(self):
        """Within the block the model holds the averaged weights; the trained ones come back after it."""
        # Kept where the average lies: with --offload_ema the GPU never holds the model twice.
        kept = {name: p.detach().to(self.shadow[name].device, copy=True) for name, p in self.parameters.items()}
        try:
            self._put(self.shadow)
            yield
        finally:
            self._put(kept)

    def load(self, shadow, updates):
        """Go on from a checkpoint's shadow weights. Raises KeyError where one is missing."""
        for name, value in self.shadow.items():
            value.copy_(like(value, shadow[name]))
        self.updates = updates

    @torch.no_grad()
    def _put(self, values):
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


class NoAverage:
    """The same calls with EMA off."""

    shadow, updates, start_kind = None, 0, None

    def update(self):
        """Nothing to average."""

    @contextmanager
    def averaged_weights(self):
        yield


def build_ema(args: EMAArgs, parameters, start):
    """The average that the flags ask for. `start`: EMA weights that were loaded apart, by name, or None."""
    if not args.use_ema:
        return NoAverage()
    kind = args.ema_start or ("ramp" if start is None else "warm")
    return AveragedWeights(parameters, args.ema_decay, kind, start, device="cpu" if args.offload_ema else None)
