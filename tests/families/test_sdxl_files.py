"""Files of Stable Diffusion XL: LoRAs and single files, held against diffusers' own readers of them."""

import json
import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import merge_checkpoints
from finetuning.families.lora_files import (
    Layer,
    adaptable,
    adaptable_components,
    attach,
    diffusers_tensors,
    find_lora,
    for_kohya,
    original_modules,
    read_lora,
    write_diffusers,
    write_kohya,
)
from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source
from finetuning.families.original import original_names, place, unet_blocks
from finetuning.families.pipelines import open_pipeline
from finetuning.families.table import FAMILIES
from finetuning.merging.lora_tools import skeletons
from finetuning.rng import torch_generator

SDXL = FAMILIES["StableDiffusionXLPipeline"]
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json and text_encoder_2/config.json
REAL_UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
REAL_TEXT = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "vocab_size": 49408,
}  # fmt: skip


@pytest.fixture(scope="module")
def components(tiny_sdxl):
    return skeletons(str(tiny_sdxl))


@pytest.fixture(scope="module")
def layers(components):
    """A Layer for every linear layer and convolution that kohya's files can hold, in several ranks."""
    found = {}
    for number, (name, module) in enumerate(for_kohya(adaptable(components))[0].items()):
        out, inside, *kernel = module.weight.shape
        draw, rank = torch_generator(0, name), 1 + number % 3
        down = torch.randn((rank, inside, *kernel), generator=draw)
        found[name] = Layer(down, 0.1 * torch.randn((out, rank, *(1 for _ in kernel)), generator=draw), 2.0)
    return found


def assert_same(found, layers):
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(found[name].delta(), layer.delta())
        if layer.magnitude is not None:
            torch.testing.assert_close(found[name].magnitude, layer.magnitude)


def loaded(pipeline):
    """{layer name: what PEFT adds to its weight}."""
    return {
        name.removesuffix(".base_layer"): module.get_delta_weight(next(iter(module.lora_A)))
        for name, module in {
            f"{part}.{name}": module
            for part, model in adaptable_components(pipeline).items()
            for name, module in model.named_modules()
        }.items()
        if hasattr(module, "get_delta_weight") and len(module.lora_A)
    }


# -- LoRA files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
def test_diffusers_loads_every_layer_of_what_is_written(tiny_sdxl, components, layers, tmp_path, kohya):
    path = tmp_path / "lora.safetensors"
    if kohya:
        write_kohya(path, layers, {}, SDXL, components)
    else:
        write_diffusers(path, layers, {}, SDXL)
    assert_same(read_lora(path, components).layers, layers)
    pipeline = open_pipeline(tiny_sdxl)
    pipeline.load_lora_weights(path)
    found = loaded(pipeline)
    assert found.keys() == layers.keys()
    for name, added in found.items():
        torch.testing.assert_close(added, layers[name].delta())


def test_kohya_names_are_those_of_sd_scripts(components, layers, tmp_path):
    write_kohya(tmp_path / "lora.safetensors", layers, {}, SDXL, components)
    stems = {key.split(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    assert stems >= {
        "lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_input_blocks_2_0_op",
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k", "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_1_2_conv", "lora_unet_output_blocks_0_0_skip_connection",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te2_text_model_encoder_layers_1_mlp_fc2",
    }  # fmt: skip
    assert all(re.match("lora_unet_(input_blocks|middle_block|output_blocks|out)_|lora_te[12]_text_", stem)
               for stem in stems)  # fmt: skip


def test_what_diffusers_would_take_for_an_attention_is_left_out_of_kohyas_files(root, components):
    mini, name = skeletons(str(root / "models/mini-sdxl")), "unet.up_blocks.0.upsamplers.0.conv"
    held, notice = for_kohya({name: None}, SDXL, mini)  # no attention in this block
    assert not held and name in notice
    assert for_kohya({name: None}, SDXL, components) == ({name: None}, None)


SPELLINGS = {
    "kohya's, diffusers' names": lambda own, original: f"lora_unet_{own.replace('.', '_')}",
    "kohya's, original names": lambda own, original: f"lora_unet_{original.replace('.', '_')}",
    "ComfyUI's": lambda own, original: f"diffusion_model.{original}",
    "a single file's": lambda own, original: f"model.diffusion_model.{original}",
    "PEFT's": lambda own, original: f"base_model.model.{own}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_unets_layers_is_read(components, layers, tmp_path, spelling):
    originals = original_modules(components, SDXL)
    own = {name: layer.with_alpha(layer.rank) for name, layer in layers.items() if name.startswith("unet.")}
    tensors = {}
    for name, layer in own.items():
        stem = SPELLINGS[spelling](name.removeprefix("unet."), originals[name])
        tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_same(read_lora(tmp_path / "lora.safetensors", components).layers, own)


def test_a_dora_comes_back_and_acts_in_diffusers(tiny_sdxl, components, layers, tmp_path):
    doras = {
        name: Layer(one.down, one.up, one.alpha, 1 + torch.rand(len(one.up), generator=torch_generator(1, name)))
        for name, one in layers.items()
    }
    write_diffusers(tmp_path / "lora.safetensors", doras, {}, SDXL)
    lora = read_lora(tmp_path / "lora.safetensors", components)
    assert lora.is_dora
    assert_same(lora.layers, doras)
    pipeline = open_pipeline(tiny_sdxl)
    attach(pipeline, lora)
    assert loaded(pipeline).keys() == doras.keys()


@pytest.mark.parametrize("reverse", [False, True], ids=["SD on SDXL", "SDXL on SD"])
def test_a_lora_of_another_base_is_refused_by_the_width_of_its_text(tiny_sdxl, tiny_model, tmp_path, reverse):
    of, on = (tiny_sdxl, tiny_model) if reverse else (tiny_model, tiny_sdxl)
    models = skeletons(str(of))
    name = next(name for name in adaptable(models) if name.endswith("attn2.to_k"))
    width = adaptable(models)[name].in_features
    layer = {name: Layer(torch.ones(1, width), torch.ones(adaptable(models)[name].out_features, 1), 1.0)}
    write_diffusers(tmp_path / "lora.safetensors", layer, {})
    words = ["convert", "--to", "kohya", "--base", str(on), "--lora", str(tmp_path / "lora.safetensors")]
    with pytest.raises(ModelError, match=rf"for a denoiser that reads text of width {width}, and this StableDiffusion"):
        read_lora(tmp_path / "lora.safetensors", skeletons(str(on)))
    assert merge_checkpoints.main([*words, "--output_dir", str(tmp_path / "out")]) == 1


# -- single files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tiny_sdxl, tmp_path_factory):
    """The same model with other weights."""
    folder = shutil.copytree(tiny_sdxl, tmp_path_factory.mktemp("other") / "model")
    for path in folder.rglob("*.safetensors"):
        noise = torch_generator(0, path.parent.name)
        tensors = {
            key: value + 0.1 * torch.randn(value.shape, generator=noise) for key, value in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def merged(*words):
    target = words[-1]
    assert merge_checkpoints.main([str(word) for word in (*words[:-1], "--output_dir", target)]) == 0
    return target


@pytest.fixture(scope="module")
def single_file(tiny_sdxl, other, tmp_path_factory):
    """Half of either."""
    target = tmp_path_factory.mktemp("merged") / "single"
    words = ("--base", tiny_sdxl, "--tuned", other, "--components", "unet,text_encoder,text_encoder_2,vae")
    return merged("merge", *words, "--ratio", 0.5, "--single_file", target) / "merged.safetensors"


def tensors_of(place):
    """{component.key: tensor} of a model."""
    return {
        f"{part}.{key}": one.read() for part, own in open_source(str(place)).tensors.items() for key, one in own.items()
    }


def test_diffusers_opens_the_single_file_as_the_same_pipeline(tiny_sdxl, other, single_file):
    pipeline = StableDiffusionXLPipeline.from_single_file(single_file, config=str(tiny_sdxl), local_files_only=True)
    one, two = tensors_of(tiny_sdxl), tensors_of(other)
    for part in SDXL.by_name:
        for key, value in getattr(pipeline, part).state_dict().items():
            torch.testing.assert_close(value, (one[f"{part}.{key}"] + two[f"{part}.{key}"]) / 2)


def test_a_single_file_is_merged_like_the_pipeline_it_was_made_of(tiny_sdxl, other, single_file, tmp_path):
    found = open_source(str(single_file))
    assert found.family is SDXL and not found.warnings
    one, two, halves = (tensors_of(place) for place in (tiny_sdxl, other, single_file))
    torch.testing.assert_close(halves, {name: (value + two[name]) / 2 for name, value in one.items()})
    copied = merged("merge", "--base", single_file, "--tuned", tiny_sdxl, "--ratio", 0, "--layout_from", tiny_sdxl,
                    tmp_path / "folder")  # fmt: skip
    torch.testing.assert_close(tensors_of(copied), halves, rtol=0, atol=0)


def test_the_lora_commands_take_sdxl(tiny_sdxl, other, single_file, components, layers, tmp_path):
    write_kohya(tmp_path / "lora.safetensors", layers, {}, SDXL, components)
    base, lora = ("--base", tiny_sdxl), ("--lora", tmp_path / "lora.safetensors")
    for to, source in (("diffusers", base), ("kohya", ("--base", single_file))):
        converted = merged("convert", *source, *lora, "--to", to, tmp_path / to)
        (path,) = converted.glob("*.safetensors")
        assert_same(read_lora(path, components).layers, layers)
    fused = tensors_of(merged("fuse", *base, *lora, tmp_path / "fused"))
    plain = tensors_of(tiny_sdxl)
    for name, layer in layers.items():
        torch.testing.assert_close(fused[f"{name}.weight"], layer.fused(plain[f"{name}.weight"]))
    extracted = merged("extract", *base, "--tuned", tmp_path / "fused", "--rank", 3, "--lora_target_modules",
                       "all-linear", "conv", "--save_kohya", tmp_path / "extracted")  # fmt: skip
    names = {name.split(".")[0] for name in read_lora(find_lora(extracted), components).layers}
    assert names == {"unet", "text_encoder", "text_encoder_2"}
    resized = merged("resize", *base, *lora, "--rank", 1, tmp_path / "resized")
    assert {layer.rank for layer in read_lora(find_lora(resized), components).layers.values()} == {1}
    doubled = merged("combine", *base, *lora, tmp_path / "lora.safetensors", tmp_path / "combined")
    for name, layer in read_lora(find_lora(doubled), components).layers.items():
        torch.testing.assert_close(layer.delta(), 2 * layers[name].delta())


def test_sd_and_sdxl_are_not_merged_and_a_refiner_is_not_opened(tiny_sdxl, tiny_model, single_file, tmp_path, capsys):
    for base in (tiny_sdxl, single_file):
        words = ["--base", base, "--tuned", tiny_model, "--ratio", "0.5", "--output_dir", tmp_path / "out"]
        assert merge_checkpoints.main(["merge", *map(str, words)]) == 1
        said = capsys.readouterr().err
        assert "StableDiffusionXLPipeline" in said and "StableDiffusionPipeline" in said and "\n" in said
    save_file({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}, tmp_path / "refiner.safetensors")
    folder = shutil.copytree(tiny_sdxl, tmp_path / "refiner")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    for refiner in (tmp_path / "refiner.safetensors", folder):
        with pytest.raises(ModelError, match="is the refiner of Stable Diffusion XL"):
            open_source(str(refiner))


def test_the_real_model_has_the_names_that_diffusers_expects():
    shapes = lambda tensors: {key: tuple(value.shape) for key, value in tensors.items()}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**REAL_UNET)
        text = CLIPTextModelWithProjection(CLIPTextConfig(**REAL_TEXT))
    names = original_names(SDXL.by_name["unet"], unet.state_dict())
    tensors = {names[key]: value for key, value in unet.state_dict().items()}
    assert len(tensors) == 1680  # in stabilityai's own file
    assert shapes(single_file_utils.convert_ldm_unet_checkpoint(tensors, dict(unet.config))) == shapes(
        unet.state_dict()
    )
    blocks = [*(f"IN{number:02d}" for number in range(9)), "M00", *(f"OUT{number:02d}" for number in range(9))]
    assert sorted({*unet_blocks(unet.state_dict()).values()} - {"BASE"}) == blocks

    component = SDXL.by_name["text_encoder_2"]
    names = original_names(component, text.state_dict())
    places = [place(component, key, names[key], value.shape) for key, value in text.state_dict().items()]
    tensors = {at.key: torch.empty(at.shape, device="meta") for at in places}
    prefix = component.original_prefixes[0]
    back = single_file_utils.convert_open_clip_checkpoint(text, tensors, prefix=prefix)
    assert shapes(back) == shapes(text.state_dict()) and prefix + "text_projection" in tensors


def test_its_layers_are_named_as_diffusers_names_them(layers):
    assert all(key.startswith(("unet.", "text_encoder.text_model.", "text_encoder_2.text_"))
               for key in diffusers_tensors(layers, SDXL))  # fmt: skip
