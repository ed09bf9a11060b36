"""The single-file layout of Stable Diffusion 1.x and 2.x: CompVis' and Stability's names, which A1111 and ComfyUI load.

    model.diffusion_model.*                     the UNet
    model_ema.*                                 its average, in names without dots (CompVis' LitEma)
    first_stage_model.*                         the autoencoder
    cond_stage_model.transformer.text_model.*   the text encoder of SD 1.x, CLIP
    cond_stage_model.model.*                    the text encoder of SD 2.x, OpenCLIP

The names that this project works with ("canonical") are those of diffusers' modules by part, the text encoder's without
"text_model.". No table lists them: how many blocks and layers there are is read off the keys, so any size will do.
"""

import re
from typing import NamedTuple

from finetuning.families.model_args import ModelError

CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": f"{CLIP}text_model."}
AVERAGE = "model_ema."
SDXL = "conditioner.embedders."
SD2_LAYERS = 23  # OpenCLIP's ViT-H has 24; SD 2.x takes what the last but one says, and diffusers leaves the last out

# The noise schedule, counters, and what SD 2.x's file holds of OpenCLIP besides its text encoder.
KNOWN_EXTRAS = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor"
    r"|model_ema\.(decay|num_updates)|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)"
)

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
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


class Block(NamedTuple):
    """A block of the UNet: how many layers, whether they attend, whether it ends with a change of resolution."""

    layers: int
    attends: bool
    resamples: bool


# -- writing -------------------------------------------------------------------------------------------------------


def original_names(part, keys):
    """{canonical key: key in the file} of one part. Raises ModelError for a key that the layout has no name for."""
    keys = list(keys)
    if part == "text_encoder":
        if _count(r"encoder\.layers\.(\d+)\.", keys) == SD2_LAYERS:
            raise ModelError(
                "the text encoder of SD 2.x is not written in the original layout, which has a 24th layer that "
                "diffusers' folders lack: leave --single_file out"
            )
        return {key: PREFIX[part] + key for key in keys}
    modules = dict(_unet_modules(*_canonical_blocks(keys)) if part == "unet" else _vae_modules(_canonical_sizes(keys)))
    names = {key: _renamed(key, modules) for key in keys}
    nameless = [key for key, name in names.items() if name is None]
    if nameless:
        raise ModelError(
            f"{len(nameless)} tensor(s) of the {part} have no name in the original layout of SD 1.x and 2.x, "
            f"{nameless[0]} first: leave --single_file out"
        )
    return {key: PREFIX[part] + name for key, name in names.items()}


def original_shape(part, key, shape):
    """The shape that a tensor has in the file: the autoencoder's attention is made of 1 x 1 convolutions there."""
    linear = part == "vae" and re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", key)
    return (*shape, 1, 1) if linear and len(shape) == 2 else tuple(shape)


def unet_blocks(keys):
    """{canonical key: block} of a UNet's tensors, as per-block ratios count them: IN00 .., M00, OUT00 .., or BASE."""
    inside = [key for key in keys if key.startswith(("conv_in.", "down_blocks.", "mid_block.", "up_blocks."))]
    blocks = dict.fromkeys(keys, "BASE")
    for key, name in original_names("unet", inside).items():
        way, number = re.match(r"(in|middle|out)\w*\.(\d+)", name.removeprefix(PREFIX["unet"])).groups()
        blocks[key] = "M00" if way == "middle" else f"{way.upper()}{int(number):02d}"
    return blocks


# -- reading -------------------------------------------------------------------------------------------------------


def is_original(keys):
    """Whether these are keys of a file in this layout (or of SDXL's, which `canonical_parts` refuses)."""
    return any(key.startswith((PREFIX["unet"], PREFIX["vae"], CLIP, OPEN_CLIP, AVERAGE, SDXL)) for key in keys)


def canonical_parts(tensors, weights="ema"):
    """({part: {canonical key: Stored}}, strange keys) of a file's {key: Stored}; nothing is read or copied.

    weights   "ema" takes the UNet's average where the file has one, "raw" the weights that were trained
    strange   keys that belong to no part, and are not among those that such files are known to have besides
    Raises ModelError: SDXL, an average that is not whole, one tensor under two names.
    """
    if any(key.startswith(SDXL) for key in tensors):
        raise ModelError("it is a Stable Diffusion XL model; this reads SD 1.x and 2.x")
    average = {
        key: stored for key, stored in tensors.items() if key.startswith(AVERAGE) and not KNOWN_EXTRAS.fullmatch(key)
    }
    parts, came_from, strange = {}, {}, []
    for key, part, name, stored in _named(tensors):
        if name is None and key not in average:
            strange.append(key)
        elif name is not None:
            if (part, name) in came_from:
                raise ModelError(f"{came_from[part, name]} and {key} are two names of one tensor: remove one")
            came_from[part, name] = key
            parts.setdefault(part, {})[name] = stored
    if average and weights == "ema" and "unet" in parts:
        for name in parts["unet"]:
            dotless = came_from["unet", name].removeprefix("model.").replace(".", "")
            parts["unet"][name] = average.pop(AVERAGE + dotless, None)
        lacking = [came_from["unet", name] for name, stored in parts["unet"].items() if stored is None]
        if lacking:
            raise ModelError(
                f"its average ({AVERAGE}*) lacks {len(lacking)} tensor(s) of the UNet, {lacking[0]} first: take the "
                "weights that were trained, --weights raw"
            )
    return parts, strange + (list(average) if weights == "ema" else [])


def _named(tensors):
    """(key, part, canonical key or None, Stored) of all that is not known to be there besides."""
    after = lambda prefix: [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    unet = {theirs: ours for ours, theirs in _unet_modules(*_original_blocks(after(PREFIX["unet"])))}
    vae = {theirs: ours for ours, theirs in _vae_modules(_original_sizes(after(PREFIX["vae"])))}
    readers = {
        PREFIX["unet"]: ("unet", lambda key, stored: {_renamed(key, unet): stored}),
        PREFIX["vae"]: ("vae", lambda key, stored: _vae_tensor(_renamed(key, vae), stored)),
        CLIP: ("text_encoder", _clip_tensor),
        OPEN_CLIP: ("text_encoder", _open_clip_tensors),
        "": (None, lambda key, stored: {None: stored}),
    }
    for key, stored in tensors.items():
        if not KNOWN_EXTRAS.fullmatch(key):
            prefix = next(prefix for prefix in readers if key.startswith(prefix))
            part, read = readers[prefix]
            for name, found in read(key.removeprefix(prefix), stored).items():
                yield key, part, name, found


def _vae_tensor(name, stored):
    if name and len(stored.shape) == 4 and original_shape("vae", name, stored.shape[:2]) == stored.shape:
        stored = stored.viewed(stored.shape[:2])
    return {name: stored}


def _clip_tensor(key, stored):
    name = key.removeprefix("text_model.")
    return {name if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else None: stored}


def _open_clip_tensors(key, stored):
    """One tensor, three where query, key and value stand in one matrix, none of the layer that is not used."""
    if key in OPEN_CLIP_ENDS:
        return {OPEN_CLIP_ENDS[key]: stored}
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)([._])(weight|bias)", key)
    if not found:
        return {None: stored}
    layer, module, joint, kind = found.groups()
    if int(layer) >= SD2_LAYERS:
        return {}
    stem = f"encoder.layers.{layer}"
    if (module, joint) == ("attn.in_proj", "_"):
        width = stored.shape[0] // 3
        thirds = (stored.rows(place * width, (place + 1) * width) for place in range(3))
        return {f"{stem}.self_attn.{name}_proj.{kind}": third for name, third in zip("qkv", thirds, strict=True)}
    known = joint == "." and module in OPEN_CLIP_LAYER
    return {f"{stem}.{OPEN_CLIP_LAYER[module]}.{kind}" if known else None: stored}


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
