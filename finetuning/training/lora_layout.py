"""Where adapters go, and of which rank and alpha: the flags, and what comes of them on one model."""

import re
from dataclasses import dataclass

import torch

from finetuning.cli import flag
from finetuning.families.lora_files import KOHYA_NAME, Lora, adaptable

DENOISER_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_LINEAR = (*TEXT_ATTENTION, "fc1", "fc2")


@dataclass
class LoraArgs:
    """Adapters (LoRA)"""

    rank: int = flag(4, "rank of the adapters: their capacity and their size", min=1)
    lora_alpha: float | None = flag(
        None, "the adapters' output is scaled by alpha / rank (none: alpha = rank, whatever the layer's rank)",
        above=0,
    )  # fmt: skip
    lora_dropout: float = flag(0.0, "share of an adapter's inputs that is dropped in training", min=0, below=1)
    lora_target_modules: list[str] = flag(
        ["attention"], "layers of the UNet that get an adapter: attention (its projections), all-linear, conv (with "
        "all-linear: LoCon), or ends of module names, e.g. to_q ff.net.2 mid_block.attentions.0.proj_in",
    )  # fmt: skip
    use_dora: bool = flag(False, "DoRA (arXiv 2402.09353): also learn each output's magnitude; slower, more memory")
    use_rslora: bool = flag(False, "rank-stabilised LoRA (arXiv 2312.03732): scale by alpha / sqrt(rank)")
    lora_rank_pattern: list[str] | None = flag(
        None, "other ranks for some layers, PATTERN=RANK: the end of a module's name, or a regular expression for it, "
        "e.g. attn2.to_k=16 'mid_block.*=32'",
    )  # fmt: skip
    lora_alpha_pattern: list[str] | None = flag(None, "other alphas for some layers, PATTERN=ALPHA, likewise")
    text_encoder_rank: int | None = flag(
        None, "rank of the adapters on the text encoder's attention projections (none: --rank)", min=1,
        requires="train_text_encoder",
    )  # fmt: skip
    base_precision: str | None = flag(
        None, "precision of the frozen base (none: as the activations); int8 and nf4, by bitsandbytes, save a little "
        "memory: they take in the attention blocks' linear layers, the convolutions stay as the activations",
        choices=("fp32", "fp16", "bf16", "int8", "nf4"),
    )  # fmt: skip
    init_lora: str | None = flag(
        None,
        "LoRA to go on from: a file of diffusers, kohya or PEFT, or a run's folder; --rank may be larger than its",
        reads=True,
    )
    save_kohya: bool = flag(False, f"also write {KOHYA_NAME}, for A1111 and ComfyUI", affects_result=False)

    def problems(self):
        if self.use_dora and self.save_kohya:
            yield "--save_kohya with --use_dora: A1111 and ComfyUI apply DoRA by other formulas; leave one of them out"
        uses_xformers = getattr(self, "enable_xformers_memory_efficient_attention", False)
        if uses_xformers and self.base_precision in ("int8", "nf4"):
            yield (
                "--enable_xformers_memory_efficient_attention with --base_precision int8 or nf4 would compute the "
                "attention in fp32: leave it out, PyTorch's own stays in the activations' precision"
            )
        for name in ("lora_rank_pattern", "lora_alpha_pattern"):
            for text in getattr(self, name) or []:
                pattern, _, number = text.rpartition("=")
                if not pattern or not _is_number(number, whole=name == "lora_rank_pattern") or not float(number):
                    yield f"--{name} {text} must look like PATTERN=NUMBER, e.g. mid_block.*=8"
                elif not _is_pattern(pattern):
                    yield f"--{name} {text}: {pattern} is not a regular expression"


class Layout:
    """The layers of `components` {name: model} that get an adapter: `ranks` {component: {module: rank}}."""

    def __init__(self, args: LoraArgs, family, components):
        self.args, self.components = args, components
        self.denoiser, self.kohya_kind = family.denoiser, family.kohya_kind
        self.rank_pattern = _numbers(args.lora_rank_pattern, int)
        self.alpha_pattern = _numbers(args.lora_alpha_pattern, float)
        if args.lora_alpha is None:  # a layer that gets a higher rank should not be scaled down for it
            own = {pattern: float(rank) for pattern, rank in self.rank_pattern.items()}
            self.alpha_pattern |= {pattern: rank for pattern, rank in own.items() if pattern not in self.alpha_pattern}
        of_text = TEXT_LINEAR if "all-linear" in args.lora_target_modules else TEXT_ATTENTION
        self.chosen = {
            name: _chosen(args.lora_target_modules if name == self.denoiser else of_text, model)
            for name, model in components.items()
        }
        self.ranks = {
            component: {module: self._rank(component, module) for module in sorted(set().union(*found.values()))}
            for component, found in self.chosen.items()
        }

    def rank(self, component):
        """The rank of a component's adapters where no pattern gives another."""
        own = self.args.text_encoder_rank if component != self.denoiser else None
        return self.args.rank if own is None else own

    def alpha(self, component):
        """The same for alpha."""
        alpha = self.rank(component) if self.args.lora_alpha is None else self.args.lora_alpha
        return int(alpha) if alpha == int(alpha) else alpha

    def config(self, component):
        """The same for PEFT."""
        from peft import LoraConfig

        own = self.ranks[component]
        ranks, alphas = ({pattern: value for pattern, value in patterns.items() if _matches(pattern, own)}
                         for patterns in (self.rank_pattern, self.alpha_pattern))  # fmt: skip
        return LoraConfig(
            r=self.rank(component), lora_alpha=self.alpha(component), rank_pattern=ranks, alpha_pattern=alphas,
            target_modules=list(own), use_dora=self.args.use_dora, use_rslora=self.args.use_rslora,
            lora_dropout=self.args.lora_dropout,
            init_lora_weights="gaussian",
        )  # fmt: skip

    def problems(self):
        """What does not fit this model, as text."""
        if nothing := [word for word, names in self.chosen[self.denoiser].items() if not names]:
            ends = {re.search(r"\w+(\.\d+)?$", name)[0] for name in adaptable({"": self.components[self.denoiser]})}
            yield (
                f"--lora_target_modules {' '.join(nothing)} matches no layer of the UNet. There are attention, "
                f"all-linear, conv, and module names that end in: {', '.join(sorted(ends))}"
            )
        modules = [module for ranks in self.ranks.values() for module in ranks]
        for name in ("lora_rank_pattern", "lora_alpha_pattern"):
            for pattern in _numbers(getattr(self.args, name), float):
                if not _matches(pattern, modules):
                    yield f"--{name} {pattern} matches none of the layers that get an adapter"
        yield from self._ranks_too_large()

    def problems_with_start(self, start: Lora):
        """Why a LoRA to start from does not fit into these adapters, as text."""
        ranks = {f"{component}.{module}": rank for component, own in self.ranks.items() for module, rank in own.items()}
        if outside := sorted(start.layers.keys() - ranks.keys()):
            yield (
                f"--init_lora {start.path} has {len(outside)} layers that get no adapter here, e.g. {outside[0]}: "
                "widen --lora_target_modules (all-linear conv takes in nearly all), or add --train_text_encoder"
            )
        if small := [name for name, layer in start.layers.items() if layer.rank > ranks.get(name, layer.rank)]:
            yield (
                f"--init_lora {start.path} has rank {start.layers[small[0]].rank} at {small[0]} and the flags ask "
                f"for {ranks[small[0]]} ({len(small)} such layers): raise --rank, --text_encoder_rank or the pattern"
            )
        if start.is_dora != self.args.use_dora:
            said = "is a DoRA: add" if start.is_dora else "is no DoRA: leave out"
            yield f"--init_lora {start.path} {said} --use_dora"

    def _rank(self, component, module):
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.rank(component))

    def _ranks_too_large(self):
        """A matrix cannot have a rank above its smaller side: what lies above would be memory for nothing."""
        layers, found = adaptable(self.components), {}
        for component, ranks in self.ranks.items():
            for module, rank in ranks.items():
                weight = layers[f"{component}.{module}"].weight
                width = min(weight.shape[0], weight[0].numel())
                if rank > width:
                    found.setdefault((rank, width), []).append(f"{component}.{module}")
        for (rank, width), names in sorted(found.items()):
            yield (
                f"rank {rank} is above the width {width} of {len(names)} layers, e.g. {names[0]}: lower --rank or "
                "--text_encoder_rank, or give these a smaller one with --lora_rank_pattern"
            )


def _chosen(words, model):
    """{word: names of the model's layers that it means}."""
    layers = {name.split(".", 1)[1]: module for name, module in adaptable({"model": model}).items()}
    found = {}
    for word in words:
        if word == "attention":
            found[word] = [name for name in layers if name.endswith(tuple(f".{end}" for end in DENOISER_ATTENTION))]
        elif word == "all-linear":
            found[word] = [name for name, module in layers.items() if isinstance(module, torch.nn.Linear)]
        elif word == "conv":  # as LoCon has it: within the blocks, so without the first and the last layer
            inside = {name: module for name, module in layers.items() if "blocks." in name or "block." in name}
            found[word] = [name for name, module in inside.items() if isinstance(module, torch.nn.Conv2d)]
        else:
            found[word] = [name for name in layers if name == word or name.endswith(f".{word}")]
    return found


def _matches(pattern, modules):
    """Whether PEFT takes the pattern for one of the modules."""
    return any(pattern in (module, _pattern_of([pattern], module)) for module in modules)


def _pattern_of(patterns, module):
    """The pattern that PEFT takes for a module, or the module's own name."""
    from peft.utils.other import get_pattern_key

    return get_pattern_key(patterns, module)


def _numbers(texts, kind):
    """["a=1"] -> {"a": 1}."""
    pairs = (text.rpartition("=") for text in texts or [])
    return {pattern: kind(number) for pattern, _, number in pairs}


def _is_number(text, whole):
    return bool(re.fullmatch(r"\d+" if whole else r"\d+(\.\d*)?", text))


def _is_pattern(text):
    try:
        return bool(re.compile(text))
    except re.error:
        return False
