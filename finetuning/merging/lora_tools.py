"""LoRA in and out: what the LoRA commands of merge_checkpoints.py share, fusing into weights, and conversion.

    fuse      base + scale x LoRA -> weights         here
    convert   one LoRA file -> another layout        here
    extract   tuned - base -> LoRA                   lora_extraction.py
    resize    LoRA -> LoRA of another rank           lora_extraction.py
    combine   several LoRAs -> one                   lora_combination.py

A command's function takes its flags and returns lines to print. What it did, layer by layer, is in the recipe beside
the result, under "run" and there "report".
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from finetuning.cli import REQUIRED, as_dict, flag, paths_read
from finetuning.families.folders import components_of_index, pipeline_index
from finetuning.families.generation import DTYPES
from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    KOHYA_NAME,
    find_lora,
    for_kohya,
    read_lora,
    write_diffusers_for_all,
    write_kohya,
)
from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source, skeleton_of
from finetuning.families.table import FAMILIES, family_of_components
from finetuning.files import atomic_folder, output_problems, write_json
from finetuning.merging.model_flags import BaseArgs, open_all
from finetuning.merging.model_writer import MergeOutput, OutputArgs, write_models
from finetuning.merging.recipe import RECIPE, metadata_of, recipe_of
from finetuning.merging.tensor_matching import Match

# The components that LoRAs are made for
ADAPTED = tuple(dict.fromkeys(one.name for family in FAMILIES.values() for one in family.adaptable))
# How far a written layer may be from what was meant, by the norm of what it adds. Rounding both factors to fp16 moves
# it by some 4e-4; numbers that are too small for fp16, or too large, move it much further.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}

ABOUT_THE_BASE = ("base_model", "base_model_hash", "ss_sd_model_name", "ss_base_model_version", "ss_v2")
ABOUT_THE_FILE = ("format", "sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata")


@dataclass
class LoraModelArgs:
    """Model of the LoRA"""

    base: str = flag(REQUIRED, "model that the LoRA is for: pipeline, Hub name, single file or UNet", reads=True)
    revision: str | None = flag(None, "git revision of the Hub model")
    weights: str = flag("ema", "which weights of a LoRA run: averaged or as trained", choices=("ema", "raw"))
    cache_dir: str | None = flag(None, "where models of the Hub are kept", affects_result=False)

    def open_sources(self):
        """[LoraFile, ...]: the inputs, for the recipe. Raises ModelError."""
        return lora_files([self.lora] if isinstance(self.lora, str) else self.lora, self)

    def open_loras(self):
        """(sources, the model's components without weights, [Lora, ...] that fit them) of --lora. Raises ModelError."""
        components, sources = skeletons(self.base, self.revision, self.cache_dir), self.open_sources()
        return sources, components, read_loras(sources, components, self)


@dataclass
class LoraFileArgs:
    """Output"""

    output_dir: str = flag(REQUIRED, "new folder for the LoRA's file", affects_result=False)
    dtype: str = flag("fp32", "precision of the file", choices=("fp32", "fp16"))

    def problems(self):
        if Path(self.output_dir).exists():
            yield f"--output_dir {self.output_dir} exists already: name a new folder, or move that one away"
        yield from output_problems(self.output_dir, paths_read(self), around=True)


@dataclass
class LoraOutputArgs(LoraFileArgs):
    """Output"""

    save_kohya: bool = flag(False, f"also write {KOHYA_NAME}, for A1111 and ComfyUI")


@dataclass
class ScaleArgs:
    """LoRAs"""

    lora: list[str] = flag(REQUIRED, "LoRAs: .safetensors files, folders of runs, or Hub names", reads=True)
    scale: list[float] | None = flag(None, "how strongly each LoRA counts, one number for each (none: 1)")

    @property
    def scales(self):
        return self.scale or [1.0] * len(self.lora)

    def problems(self):
        if self.scale is not None and len(self.scale) != len(self.lora):
            yield f"--scale has {len(self.scale)} number(s) for {len(self.lora)} LoRA(s): give one for each"


@dataclass
class FuseArgs(OutputArgs, ScaleArgs, BaseArgs):
    """Fuse"""

    weights: str = flag("ema", "which weights of a LoRA run: averaged or as trained", choices=("ema", "raw"))

    def open_sources(self):
        """[Source of the base, LoraFile, ...]: the inputs, for the recipe. Raises ModelError."""
        base, files = open_all([self.open_base, partial(lora_files, self.lora, self)])
        return [base, *files]


@dataclass
class ConvertArgs(LoraFileArgs, LoraModelArgs):
    """Convert"""

    lora: str = flag(REQUIRED, "LoRA: file of diffusers, kohya or PEFT, folder of a run, or Hub name", reads=True)
    to: str = flag(REQUIRED, "layout to write", choices=("diffusers", "kohya"))


# -- the layers of a model -----------------------------------------------------------------------------------------


def skeletons(name, revision=None, cache_dir=None):
    """{component: module} of those that LoRAs are made for, without weights, on the meta device. Raises ModelError.

    name   what open_source opens; of a pipeline only the configurations are read
    """
    try:
        options = {"revision": revision, "cache_dir": cache_dir, "relatives": True}
        source = open_source(name, only=ADAPTED, without_weights=ADAPTED, **options)
        if source.kind != "pipeline":
            return stand_ins(source.tensors)
        there = components_of_index(pipeline_index(source.folder))
        adapted = [one for one in source.family.adaptable if one.name in there]
        return {one.name: skeleton_of(one, source.folder / one.name) for one in adapted}
    except ModelError as error:
        raise ModelError(f"--base {error}") from error


def stand_ins(components):
    """Models without weights, with the layers of {component: {key: TensorReference}}.

    A weight of 2 dimensions is a linear layer, one of 4 a convolution. Only of the components that LoRAs are made for.
    Embeddings have 2 dimensions as well, but no adapter is put on them.
    """
    models = {}
    for component in (name for name in ADAPTED if name in components):
        model = models[component] = torch.nn.Module()
        for key, reference in components[component].items():
            name, _, kind = key.rpartition(".")
            if kind == "weight" and len(reference.shape) in (2, 4) and not name.endswith("_embedding"):
                *above, last = name.split(".")
                place = model
                for word in above:
                    if word not in place._modules:
                        place.add_module(word, torch.nn.Module())
                    place = place._modules[word]
                place.add_module(last, empty_layer(reference.shape))
    return models


def empty_layer(shape):
    """A linear layer or a convolution whose weight has this shape, without numbers, on the meta device."""
    out, inside, *kernel = shape
    if kernel:
        return torch.nn.Conv2d(inside, out, kernel, bias=False, device="meta")
    return torch.nn.Linear(inside, out, bias=False, device="meta")


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraFile:
    """A LoRA among the inputs of a recipe, with the fields of opening.Source that recipes name."""

    given: str
    files: tuple[Path, ...]
    folder: Path | None = None


def lora_files(names, args):
    """[LoraFile, ...]. Raises ModelError with all that cannot be found or read."""
    found = open_all([partial(find_lora, name, args.weights, args.cache_dir) for name in names])
    return [LoraFile(name, (path,)) for name, path in zip(names, found, strict=True)]


def read_loras(files, components, args):
    """[Lora, ...] of LoraFiles, checked against `components` of --base. Raises ModelError with all that is wrong."""
    try:
        return open_all([partial(read_lora, file.files[0], components) for file in files])
    except ModelError as problem:
        hint = f"\n--base {args.base} has no text encoder: a LoRA that adapts one needs a base that is a whole pipeline"
        raise ModelError(f"--lora {problem}{'' if 'text_encoder' in components else hint}") from problem


def refuse_dora(loras, why):
    """Raises ModelError naming the DoRAs, which `why` rules out."""
    if doras := [str(lora.path) for lora in loras if lora.is_dora]:
        raise ModelError(f"--lora {', '.join(doras)}: DoRA {why}")


def about_the_base(loras):
    """What all the files say alike of the base that they were made for."""
    return {
        key: loras[0].metadata[key]
        for key in ABOUT_THE_BASE
        if key in loras[0].metadata and len({lora.metadata.get(key) for lora in loras}) == 1
    }


# -- fuse ----------------------------------------------------------------------------------------------------------


def fuse(args: FuseArgs):
    """Write the base with --lora in its weights. Returns lines. Raises ModelError."""
    base, *files = args.open_sources()
    loras = read_loras(files, stand_ins(base.tensors), args)
    computes = fuse_compute(loras, args.scales)
    matches = [
        Match(component, key, (reference,), is_copy=f"{component}.{key}" not in computes)
        for component, own in base.tensors.items()
        for key, reference in own.items()
    ]
    output = MergeOutput(Path(args.output_dir), lambda one: computes[one.name], as_dict(args))
    lines = [
        f"{lora.path} at scale {scale:g}: {len(lora.layers)} layers, made for "
        f"{lora.metadata.get('base_model', 'a base that it does not name')}"
        for lora, scale in zip(loras, args.scales, strict=True)
    ]
    return [*base.warnings, *lines, *write_models("fuse", [output], [base, *files], matches, args, whole=True)]


def fuse_compute(loras, scales):
    """{"component.layer.weight": compute(weight, out=)} that fills `out` with the weight and all LoRAs in it, in fp32.

    Or 0 in its place, as in merge_writer.OutputTensor: the weight itself.

    What LoRAs add is summed. At scale 0 a LoRA, or a DoRA, is not there, as in generation. A DoRA gives each output
    another length, so beside it the order would matter: raises ModelError.
    """
    acting = [(lora, scale) for lora, scale in zip(loras, scales, strict=True) if scale]
    if len(acting) > 1:
        refuse_dora([lora for lora, _ in acting], "is fused alone, beside others the order would matter: fuse in turn")
    computes = {}
    for name in dict.fromkeys(name for lora in loras for name in lora.layers):
        layers = [(lora.layers[name], scale) for lora, scale in acting if name in lora.layers]
        computes[f"{name}.weight"] = partial(_fuse, layers) if layers else 0
    return computes


def _fuse(layers, weight, *, out):
    """`weight` in any shape of as many elements; `out` in any other."""
    first = layers[0][0]
    moved = weight.reshape(first.up.shape[0], *first.down.shape[1:])
    for layer, scale in layers:
        moved = layer.fused(moved, scale)
    return out.copy_(moved.reshape(out.shape))


# -- convert -------------------------------------------------------------------------------------------------------


def convert(args: ConvertArgs):
    """Write --lora in the layout --to, with all that its metadata says. Returns lines. Raises ModelError."""
    sources, components, (lora,) = args.open_loras()
    if args.to == "kohya":
        refuse_dora([lora], "is applied by other formulas in A1111 and ComfyUI: fuse it into its base instead")
    kept = {key: value for key, value in lora.metadata.items() if key not in ABOUT_THE_FILE}
    name = {"diffusers": DIFFUSERS_NAME, "kohya": KOHYA_NAME}[args.to]
    return write_result("convert", args, sources, lora.layers, components, kept, {}, (name,))


# -- writing -------------------------------------------------------------------------------------------------------


def write_result(command, args, sources, layers, components, facts, report, names=None):
    """Write {layer name: Layer} as --output_dir, whole or not there. Returns lines. Raises ModelError.

    Each file is read back against `components`, the models by name, and must hold the layers up to --dtype's rounding.
    sources   what it was made of: [Source or LoraFile, ...]
    facts     what the metadata should say besides the recipe, rank and alpha
    report    what the recipe should say besides, ready for JSON
    names     the files: DIFFUSERS_NAME, KOHYA_NAME (none: as --save_kohya says)
    """
    if problem := next(LoraFileArgs.problems(args), None):
        raise ModelError(problem)
    names = names or ((DIFFUSERS_NAME, KOHYA_NAME) if args.save_kohya else (DIFFUSERS_NAME,))
    rounded = {name: _rounded(layer, DTYPES[args.dtype]) for name, layer in layers.items()}
    recipe = recipe_of(command, as_dict(args), sources)
    facts = facts | metadata_of(recipe) | _size_facts(layers)
    family = family_of_components(components)
    held, notice = for_kohya(layers, family, components)
    if KOHYA_NAME in names and not held:
        raise ModelError(f"{notice}; there is no other layer")
    with atomic_folder(args.output_dir) as folder:
        for name in names:
            if name == KOHYA_NAME:
                write_kohya(folder / name, rounded, facts | _kohya_facts(held), family, components)
            else:
                write_diffusers_for_all(folder / name, rounded, facts, family)
            _check(folder / name, held if name == KOHYA_NAME else layers, components, args.dtype)
        recipe["run"]["report"] = report
        write_json(folder / RECIPE, recipe)
    lines = [notice] if notice and KOHYA_NAME in names else []
    for name in reversed(names):
        path, count = Path(args.output_dir) / name, len(held if name == KOHYA_NAME else layers)
        lines.insert(0, f"{path}  {count} layers, {path.stat().st_size / 1e6:.2f} MB")
    return lines


def _rounded(layer, dtype):
    """The layer with alpha = rank, as it is stored: scaled in fp32, then rounded once."""
    layer = layer.with_alpha(layer.rank)
    magnitude = None if layer.magnitude is None else layer.magnitude.to(dtype)
    return replace(layer, down=layer.down.to(dtype), up=layer.up.to(dtype), magnitude=magnitude)


def _size_facts(layers):
    ranks, alphas = ({getattr(layer, what) for layer in layers.values()} for what in ("rank", "alpha"))
    return {
        "rank": ", ".join(map(str, sorted(ranks))),
        "alpha": ", ".join(f"{alpha:g}" for alpha in sorted(alphas)),
        "parts": ", ".join(name for name in ADAPTED if any(layer.startswith(f"{name}.") for layer in layers)),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
    }


def _kohya_facts(layers):
    """The names under which sd-scripts looks for rank and alpha; "Dynamic" is its own word for ranks that differ."""
    ranks = Counter(layer.rank for layer in layers.values())
    alpha = ranks.most_common(1)[0][0]  # as stored: see _rounded
    rank = alpha if len(ranks) == 1 else "Dynamic"
    has_convolutions = any(layer.down[0].numel() > layer.down.shape[1] for layer in layers.values())
    dimensions = {"conv_dim": str(rank), "conv_alpha": str(alpha)} if has_convolutions else {}
    facts = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha}
    return facts | {"ss_network_args": json.dumps(dimensions)}


def _check(path, layers, components, dtype):
    """Raises ModelError unless the file holds the layers."""
    found, tolerance = read_lora(path, components).layers, TOLERANCE[DTYPES[dtype]]
    off = {name: _distance(found[name], layer) if name in found else 1.0 for name, layer in layers.items()}
    far = {name: distance for name, distance in off.items() if not distance <= tolerance}
    if found.keys() - layers.keys() or far:
        name = max(far, key=far.get, default="a layer that was not there")
        hint = ": write --dtype fp32, fp16 cannot hold these numbers" if dtype == "fp16" else ""
        raise ModelError(
            f"{path.name} does not hold what was to be written, {len(far)} of {len(layers)} layers differ, "
            f"e.g. {name} by {far.get(name, 1):.1e} of its norm{hint}"
        )


def _distance(found, meant):
    """How far two layers' sums and magnitudes are apart, each relative to `meant`."""
    of_magnitudes = 0.0 if meant.magnitude is None else relative_distance(found.magnitude, meant.magnitude)
    return relative_distance(found.delta(), meant.delta()) + of_magnitudes  # a sum, in which a NaN stays one


def relative_distance(found, meant):
    """||found - meant|| / ||meant||, in float64; 0 where both are nothing."""
    found, meant = found.double(), meant.double()
    distance, norm = (found - meant).norm().item(), meant.norm().item()
    return distance / norm if norm else distance
