"""Several LoRAs as one, by PEFT's own arithmetic on what each adds to a weight.

PEFT's add_weighted_adapter works on a model that carries the adapters. Here it gets a model of one layer at a time, so
that LoRAs of any ranks and layers go together and the base's weights are not needed. Offered are `cat`, the exact sum
at the sum of the ranks, and those that work on the products up @ down and then cut them to a rank. Those that average
the factors themselves (linear, ties, dare_linear ...) are not: up @ down of averages is another matrix than the sum.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel

from finetuning.cli import REQUIRED, flag
from finetuning.families.lora_files import Layer
from finetuning.families.model_args import ModelError
from finetuning.merging.lora_tools import (
    LoraModelArgs,
    LoraOutputArgs,
    origin,
    read_loras,
    refuse_dora,
    relative_distance,
    scale_problems,
    skeletons,
    write_result,
)
from finetuning.rng import torch_generator

EXACT = 1e-6  # how far `cat` may be from the sum, by the sum of the norms
PRUNING = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", "svd", *PRUNING)


@dataclass
class CombineArgs(LoraModelArgs, LoraOutputArgs):
    """Combine"""

    lora: list[str] = flag(REQUIRED, "two LoRAs or more: files of diffusers, kohya or PEFT, folders of runs, Hub names")
    scale: list[float] | None = flag(None, "how strongly each LoRA counts, one number for each (none: 1)")
    method: str = flag("cat", "PEFT's combination_type: cat is the exact sum, of the sum of the ranks", choices=METHODS)
    rank: int | None = flag(None, "rank of the result, for all methods but cat (none: the largest of the LoRAs)")
    density: float | None = flag(None, "share of the numbers that ties, dare and magnitude_prune leave, e.g. 0.5")
    seed: int = flag(0, "of what dare drops")

    def problems(self):
        if len(self.lora) < 2:
            yield "--lora: combine takes two LoRAs or more"
        yield from scale_problems(self)
        if self.rank is not None and self.rank < 1:
            yield f"--rank {self.rank} must be at least 1"
        if self.rank is not None and self.method == "cat":
            yield "--rank does nothing with --method cat, whose rank is the sum: take --method svd, or resize it"
        if (self.method in PRUNING) != (self.density is not None):
            yield f"--density goes with --method {', '.join(PRUNING)}, and they need it"
        if self.density is not None and not 0 < self.density <= 1:
            yield f"--density {self.density} must be above 0 and at most 1"
        if "ties" in self.method and any(scale < 0 for scale in self.scale or []):
            yield f"--scale below 0 with --method {self.method}: PEFT elects the signs before it weighs; use cat or svd"


def combine(args: CombineArgs):
    """Write the LoRAs of --lora as one. Returns lines. Raises ModelError.

    The report tells how far each layer is from the weighted sum, by its norm; with cat that must be nothing.
    """
    parts = skeletons(args.base, args.revision, args.cache_dir)
    loras = read_loras(args.lora, parts, args)
    refuse_dora(loras, "gives outputs another length, which does not add up: fold them into their base in turn")
    scales = args.scale or [1.0] * len(loras)
    layers, told, squares = {}, {}, Counter()
    for name in dict.fromkeys(name for lora in loras for name in lora.layers):
        own = [lora.layers.get(name) for lora in loras]
        layers[name] = combined(own, scales, args.method, args.rank, args.density, (args.seed, name))
        terms = [layer.delta(scale) for layer, scale in zip(own, scales, strict=True) if layer]
        found, meant = layers[name].delta(), sum(terms)
        told[name] = {"rank": layers[name].rank, "distance": relative_distance(found, meant)}
        off = (found.double() - meant.double()).norm().item()
        if args.method == "cat" and not off <= EXACT * sum(term.norm().item() for term in terms):
            raise ModelError(f"{name}: PEFT's sum is off by {off:.1e}: another version of it is needed")
        squares.update({"off": off**2, "all": meant.double().square().sum().item()})
    distance = (squares["off"] / squares["all"]) ** 0.5 if squares["all"] else 0.0
    report = {"ranks": told, "distance": distance}
    written = write_result("combine", args, args.open_sources(), layers, parts, origin(loras), report)
    lines = [
        f"{one.path} at scale {scale:g}, {len(one.layers)} layers" for one, scale in zip(loras, scales, strict=True)
    ]
    lines.append(f"{args.method}: {distance:.1e} of its norm away from the weighted sum")
    return lines + written


def combined(layers, scales, method="cat", rank=None, density=None, key=(0, "")):
    """The Layer that PEFT makes of one layer of several LoRAs, some of which may be None: they lack it.

    key   (seed, name of the layer): what dare drops depends on it alone
    """
    known = [layer for layer in layers if layer]
    weight = torch.Size((known[0].up.shape[0], *known[0].down.shape[1:]))
    if method == "cat":
        rank = sum(layer.rank for layer in known)
    else:
        rank = min(rank or max(layer.rank for layer in known), weight[0], weight[1:].numel())
    model = torch.nn.ModuleDict({"layer": _empty(weight), "absent": _empty((1, 1))})
    names = [f"lora_{number}" for number in range(len(layers))]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(torch_generator(key[0], f"combination of {key[1]}").initial_seed())
        peft = LoraModel(model, _config(layers[0]), names[0])
        for name, layer in zip(names[1:], layers[1:], strict=True):
            peft.peft_config[name] = _config(layer)
            peft.inject_adapter(model, name)
        adapted = model["layer"]
        for name, layer in zip(names, layers, strict=True):
            if layer:
                adapted.lora_A[name].weight.copy_(layer.down)
                adapted.lora_B[name].weight.copy_(layer.up)
        peft.add_weighted_adapter(
            names, list(scales), "sum", method, svd_rank=rank, svd_full_matrices=False, density=density
        )
        down, up = adapted.lora_A["sum"].weight, adapted.lora_B["sum"].weight
        # with cat, PEFT leaves room for the LoRAs that lack the layer
        return Layer(down[:rank].clone(), up[:, :rank].clone(), float(rank))


def _empty(weight):
    """A layer of this weight's shape, whose numbers nobody reads."""
    out, inside, *kernel = weight
    kind = torch.nn.Conv2d if kernel else torch.nn.Linear
    return torch.nn.utils.skip_init(kind, inside, out, *([kernel] if kernel else []), bias=False)


def _config(layer):
    """PEFT's for a layer; one that lacks it sits on another module, as on a whole model it would."""
    if layer is None:
        return LoraConfig(r=1, target_modules=["absent"])
    return LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["layer"])
