"""The original single-file layout, held against diffusers' own readers of it."""

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from finetuning.families.model_args import ModelError
from finetuning.families.original import canonical_parts, original_names, place, unet_blocks
from finetuning.families.table import FAMILIES
from finetuning.families.tensors import tensor_references

SD, SDXL = FAMILIES["StableDiffusionPipeline"], FAMILIES["StableDiffusionXLPipeline"]
PARTS = tuple(SD.by_name)
SD1_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2_UNET = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def read_part(folder, part):
    (path,) = [path for path in (folder / part).glob("*.safetensors") if path.name.count(".") == 1]
    return {key.removeprefix("text_model."): value for key, value in load_file(path).items()}


def in_original_layout(parts):
    """{key in the file: tensor} of {part: {canonical key: tensor}}."""
    tensors = {}
    for part, own in parts.items():
        names = original_names(SD.by_name[part], own)
        assert len(set(names.values())) == len(own) and list(names) == list(own)
        places = [place(SD.by_name[part], key, names[key], own[key].shape) for key in own]
        tensors |= {at.key: value.reshape(at.shape) for at, value in zip(places, own.values(), strict=True)}
    return tensors


def whole_model(folder):
    return {part: read_part(folder, part) for part in PARTS}


def read(stored):
    return {key: one.read() for key, one in stored.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def shapes(tensors):
    return {key: tuple(value.shape) for key, value in tensors.items()}


def write_and_read(path, tensors, weights="ema"):
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    parts, strange = canonical_parts(tensor_references(path)[0], SD, weights)
    return {part: read(own) for part, own in parts.items()}, strange


@pytest.fixture
def empty_weights():
    """Modules are made on the meta device: shapes without numbers."""
    with torch.device("meta"):
        yield


@pytest.fixture(params=["tiny", "mini-sd"])
def model_folder(request, tiny_model, root):
    return tiny_model if request.param == "tiny" else root / "models/mini-sd"


# -- what diffusers reads of it --------------------------------------------------------------------------------------


def test_diffusers_opens_the_file_as_the_same_pipeline(model_folder, tmp_path):
    model = whole_model(model_folder)
    save_file({key: value.contiguous() for key, value in in_original_layout(model).items()}, tmp_path / "m.safetensors")
    pipeline = StableDiffusionPipeline.from_single_file(
        tmp_path / "m.safetensors", config=str(model_folder), local_files_only=True, safety_checker=None
    )
    for part in PARTS:
        loaded = {key.removeprefix("text_model."): value for key, value in getattr(pipeline, part).state_dict().items()}
        assert equal(loaded, {key: value.float() for key, value in model[part].items()})


@pytest.mark.parametrize(("settings", "count"), [(SD1_UNET, 686), (SD2_UNET, 686)], ids=["1.5", "2.1"])
def test_the_real_unet_has_the_names_that_diffusers_expects(empty_weights, settings, count):
    unet = UNet2DConditionModel(**settings)
    tensors = in_original_layout({"unet": unet.state_dict()})
    assert len(tensors) == count
    assert equal_shapes_through_diffusers(single_file_utils.convert_ldm_unet_checkpoint, tensors, unet)
    assert tuple(tensors["model.diffusion_model.output_blocks.8.2.conv.weight"].shape) == (640, 640, 3, 3)
    assert tuple(tensors["model.diffusion_model.output_blocks.2.1.conv.weight"].shape) == (1280, 1280, 3, 3)


def test_the_real_autoencoder_has_the_names_that_diffusers_expects(empty_weights):
    vae = AutoencoderKL(**SD_VAE)
    tensors = in_original_layout({"vae": vae.state_dict()})
    assert len(tensors) == 248
    assert equal_shapes_through_diffusers(single_file_utils.convert_ldm_vae_checkpoint, tensors, vae)
    assert tuple(tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape) == (512, 512, 1, 1)


def equal_shapes_through_diffusers(convert, tensors, module):
    return shapes(convert(tensors, dict(module.config))) == shapes(module.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"block_out_channels": (8, 16, 24), "layers_per_block": 1},
        {"block_out_channels": (8, 16, 16, 24), "layers_per_block": 3},
        {"block_out_channels": (8,), "layers_per_block": 2},
    ],
    ids=str,
)
def test_other_numbers_of_blocks_and_layers_come_back_as_they_were(settings, tmp_path):
    count = len(settings["block_out_channels"])
    unet = UNet2DConditionModel(
        **settings, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * (count - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (count - 1),
    ).state_dict()  # fmt: skip
    vae = AutoencoderKL(
        **settings, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
    ).state_dict()  # fmt: skip
    parts, strange = write_and_read(tmp_path / "m.safetensors", in_original_layout({"unet": unet, "vae": vae}))
    assert equal(parts["unet"], unet) and equal(parts["vae"], vae) and not strange


# -- there and back --------------------------------------------------------------------------------------------------


def test_reading_undoes_writing(model_folder, tmp_path):
    model = whole_model(model_folder)
    parts, strange = write_and_read(tmp_path / "m.safetensors", in_original_layout(model))
    assert not strange and parts.keys() == model.keys()
    assert all(equal(parts[part], model[part]) for part in PARTS)


def test_the_unet_is_its_average_unless_the_trained_weights_are_asked_for(tiny_model, tmp_path):
    model = whole_model(tiny_model)
    tensors = in_original_layout(model)
    for key in original_names(SD.by_name["unet"], model["unet"]).values():
        tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key] + 1
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    averaged, strange = write_and_read(tmp_path / "m.safetensors", tensors)
    assert not strange and equal(averaged["unet"], {key: value + 1 for key, value in model["unet"].items()})
    trained, strange = write_and_read(tmp_path / "m.safetensors", tensors, "raw")
    assert not strange and equal(trained["unet"], model["unet"])
    assert all(equal(averaged[part], model[part]) for part in ("vae", "text_encoder"))

    tensors["model_ema.stray"] = tensors.pop("model_ema.diffusion_modelout2bias")
    with pytest.raises(ModelError, match=r"lacks 1 .*model\.diffusion_model\.out\.2\.bias first.*--weights raw"):
        write_and_read(tmp_path / "m.safetensors", tensors)


def test_an_average_of_what_is_not_there_is_strange(tiny_model, tmp_path):
    tensors = in_original_layout({"unet": read_part(tiny_model, "unet")})
    for key in list(tensors):
        tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key]
    tensors["model_ema.stray"] = torch.zeros(1)
    assert write_and_read(tmp_path / "m.safetensors", tensors)[1] == ["model_ema.stray"]
    assert write_and_read(tmp_path / "m.safetensors", tensors, "raw")[1] == []


def test_text_encoder_keys_without_text_model_are_the_same_tensors(tiny_model, tmp_path):
    encoder = read_part(tiny_model, "text_encoder")
    short = {f"cond_stage_model.transformer.{key}": value for key, value in encoder.items()}
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
    parts, strange = write_and_read(tmp_path / "m.safetensors", short | ids)
    assert not strange
    assert equal(parts["text_encoder"], encoder | {"embeddings.position_ids": torch.arange(16)[None]})
    with pytest.raises(ModelError, match="two names of one tensor"):
        write_and_read(tmp_path / "m.safetensors", short | in_original_layout({"text_encoder": encoder}))


def test_an_autoencoder_with_linear_attention_is_read_as_well(tiny_model, tmp_path):
    vae = read_part(tiny_model, "vae")
    names = original_names(SD.by_name["vae"], vae)
    parts, strange = write_and_read(tmp_path / "m.safetensors", {names[key]: value for key, value in vae.items()})
    assert not strange and equal(parts["vae"], vae)


def test_what_belongs_to_no_part_is_strange_and_what_such_files_are_known_to_hold_is_not(tiny_model, tmp_path):
    known = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance", "model_ema.num_updates")
    strange = [
        "control_model.zero_convs.0.0.weight",
        "cond_stage_model.transformer.vision_model.post_layernorm.weight",
        "first_stage_model.loss.logvar",
        "model.diffusion_model.input_blocks.99.0.in_layers.0.weight",
        "model.diffusion_model.label_emb.1.0.weight",
        "betas.more",
    ]
    model = whole_model(tiny_model)
    extra = {key: torch.zeros(2) for key in (*known, *strange)}
    parts, found = write_and_read(tmp_path / "m.safetensors", in_original_layout(model) | extra)
    assert sorted(found) == sorted(strange)
    assert all(equal(parts[part], model[part]) for part in PARTS)


# -- the text encoder of SD 2.x --------------------------------------------------------------------------------------


def open_clip(width, layers):
    """The tensors of an OpenCLIP text encoder of this width, as Stability's files have them."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "positional_embedding": (5, width),
        "token_embedding.weight": (7, width),
        "text_projection": (width, width),
    }
    sizes |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "logit_scale": ()}
    for layer in range(layers):
        stem = f"transformer.resblocks.{layer}"
        sizes |= {f"{stem}.attn.in_proj_weight": (3 * width, width), f"{stem}.attn.in_proj_bias": (3 * width,)}
        for module, shape in {"attn.out_proj": (width, width), "ln_1": (width,), "ln_2": (width,),
                              "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}.items():  # fmt: skip
            sizes |= {f"{stem}.{module}.weight": shape, f"{stem}.{module}.bias": shape[:1]}
    return {f"cond_stage_model.model.{key}": torch.randn(size, generator=generator) for key, size in sizes.items()}


def test_open_clip_is_read_as_diffusers_reads_it(tmp_path):
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=32, num_hidden_layers=23, vocab_size=7, max_position_embeddings=5,
        num_attention_heads=2, bos_token_id=5, eos_token_id=6,
    )  # fmt: skip
    model = CLIPTextModel(config)
    tensors = open_clip(8, 24)
    parts, strange = write_and_read(tmp_path / "m.safetensors", tensors)
    expected = single_file_utils.convert_open_clip_checkpoint(model, dict(tensors))
    expected = {key.removeprefix("text_model."): value for key, value in expected.items()}
    assert not strange and equal(parts["text_encoder"], expected)
    assert shapes(parts["text_encoder"]) == shapes(
        {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    )


def test_open_clip_is_not_written():
    keys = [f"encoder.layers.{layer}.layer_norm1.weight" for layer in range(23)]
    with pytest.raises(ModelError, match="leave --single_file out"):
        original_names(SD.by_name["text_encoder"], keys)
    assert original_names(SD.by_name["text_encoder"], keys[:12])[keys[0]].startswith(
        "cond_stage_model.transformer.text_model."
    )


# -- names and shapes one by one -------------------------------------------------------------------------------------


def test_a_key_without_a_name_in_the_layout_is_refused(tiny_model):
    keys = [*read_part(tiny_model, "unet"), "class_embedding.linear_1.weight"]
    with pytest.raises(ModelError, match=r"1 tensor.* unet .*class_embedding\.linear_1\.weight.*--single_file"):
        original_names(SD.by_name["unet"], keys)


def test_sd1_has_the_25_blocks_that_per_block_ratios_name(empty_weights):
    blocks = unet_blocks(UNet2DConditionModel(**SD1_UNET).state_dict())
    ways = [f"{way}{number:02d}" for way in ("IN", "OUT") for number in range(12)]
    assert set(blocks.values()) == {*ways, "M00", "BASE"}
    assert [blocks[f"{key}.weight"] for key in ("conv_in", "time_embedding.linear_1", "conv_out")] == [
        "IN00", "BASE", "BASE",
    ]  # fmt: skip
