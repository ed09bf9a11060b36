"""fusing LoRAs into weights, converting their files, and what the LoRA commands share."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finetuning.families.generation import DTYPES
from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    KOHYA_NAME,
    Layer,
    Lora,
    adaptable,
    adaptable_components,
    attach,
    read_lora,
    set_scale,
    write_diffusers,
    write_kohya,
)
from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source
from finetuning.families.pipelines import open_pipeline
from finetuning.merging import lora_tools as commands
from finetuning.merging.lora_tools import ConvertArgs, FuseArgs, convert, fuse, fuse_compute, skeletons, stand_ins
from finetuning.merging.recipe import read_recipe
from finetuning.rng import torch_generator

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # [8, 8]
PROJ_IN = "unet.down_blocks.0.attentions.0.proj_in"  # [8, 8, 1, 1]
CONV = "unet.down_blocks.1.resnets.0.conv1"  # [16, 8, 3, 3]
TEXT_Q = "text_encoder.encoder.layers.0.self_attn.q_proj"  # [16, 16]
FC1 = "text_encoder.encoder.layers.0.mlp.fc1"  # [32, 16]
FACTS = {"base_model": "some/base", "base_model_hash": "ab12", "steps": "70"}


@pytest.fixture(scope="module")
def parts(tiny_model):
    return skeletons(str(tiny_model))


@pytest.fixture(scope="module")
def made(parts):
    """A function: layers of random numbers, far from nothing, for some of the model's weights."""

    def make(names=(TO_Q, PROJ_IN, CONV, TEXT_Q, FC1), rank=3, alpha=2.0, dora=False, seed=0):
        layers = {}
        for name in names:
            out, inside, *kernel = adaptable(parts)[name].weight.shape
            draw = torch_generator(seed, name)
            magnitude = 1 + torch.randn(out, generator=draw).abs() if dora else None
            down = torch.randn((rank, inside, *kernel), generator=draw)
            up = 0.3 * torch.randn((out, rank, *(1 for _ in kernel)), generator=draw)
            layers[name] = Layer(down, up, alpha, magnitude)
        return layers

    return make


@pytest.fixture
def written(tmp_path, made):
    """A function: such layers as a file of diffusers."""

    def write(name="some", facts=FACTS, **kind):
        path = tmp_path / f"{name}.safetensors"
        write_diffusers(path, made(**kind), facts)
        return path

    return write


@pytest.fixture
def fused(tiny_model, tmp_path):
    """A function: where `fuse` with these flags has written its result."""

    def run(*loras, **flags):
        target = tmp_path / f"fused-{len(list(tmp_path.iterdir()))}"
        args = FuseArgs(base=str(tiny_model), lora=[str(lora) for lora in loras], output_dir=str(target), **flags)
        assert not list(args.problems())
        fuse(args)
        return target

    return run


def weights_of(place):
    """{part.key: tensor} of a model."""
    found = open_source(str(place)).tensors
    return {f"{part}.{key}": stored.read() for part, own in found.items() for key, stored in own.items()}


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metadata_of(path):
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def drawn(pipeline):
    """Latents of a short run of the pipeline."""
    return pipeline(
        "a red circle", num_inference_steps=3, guidance_scale=3.0, height=32, width=32, output_type="latent",
        generator=torch_generator(0, "latents"),
    ).images  # fmt: skip


# -- the layers of a model -------------------------------------------------------------------------------------------


def test_skeletons_and_stand_ins_have_the_models_layers_and_no_weights(tiny_model, parts):
    loaded = adaptable(adaptable_components(open_pipeline(tiny_model)))
    expected = {name: (type(module), module.weight.shape) for name, module in loaded.items()}
    for models in (parts, stand_ins(open_source(str(tiny_model)).tensors)):
        found = adaptable(models)
        assert {name: (type(module), module.weight.shape) for name, module in found.items()} == expected
        assert all(module.weight.is_meta for module in found.values())


def test_a_bare_unet_has_no_text_encoder(tiny_model, parts):
    alone = skeletons(str(tiny_model / "unet"))
    assert alone.keys() == {"unet"} and adaptable(alone).keys() == adaptable({"unet": parts["unet"]}).keys()


@pytest.mark.parametrize("name", ["tokenizer", "unet/config.json"])
def test_a_base_without_configs_is_named(tiny_model, name):
    with pytest.raises(ModelError, match=name):
        skeletons(str(tiny_model / name))


# -- fusing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dora", "scale"), [(False, 0.5), (True, 1.0), (True, 0.5)])
def test_fusing_then_generating_equals_generating_with_the_lora(tiny_model, parts, written, fused, dora, scale):
    path = written(dora=dora)
    adapted = open_pipeline(tiny_model)
    before = drawn(adapted)
    attach(adapted, read_lora(path, parts))
    set_scale(adapted, scale)
    expected = drawn(adapted)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(drawn(open_pipeline(fused(path, scale=[scale]))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_folded_weights_are_those_of_the_formula_and_all_others_the_bases(tiny_model, made, written, fused, dora):
    base, found = weights_of(tiny_model), weights_of(fused(written(dora=dora), scale=[0.7]))
    assert base.keys() == found.keys()
    layers = made(dora=dora)
    for name, weight in base.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            assert torch.equal(found[name], weight), name
            continue
        up, down, moved = (np.asarray(value, dtype=np.float64) for value in (layer.up, layer.down, weight))
        up = up.reshape(len(up), -1)
        moved = moved + (0.7 * 2 / 3 * up @ down.reshape(3, -1)).reshape(moved.shape)
        if dora:
            moved *= (layer.magnitude.numpy() / np.linalg.norm(moved.reshape(len(up), -1), axis=1)).reshape(
                -1, *(1 for _ in moved.shape[1:])
            )
        np.testing.assert_allclose(found[name].numpy(), moved, rtol=1e-5, atol=1e-6, err_msg=name)


def test_several_loras_add_up_in_any_order(tiny_model, made, written, fused):
    one, other = written("one"), written("other", names=(TO_Q, FC1), rank=2, alpha=4.0, seed=1)
    found, turned = weights_of(fused(one, other, scale=[0.5, -2.0])), weights_of(fused(other, one, scale=[-2.0, 0.5]))
    base = weights_of(tiny_model)[f"{TO_Q}.weight"]
    expected = base + made()[TO_Q].delta(0.5) + made(rank=2, alpha=4.0, seed=1)[TO_Q].delta(-2.0)
    for weights in (found, turned):
        torch.testing.assert_close(weights[f"{TO_Q}.weight"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_at_scale_0_the_model_is_the_base_to_the_last_bit(tiny_model, written, fused, dora):
    assert same_weights(weights_of(fused(written(dora=dora), scale=[0.0])), weights_of(tiny_model))


def test_a_single_file_holds_the_same_weights(written, fused):
    path = written()
    single = fused(path, single_file=True)
    (file,) = single.glob("*.safetensors")
    assert same_weights(weights_of(file), weights_of(fused(path)))


def test_the_precision_is_rounded_once(written, fused):
    path = written()
    exact, half = weights_of(fused(path)), weights_of(fused(path, dtype="fp16"))
    for name, value in exact.items():
        expected = value.half() if value.is_floating_point() else value
        assert torch.equal(half[name], expected), name


def test_the_recipe_names_base_and_lora(tiny_model, written, fused):
    path = written()
    recipe = read_recipe(fused(path, scale=[0.5]))
    assert recipe["scale"] == [0.5] and recipe["run"]["command"] == "fuse"
    assert [source["given"] for source in recipe["run"]["inputs"]] == [str(tiny_model), str(path)]


def test_dora_beside_another_is_refused(made):
    loras = [Lora(f"{dora}.safetensors", made(dora=dora), {}) for dora in (False, True)]
    with pytest.raises(ModelError, match=r"^--lora True.safetensors: DoRA"):
        fuse_compute(loras, [1, 1])
    assert fuse_compute(loras, [0, 1]).keys() == {f"{name}.weight" for name in made()}  # at 0 the other is not there


def test_a_lora_for_a_part_that_the_base_lacks_is_refused_by_name(tiny_model, written, tmp_path):
    names = [written("both"), written("text", names=(FC1,)), written("fits", names=(TO_Q,))]
    args = FuseArgs(base=str(tiny_model / "unet"), lora=[str(n) for n in names], output_dir=str(tmp_path / "new"))
    with pytest.raises(ModelError, match="no text encoder") as caught:
        fuse(args)
    told = str(caught.value)
    assert "both.safetensors" in told and "text.safetensors" in told and "fits" not in told
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in told and not (tmp_path / "new").exists()


def test_a_scale_for_each_lora_or_none():
    (problem,) = FuseArgs(base="b", lora=["x", "y"], scale=[1.0], output_dir="new").problems()
    assert problem.startswith("--scale")
    assert not list(FuseArgs(base="b", lora=["x", "y"], output_dir="new").problems())


# -- converting and writing ------------------------------------------------------------------------------------------


@pytest.fixture
def converted(tiny_model, tmp_path):
    """A function: the file that `convert` has written."""

    def run(path, to, **flags):
        target = tmp_path / f"converted-{to}-{len(list(tmp_path.iterdir()))}"
        convert(ConvertArgs(base=str(tiny_model), lora=str(path), to=to, output_dir=str(target), **flags))
        return target / {"diffusers": DIFFUSERS_NAME, "kohya": KOHYA_NAME}[to]

    return run


def assert_same_layers(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        off = (found[name].delta() - layer.delta()).norm() / layer.delta().norm()
        assert off <= tolerance, (name, off)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_to_kohya_and_back_nothing_changes(parts, made, written, converted, dtype, tolerance):
    kohya = converted(written(), "kohya", dtype=dtype)
    assert any(key.startswith("lora_te_text_model_encoder") for key in load_file(kohya))
    back = converted(kohya, "diffusers", dtype=dtype)
    for path in (kohya, back):
        stored = {value.dtype for key, value in load_file(path).items() if not key.endswith(".alpha")}
        assert stored == {DTYPES[dtype]}
        assert_same_layers(read_lora(path, parts).layers, made(), tolerance)
    for key, value in FACTS.items():
        assert metadata_of(kohya)[key] == metadata_of(back)[key] == value


def test_layers_that_kohyas_layout_does_not_hold_are_left_out_with_a_notice(tiny_model, parts, written, tmp_path):
    embedding = "unet.time_embedding.linear_1"
    path = written(names=(TO_Q, embedding))
    args = ConvertArgs(base=str(tiny_model), lora=str(path), to="kohya", output_dir=str(tmp_path / "kohya"))
    lines = convert(args)
    assert read_lora(tmp_path / "kohya" / KOHYA_NAME, parts).layers.keys() == {TO_Q}
    assert "1 layers" in lines[0] and embedding in lines[-1]
    alone = written("alone", names=(embedding,))
    with pytest.raises(ModelError, match=embedding):
        convert(replace(args, lora=str(alone), output_dir=str(tmp_path / "none")))


def test_metadata_tells_rank_and_alpha_as_each_reader_looks_for_them(written, converted):
    path = converted(written(), "kohya")
    told = metadata_of(path)
    assert (told["rank"], told["alpha"], told["parts"]) == ("3", "2", "unet, text_encoder")
    alpha = load_file(path)["lora_unet_down_blocks_1_resnets_0_conv1.alpha"].item()
    assert (told["ss_network_module"], told["ss_network_dim"]) == ("networks.lora", "3")
    assert float(told["ss_network_alpha"]) == alpha
    assert json.loads(told["ss_network_args"])["conv_dim"] == "3"
    assert json.loads(told["merge"])["to"] == "kohya"
    assert read_recipe(path.parent)["run"]["inputs"][0]["files"].keys() == {"some.safetensors"}


def test_a_dora_goes_to_diffusers_and_not_to_kohya(parts, made, written, converted):
    path = written(dora=True)
    found = read_lora(converted(path, "diffusers"), parts).layers
    assert_same_layers(found, made(dora=True))
    assert all(torch.equal(found[name].magnitude, layer.magnitude) for name, layer in made(dora=True).items())
    with pytest.raises(ModelError, match="DoRA is applied by other formulas"):
        converted(path, "kohya")


def test_numbers_that_fp16_cannot_hold_are_refused(made, tmp_path, converted):
    layers = {name: replace(layer, up=1e-8 * layer.up) for name, layer in made(names=(TO_Q, CONV)).items()}
    write_kohya(tmp_path / "tiny.safetensors", layers, {})
    with pytest.raises(ModelError, match=r"2 of 2 layers differ.*--dtype fp32"):
        converted(tmp_path / "tiny.safetensors", "diffusers", dtype="fp16")
    assert not list(tmp_path.glob("converted*")) and not list(tmp_path.glob(".incomplete*"))


@pytest.mark.parametrize("spoil", [
    lambda layers: {name: layers[name] for name in list(layers)[1:]},
    lambda layers: {name: replace(layer, up=1.00001 * layer.up) for name, layer in layers.items()},
    lambda layers: {name: replace(layer, magnitude=layer.magnitude * torch.nan) for name, layer in layers.items()},
], ids=["a layer less", "another strength", "NaN"])  # fmt: skip
def test_a_file_that_holds_something_else_is_not_left_there(monkeypatch, written, converted, tmp_path, spoil):
    write = commands.write_diffusers_for_all
    monkeypatch.setattr(
        commands, "write_diffusers_for_all", lambda path, layers, *more: write(path, spoil(layers), *more)
    )
    with pytest.raises(ModelError, match=r"does not hold what was to be written|NaN"):
        converted(written(dora=True), "diffusers")
    assert not list(tmp_path.glob("converted*"))


def test_what_is_there_already_is_not_touched(tiny_model, written, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    args = ConvertArgs(base=str(tiny_model), lora=str(written()), to="kohya", output_dir=str(tmp_path / "mine"))
    (problem,) = args.problems()
    assert problem.startswith("--output_dir")
    with pytest.raises(ModelError, match="exists already"):
        convert(args)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_all_inputs_that_cannot_be_read_are_named_together(tiny_model, tmp_path):
    broken, missing = tmp_path / "broken.safetensors", tmp_path / "missing"
    broken.write_bytes(b"nothing")
    args = FuseArgs(base=str(tiny_model), lora=[str(broken)] * 2, output_dir=str(tmp_path / "new"))
    with pytest.raises(ModelError, match=r"(?s)broken\.safetensors is damaged.*broken\.safetensors is damaged"):
        fuse(args)
    with pytest.raises(ModelError, match=r"(?s)no-model.*missing is neither"):
        fuse(replace(args, base=str(tmp_path / "no-model"), lora=[str(missing), str(broken)]))
