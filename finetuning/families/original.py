"""The single-file layout: CompVis' and Stability's names, which A1111 and ComfyUI load.

    model.diffusion_model.*                     the UNet
    model_ema.*                                 its average, in names without dots (CompVis' LitEma)
    first_stage_model.*                         the autoencoder
    cond_stage_model.transformer.text_model.*   the text encoder of SD 1.x, CLIP
    cond_stage_model.model.*                    the text encoder of SD 2.x, OpenCLIP
    conditioner.embedders.0.transformer.*, conditioner.embedders.1.model.*    SDXL's, CLIP and OpenCLIP

Where a component lies, its family declares. The names that this project works with ("canonical") are those of the
components' modules. No table lists them: how many blocks and layers there are is read off the keys, so any size will
do.
"""

import math
import re
from typing import NamedTuple

from finetuning.families.model_args import ModelError

AVERAGE = "model_ema."
UNET, AUTOENCODER = "UNet2DConditionModel", "AutoencoderKL"
SD2_LAYERS = 23  # OpenCLIP's ViT-H has 24; SD 2.x takes what the last but one says, and diffusers leaves the last out

# The noise schedule, counters, and what files hold of OpenCLIP besides what is used of it.
KNOWN_EXTRAS = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor"
    r"|model_ema\.(decay|num_updates)|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)"
    r"|conditioner\.embedders\.1\.model\.(logit_scale|attn_mask)|denoiser\.sigmas"
)

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# What older diffusers folders call the same layers; diffusers renames them when it loads.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

OPEN_CLIP_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PROJECTION = "text_projection"  # which OpenCLIP multiplies from the other side


class Place(NamedTuple):
    """Where a tensor lies in a single file."""

    key: str
    shape: tuple[int, ...]  # of the file's tensor
    first: int = 0  # element of it where ours begins: OpenCLIP keeps query, key and value in one
    transposed: bool = False


class Block(NamedTuple):
    """A block of the UNet: how many layers, whether they attend, whether it ends with a change of resolution."""

    layers: int
    attends: bool
    resamples: bool


# -- writing -------------------------------------------------------------------------------------------------------


def original_names(component, keys):
    """{canonical key: key in the file} of a family's Component, without OpenCLIP's position ids, which it has not.

    Raises ModelError for a key that the layout has no name for.
    """
    keys = list(keys)
    if not component.original_prefixes:
        raise ModelError(
            f"a single file is in Stable Diffusion's layout, which has no place for this {component.name}: leave "
            "--single_file out"
        )
    prefix = component.original_prefixes[0]
    if component.is_text_encoder and not _is_open_clip(prefix):
        if _count(r"(?:text_model\.)?encoder\.layers\.(\d+)\.", keys) == SD2_LAYERS:
            raise ModelError(
                "the text encoder of SD 2.x is not written in the original layout, which has a 24th layer that "
                "diffusers' folders lack: leave --single_file out"
            )
        return {key: prefix + component.file_prefix + key for key in keys}
    keys = [key for key in keys if not key.endswith("position_ids")]
    names = known_names(component, keys)
    if nameless := [key for key in keys if key not in names]:
        raise ModelError(
            f"{len(nameless)} tensor(s) of the {component.name} have no name in the original layout, "
            f"{nameless[0]} first: leave --single_file out"
        )
    return {key: prefix + name for key, name in names.items()}


def known_names(component, keys):
    """{canonical key: key in the file, without the prefix}, as far as CompVis' layout and OpenCLIP's have one."""
    keys, modules = list(keys), {}
    if component.class_name == UNET:
        modules = dict(_unet_modules(*_canonical_blocks(keys)))
    elif component.class_name == AUTOENCODER:
        modules = dict(_vae_modules(_canonical_sizes(keys)))
    rename = _open_clip_name if component.is_text_encoder else lambda key: _renamed(key, modules)
    return {key: name for key in keys if (name := rename(key)) is not None}


def place(component, key, name, shape):
    """The Place of a tensor that is called `name` in the file.

    The autoencoder's attention is made of 1 x 1 convolutions there.
    """
    if component.class_name == AUTOENCODER:
        linear = re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", key) and len(shape) == 2
        return Place(name, (*shape, 1, 1) if linear else tuple(shape))
    if third := re.search(r"\.self_attn\.(q|k|v)_proj\.", key) if "in_proj_" in name else None:
        return Place(name, (3 * shape[0], *shape[1:]), "qkv".index(third[1]) * math.prod(shape))
    if name.endswith(f".{PROJECTION}"):
        return Place(name, tuple(shape[::-1]), transposed=True)
    return Place(name, tuple(shape))


def unet_blocks(keys):
    """{canonical key: block} of a UNet's tensors, as per-block ratios count them: IN00 .., M00, OUT00 .., or BASE.

    Raises ModelError where the UNet has layers that Stable Diffusion's have not (DeepFloyd IF's, say).
    """
    inside = [key for key in keys if key.startswith(("conv_in.", "down_blocks.", "mid_block.", "up_blocks."))]
    blocks = dict.fromkeys(keys, "BASE")
    modules = dict(_unet_modules(*_canonical_blocks(inside)))
    for key in inside:
        place = re.match(r"(in|middle|out)\w*\.(\d+)", _renamed(key, modules) or "")
        if place is None:
            raise ModelError(f"blocks are numbered in Stable Diffusion's UNets alone, and this one has a {key}")
        way, number = place.groups()
        blocks[key] = "M00" if way == "middle" else f"{way.upper()}{int(number):02d}"
    return blocks


# -- reading -------------------------------------------------------------------------------------------------------


def is_original(keys, family):
    """Whether these are keys of a file in this layout."""
    return any(key.startswith(tuple(_prefixes(family) | {AVERAGE: None})) for key in keys)


def _prefixes(family):
    """{beginning of keys: Component}."""
    return {prefix: component for component in family.components for prefix in component.original_prefixes}


def canonical_parts(tensors, family, weights="ema"):
    """({component: {canonical key: reference}}, strange keys) of a file's {key: reference}; nothing is read or copied.

    weights   "ema" takes the UNet's average where the file has one, "raw" the weights that were trained
    strange   keys that belong to no component, and are not among those that such files are known to have besides
    Raises ModelError: an average that is not whole, one tensor under two names.
    """
    average = {
        key: stored for key, stored in tensors.items() if key.startswith(AVERAGE) and not KNOWN_EXTRAS.fullmatch(key)
    }
    parts, came_from, strange = {}, {}, []
    for key, part, name, stored in _named(tensors, family):
        if name is None and key not in average:
            strange.append(key)
        elif name is not None:
            if (part, name) in came_from:
                raise ModelError(f"{came_from[part, name]} and {key} are two names of one tensor: remove one")
            came_from[part, name] = key
            parts.setdefault(part, {})[name] = stored
    denoiser = family.denoiser
    if average and weights == "ema" and denoiser in parts:
        for name in parts[denoiser]:
            dotless = came_from[denoiser, name].removeprefix("model.").replace(".", "")
            parts[denoiser][name] = average.pop(AVERAGE + dotless, None)
        lacking = [came_from[denoiser, name] for name, stored in parts[denoiser].items() if stored is None]
        if lacking:
            raise ModelError(
                f"its average ({AVERAGE}*) lacks {len(lacking)} tensor(s) of the UNet, {lacking[0]} first: take the "
                "weights that were trained, --weights raw"
            )
    return parts, strange + (list(average) if weights == "ema" else [])


def _named(tensors, family):
    """(key, component's name, canonical key or None, reference) of all that is not known to be there besides."""
    prefixes = _prefixes(family)
    readers = {prefix: _reader(component, prefix, tensors) for prefix, component in prefixes.items()}
    for key, stored in tensors.items():
        if KNOWN_EXTRAS.fullmatch(key):
            continue
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            yield key, None, None, stored
            continue
        for name, found in readers[prefix](key.removeprefix(prefix), stored).items():
            yield key, prefixes[prefix].name, name, found


def _reader(component, prefix, tensors):
    """A function (key without prefix, reference) -> {canonical key or None: reference} for a component's tensors."""
    keys = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    if component.class_name == UNET:
        modules = {theirs: ours for ours, theirs in _unet_modules(*_original_blocks(keys))}
        return lambda key, stored: {_renamed(key, modules): stored}
    if component.class_name == AUTOENCODER:
        modules = {theirs: ours for ours, theirs in _vae_modules(_original_sizes(keys))}
        return lambda key, stored: _vae_tensor(_renamed(key, modules), stored)
    if not _is_open_clip(prefix):
        return lambda key, stored: _clip_tensor(component, key, stored)
    return lambda key, stored: _open_clip_tensors(component, key, stored)


def _is_open_clip(prefix):
    return prefix.endswith(".model.")


def _vae_tensor(name, stored):
    if name and len(stored.shape) == 4 and re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name):
        stored = stored.viewed(stored.shape[:2])
    return {name: stored}


def _clip_tensor(component, key, stored):
    name = key.removeprefix(component.file_prefix)
    return {name if re.match(r"(text_model\.)?(embeddings|encoder|final_layer_norm)\.", name) else None: stored}


def _open_clip_tensors(component, key, stored):
    """One tensor, three where query, key and value stand in one matrix, none of the layer that is not used."""
    inner = "" if component.file_prefix else "text_model."
    if key == PROJECTION:
        return {f"{PROJECTION}.weight": stored.flipped()}
    if key in OPEN_CLIP_ENDS:
        return {inner + OPEN_CLIP_ENDS[key]: stored}
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)([._])(weight|bias)", key)
    if not found:
        return {None: stored}
    layer, module, joint, kind = found.groups()
    if component.class_name == "CLIPTextModel" and int(layer) >= SD2_LAYERS:
        return {}
    stem = f"{inner}encoder.layers.{layer}"
    if (module, joint) == ("attn.in_proj", "_"):
        width = stored.shape[0] // 3
        thirds = (stored.rows(place * width, (place + 1) * width) for place in range(3))
        return {f"{stem}.self_attn.{name}_proj.{kind}": third for name, third in zip("qkv", thirds, strict=True)}
    known = joint == "." and module in OPEN_CLIP_LAYER
    return {f"{stem}.{OPEN_CLIP_LAYER[module]}.{kind}" if known else None: stored}


def _open_clip_name(key):
    """What OpenCLIP calls a canonical key, or None."""
    if key == f"{PROJECTION}.weight":
        return PROJECTION
    key = key.removeprefix("text_model.")
    if name := {ours: theirs for theirs, ours in OPEN_CLIP_ENDS.items()}.get(key):
        return name
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if not found:
        return None
    layer, module, kind = found.groups()
    if re.fullmatch(r"self_attn\.(q|k|v)_proj", module):
        return f"transformer.resblocks.{layer}.attn.in_proj_{kind}"
    module = {ours: theirs for theirs, ours in OPEN_CLIP_LAYER.items()}.get(module)
    return module and f"transformer.resblocks.{layer}.{module}.{kind}"


# -- names by rule -------------------------------------------------------------------------------------------------


def _unet_modules(down, up):
    """(diffusers' module, original module) of a UNet with these blocks.

    The original numbers layers and changes of resolution on through all blocks, its first convolution among them.
    """
    yield from UNET_ENDS.items()
    for number, place in (("0", "0"), ("1", "2")):
        yield from _within(f"mid_block.resnets.{number}", f"middle_block.{place}", UNET_RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    place = 1
    for number, block in enumerate(down):
        for layer in range(block.layers):
            yield from _layer(f"down_blocks.{number}", layer, f"input_blocks.{place}", block.attends)
            place += 1
        if block.resamples:
            yield f"down_blocks.{number}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1
    place = 0
    for number, block in enumerate(up):
        for layer in range(block.layers):
            yield from _layer(f"up_blocks.{number}", layer, f"output_blocks.{place}", block.attends)
            place += 1
        if block.resamples:
            last = f"output_blocks.{place - 1}.{2 if block.attends else 1}.conv"
            yield f"up_blocks.{number}.upsamplers.0.conv", last


def _layer(block, layer, place, attends):
    yield from _within(f"{block}.resnets.{layer}", f"{place}.0", UNET_RESNET)
    if attends:
        yield f"{block}.attentions.{layer}", f"{place}.1"


def _vae_modules(sizes):
    """(diffusers' module, original module) of an autoencoder of so many (blocks, layers at most in each).

    The decoder's blocks are numbered by resolution in the original, and in the order of their use in diffusers.
    """
    blocks, layers = sizes
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name
    for half, side, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield from _within(half, half, VAE_ENDS)
        for number in range(2):
            yield from _within(f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}", VAE_RESNET)
        yield from _within(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        for number in range(blocks):
            ours = f"{half}.{side}_blocks.{number}"
            theirs = f"{half}.{side}.{number if side == 'down' else blocks - 1 - number}"
            yield f"{ours}.{sampler}rs.0.conv", f"{theirs}.{sampler}.conv"
            for layer in range(layers):
                yield from _within(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", VAE_RESNET)


def _within(ours, theirs, names):
    return ((f"{ours}.{name}", f"{theirs}.{other}") for name, other in names.items())


def _renamed(key, modules):
    """The key with its module renamed, the longest that `modules` has, or None."""
    words = key.split(".")
    for length in range(len(words) - 1, 0, -1):
        if (name := modules.get(".".join(words[:length]))) is not None:
            return ".".join([name, *words[length:]])
    return None


# -- how many blocks and layers ------------------------------------------------------------------------------------


def _canonical_blocks(keys):
    """The UNet's blocks on the way down and on the way up, from diffusers' keys."""
    return [_blocks_of_one_way(way, keys) for way in ("down", "up")]


def _blocks_of_one_way(way, keys):
    pattern = re.compile(rf"{way}_blocks\.(\d+)\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.")
    found = {match.groups() for match in map(pattern.match, keys) if match}
    count = lambda number, kind: sum((block, what) == (str(number), kind) for block, what, _ in found)
    return [
        Block(count(number, "resnets"), count(number, "attentions") > 0, count(number, f"{way}samplers") > 0)
        for number in range(1 + max((int(block) for block, _, _ in found), default=-1))
    ]


def _original_blocks(keys):
    """The same from the original keys: a block ends with its change of resolution."""
    places = {"input": {}, "output": {}}
    for key in keys:
        if found := re.match(r"(input|output)_blocks\.(\d+)\.(\d+(?:\.op|\.conv)?)\.", key):
            places[found[1]].setdefault(int(found[2]), set()).add(found[3])
    places["input"].pop(0, None)  # the first convolution
    ways = []
    for way in places.values():
        blocks, layers, attends = [], 0, False
        for _, holds in sorted(way.items()):
            layers += "0" in holds
            attends |= "1" in holds
            if holds & {"0.op", "1.conv", "2.conv"}:
                blocks.append(Block(layers, attends, True))
                layers, attends = 0, False
        ways.append(blocks + ([Block(layers, attends, False)] if layers else []))
    return ways


def _canonical_sizes(keys):
    """(blocks, layers at most in each) of an autoencoder, from diffusers' keys."""
    return _count(r"\w+\.\w+_blocks\.(\d+)\.", keys), _count(r"\w+\.\w+_blocks\.\d+\.resnets\.(\d+)\.", keys)


def _original_sizes(keys):
    return _count(r"\w+\.(?:down|up)\.(\d+)\.", keys), _count(r"\w+\.(?:down|up)\.\d+\.block\.(\d+)\.", keys)


def _count(pattern, keys):
    """One more than the highest number that the pattern finds at the start of a key."""
    return 1 + max((int(found[1]) for key in keys if (found := re.match(pattern, key))), default=-1)
