"""LoRA by truncated singular value decomposition: out of the difference of two models, or of a LoRA of another rank.

The best matrix of rank r is the sum of the r largest singular parts (Eckart and Young, Psychometrika 1936). What it
keeps is reported as energy: the sum of the squares of its singular values, as a share of all.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, flag
from finetuning.families.lora_files import Layer, adaptable
from finetuning.families.model_args import ModelError
from finetuning.families.tensors import refuse_not_finite
from finetuning.merging.lora_tools import (
    ADAPTED,
    LoraModelArgs,
    LoraOutputArgs,
    about_the_base,
    refuse_dora,
    stand_ins,
    write_result,
)
from finetuning.merging.model_flags import BaseArgs, component_problems, open_all, separated
from finetuning.merging.tensor_matching import differences, is_copied

KEEP_ENERGY = "the smallest rank for each layer that keeps this share of its energy, at most --rank; e.g. 0.95"


@dataclass
class ExtractArgs(LoraOutputArgs, BaseArgs):
    """Extract"""

    tuned: str = flag(REQUIRED, "the model that was trained further: what --base lacks of it is the LoRA", reads=True)
    rank: int = flag(REQUIRED, "rank of the LoRA; a layer's smaller side where that is less", min=1)
    conv_rank: int | None = flag(None, "the same for convolutions larger than 1 x 1 (none: --rank)", min=1)
    keep_energy: float | None = flag(None, KEEP_ENERGY, above=0, max=1)
    components: list[str] = flag(list(ADAPTED), "components to compare, e.g. unet,text_encoder", was=("parts",))
    lora_target_modules: list[str] = flag(
        ["all-linear", "conv"], "UNet layers, as in train_lora.py: attention, all-linear, conv, or ends of module names"
    )
    weights: str = flag("ema", "which weights of a tuned run or checkpoint", choices=("ema", "raw"))
    tuned_revision: str | None = flag(None, "git revision of a tuned model on the Hub")
    tuned_variant: str | None = flag(None, "weights' variant of the tuned model")

    def problems(self):
        yield from component_problems(self.components, ADAPTED)

    def open_sources(self):
        """[base, tuned]: the Sources. Raises ModelError."""
        return open_all([self.open_base, lambda: self.open_tuned(self.tuned)])


@dataclass
class ResizeArgs(LoraOutputArgs, LoraModelArgs):
    """Resize"""

    lora: str = flag(REQUIRED, "LoRA: file of diffusers, kohya or PEFT, folder of a run, or Hub name", reads=True)
    rank: int | None = flag(None, "new rank; layers of a smaller one keep theirs", min=1)
    keep_energy: float | None = flag(None, KEEP_ENERGY, above=0, max=1)

    def problems(self):
        if self.rank is None and self.keep_energy is None:
            yield "resize needs --rank, --keep_energy or both"


# -- the decomposition ---------------------------------------------------------------------------------------------


def truncated(difference, rank, keep_energy=None):
    """(Layer, kept energy): the best Layer of at most `rank` for a difference [out, in] or [out, in, height, width].

    In float64, through the eigenvectors of the smaller side's Gram matrix: 0.8 s of one core for 1280 x 11520 at rank
    32, where torch.linalg.svd took 17 s. The matrix is projected on them, so no precision is lost to the squares.
    """
    import scipy.linalg

    matrix = difference.double().flatten(1)
    flat = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # [smaller side, larger side]
    side = flat.shape[0]
    window = [max(side - rank, 0), side - 1]  # eigenvalues come in rising order
    numbers = flat.numpy()  # NumPy computes a matrix times itself in half the time
    values, vectors = map(torch.from_numpy, scipy.linalg.eigh(numbers @ numbers.T, subset_by_index=window))
    total = flat.square().sum()
    rank = smallest_rank(values.flip(0), total, rank, keep_energy)
    left = vectors.flip(1)[:, :rank]  # [smaller side, rank]
    right = left.T @ flat  # [rank, larger side], of singular values' length
    values = right.norm(dim=1)
    right = right / torch.where(values > 0, values, 1)[:, None]
    up, down = (left, right) if flat is matrix else (right.T, left.T)
    return _balanced(up, values, down, difference.shape), (values.square().sum() / total).item()


def truncated_layer(layer: Layer, rank=None, keep_energy=None):
    """(Layer, kept energy): the best Layer of a lower rank, from the QR decompositions of its two factors."""
    up, small_up = torch.linalg.qr(layer.up.double().flatten(1))
    down, small_down = torch.linalg.qr(layer.down.double().flatten(1).T)
    left, values, right = torch.linalg.svd(layer.alpha / layer.rank * small_up @ small_down.T, full_matrices=False)
    energies = values.square()
    rank = smallest_rank(energies, energies.sum(), rank or len(values), keep_energy)
    shape = (layer.up.shape[0], *layer.down.shape[1:])
    small = _balanced(up @ left[:, :rank], values[:rank], right[:rank] @ down.T, shape)
    return small, (energies[:rank].sum() / energies.sum()).item()


def smallest_rank(energies, total, rank, keep_energy):
    """The smallest rank that keeps the share `keep_energy` of `total`, at most `rank`; none: `rank`.

    energies   squares of the singular values, falling; as many as there are, or `rank`
    """
    rank = min(rank, len(energies))
    if keep_energy is None:
        return rank
    return min(rank, int(torch.searchsorted(energies.cumsum(0), keep_energy * total)) + 1)


def _balanced(up, values, down, shape):
    """A Layer for a weight of `shape` in fp32, the singular values shared by both factors, so that neither is tiny."""
    root, kernel = values.sqrt(), (1 for _ in shape[2:])
    return Layer(
        down=(root[:, None] * down).float().reshape(-1, *shape[1:]),
        up=(up * root).float().reshape(shape[0], -1, *kernel),
        alpha=float(len(values)),
    )


# -- extract -------------------------------------------------------------------------------------------------------


def extract(args: ExtractArgs):
    """Write a LoRA of what --tuned has and --base has not. Returns lines. Raises ModelError.

    A tensor at a time is read. A weight that is the same in both, at the precision of the coarser file, is left out.
    """
    base, tuned = args.open_sources()
    models = stand_ins(base.tensors)
    layers, report = extracted(args, base, tuned, models)
    facts = {"base_model": base.given, "tuned_model": tuned.given}
    written = write_result("extract", args, [base, tuned], layers, models, facts, report)
    return [*base.warnings, *tuned.warnings, *_extract_lines(report), *written]


def extracted(args: ExtractArgs, base, tuned, models):
    """({layer name: Layer}, report) of two Sources; `models` are the base's layers (lora_tools.stand_ins)."""
    compared = [name for name in separated(args.components) if name in base.tensors and name in tuned.tensors]
    problems = [] if compared else ["--components: none is in both"]
    for name in compared:
        problems += differences(name, base.tensors[name], tuned.tensors[name], base.given, tuned.given)
    if problems:
        raise ModelError("\n".join(problems))
    targets, known = _targets(args, base.family, {name: models[name] for name in compared}), adaptable(models)

    layers, ranks, energies, outside, unchanged = {}, {}, Counter(), Counter(), []
    total = sum(reference.nbytes for name in compared for reference in base.tensors[name].values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="extracting", leave=False)
    for component in compared:
        for key, reference in sorted(base.tensors[component].items()):
            name, layer = f"{component}.{key}", f"{component}.{key}".rpartition(".")[0]
            pair = (reference, tuned.tensors[component].get(key))
            difference = _difference(key, *pair)
            wanted = layer in targets and key.endswith(".weight")
            if difference is None:
                unchanged += [layer] if wanted else []
            elif not difference.isfinite().all():
                bar.close()
                for one in pair:
                    refuse_not_finite({key: one.read()}, one.path)
            elif not wanted:
                outside[_group(name, reference, known)] += difference.square().sum().item()
            else:
                rank = args.rank if difference.shape[2:].numel() == 1 else args.conv_rank or args.rank
                layers[layer], kept = truncated(difference, rank, args.keep_energy)
                energy = difference.square().sum().item()
                energies.update({"all": energy, "kept": kept * energy})
                ranks[layer] = {"rank": layers[layer].rank, "kept_energy": kept, "norm": energy**0.5}
            bar.update(reference.nbytes)
    bar.close()
    if not layers:
        raise ModelError(
            f"{base.given} and {tuned.given} have the same weights in all {len(targets)} layers that may get an "
            "adapter (--lora_target_modules): there is nothing to extract"
        )
    difference = energies["all"] + sum(outside.values())
    return layers, {
        "ranks": ranks,
        "kept_energy": energies["kept"] / energies["all"],
        "outside": {group: energy / difference for group, energy in sorted(outside.items())},
        "unchanged": unchanged,
        "not_compared": sorted((base.tensors.keys() | tuned.tensors.keys()) - set(compared)),
    }


def _targets(args, family, models):
    """Names of the layers that may get an adapter, by train_lora.py's words. Raises ModelError for strange ones."""
    from finetuning.training.lora_layout import Layout, LoraArgs

    layout = Layout(LoraArgs(lora_target_modules=args.lora_target_modules), family, models)
    if nothing := [word for word, names in layout.chosen.get(family.denoiser, {}).items() if not names]:
        raise ModelError(
            f"--lora_target_modules {' '.join(nothing)} matches no layer of the UNet: there are attention, "
            "all-linear, conv, and ends of module names such as to_q or ff.net.2"
        )
    return {f"{component}.{module}" for component, own in layout.ranks.items() for module in own}


def _difference(key, base, tuned):
    """tuned - base in float64; None where they are the same at the coarser precision of the two, or no weights."""
    if is_copied(key, base):
        return None
    coarser = max((base.dtype, tuned.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    before, after = base.read(), tuned.read()
    return None if torch.equal(before.to(coarser), after.to(coarser)) else after.double() - before.double()


def _group(name, reference, known):
    """What a tensor is that no adapter holds."""
    layer, _, kind = name.rpartition(".")
    if layer in known:
        return "biases" if kind == "bias" else "layers outside --lora_target_modules"
    return "norms" if len(reference.shape) == 1 else "embeddings"


def _extract_lines(report):
    by_energy = sorted(report["ranks"].items(), key=lambda item: item[1]["kept_energy"])
    lines = [
        f"kept energy {report['kept_energy']:.4f} of {len(by_energy)} layers, {len(report['unchanged'])} are unchanged"
    ]
    lines += [f"  least: {one['kept_energy']:.4f} at rank {one['rank']} in {name}" for name, one in by_energy[:3]]
    lines += [f"{share:.4f} of the difference is in {group}" for group, share in report["outside"].items()]
    if report["not_compared"]:
        lines.append(f"not compared: {', '.join(report['not_compared'])}")
    return lines


# -- resize --------------------------------------------------------------------------------------------------------


def resize(args: ResizeArgs):
    """Write --lora at another rank, as strong as before (alpha = rank). Returns lines. Raises ModelError.

    A layer that adds nothing is left out.
    """
    sources, components, (lora,) = args.open_loras()
    refuse_dora([lora], "has magnitudes that go with its full rank: fuse it into its base, and extract that")
    layers, ranks, energies, nothing = {}, {}, Counter(), []
    for name, layer in lora.layers.items():
        energy = layer.delta().double().square().sum().item()
        if not energy:
            nothing.append(name)
            continue
        layers[name], kept = truncated_layer(layer, args.rank, args.keep_energy)
        energies.update({"all": energy, "kept": kept * energy})
        ranks[name] = {"rank": layers[name].rank, "of_rank": layer.rank, "kept_energy": kept}
    if not layers:
        raise ModelError(f"--lora {lora.path} adds nothing to any layer: there is nothing to resize")
    report = {"ranks": ranks, "kept_energy": energies["kept"] / energies["all"], "nothing": nothing}
    written = write_result("resize", args, sources, layers, components, about_the_base([lora]), report)
    before, after = (sorted({one[what] for one in ranks.values()}) for what in ("of_rank", "rank"))
    lines = [f"rank {_span(before)} -> {_span(after)}, kept energy {report['kept_energy']:.4f}"]
    lines += [f"{len(nothing)} layers add nothing and are left out"] if nothing else []
    return lines + written


def _span(numbers):
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
