"""Several LoRAs as one, by PEFT's own arithmetic on what each adds to a weight.

PEFT's add_weighted_adapter works on a model that carries the adapters. Here it gets a model of one layer at a time, so
that LoRAs of any ranks and layers go together and the base's weights are not needed. Offered are `cat`, the exact sum
at the sum of the ranks, and those that work on the products up @ down and then cut them to a rank. Those that average
the factors themselves (linear, ties, dare_linear ...) are not: up @ down of averages is another matrix than the sum.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from finetuning.cli import SEEDS, flag
from finetuning.families.lora_files import Layer
from finetuning.families.model_args import ModelError
from finetuning.merging.lora_tools import (
    LoraModelArgs,
    LoraOutputArgs,
    ScaleArgs,
    about_the_base,
    empty_layer,
    refuse_dora,
    relative_distance,
    write_result,
)
from finetuning.rng import torch_generator

EXACT = 1e-6  # how far `cat` may be from the sum, by the sum of the norms
PRUNING = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", "svd", *PRUNING)


@dataclass
class CombineArgs(LoraOutputArgs, ScaleArgs, LoraModelArgs):
    """Combine"""

    method: str = flag("cat", "PEFT's combination_type: cat is the exact sum, of the sum of the ranks", choices=METHODS)
    rank: int | None = flag(
        None, "rank of the result (none: the largest of the LoRAs; cat has their sum)", min=1,
        requires=tuple(f"method={name}" for name in METHODS if name != "cat"),
    )  # fmt: skip
    density: float | None = flag(
        None, "share of the numbers that is left, e.g. 0.5", above=0, max=1,
        requires=tuple(f"method={name}" for name in PRUNING),
    )  # fmt: skip
    seed: int = flag(0, "seed of what dare drops", **SEEDS)

    def problems(self):
        if len(self.lora) < 2:
            yield "--lora: combine takes two LoRAs or more"
        if self.method in PRUNING and self.density is None:
            yield f"--method {self.method} needs --density"
        if "ties" in self.method and any(scale < 0 for scale in self.scale or []):
            yield f"--scale below 0 with --method {self.method}: PEFT elects the signs before it weighs; use cat or svd"


def combine(args: CombineArgs):
    """Write the LoRAs of --lora as one. Returns lines. Raises ModelError.

    The report says how far each layer is from the weighted sum, by its norm; with cat that must be nothing.
    """
    sources, components, loras = args.open_loras()
    refuse_dora(loras, "gives outputs another length, which does not add up: fuse them into their base in turn")
    scales = args.scales
    layers, ranks, squares = {}, {}, Counter()
    for name in dict.fromkeys(name for lora in loras for name in lora.layers):
        own = [lora.layers.get(name) for lora in loras]
        layers[name] = combined(own, scales, args.method, args.rank, args.density, (args.seed, name))
        terms = [layer.delta(scale) for layer, scale in zip(own, scales, strict=True) if layer]
        found, meant = layers[name].delta(), sum(terms)
        ranks[name] = {"rank": layers[name].rank, "distance": relative_distance(found, meant)}
        off = (found.double() - meant.double()).norm().item()
        if args.method == "cat" and not off <= EXACT * sum(term.norm().item() for term in terms):
            raise ModelError(f"{name}: PEFT's sum is off by {off:.1e}: another version of it is needed")
        squares.update({"off": off**2, "all": meant.double().square().sum().item()})
    distance = (squares["off"] / squares["all"]) ** 0.5 if squares["all"] else 0.0
    report = {"ranks": ranks, "distance": distance}
    written = write_result("combine", args, sources, layers, components, about_the_base(loras), report)
    lines = [
        f"{one.path} at scale {scale:g}, {len(one.layers)} layers" for one, scale in zip(loras, scales, strict=True)
    ]
    lines.append(f"{args.method}: {distance:.1e} of its norm away from the weighted sum")
    return lines + written


def combined(layers, scales, method="cat", rank=None, density=None, key=(0, "")):
    """The Layer that PEFT makes of one layer of several LoRAs, some of which may be None: they lack it.

    key   (seed, name of the layer): what dare drops depends on it alone
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    def config(layer):
        """One that lacks the layer sits on another module, as on a whole model it would."""
        if layer is None:
            return LoraConfig(r=1, target_modules=["absent"])
        return LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["layer"])

    known = [layer for layer in layers if layer]
    weight = torch.Size((known[0].up.shape[0], *known[0].down.shape[1:]))
    if method == "cat":
        rank = sum(layer.rank for layer in known)
    else:
        rank = min(rank or max(layer.rank for layer in known), weight[0], weight[1:].numel())
    model = torch.nn.ModuleDict({"layer": empty_layer(weight), "absent": empty_layer((1, 1))}).to_empty(device="cpu")
    names = [f"lora_{number}" for number in range(len(layers))]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(torch_generator(key[0], f"combination of {key[1]}").initial_seed())
        peft = LoraModel(model, config(layers[0]), names[0])
        for name, layer in zip(names[1:], layers[1:], strict=True):
            peft.peft_config[name] = config(layer)
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
