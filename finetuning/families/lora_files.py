"""LoRA files: every common layout read into one form, and written as diffusers and as kohya's sd-scripts name things.

The one form is a `Layer` for each adapted linear layer or convolution W. With the layer at scale s the model has

    V = W + s * alpha / rank * up @ down    LoRA (arXiv 2106.09685, section 4.1)
    m * V / ||V||                           DoRA (arXiv 2402.09353, eq. 5), the norm over the inputs of each output

in its place. diffusers and PEFT say lora_A and lora_B for down and up. Layers are named by component and module, as in
"unet.mid_block.attentions.0.proj_in". What files put before a module's name, the model's family declares.
"""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetuning.cli import first_few
from finetuning.families.folders import RAW, of_checkpoint
from finetuning.families.model_args import ModelError
from finetuning.families.original import known_names
from finetuning.families.table import DEFAULT_FAMILY, family_of, family_of_components
from finetuning.families.tensors import read_json, refuse_not_finite, refuse_quantised, tensor_references

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"  # which diffusers' load_lora_weights(folder) looks for
RAW_NAME = f"pytorch_lora_weights.{RAW}.safetensors"
KOHYA_NAME = "kohya_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configurations

DOWN, UP, ALPHA, MAGNITUDE, DORA_SCALE = "down", "up", "alpha", "magnitude", "dora_scale"
ENDINGS = (
    (r"\.lora_(?:A(?:\.\w+)?|down)\.weight|[._]lora(?:_linear_layer)?\.down\.weight", DOWN),
    (r"\.lora_(?:B(?:\.\w+)?|up)\.weight|[._]lora(?:_linear_layer)?\.up\.weight", UP),
    (r"\.alpha", ALPHA),
    (r"\.lora_magnitude_vector(?:\.\w+)*", MAGNITUDE),
    (r"\.dora_scale", DORA_SCALE),
)
LORA_KEY = re.compile(r"[._]lora(_\w+)?[._]|^lora_(unet|te)")

# Layers of which sd-scripts reads nothing and older versions of diffusers garble the names.
NOT_FOR_KOHYA = re.compile(r"unet\.(time_embedding|add_embedding|class_embedding)\.")
# The original name of an upsampler without attention before it, which real SDXLs do not have: diffusers reads the 1 as
# an attention.
TAKEN_FOR_ATTENTION = re.compile(r"output_blocks\.\d+\.1\.conv")


@dataclass(frozen=True)
class Layer:
    """What is added to one weight [out, in] or [out, in, height, width]."""

    down: torch.Tensor  # [rank, in] or [rank, in, height, width]
    up: torch.Tensor  # [out, rank] or [out, rank, 1, 1]
    alpha: float
    magnitude: torch.Tensor | None = None  # DoRA's m, [out]

    @property
    def rank(self):
        return self.down.shape[0]

    def with_alpha(self, alpha):
        """The same layer with another alpha: what the alpha no longer says is said by `up`."""
        factor = self.alpha / alpha
        return self if factor == 1 else replace(self, up=self.up * factor, alpha=alpha)

    def delta(self, scale=1.0):
        """scale * alpha / rank * up @ down, fp32, in the weight's shape."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (scale * self.alpha / self.rank * product).reshape(self.up.shape[0], *self.down.shape[1:])

    def fused(self, weight, scale=1.0):
        """The weight that has the layer in it, fp32."""
        moved = weight.float() + self.delta(scale)
        return moved * self.stretch(moved)

    def stretch(self, moved):
        """What DoRA multiplies each output of V = weight + delta with, [out, 1, ...]; 1 for a LoRA."""
        if self.magnitude is None:
            return torch.ones(())
        per_output = (-1,) + (1,) * (moved.ndim - 1)
        return (self.magnitude.float() / moved.flatten(1).norm(dim=1)).reshape(per_output)


@dataclass(frozen=True)
class Lora:
    """The layers of one file by name, and the file's metadata."""

    path: Path
    layers: dict
    metadata: dict

    @property
    def is_dora(self):
        return any(layer.magnitude is not None for layer in self.layers.values())

    def note_on_base(self, name, hash_of_base):
        """A sentence where the file says that it was made for other weights than these, else None."""
        recorded = self.metadata.get("base_model_hash")
        if recorded in (None, hash_of_base):
            return None
        return (
            f"{self.path} was made for {self.metadata.get('base_model', 'another base')} (weights {recorded[:12]}), "
            f"and {name} has other weights ({hash_of_base[:12]}): it fits, but what it learned may not show"
        )


def adaptable(components):
    """{layer name: module} of all that can carry an adapter, of {name: model}."""
    return {
        f"{component}.{name}": module
        for component, model in components.items()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def adaptable_components(pipeline):
    """{name: model} of the components of a diffusers pipeline that LoRAs are made for."""
    return {component.name: getattr(pipeline, component.name) for component in family_of(pipeline).adaptable}


def weights_hash(model):
    """sha256 over a model's weights by name, rounded to fp16: the same for its fp32 and its fp16 files."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- reading -------------------------------------------------------------------------------------------------------


def is_lora_key(key):
    """Whether a tensor of this name belongs to a LoRA."""
    return bool(LORA_KEY.search(key))


def is_lora_path(path):
    """Whether a file or folder is, by its names, a LoRA or a run of train_lora.py."""
    files = (DIFFUSERS_NAME, RAW_NAME, PEFT_NAME, KOHYA_NAME)
    return path.name in files or (path / "lora").is_dir() or any((path / file).is_file() for file in files)


def read_lora(source, components, weights="ema", cache_dir=None):
    """A LoRA from wherever it lies, checked against the models in `components`. Raises ModelError.

    source      .safetensors file (diffusers, kohya or PEFT), output folder or checkpoint-N of a run, PEFT folder, or a
                Hub name: owner/repository, or owner/repository/file.safetensors
    components  {"unet": ..., "text_encoder": ...}, without adapters of their own
    weights     "ema" or "raw": which of the two a run has kept; where only one is there, that one
    """
    path, family = find_lora(source, weights, cache_dir), family_of_components(components)
    references, metadata = tensor_references(path)
    refuse_quantised(str(path), references)
    tensors = {key: reference.read() for key, reference in references.items()}
    refuse_not_finite(tensors, path)
    modules = adaptable(components)
    spellings = {}
    originals = original_modules(components, family)
    for name in modules:
        for spelled in _spellings(name, family, originals.get(name)):
            spellings.setdefault(spelled, name)
    found, strange = {}, []
    for key, value in tensors.items():
        stem, kind = _split(key)
        if kind is None or stem not in spellings:
            strange.append(key)
        else:
            found.setdefault(spellings[stem], {})[kind] = value
    if strange:
        foreign = [key for key in strange if _split(key)[1] is None]
        reason = "has no such layer in this model: it was made for " + (
            _other_text(tensors, modules, family) or "another kind of base"
        )
        if foreign:
            reason = "is of LyCORIS's Tucker form" if ".lora_mid." in foreign[0] else "is no LoRA layer"
        raise ModelError(
            f"{path}: {len(strange)} of its {len(tensors)} tensors do not fit, {(foreign or strange)[0]} {reason} "
            f"({_made_for(metadata)}); LoRA, LoCon and DoRA for {family.pipeline} can be read"
        )
    alpha_of = _alphas(path, metadata, components)
    layers, wrong = {}, []
    for name, one in found.items():
        layer = _layer(one, tuple(modules[name].weight.shape), lambda rank, name=name: alpha_of(name, rank))
        if isinstance(layer, str):
            wrong.append(f"{name}: {layer}")
        else:
            layers[name] = layer
    if wrong or not layers:
        listed = "\n  ".join(wrong[:5]) or "it has no layers"
        if other := _other_text(tensors, modules, family):
            listed = f"it was made for {other}\n  {listed}"
        raise ModelError(
            f"{path} does not fit this model, {len(wrong)} layers differ ({_made_for(metadata)}):\n  {listed}"
        )
    return Lora(path, layers, metadata)


def find_lora(source, weights="ema", cache_dir=None):
    """The file that `source` means (see read_lora)."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        finished = (DIFFUSERS_NAME, PEFT_NAME) if weights == "ema" else (RAW_NAME, DIFFUSERS_NAME, PEFT_NAME)
        for candidate in (of_checkpoint(path, "lora", weights) / DIFFUSERS_NAME, *(path / name for name in finished)):
            if candidate.is_file():
                return candidate
        single = sorted(path.glob("*.safetensors"))
        if len(single) == 1:
            return single[0]
        there = first_few(sorted(entry.name for entry in path.iterdir()), 8) or "nothing"
        raise ModelError(f"{path} holds no {DIFFUSERS_NAME}, only {there}: name the LoRA's file")
    from huggingface_hub import hf_hub_download

    repository, name = str(source), DIFFUSERS_NAME
    if str(source).count("/") > 1 and str(source).endswith(".safetensors"):
        *owner, name = str(source).split("/", 2)
        repository = "/".join(owner)
    try:
        return Path(hf_hub_download(repository, name, cache_dir=cache_dir))
    except (OSError, ValueError) as error:  # the Hub's own errors are of these kinds
        raise ModelError(
            f"{source} is neither a LoRA file or folder, nor one to be had from the Hub: {error}"
        ) from error


def _split(key):
    """(module as the file spells it, which of a layer's tensors), or (key, None)."""
    for ending, kind in ENDINGS:
        if match := re.search(f"(?:{ending})$", key):
            return key[: match.start()], kind
    return key, None


def original_modules(components, family):
    """{layer name: what single files call the module} of all in {component: module} for which they have a name."""
    return {
        f"{name}.{key.removesuffix('.weight')}": original.removesuffix(".weight")
        for name, module in components.items() if name == family.denoiser
        for key, original in known_names(family.by_name[name], module.state_dict()).items()
    }  # fmt: skip


def _spellings(name, family, original=None):
    """How files write a layer: diffusers now and of 2023, PEFT, kohya, ComfyUI; `original`: as single files call it."""
    component, module = _in_family(name, family)
    flat = module.replace(".", "_")
    yield f"{component.lora_prefix}{module}"
    yield f"{component.kohya_prefix}{flat}"
    yield f"base_model.model.{module}"
    if original:
        yield f"{component.kohya_prefix}{original.replace('.', '_')}"
        yield from (f"diffusion_model.{original}", component.original_prefixes[0] + original)
    if component.name == family.denoiser:
        processor = re.sub(r"\.(attn\d)\.(to_\w+)(\.0)?$", r".\1.processor.\2", module)
        yield from (module, f"{component.lora_prefix}{processor}", processor)
    else:
        old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", module)
        yield from (f"{component.name}.{module}", f"{component.lora_prefix}{old}", f"{component.name}.{old}")
        yield f"base_model.model.{component.file_prefix}{module}"
        yield re.sub("^lora_te_", "lora_te1_", f"{component.kohya_prefix}{flat}")


def _in_family(name, family):
    """(Component, module's name) of a layer's name."""
    component, module = name.split(".", 1)
    return family.by_name[component], module


def _other_text(tensors, modules, family):
    """What a LoRA was made for whose denoiser attends to text of another width than this one's, or None."""
    to_text = re.compile(r"attn2[._](?:processor[._])?to_k")
    theirs = {value.shape[1] for key, value in tensors.items() if to_text.search(key) and _split(key)[1] == DOWN}
    ours = {module.in_features for name, module in modules.items() if to_text.search(name)}
    if not theirs or not ours or theirs & ours:
        return None
    known = {768: " (Stable Diffusion 1.x)", 1024: " (Stable Diffusion 2.x)", 2048: " (Stable Diffusion XL)"}
    shown = lambda widths: ", ".join(f"{width}{known.get(width, '')}" for width in sorted(widths))
    return f"a denoiser that reads text of width {shown(theirs)}, and this {family.pipeline} reads {shown(ours)}"


def _alphas(path, metadata, components):
    """A function (layer name, rank) -> alpha, for layers without an alpha of their own in the file."""
    configs = {}
    beside = path.with_name("adapter_config.json")
    try:
        for key, value in json.loads(metadata.get(METADATA_KEY) or "{}").items():
            component, setting = key.split(".", 1)
            configs.setdefault(component, {})[setting] = value
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its metadata {METADATA_KEY} is damaged ({error}), so its alphas are lost") from error
    if path.name == PEFT_NAME and beside.is_file():
        configs = dict.fromkeys(components, read_json(beside))
    for config in configs.values():
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(
            isinstance(alpha, int | float) for alpha in (config.get("lora_alpha"), *patterns.values())
        ):
            raise ModelError(f"{path}: what its configuration says of alpha is damaged (lora_alpha, alpha_pattern)")

    def alpha(name, rank):
        component, module = name.split(".", 1)
        config = configs.get(component)
        if config is None:
            return float(rank)  # what every reader takes a missing alpha for
        from peft.utils.other import get_pattern_key

        patterns = config.get("alpha_pattern") or {}
        try:
            value = patterns.get(get_pattern_key(patterns, module), config["lora_alpha"])
        except re.error as error:
            raise ModelError(f"{path}: {error.pattern} of its alpha_pattern is no regular expression") from error
        return float(value) * (rank**0.5 if config.get("use_rslora") else 1)

    return alpha


def _layer(one, weight, alpha_of):
    """A Layer of the tensors of one layer, in the shape of its weight; or what is wrong, as text."""
    if DOWN not in one or UP not in one:
        return f"has only {', '.join(sorted(one))}"
    down, up = one[DOWN], one[UP]
    rank, inputs = down.shape[0] if down.ndim else 0, torch.Size(weight[1:]).numel()
    if not rank or down.numel() != rank * inputs or up.shape[:1] != weight[:1] or up.numel() != weight[0] * rank:
        return f"the file has {list(up.shape)} x {list(down.shape)}, the model's weight is {list(weight)}"
    magnitude = one.get(MAGNITUDE, one.get(DORA_SCALE))
    # LyCORIS has one for each output [out, 1, ...] or for each input [1, in, ...]; on square layers only that tells
    by_input = DORA_SCALE in one and magnitude.shape[:1] != weight[:1]
    if magnitude is not None and (by_input or magnitude.numel() != weight[0]):
        return f"DoRA over inputs ({list(magnitude.shape)}) is not read, only over outputs"
    own = one.get(ALPHA)
    alpha = alpha_of(rank) if own is None else own.item() if own.numel() == 1 else math.nan
    if not alpha or not math.isfinite(alpha):
        return f"its alpha is {alpha}, which is no number to scale a layer with"
    kernel = weight[2:]  # empty for a linear layer; some files write those as 1 x 1 convolutions
    return Layer(
        down.float().reshape(rank, *weight[1:]),  # a fp16 file's numbers are exact in fp32; scaling them in fp16 is not
        up.float().reshape(weight[0], rank, *(1 for _ in kernel)),
        alpha,
        None if magnitude is None else magnitude.float().reshape(-1),
    )


def _made_for(metadata):
    name = metadata.get("base_model") or metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version")
    return f"it says it was made for {name}" if name else "it does not say what it was made for"


# -- putting into a pipeline ---------------------------------------------------------------------------------------


def attach(pipeline, lora: Lora, name="lora"):
    """Load the layers into a diffusers pipeline as the adapter `name`, by diffusers' own loader, at scale 1."""
    family = family_of(pipeline)
    layers = {key: layer.with_alpha(layer.rank) for key, layer in lora.layers.items()}
    state = diffusers_tensors(layers, family)
    for component in family.adaptable:
        if not any(key.startswith(f"{component.name}.") for key in layers):
            continue
        model = getattr(pipeline, component.name)
        if component.name == family.denoiser:
            load = getattr(pipeline, f"load_lora_into_{component.name}")
            load(state, None, model, adapter_name=name)
        else:
            pipeline.load_lora_into_text_encoder(state, None, model, prefix=component.name, adapter_name=name)


def set_scale(pipeline, scale, name="lora"):
    """How strongly the adapter acts. At 0 it is switched off, so the images are the base's to the last bit."""
    if scale == 0:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters(name, scale)


def detach(pipeline):
    """Take all adapters out again."""
    pipeline.unload_lora_weights()


# -- writing -------------------------------------------------------------------------------------------------------


def diffusers_tensors(layers, family=DEFAULT_FAMILY):
    """{key: tensor} as diffusers and PEFT name them. They do not hold alpha: it stands in the file's metadata."""
    tensors = {}
    for name, layer in layers.items():
        component, module = _in_family(name, family)
        stem = component.lora_prefix + module
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = layer.down, layer.up
        if layer.magnitude is not None:
            shape = (-1,) if layer.down.ndim == 2 else (1, -1, 1, 1)
            tensors[stem + magnitude_ending(component)] = layer.magnitude.reshape(shape)
    return tensors


def magnitude_ending(component):
    """What DoRA's magnitudes are called, as diffusers' loader looks for them, or transformers'."""
    return ".lora_magnitude_vector.weight" if component.is_text_encoder else ".lora_magnitude_vector"


def write_diffusers(path, layers, facts, family=DEFAULT_FAMILY):
    """Write `layers` as they are; their alphas go into the metadata that diffusers reads (from 0.34 on)."""
    metadata = {**facts, METADATA_KEY: json.dumps(_configs(layers), sort_keys=True)}
    _write(path, diffusers_tensors(layers, family), metadata)


def write_diffusers_for_all(path, layers, facts, family=DEFAULT_FAMILY):
    """The same with alpha = rank in every layer: what a reader takes for granted that knows nothing of the metadata."""
    write_diffusers(path, {name: layer.with_alpha(layer.rank) for name, layer in layers.items()}, facts, family)


def for_kohya(layers, family=DEFAULT_FAMILY, components=None):
    """(the layers that a kohya file can hold, a notice of those it cannot, or None); arguments as of `write_kohya`."""
    originals = original_modules(components or {}, family) if family.by_name[family.denoiser].kohya_original else {}
    cannot = lambda name: NOT_FOR_KOHYA.match(name) or TAKEN_FOR_ATTENTION.fullmatch(originals.get(name, ""))
    held = {name: layer for name, layer in layers.items() if not cannot(name)}
    left_out = [name for name in layers if name not in held]
    if not left_out:
        return held, None
    return held, (
        f"{KOHYA_NAME} leaves out {len(left_out)} layers ({first_few(left_out, 2)}): sd-scripts does not read them or "
        f"diffusers garbles them. {DIFFUSERS_NAME} has them"
    )


def write_kohya(path, layers, facts, family=DEFAULT_FAMILY, components=None):
    """Write the layout of sd-scripts, which A1111 and ComfyUI load. LoRA only: they apply DoRA by other formulas.

    components   {name: module} of the model, for a family whose files have original names (Component.kohya_original)

    Every layer has the same alpha, the most common one: diffusers' reader of this layout loses alphas that differ.
    Without the layers that `for_kohya` leaves out.
    """
    layers, _ = for_kohya(layers, family, components)
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0] if layers else 0
    tensors, originals = {}, original_modules(components or {}, family)
    for name, layer in layers.items():
        component, module = _in_family(name, family)
        module = originals[name] if component.kohya_original else module
        stem, layer = component.kohya_prefix + module.replace(".", "_"), layer.with_alpha(alpha)
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    _write(path, tensors, facts)


def _write(path, tensors, metadata):
    """safetensors with its metadata sorted: the library writes it in any order, and equal files should be equal."""
    from safetensors.torch import save

    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    start = 8 + int.from_bytes(content[:8], "little")
    # The hash that A1111 shows and looks files up by is the one of the tensors
    metadata = {"format": "pt", **metadata, "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest()}
    ordered = {key: str(metadata[key]) for key in sorted(metadata)}
    header = json.dumps({"__metadata__": ordered, **json.loads(content[8:start])}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


def _configs(layers):
    """What PEFT's LoraConfig needs to build the same layers again, by component."""
    configs = {}
    for component in sorted({name.split(".", 1)[0] for name in layers}):
        own = {name.split(".", 1)[1]: layer for name, layer in layers.items() if name.startswith(f"{component}.")}
        ranks, alphas = ({name: getattr(one, what) for name, one in own.items()} for what in ("rank", "alpha"))
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        configs |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": alpha,
            f"{component}.rank_pattern": {name: value for name, value in ranks.items() if value != rank},
            f"{component}.alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
            f"{component}.target_modules": sorted(own),
            f"{component}.use_dora": any(layer.magnitude is not None for layer in own.values()),
        }
    return configs
