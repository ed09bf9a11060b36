"""LoRA by truncated singular value decomposition: out of the difference of two models, or of a LoRA of another rank.

The best matrix of rank r is the sum of the r largest singular parts (Eckart and Young, Psychometrika 1936). What it
keeps is told as energy: the sum of the squares of its singular values, as a share of all.
"""

from collections import Counter
from dataclasses import dataclass

import scipy.linalg
import torch
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, flag
from finetuning.families.lora_files import Layer, adaptable
from finetuning.families.model_args import ModelError
from finetuning.merging.lora_tools import (
    ADAPTED,
    LoraModelArgs,
    LoraOutputArgs,
    origin,
    read_loras,
    refuse_dora,
    skeletons,
    stand_ins,
    write_result,
)
from finetuning.merging.models import BaseArgs, opened
from finetuning.merging.sources import open_source
from finetuning.training.lora_layout import Layout, LoraArgs


@dataclass
class ExtractArgs(LoraOutputArgs, BaseArgs):
    """Extract"""

    tuned: str = flag(REQUIRED, "the model that was trained further: what it has and --base has not is the LoRA")
    rank: int = flag(REQUIRED, "rank of the LoRA; a layer's smaller side where that is less")
    conv_rank: int | None = flag(None, "the same for convolutions larger than 1 x 1 (none: --rank)")
    keep_energy: float | None = flag(
        None, "a smaller rank for each layer whose difference keeps this share of its energy with it, e.g. 0.95"
    )
    parts: list[str] = flag(list(ADAPTED), "parts to compare, e.g. unet,text_encoder")
    lora_target_modules: list[str] = flag(
        ["all-linear", "conv"], "layers of the UNet that may get an adapter, as in train_lora.py: attention, "
        "all-linear, conv, or ends of module names",
    )  # fmt: skip
    weights: str = flag("ema", "which weights of a tuned run or checkpoint", choices=("ema", "raw"))
    tuned_revision: str | None = flag(None, "git revision of a tuned model on the Hub")
    tuned_variant: str | None = flag(None, "weights' variant of the tuned model")

    def problems(self):
        yield from rank_problems(self)
        if self.conv_rank is not None and self.conv_rank < 1:
            yield f"--conv_rank {self.conv_rank} must be at least 1"
        self.parts = [part for word in self.parts for part in word.split(",") if part]
        if strange := [part for part in self.parts if part not in ADAPTED]:
            yield f"--parts {' '.join(strange)}: a LoRA can hold {' and '.join(ADAPTED)}"

    def open_sources(self):
        """[base, tuned]: the Sources. Raises ModelError."""
        return opened([self.open_base, self._open_tuned])

    def _open_tuned(self):
        return open_source(
            self.tuned, weights=self.weights, revision=self.tuned_revision, variant=self.tuned_variant,
            cache_dir=self.cache_dir, layout_from=self.layout_from,
        )  # fmt: skip


@dataclass
class ResizeArgs(LoraModelArgs, LoraOutputArgs):
    """Resize"""

    lora: str = flag(REQUIRED, "LoRA: file of diffusers, kohya or PEFT, folder of a run, or Hub name")
    rank: int | None = flag(None, "new rank; layers of a smaller one keep theirs")
    keep_energy: float | None = flag(
        None, "the smallest rank for each layer that keeps this share of its energy, at most --rank; e.g. 0.95"
    )

    def problems(self):
        yield from rank_problems(self)
        if self.rank is None and self.keep_energy is None:
            yield "resize needs --rank, --keep_energy or both"


def rank_problems(args):
    if args.rank is not None and args.rank < 1:
        yield f"--rank {args.rank} must be at least 1"
    if args.keep_energy is not None and not 0 < args.keep_energy <= 1:
        yield f"--keep_energy {args.keep_energy} must be above 0 and at most 1"


# -- the decomposition ---------------------------------------------------------------------------------------------


def truncated(difference, rank, keep_energy=None):
    """(Layer, kept energy): the best Layer of at most `rank` for a difference [out, in] or [out, in, height, width].

    In float64, through the eigenvectors of the smaller side's Gram matrix: 0.8 s of one core for 1280 x 11520 at rank
    32, where torch.linalg.svd took 17 s. The matrix is projected on them, so no precision is lost to the squares.
    """
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
    models = stand_ins(base.parts)
    layers, report = extracted(args, base, tuned, models)
    facts = {"base_model": base.given, "tuned_model": tuned.given}
    written = write_result("extract", args, [base, tuned], layers, models, facts, report)
    return [*base.notes, *tuned.notes, *_extract_lines(report), *written]


def extracted(args: ExtractArgs, base, tuned, models):
    """({layer name: Layer}, report) of two Sources; `models` are the base's layers (lora.stand_ins)."""
    compared = [part for part in args.parts if part in base.parts and part in tuned.parts]
    if problems := [*_differing_keys(base, tuned, compared), *([] if compared else ["--parts: none is in both"])]:
        raise ModelError("\n".join(problems))
    targets, known = _targets(args, {part: models[part] for part in compared}), adaptable(models)

    layers, ranks, energies, outside, unchanged, broken = {}, {}, Counter(), Counter(), [], []
    total = sum(stored.nbytes for part in compared for stored in base.parts[part].values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="extracting", leave=False)
    for part in compared:
        for key, stored in sorted(base.parts[part].items()):
            name, layer = f"{part}.{key}", f"{part}.{key}".rpartition(".")[0]
            difference = _difference(stored, tuned.parts[part][key])
            wanted = layer in targets and key.endswith(".weight")
            if difference is None:
                unchanged += [layer] if wanted else []
            elif not difference.isfinite().all():
                broken.append(name)
            elif not wanted:
                outside[_group(name, stored, known)] += difference.square().sum().item()
            elif not broken:
                rank = args.rank if difference.shape[2:].numel() == 1 else args.conv_rank or args.rank
                layers[layer], kept = truncated(difference, rank, args.keep_energy)
                energy = difference.square().sum().item()
                energies.update({"all": energy, "kept": kept * energy})
                ranks[layer] = {"rank": layers[layer].rank, "kept_energy": kept, "norm": energy**0.5}
            bar.update(stored.nbytes)
    bar.close()
    if broken:
        raise ModelError(f"NaN or infinity in {len(broken)} tensors of {base.given} or {tuned.given}: {_few(broken)}")
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
        "not_compared": sorted((base.parts.keys() | tuned.parts.keys()) - set(compared)),
    }


def _targets(args, models):
    """Names of the layers that may get an adapter, by train_lora.py's words. Raises ModelError for strange ones."""
    layout = Layout(LoraArgs(lora_target_modules=args.lora_target_modules), models)
    if nothing := [word for word, names in layout.chosen.get("unet", {}).items() if not names]:
        raise ModelError(
            f"--lora_target_modules {' '.join(nothing)} matches no layer of the UNet: there are attention, "
            "all-linear, conv, and ends of module names such as to_q or ff.net.2"
        )
    return {f"{part}.{module}" for part, own in layout.ranks.items() for module in own}


def _difference(base, tuned):
    """tuned - base in float64; None where they are the same at the coarser precision of the two, or whole numbers."""
    dtypes = (base.dtype, tuned.dtype)
    if not all(dtype.is_floating_point for dtype in dtypes):
        return None
    coarser = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    before, after = base.read(), tuned.read()
    return None if torch.equal(before.to(coarser), after.to(coarser)) else after.double() - before.double()


def _differing_keys(base, tuned, parts):
    """Tensors that only one of the two has, or in another shape, as text."""
    for part in parts:
        ours, theirs = base.parts[part], tuned.parts[part]
        for source, keys in ((base, ours.keys() - theirs.keys()), (tuned, theirs.keys() - ours.keys())):
            if floating := sorted(f"{part}.{key}" for key in keys if source.parts[part][key].dtype.is_floating_point):
                yield f"only {source.given} has {len(floating)} of the tensors: {_few(floating)}"
        both = sorted(ours.keys() & theirs.keys())
        if other := [f"{part}.{key}" for key in both if ours[key].shape != theirs[key].shape]:
            key = other[0].partition(".")[2]
            yield (
                f"{len(other)} tensors have other shapes in {base.given} than in {tuned.given}, another kind of model: "
                f"{other[0]} {list(ours[key].shape)} and {list(theirs[key].shape)}"
            )


def _group(name, stored, known):
    """What a tensor is that no adapter holds."""
    layer, _, kind = name.rpartition(".")
    if layer in known:
        return "biases" if kind == "bias" else "layers outside --lora_target_modules"
    return "norms" if len(stored.shape) == 1 else "embeddings"


def _extract_lines(report):
    yet = sorted(report["ranks"].items(), key=lambda item: item[1]["kept_energy"])
    lines = [f"kept energy {report['kept_energy']:.4f} of {len(yet)} layers, {len(report['unchanged'])} are unchanged"]
    lines += [f"  least: {one['kept_energy']:.4f} at rank {one['rank']} in {name}" for name, one in yet[:3]]
    lines += [f"{share:.4f} of the difference is in {group}" for group, share in report["outside"].items()]
    if report["not_compared"]:
        lines.append(f"not compared: {', '.join(report['not_compared'])}")
    return lines


def _few(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# -- resize --------------------------------------------------------------------------------------------------------


def resize(args: ResizeArgs):
    """Write --lora at another rank, as strong as before (alpha = rank). Returns lines. Raises ModelError.

    A layer that adds nothing is left out.
    """
    parts = skeletons(args.base, args.revision, args.cache_dir)
    (lora,) = read_loras([args.lora], parts, args)
    refuse_dora([lora], "has magnitudes that go with its full rank: fold it into its base, and extract that")
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
    written = write_result("resize", args, args.open_sources(), layers, parts, origin([lora]), report)
    before, after = (sorted({one[what] for one in ranks.values()}) for what in ("of_rank", "rank"))
    lines = [f"rank {_span(before)} -> {_span(after)}, kept energy {report['kept_energy']:.4f}"]
    lines += [f"{len(nothing)} layers add nothing and are left out"] if nothing else []
    return lines + written


def _span(numbers):
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
