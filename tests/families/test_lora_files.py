"""LoRA files: written as diffusers and kohya name things, read in every common layout, and put into a pipeline."""

import copy
import hashlib
import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    KOHYA_NAME,
    PEFT_NAME,
    RAW_NAME,
    Layer,
    Lora,
    adaptable,
    adaptable_components,
    attach,
    detach,
    diffusers_tensors,
    find_lora,
    for_kohya,
    read_lora,
    set_scale,
    weights_hash,
    write_diffusers,
    write_diffusers_for_all,
    write_kohya,
)
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import open_pipeline
from finetuning.rng import torch_generator

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MLP = "encoder.layers.0.mlp"
ATTENTION = "encoder.layers.0.self_attn"
TO_Q = f"unet.{BLOCK}.attn1.to_q"  # [8, 8]
TO_K = f"unet.{BLOCK}.attn2.to_k"  # [8, 16]
TO_OUT = f"unet.{BLOCK}.attn1.to_out.0"
PROJ_IN = "unet.down_blocks.0.attentions.0.proj_in"  # [8, 8, 1, 1]
CONV = "unet.down_blocks.1.resnets.0.conv1"  # [16, 8, 3, 3]
TEXT_Q = f"text_encoder.{ATTENTION}.q_proj"  # [16, 16]
TEXT_OUT = f"text_encoder.{ATTENTION}.out_proj"
FC1 = f"text_encoder.{MLP}.fc1"  # [32, 16]

LINEAR = (TO_Q, TO_K, TO_OUT)
CONVOLUTIONS = (PROJ_IN, CONV, "unet.down_blocks.0.downsamplers.0.conv")
TEXT = (TEXT_Q, TEXT_OUT, FC1)

# {layer name: (rank, alpha)}, and whether it is a DoRA
KINDS = {
    "plain": (dict.fromkeys(LINEAR, (4, 4)), False),
    "alpha is not rank": (dict.fromkeys(LINEAR, (4, 1.5)), False),
    "many ranks and alphas": (
        {TO_Q: (2, 1), TO_K: (4, 3), TO_OUT: (3, 8), CONV: (5, 3), TEXT_Q: (1, 3), TEXT_OUT: (2, 4)}, False,
    ),
    "convolutions": (dict.fromkeys(CONVOLUTIONS, (3, 2)), False),
    "text encoder": (dict.fromkeys(TEXT, (2, 8)), False),
    "DoRA": (dict.fromkeys((*LINEAR, *CONVOLUTIONS, *TEXT), (4, 2)), True),
    "DoRA of many ranks": ({TO_Q: (2, 1), TO_K: (4, 3), CONV: (3, 8), TEXT_Q: (1, 2)}, True),
}  # fmt: skip

WRITERS = (write_diffusers, write_diffusers_for_all, write_kohya)


def draw(*shape, name=""):
    return torch.randn(shape, generator=torch_generator(0, f"{name} {shape}"))


def made_layer(weight, rank, alpha, dora=False, name=""):
    """A Layer of random numbers for a weight, far from nothing; a DoRA's magnitudes are not the weight's own norms."""
    out, inside, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    down = draw(rank, inside, *kernel, name=name)
    up = 0.3 * draw(out, rank, *(1 for _ in kernel), name=name)
    return Layer(down, up, alpha, 1 + draw(out, name=name).abs() if dora else None)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    """To be read only."""
    return open_pipeline(tiny_model)


@pytest.fixture(scope="module")
def parts(pipeline):
    return adaptable_components(pipeline)


@pytest.fixture(scope="module")
def weights(parts):
    """{layer name: weight}."""
    return {name: module.weight.detach() for name, module in adaptable(parts).items()}


@pytest.fixture(scope="module")
def kinds(weights):
    """{kind: {layer name: Layer}}."""
    return {
        kind: {name: made_layer(weights[name], *sizes, dora, name) for name, sizes in chosen.items()}
        for kind, (chosen, dora) in KINDS.items()
    }


@pytest.fixture(params=KINDS)
def layers(request, kinds):
    return kinds[request.param]


def copied(pipeline):
    """The same pipeline with parts of its own, for LoRAs to change."""
    again = copy.copy(pipeline)
    for part, model in adaptable_components(pipeline).items():
        setattr(again, part, copy.deepcopy(model))
    return again


@pytest.fixture
def own(pipeline):
    """A pipeline that a test may change."""
    return copied(pipeline)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some.safetensors"


def metadata_of(path):
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def close(one, other):
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def assert_same(found, expected):
    """The same layers, which do the same."""
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert found[name].delta().norm() > 0.1, name
        assert close(found[name].delta(), layer.delta()), name
        assert (found[name].magnitude is None) == (layer.magnitude is None), name
        assert layer.magnitude is None or torch.equal(found[name].magnitude, layer.magnitude), name


@torch.no_grad()
def prediction(pipeline):
    """The UNet's output for two captions, [2, 4, 4, 4]."""
    text = pipeline.text_encoder(torch.arange(32).view(2, 16))[0]
    return pipeline.unet(draw(2, 4, 4, 4), torch.tensor([200, 700]), text).sample


@pytest.fixture
def fused_prediction(pipeline):
    """What a pipeline predicts that has the layers in its weights, by the formula itself."""

    def predict(layers, scale=1.0):
        changed = copied(pipeline)
        for name, layer in layers.items():
            module = adaptable(adaptable_components(changed))[name]
            module.weight.data = layer.fused(module.weight.data, scale)
        predicted = prediction(changed)
        assert (predicted - prediction(pipeline)).abs().max() > 1e-3  # else there is nothing to compare
        return predicted

    return predict


# -- one layer -------------------------------------------------------------------------------------------------------


def reference(layer, weight, scale):
    """(delta, V) in float64 by NumPy."""
    up, down, weight = (np.asarray(value, dtype=np.float64) for value in (layer.up, layer.down, weight))
    product = np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
    delta = scale * layer.alpha / down.shape[0] * product
    moved = weight + delta
    if layer.magnitude is not None:
        inputs = tuple(range(1, weight.ndim))
        per_output = np.asarray(layer.magnitude, dtype=np.float64).reshape(-1, *(1 for _ in inputs))
        moved = per_output * moved / np.sqrt((moved**2).sum(axis=inputs, keepdims=True))
    return delta, moved


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", [TO_K, PROJ_IN, CONV])
def test_delta_and_fused_are_the_formula(name, dora, scale, weights):
    layer = made_layer(weights[name], 3, 7, dora)
    delta, fused = reference(layer, weights[name], scale)
    assert layer.rank == 3
    assert layer.delta(scale).shape == layer.fused(weights[name], scale).shape == weights[name].shape
    assert np.allclose(layer.delta(scale), delta, rtol=1e-5, atol=1e-6)
    assert np.allclose(layer.fused(weights[name], scale), fused, rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_fp32(weights):
    whole = made_layer(weights[CONV], 3, 7, dora=True)
    half = Layer(whole.down.half(), whole.up.half(), 7, whole.magnitude.half())
    again = Layer(half.down.float(), half.up.float(), 7, half.magnitude.float())
    assert half.delta().dtype == half.fused(weights[CONV].half()).dtype == torch.float32
    assert torch.equal(half.delta(), again.delta())
    assert torch.equal(half.fused(weights[CONV].half()), again.fused(weights[CONV].half().float()))


@pytest.mark.parametrize("alpha", [0.5, 3, 4.0, 100])
@pytest.mark.parametrize("name", [TO_K, CONV])
def test_with_alpha_keeps_the_delta(name, alpha, weights):
    layer = made_layer(weights[name], 3, 4, dora=True)
    other = layer.with_alpha(alpha)
    assert other.alpha == alpha and other.rank == 3
    assert close(other.delta(), layer.delta()) and close(other.fused(weights[name]), layer.fused(weights[name]))
    assert torch.equal(other.down, layer.down) and torch.equal(other.magnitude, layer.magnitude)
    assert layer.with_alpha(4.0) is layer


# -- written and read again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_what_was_written_is_read_again(write, layers, file, parts):
    if write is write_kohya:
        layers = {name: replace(layer, magnitude=None) for name, layer in layers.items()}  # it has no place for them
    write(file, layers, {"base_model": "org/name", "rank": 4})
    lora = read_lora(file, parts)
    assert_same(lora.layers, layers)
    assert lora.path == file and lora.is_dora == (next(iter(layers.values())).magnitude is not None)
    assert lora.metadata["base_model"] == "org/name" and lora.metadata["rank"] == "4"
    for name, layer in layers.items() if write is write_diffusers else ():  # as they are
        found = lora.layers[name]
        assert (found.rank, found.alpha) == (layer.rank, layer.alpha)
        assert torch.equal(found.down, layer.down) and torch.equal(found.up, layer.up)


def test_the_metadata_is_what_peft_needs_to_build_the_layers(kinds, file):
    write_diffusers(file, kinds["many ranks and alphas"], {})
    found = {}
    for part in ("unet", "text_encoder"):
        stored = json.loads(metadata_of(file)["lora_adapter_metadata"]).items()
        config = LoraConfig(**{key.removeprefix(f"{part}."): value for key, value in stored if key.startswith(part)})
        assert not config.use_dora
        for name in config.target_modules:
            rank, alpha = config.rank_pattern.get(name, config.r), config.alpha_pattern.get(name, config.lora_alpha)
            found[f"{part}.{name}"] = (rank, alpha)
    assert found == KINDS["many ranks and alphas"][0]
    write_diffusers(file, kinds["plain"] | {TEXT_Q: kinds["DoRA"][TEXT_Q]}, {})
    config = json.loads(metadata_of(file)["lora_adapter_metadata"])
    assert config["text_encoder.use_dora"] is True and config["unet.use_dora"] is False


def test_tensors_are_named_as_diffusers_and_transformers_look_for_them(kinds):
    shapes = {key: tuple(value.shape) for key, value in diffusers_tensors(kinds["DoRA of many ranks"]).items()}
    to_q, to_k = f"unet.{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn2.to_k"
    conv, text = "unet.down_blocks.1.resnets.0.conv1", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert shapes == {
        f"{to_q}.lora_A.weight": (2, 8), f"{to_q}.lora_B.weight": (8, 2), f"{to_q}.lora_magnitude_vector": (8,),
        f"{to_k}.lora_A.weight": (4, 16), f"{to_k}.lora_B.weight": (8, 4), f"{to_k}.lora_magnitude_vector": (8,),
        f"{conv}.lora_A.weight": (3, 8, 3, 3), f"{conv}.lora_B.weight": (16, 3, 1, 1),
        f"{conv}.lora_magnitude_vector": (1, 16, 1, 1),
        f"{text}.lora_A.weight": (1, 16), f"{text}.lora_B.weight": (16, 1),
        f"{text}.lora_magnitude_vector.weight": (16,),
    }  # fmt: skip


def test_kohya_files_name_their_tensors_as_sd_scripts_does(weights, file):
    names = {
        TO_Q: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        TO_OUT: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        f"unet.{BLOCK}.ff.net.0.proj": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
        PROJ_IN: "lora_unet_down_blocks_0_attentions_0_proj_in",
        CONV: "lora_unet_down_blocks_1_resnets_0_conv1",
        "unet.mid_block.resnets.1.time_emb_proj": "lora_unet_mid_block_resnets_1_time_emb_proj",
        TEXT_Q: "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        FC1: "lora_te_text_model_encoder_layers_0_mlp_fc1",
    }
    write_kohya(file, {name: made_layer(weights[name], 2, 1) for name in names}, {})
    stored = load_file(file)
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert stored.keys() == {f"{stem}.{ending}" for stem in names.values() for ending in endings}
    for name, stem in names.items():
        out, *inside = weights[name].shape
        assert stored[f"{stem}.lora_down.weight"].shape == (2, *inside)
        assert stored[f"{stem}.lora_up.weight"].shape == ((out, 2) if len(inside) == 1 else (out, 2, 1, 1))
        assert stored[f"{stem}.alpha"].shape == () and stored[f"{stem}.alpha"] == 1


def test_kohya_files_have_one_alpha_the_most_common(kinds, file):
    write_kohya(file, kinds["many ranks and alphas"], {})
    alphas = [value.item() for key, value in load_file(file).items() if key.endswith(".alpha")]
    assert alphas == [3.0] * 6


def test_kohya_files_leave_out_what_sd_scripts_does_not_read(kinds, weights, file, parts):
    time = "unet.time_embedding.linear_1"
    held, notice = for_kohya(kinds["plain"] | {time: made_layer(weights[time], 2, 2)})
    assert held.keys() == kinds["plain"].keys() and time in notice and DIFFUSERS_NAME in notice
    assert for_kohya(held) == (held, None)
    write_kohya(file, kinds["plain"] | {time: made_layer(weights[time], 2, 2)}, {})
    assert read_lora(file, parts).layers.keys() == kinds["plain"].keys()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_layers_and_facts_make_equal_files_with_the_hash_of_all_after_the_header(dtype, write, kinds, file):
    whole = kinds["many ranks and alphas"]
    layers = {name: Layer(one.down.to(dtype), one.up.to(dtype), one.alpha) for name, one in whole.items()}
    facts = {"steps": 300, "base_model": "Stüdio/模型", **{f"fact {number}": number for number in range(20)}}
    write(file, layers, facts)
    content, metadata = file.read_bytes(), metadata_of(file)
    write(file, layers, dict(reversed(facts.items())))
    assert file.read_bytes() == content
    (length,) = struct.unpack("<Q", content[:8])
    hashed = hashlib.sha256(content[8 + length :]).hexdigest()
    expected = {key: str(value) for key, value in facts.items()} | {"format": "pt", "sshs_model_hash": hashed}
    assert metadata.items() >= expected.items()
    assert length % 8 == 0  # what follows is read in place


def test_layers_that_are_views_of_other_tensors_can_be_written(weights, file, parts):
    wide = made_layer(weights[TO_K], 6, 6)
    narrow = Layer(wide.down[::2], wide.up[:, ::2].requires_grad_(), 3)
    for write in (write_diffusers, write_kohya):
        write(file, {TO_K: narrow}, {})
        assert_same(read_lora(file, parts).layers, {TO_K: narrow})


# -- written for diffusers' own loader -------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_diffusers_loads_what_was_written(write, layers, file, own, fused_prediction):
    """What is for all readers, without its metadata too. Of a kohya file diffusers loses a DoRA's magnitudes."""
    if write is write_kohya and next(iter(layers.values())).magnitude is not None:
        return
    write(file, layers, {})
    if write is write_diffusers_for_all:
        save_file(load_file(file), file)
        assert not metadata_of(file)
    own.load_lora_weights(file.parent, weight_name=file.name)
    assert close(prediction(own), fused_prediction(layers))


# -- other people's layouts ------------------------------------------------------------------------------------------


KOHYA_BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
KOHYA_CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
KOHYA_TEXT_Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
OLD, AB = ("down", "up"), ("lora_A", "lora_B")
LAYOUTS = {
    # how down and up are called, {layer name: what stands around that and before .weight}
    "diffusers of 2023": (OLD, {
        TO_Q: f"unet.{BLOCK}.attn1.processor.to_q_lora.*",
        TO_OUT: f"unet.{BLOCK}.attn1.processor.to_out_lora.*",
        TEXT_Q: f"text_encoder.text_model.{ATTENTION}.to_q_lora.*",
        TEXT_OUT: f"text_encoder.text_model.{ATTENTION}.to_out_lora.*",
    }),
    "attention processors without a prefix": (OLD, {
        TO_Q: f"{BLOCK}.attn1.processor.to_q_lora.*", TO_OUT: f"{BLOCK}.attn1.processor.to_out_lora.*",
    }),
    "the official script": (OLD, {
        TO_Q: f"unet.{BLOCK}.attn1.to_q.lora.*",
        TO_OUT: f"unet.{BLOCK}.attn1.to_out.0.lora.*",
        CONV: "unet.down_blocks.1.resnets.0.conv1.lora.*",
        TEXT_Q: f"text_encoder.text_model.{ATTENTION}.q_proj.lora_linear_layer.*",
        FC1: f"text_encoder.text_model.{MLP}.fc1.lora_linear_layer.*",
    }),
    "diffusers with the names of transformers 5": (AB, {
        TO_K: f"unet.{BLOCK}.attn2.to_k.*", TEXT_Q: f"text_encoder.{ATTENTION}.q_proj.*",
    }),
    "diffusers with the adapter's name": (AB, {TO_K: f"unet.{BLOCK}.attn2.to_k.*.default"}),
    "PEFT of a UNet": (AB, {
        TO_Q: f"base_model.model.{BLOCK}.attn1.to_q.*", CONV: "base_model.model.down_blocks.1.resnets.0.conv1.*",
    }),
    "PEFT of a text encoder": (AB, {TEXT_Q: f"base_model.model.{ATTENTION}.q_proj.*"}),
    "PEFT of a text encoder before transformers 5": (AB, {FC1: f"base_model.model.text_model.{MLP}.fc1.*"}),
    "kohya": (OLD, {
        TO_Q: f"{KOHYA_BLOCK}_attn1_to_q.lora_*",
        TO_OUT: f"{KOHYA_BLOCK}_attn1_to_out_0.lora_*",
        CONV: f"{KOHYA_CONV}.lora_*",
        TEXT_Q: f"{KOHYA_TEXT_Q}.lora_*",
    }),
    "kohya with two text encoders' names": (OLD, {
        TEXT_Q: "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_*",
        FC1: "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_*",
    }),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_a_missing_alpha_is_the_rank(layout, file, parts, weights):
    (down, up), stems = LAYOUTS[layout]
    layers, tensors = {}, {}
    for rank, (name, stem) in enumerate(stems.items(), start=2):
        layers[name] = layer = made_layer(weights[name], rank, rank, name=name)
        tensors |= {f"{stem.replace('*', down)}.weight": layer.down, f"{stem.replace('*', up)}.weight": layer.up}
    save_file(tensors, file)
    lora = read_lora(str(file), parts)
    assert_same(lora.layers, layers)
    assert lora.metadata == {} and not lora.is_dora
    for name, layer in layers.items():
        assert torch.equal(lora.layers[name].down, layer.down) and torch.equal(lora.layers[name].up, layer.up)


def test_kohya_files_have_an_alpha_and_a_dora_scale_for_each_layer(file, parts, kinds):
    layers = {name: kinds["DoRA of many ranks"][name] for name in (TO_K, CONV, TEXT_Q)}
    stems = {TO_K: f"{KOHYA_BLOCK}_attn2_to_k", CONV: KOHYA_CONV, TEXT_Q: KOHYA_TEXT_Q}
    shapes = {TO_K: (8, 1), CONV: (16, 1, 1, 1), TEXT_Q: (16, 1)}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{stems[name]}.lora_down.weight"] = layer.down
        tensors[f"{stems[name]}.lora_up.weight"] = layer.up
        tensors[f"{stems[name]}.alpha"] = torch.tensor(layer.alpha, dtype=torch.bfloat16)
        tensors[f"{stems[name]}.dora_scale"] = layer.magnitude.reshape(shapes[name])
    save_file(tensors, file, metadata={"ss_network_dim": "4"})
    lora = read_lora(file, parts)
    assert_same(lora.layers, layers)
    assert lora.is_dora and [lora.layers[name].alpha for name in layers] == [3, 8, 2]


def test_linear_layers_may_be_written_as_convolutions_and_the_other_way_round(file, parts, weights):
    linear, convolution = (made_layer(weights[name], 2, 2) for name in (TO_K, PROJ_IN))
    save_file(
        {
            f"{KOHYA_BLOCK}_attn2_to_k.lora_down.weight": linear.down[:, :, None, None],
            f"{KOHYA_BLOCK}_attn2_to_k.lora_up.weight": linear.up[:, :, None, None],
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": convolution.down[:, :, 0, 0],
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": convolution.up[:, :, 0, 0],
        },
        file,
    )
    lora = read_lora(file, parts)
    assert_same(lora.layers, {TO_K: linear, PROJ_IN: convolution})
    assert lora.layers[TO_K].down.ndim == 2 and lora.layers[PROJ_IN].up.shape == (8, 2, 1, 1)


@pytest.mark.parametrize(
    ("config", "alphas"),
    [
        ({"lora_alpha": 6}, (6, 6)),
        ({"lora_alpha": 6, "alpha_pattern": {"attn2.to_k": 1}}, (6, 1)),
        ({"lora_alpha": 6, "alpha_pattern": {r".*\.to_[qk]": 5}}, (5, 5)),
        ({"lora_alpha": 6, "use_rslora": True}, (6 * 2**0.5, 12)),
        ({"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {f"^{BLOCK}.attn1.to_q": 1}}, (2**0.5, 12)),
        ({"lora_alpha": 6, "use_rslora": False, "alpha_pattern": None}, (6, 6)),
    ],
)
def test_a_peft_folder_says_its_alphas_in_its_config(config, alphas, tmp_path, parts, weights):
    layers = {TO_Q: made_layer(weights[TO_Q], 2, alphas[0]), TO_K: made_layer(weights[TO_K], 4, alphas[1])}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name.removeprefix('unet.')}.lora_A.weight"] = layer.down
        tensors[f"base_model.model.{name.removeprefix('unet.')}.lora_B.weight"] = layer.up
    save_file(tensors, tmp_path / PEFT_NAME)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **config}))
    for source in (tmp_path, tmp_path / PEFT_NAME):
        lora = read_lora(source, parts)
        assert_same(lora.layers, layers)
        assert [lora.layers[name].alpha for name in layers] == pytest.approx(alphas)


def deltas(model, part):
    """What PEFT says that the adapters of a model add."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {
        f"{part}.{name.removeprefix('base_model.model.')}": module.get_delta_weight(module.active_adapters[0]).detach()
        for name, module in found.items()
    }


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_saves_is_read_as_peft_means_it(dora, tmp_path, own, parts):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "conv1"], rank_pattern={"to_k": 2},
        alpha_pattern={"mid_block.*to_q": 3}, use_rslora=True, use_dora=dora, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(own.unet, config)
    model.save_pretrained(tmp_path)
    expected = deltas(model, "unet")
    lora = read_lora(tmp_path, parts)
    assert lora.layers.keys() == expected.keys() and len(expected) == 24
    assert all(close(lora.layers[name].delta(), delta) for name, delta in expected.items())
    assert lora.is_dora == dora
    merged = model.merge_and_unload().state_dict()
    weights = {name: module.weight.detach() for name, module in adaptable(parts).items()}
    for name, layer in lora.layers.items():
        assert close(layer.fused(weights[name]), merged[f"{name.removeprefix('unet.')}.weight"])


def test_what_diffusers_saves_with_its_metadata_is_read_as_peft_means_it(tmp_path, own, parts):
    settings = {
        "unet": LoraConfig(
            r=4, lora_alpha=6, target_modules=["to_q", "to_k"], alpha_pattern={"attn2.to_k": 3}, use_rslora=True,
            init_lora_weights=False,
        ),
        "text_encoder": LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj"], init_lora_weights=False),
    }  # fmt: skip
    expected = {}
    for part, config in settings.items():
        adaptable_components(own)[part].add_adapter(config)
        expected |= deltas(adaptable_components(own)[part], part)
    own.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(own.unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(own.text_encoder, adapter_name="default"),
        unet_lora_adapter_metadata=settings["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=settings["text_encoder"].to_dict(),
    )
    lora = read_lora(tmp_path, parts)
    assert lora.layers.keys() == expected.keys() and {TO_Q, TO_K, TEXT_Q} <= expected.keys()
    assert all(close(lora.layers[name].delta(), delta) for name, delta in expected.items())


# -- what cannot be read ---------------------------------------------------------------------------------------------


def problem(source, parts, **options):
    with pytest.raises(ModelError) as caught:
        read_lora(source, parts, **options)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".safetensors"])
def test_a_pickle_is_never_opened(suffix, tmp_path, parts, bomb):
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(pickle.dumps(bomb))
    message = problem(path, parts)
    assert not bomb.path.exists() and str(path) in message
    assert suffix == ".safetensors" or "torch.load" in message
    pickle.loads(path.read_bytes())
    assert bomb.path.exists()  # it would have


def rewritten(change, **metadata):
    """What `change` makes of the tensors of a kohya file, or of one of diffusers where there is metadata."""

    def write(file, kinds):
        if metadata:
            write_diffusers(file, kinds["plain"], {})
        else:
            write_kohya(file, kinds["plain"], {"ss_sd_model_name": "their-base"})
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=metadata_of(file) | metadata)

    return write


def added(key, *shape):
    return rewritten(lambda tensors: tensors.update({key: torch.ones(shape or (8, 8))}))


def only(ending):
    """Of one layer, what ends so."""
    stem = f"{KOHYA_BLOCK}_attn2_to_k."
    return rewritten(lambda tensors: [tensors.pop(key) for key in list(tensors)
                                      if key.startswith(stem) and ending not in key.removeprefix(stem)])  # fmt: skip


def of_shape(*shape):
    def write(file, kinds):
        wrong = {TO_K: made_layer(torch.empty(shape), 2, 2), TO_Q: kinds["plain"][TO_Q]}
        write_diffusers(file, wrong, {"base_model": "org/other-base"})

    return write


def of_bytes(change):
    def write(file, kinds):
        write_diffusers(file, kinds["plain"], {})
        file.write_bytes(change(file.read_bytes()))

    return write


MID = f"{KOHYA_CONV}.lora_mid.weight"
TO_K_FILE = f"unet.{BLOCK}.attn2.to_k"
BROKEN = {
    # how the file is made, and what the message has to say
    "cut": (of_bytes(lambda content: content[:-1]), "again"),
    "cut header": (of_bytes(lambda content: content[:100]), "again"),
    "empty": (of_bytes(lambda content: b""), "empty"),
    "LFS pointer": (of_bytes(lambda content: b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "no layers": (rewritten(dict.clear), "no layers", "their-base"),
    "NaN": (rewritten(lambda t: t[f"{KOHYA_BLOCK}_attn1_to_q.lora_up.weight"].fill_(torch.nan)), "NaN", "attn1_to_q"),
    "broken metadata": (rewritten(dict, lora_adapter_metadata="{"), "lora_adapter_metadata"),
    "metadata of another kind": (rewritten(dict, lora_adapter_metadata="[1]"), "lora_adapter_metadata"),
    "metadata without alphas": (rewritten(dict, lora_adapter_metadata='{"unet.r": 4}'), "lora_alpha"),
    "LoHa": (added(f"{KOHYA_BLOCK}_attn1_to_k.hada_w1_a"), "1 of its 10 tensors", "hada_w1_a", "their-base"),
    "LoKr": (added(f"{KOHYA_BLOCK}_attn1_to_k.lokr_w1"), "lokr_w1 is no LoRA layer"),
    "bias": (added(f"unet.{BLOCK}.attn1.to_k.lora_B.bias"), "lora_B.bias is no LoRA layer"),
    "embedding": (added("emb_params"), "emb_params is no LoRA layer"),
    "weight": (added(f"unet.{BLOCK}.attn1.to_k.weight"), "to_k.weight is no LoRA layer"),
    "Tucker": (added(MID, 4, 4, 3, 3), f"{MID} is of LyCORIS's Tucker form"),
    **{
        f"of another base: {stem}": (added(f"{stem}.lora_up.weight", 4, 4), f"{stem}.lora_up", "another kind of base")
        for stem in (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",  # Stable Diffusion XL
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
            "transformer.transformer_blocks.0.attn.to_q",
            f"unet.{BLOCK}.attn3.to_q",
            f"unet.{BLOCK}.norm1",
        )
    },
    "inputs of another base": (of_shape(8, 24), "1 layers", "[8, 2] x [2, 24]", "[8, 16]", "org/other-base"),
    "outputs of another base": (of_shape(12, 16), TO_K, "[12, 2] x [2, 16]"),
    "up of another rank": (
        rewritten(lambda t: t.update({f"{TO_K_FILE}.lora_B.weight": torch.ones(8, 1)}), made="x"), "[8, 1] x [4, 16]",
    ),
    "only down": (only("down"), TO_K, "has only down"),
    "only up": (only("up"), TO_K, "has only up"),
    "only alpha": (only("alpha"), TO_K, "has only alpha"),
    "DoRA over inputs": (added(f"{KOHYA_BLOCK}_attn2_to_k.dora_scale", 1, 16), f"{TO_K}: DoRA over inputs"),
    # as many inputs as outputs: only the shape tells
    "DoRA over as many inputs": (added(f"{KOHYA_BLOCK}_attn1_to_q.dora_scale", 1, 8), f"{TO_Q}: DoRA over inputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named_with_its_file(case, kinds, file, parts):
    write, *words = BROKEN[case]
    write(file, kinds)
    message = problem(file, parts)
    assert message.startswith(str(file)) and all(word in message for word in words), message


def test_layers_of_a_component_that_was_not_given_do_not_fit(kinds, file, parts):
    write_diffusers(file, kinds["text encoder"], {})
    assert "has no such layer in this model" in problem(file, {"unet": parts["unet"]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaling_a_small_file_does_not_round_it_again(dtype, kinds, file, parts):
    small = {
        name: replace(layer, up=layer.up.to(dtype), down=layer.down.to(dtype)) for name, layer in kinds["plain"].items()
    }
    write_diffusers(file, small, {})
    for name, layer in read_lora(file, parts).layers.items():
        exact = replace(small[name], up=small[name].up.float())
        assert torch.equal(layer.with_alpha(1 / 3).up, exact.with_alpha(1 / 3).up)


# -- where a LoRA lies -----------------------------------------------------------------------------------------------


IN_LORA, IN_LORA_EMA = f"lora/{DIFFUSERS_NAME}", f"lora_ema/{DIFFUSERS_NAME}"


def files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("there", "ema", "raw"),
    [
        ((DIFFUSERS_NAME, RAW_NAME, KOHYA_NAME), DIFFUSERS_NAME, RAW_NAME),
        ((DIFFUSERS_NAME, KOHYA_NAME, "args.json"), DIFFUSERS_NAME, DIFFUSERS_NAME),
        ((RAW_NAME,), RAW_NAME, RAW_NAME),
        ((KOHYA_NAME, "notes.txt"), KOHYA_NAME, KOHYA_NAME),
        ((IN_LORA, IN_LORA_EMA), IN_LORA_EMA, IN_LORA),
        ((IN_LORA, "random_states_0.pkl"), IN_LORA, IN_LORA),
        ((PEFT_NAME, "adapter_config.json"), PEFT_NAME, PEFT_NAME),
        (("style.safetensors", "style.ckpt"), "style.safetensors", "style.safetensors"),
        ((DIFFUSERS_NAME, f"checkpoint-4/{IN_LORA}"), DIFFUSERS_NAME, DIFFUSERS_NAME),
    ],
)
def test_a_folder_means_its_averaged_or_its_raw_lora(there, ema, raw, tmp_path):
    files(tmp_path, *there)
    assert find_lora(tmp_path) == find_lora(str(tmp_path), "ema") == tmp_path / ema
    assert find_lora(tmp_path, "raw") == find_lora(tmp_path / raw) == tmp_path / raw


def test_a_folder_without_a_lora_tells_what_it_holds(tmp_path, parts):
    assert "nothing" in problem(tmp_path, parts)
    files(tmp_path, "a.safetensors", "b.safetensors", "adapter_model.bin")
    message = problem(tmp_path, parts)
    assert message.startswith(str(tmp_path)) and "a.safetensors, adapter_model.bin, b.safetensors" in message


@pytest.mark.parametrize(
    "source", ["nowhere", "org/nowhere", "org/nowhere/some.safetensors", "/no/such/folder", "a b/c"]
)
def test_a_path_that_is_not_there_is_named(source, parts):
    assert problem(source, parts).startswith(f"{source} is neither")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/name", DIFFUSERS_NAME),
        ("org/name/style.safetensors", "style.safetensors"),
        ("org/name/inner/style.safetensors", "inner/style.safetensors"),
    ],
)
def test_a_hub_name_is_found_in_the_cache(source, name, tmp_path, monkeypatch):
    storage = files(tmp_path / "models--org--name", f"snapshots/{'0' * 40}/{name}", "refs/main")
    (storage / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_lora(source) == storage / "snapshots" / ("0" * 40) / name


# -- in a pipeline ---------------------------------------------------------------------------------------------------


def lora_of(layers, **metadata):
    return Lora(Path("some.safetensors"), layers, metadata)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(pipeline):
    """All weights of the parts that LoRAs are made for."""
    models = adaptable_components(pipeline).items()
    return {f"{part}.{key}": value for part, model in models for key, value in model.state_dict().items()}


def test_an_attached_lora_acts_as_if_it_were_in_the_weights_until_it_is_detached(
    layers, own, pipeline, fused_prediction
):
    attach(own, lora_of(layers))
    assert state(own).keys() != state(pipeline).keys()
    assert close(prediction(own), fused_prediction(layers))
    for scale in (2.0, -1.0, 0, 0.5):  # each forgets the one before
        set_scale(own, scale)
        if scale:
            assert close(prediction(own), fused_prediction(layers, scale))
        else:  # the base to the last bit
            assert torch.equal(prediction(own), prediction(pipeline))
    detach(own)
    assert torch.equal(prediction(own), prediction(pipeline))
    assert equal(state(own), state(pipeline))
    assert [type(module) for module in own.unet.modules()] == [type(module) for module in pipeline.unet.modules()]


def test_one_lora_after_another_has_nothing_of_the_one_before(kinds, own, fused_prediction):
    """generate_images.py goes through several, and may end each at scale 0."""
    for kind in ("DoRA", "text encoder", "many ranks and alphas"):
        attach(own, lora_of(kinds[kind]))
        assert close(prediction(own), fused_prediction(kinds[kind]))
        set_scale(own, 0)
        detach(own)


# -- whose weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["one weight", "two change places", "only its modes"])
def test_the_hash_of_a_model_is_that_of_its_weights(change, own, parts):
    with torch.no_grad():
        if change == "one weight":
            own.unet.get_parameter(f"{BLOCK}.norm1.weight").view(-1)[-1] += 0.01
        elif change == "two change places":
            own.unet.conv_in.bias[:2] = own.unet.conv_in.bias[:2].flip(0).clone()
        else:
            own.unet.requires_grad_(False).train().to(memory_format=torch.channels_last)
    assert (weights_hash(own.unet) == weights_hash(parts["unet"])) == (change == "only its modes")


def test_the_hash_is_that_of_half_precision_and_of_names_and_shapes(parts):
    for model in parts.values():
        half = copy.deepcopy(model).half()
        assert weights_hash(half) == weights_hash(half.float()) == weights_hash(model)
        assert len(weights_hash(model)) == 64
    one, turned = (torch.nn.Linear(*sides, bias=False) for sides in ((2, 3), (3, 2)))
    for linear in (one, turned):
        torch.nn.init.ones_(linear.weight)
    assert len({weights_hash(model) for model in (one, turned, torch.nn.Sequential(one), *parts.values())}) == 5


def test_a_lora_of_other_weights_is_noted_and_of_the_same_or_unknown_ones_is_not(parts):
    own_hash, other_hash = weights_hash(parts["unet"]), "f" * 64
    assert lora_of({}).note_on_base("models/mine", own_hash) is None
    assert lora_of({}, base_model="x", base_model_hash=own_hash).note_on_base("models/mine", own_hash) is None
    note = lora_of({}, base_model="org/theirs", base_model_hash=other_hash).note_on_base("models/mine", own_hash)
    assert all(said in note for said in ("some.safetensors", "org/theirs", "f" * 12, "models/mine", own_hash[:12]))
    assert "f" * 13 not in note and own_hash not in note
    assert "another base" in lora_of({}, base_model_hash=other_hash).note_on_base("models/mine", own_hash)
