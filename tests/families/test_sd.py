"""Loading a Stable Diffusion from folders and from the Hub's cache, and handing over what became of it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError, StartArgs
from finetuning.training.ema import AveragedWeights

MAIN = "diffusion_pytorch_model.safetensors"
RAW = "diffusion_pytorch_model.non_ema.safetensors"


def load(model, prediction_type=None, seed=0, **flags):
    start = {name: flags.pop(name) for name in list(flags) if name in StartArgs.__dataclass_fields__}
    base = ModelArgs(pretrained_model_name_or_path=str(model), **flags)
    return load_model(base, prediction_type, seed, StartArgs(**start))


def unet_of(model):
    return {name: value.detach() for name, value in model.denoiser.unet.state_dict().items()}


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)  # torch.equal alone takes 1.0 in half precision for 1.0


def equal(one, other):
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@torch.no_grad()
def train_a_little(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.trained_parameters().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def average_of(model):
    """An average that is neither the base nor the trained weights."""
    average = AveragedWeights(model.trained_parameters(), 0.5, "warm")
    train_a_little(model)
    average.update()
    return average


@pytest.fixture(scope="module")
def main_weights(tiny_model):
    return load_file(tiny_model / "unet" / MAIN)


@pytest.fixture(scope="module")
def raw_weights(tiny_model):
    return load_file(tiny_model / "unet" / RAW)


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.fixture
def hub_cache(tiny_model, tmp_path, raw_weights):
    """A Hub cache that holds org/name: main, and two more revisions whose UNet has other weights."""
    storage = tmp_path / "hub" / "models--org--name"
    (storage / "refs").mkdir(parents=True)
    for number, revision in enumerate(("main", "non-ema", "raw")):
        commit = f"{number}" * 40
        (storage / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_model, storage / "snapshots" / commit)
        if revision != "main":
            shifted = {name: value + number for name, value in raw_weights.items()}
            save_file(shifted, storage / "snapshots" / commit / "unet" / MAIN, metadata={"format": "pt"})
    return storage.parent


# -- which weights are trained ---------------------------------------------------------------------------------------


def test_a_folder_is_loaded_in_fp32_with_only_the_unet_to_be_trained(tiny_model, main_weights):
    model = load(tiny_model)
    assert equal(unet_of(model), main_weights) and model.ema_start is None
    assert all(parameter.requires_grad for parameter in model.denoiser.unet.parameters())
    frozen = [*model.denoiser.text_encoder.parameters(), *model.vae.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert model.denoiser.training and not model.vae.training


def test_train_text_encoder_adds_it_to_what_is_trained(tiny_model):
    model = load(tiny_model, train_text_encoder=True)
    assert list(model.trained_modules) == ["unet", "text_encoder"]
    assert all(parameter.requires_grad for parameter in model.trained_parameters().values())
    groups = model.parameter_groups(1e-4, 1e-5)
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert listed == [id(parameter) for parameter in model.trained_parameters().values()]


def test_variant_is_used_where_a_part_has_it_and_trained_in_fp32(copied):
    half = {}
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        plain = copied / part / f"{stem}.safetensors"
        half[part] = {name: value.half() for name, value in load_file(plain).items()}
        plain.unlink()
        save_file(half[part], copied / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
    edit(copied / "text_encoder/config.json", dtype="float16")  # transformers would follow it
    model = load(copied, variant="fp16")  # the autoencoder has no such file
    assert equal(unet_of(model), {name: value.float() for name, value in half["unet"].items()})
    text = {f"text_model.{name}": value for name, value in model.denoiser.text_encoder.state_dict().items()}
    assert equal(text, {name: value.float() for name, value in half["text_encoder"].items()})


def test_non_ema_variant_is_trained_and_the_average_starts_from_the_main_weights(tiny_model, main_weights, raw_weights):
    """diffusers' script does it the other way round."""
    model = load(tiny_model, non_ema_variant="non_ema")
    assert equal(unet_of(model), raw_weights) and not equal(main_weights, raw_weights)
    assert equal(model.ema_start, {f"unet.{name}": value for name, value in main_weights.items()})
    assert model.ema_start.keys() == model.trained_parameters().keys()


def test_a_non_ema_variant_that_is_not_there_is_named(tiny_model):
    with pytest.raises(ModelError, match="--non_ema_variant other: no such weights"):
        load(tiny_model, non_ema_variant="other")


def test_a_folder_has_no_revisions(tiny_model):
    with pytest.raises(ModelError, match=r"--non_ema_revision non-ema: .* no revisions; .*--non_ema_variant"):
        load(tiny_model, non_ema_revision="non-ema")


# -- names on the Hub ------------------------------------------------------------------------------------------------


def test_a_hub_name_is_found_in_the_cache(hub_cache, main_weights):
    model = load("org/name", cache_dir=str(hub_cache))
    assert equal(unet_of(model), main_weights) and model.ema_start is None


@pytest.mark.parametrize(("revision", "number"), [("non-ema", 1), ("raw", 2), ("2" * 40, 2)])
def test_revision_is_really_loaded(revision, number, hub_cache, raw_weights):
    """diffusers' script crashes on any revision."""
    model = load("org/name", cache_dir=str(hub_cache), revision=revision)
    assert equal(unet_of(model), {name: value + number for name, value in raw_weights.items()})


@pytest.mark.parametrize(("revision", "number"), [("non-ema", 1), ("raw", 2)])
def test_non_ema_revision_is_trained_and_the_average_starts_from_main(
    revision, number, hub_cache, main_weights, raw_weights
):
    model = load("org/name", cache_dir=str(hub_cache), non_ema_revision=revision)
    assert equal(unet_of(model), {name: value + number for name, value in raw_weights.items()})
    assert equal(model.ema_start, {f"unet.{name}": value for name, value in main_weights.items()})


def test_non_ema_variant_of_a_hub_name(hub_cache, main_weights, raw_weights):
    model = load("org/name", cache_dir=str(hub_cache), non_ema_variant="non_ema")
    assert equal(unet_of(model), raw_weights)
    assert equal(model.ema_start, {f"unet.{name}": value for name, value in main_weights.items()})


@pytest.mark.parametrize("flag", ["revision", "non_ema_revision", "non_ema_variant"])
def test_what_the_hub_does_not_have_is_named(flag, hub_cache):
    with pytest.raises(ModelError, match="nowhere"):
        load("org/name", cache_dir=str(hub_cache), **{flag: "nowhere"})


def test_a_name_that_is_neither_folder_nor_cached(tmp_path):
    with pytest.raises(ModelError, match="--pretrained_model_name_or_path org/other is neither a folder"):
        load("org/other", cache_dir=str(tmp_path))


# -- folders that are something else ---------------------------------------------------------------------------------


def test_a_folder_without_an_index_is_not_a_pipeline(copied):
    (copied / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"has no model_index\.json.*--resume_from_checkpoint"):
        load(copied)


def test_another_pipeline_is_refused_by_its_name(copied):
    edit(copied / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(ModelError, match="is a StableDiffusionXLPipeline; what can be trained is Stable"):
        load(copied)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler", "unet"])
def test_a_part_that_is_missing_is_named(part, copied):
    shutil.rmtree(copied / part)
    with pytest.raises(ModelError, match=f"lacks {part}"):
        load(copied)


def test_a_missing_part_that_only_the_finished_pipeline_needs_is_named_before_the_training(copied):
    edit(copied / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.raises(ModelError, match="safety_checker"):
        load(copied)


def test_an_inpainting_unet_is_refused(copied):
    config = UNet2DConditionModel.load_config(copied / "unet") | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(copied / "unet")
    with pytest.raises(ModelError, match="takes 9 channels and the autoencoder gives 4: an inpainting"):
        load(copied)


def test_text_of_another_width_is_refused(tiny_model):
    with pytest.raises(ModelError, match="text of width 24 and the text encoder gives 16"):
        load(tiny_model, from_scratch=True, unet_config="{cross_attention_dim: 24}")


# -- from scratch ----------------------------------------------------------------------------------------------------


def test_from_scratch_depends_on_the_seed_alone(tiny_model, main_weights):
    before = torch.get_rng_state()
    first = unet_of(load(tiny_model, seed=1, from_scratch=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert equal(first, unet_of(load(tiny_model, seed=1, from_scratch=True)))
    assert not equal(first, unet_of(load(tiny_model, seed=2, from_scratch=True)))
    assert first.keys() == main_weights.keys() and not equal(first, main_weights)


def test_unet_config_is_read_from_text_and_from_files(tiny_model, tmp_path):
    (tmp_path / "unet.json").write_text('{"layers_per_block": 2}')
    (tmp_path / "unet.yaml").write_text("layers_per_block: 2\n")
    for config in ("{layers_per_block: 2}", str(tmp_path / "unet.json"), str(tmp_path / "unet.yaml")):
        unet = load(tiny_model, from_scratch=True, unet_config=config).denoiser.unet
        assert len(unet.down_blocks[0].resnets) == 2
        assert list(unet.config.block_out_channels) == [8, 16]  # what is not named stays as in the base


def test_unet_config_may_be_longer_than_a_file_name(tiny_model):
    config = json.dumps({"layers_per_block": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]})
    unet = load(tiny_model, from_scratch=True, unet_config=config + " " * 300).denoiser.unet
    assert len(unet.down_blocks[0].resnets) == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("no_such_file.yaml", "neither a file nor"),
        ("{layers_per_block: [}", "--unet_config"),
        ("{layers_per_blok: 3}", "layers_per_blok"),
        ("{block_out_channels: [8, 16, 32]}", "--unet_config"),
    ],
)
def test_a_unet_config_that_cannot_be_used_is_named(config, said, tiny_model):
    with pytest.raises(ModelError, match=said):
        load(tiny_model, from_scratch=True, unet_config=config)


# -- what a run needs ------------------------------------------------------------------------------------------------


def test_images_become_latents_of_an_eighth_of_their_side(tiny_model):
    model = load(tiny_model)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.posterior(pixels)
    assert model.pixels_per_latent == 8 and mean.shape == std.shape == (2, 4, 4, 6)
    with torch.no_grad():
        expected = model.vae.encode(pixels).latent_dist
    assert torch.equal(mean, expected.mean) and torch.equal(std, expected.std)
    assert torch.equal(model.scale_latents(mean), mean * 0.18215)


def test_the_posterior_is_fp32_also_of_an_autoencoder_in_half_precision(tiny_model):
    model = load(tiny_model)
    model.to("cpu", torch.bfloat16)
    assert {moment.dtype for moment in model.posterior(torch.zeros(1, 3, 32, 32))} == {torch.float32}


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_trained_stays_in_fp32(trained, tiny_model):
    model = load(tiny_model, train_text_encoder=trained)
    model.to("cpu", torch.bfloat16)
    assert model.vae.dtype == torch.bfloat16 and model.denoiser.unet.dtype == torch.float32
    assert model.denoiser.text_encoder.dtype == (torch.float32 if trained else torch.bfloat16)


def test_gradient_checkpointing_changes_the_memory_and_not_the_gradient(tiny_model):
    gradients = []
    for on in (False, True):
        model = load(tiny_model, gradient_checkpointing=on, train_text_encoder=True)
        assert model.denoiser.unet.is_gradient_checkpointing is on
        assert model.denoiser.text_encoder.is_gradient_checkpointing is on
        noisy = torch.ones(1, 4, 4, 4)
        model.denoiser(noisy, torch.tensor([5]), torch.arange(16).view(1, 16)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.trained_parameters().items() if p.grad is not None})
    assert equal(*gradients) and len(gradients[0]) > 50


def test_the_validation_pipeline_is_in_evaluation_mode_for_as_long_as_it_is_used(tiny_model):
    model = load(tiny_model)
    with pytest.raises(ValueError, match="inside"), model.pipeline() as pipeline:
        assert not model.denoiser.training and pipeline.unet is model.denoiser.unet
        raise ValueError("inside")
    assert model.denoiser.training


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_text", [False, True])
def test_trained_weights_and_their_average_come_back_from_a_checkpoint(with_text, tiny_model, output):
    model = load(tiny_model, train_text_encoder=with_text)
    average = average_of(model)
    trained = {name: value.detach().clone() for name, value in model.trained_parameters().items()}
    model.save_trained(output)
    model.save_trained(output, "_ema", average.shadow)

    again = load(tiny_model, train_text_encoder=with_text)
    shadow = again.load_trained(output, ema=True)
    assert equal({name: value.detach() for name, value in again.trained_parameters().items()}, trained)
    assert equal(shadow, average.shadow) and not equal(shadow, trained)
    assert again.load_trained(output, ema=False) is None


def test_a_checkpoint_without_the_text_encoder_is_named(tiny_model, output):
    load(tiny_model).save_trained(output)
    with pytest.raises(ModelError, match="holds no trained text_encoder: it was made without --train_text_encoder"):
        load(tiny_model, train_text_encoder=True).load_trained(output, ema=False)


# -- the finished pipeline -------------------------------------------------------------------------------------------


def test_parts_that_were_not_trained_are_copied_byte_for_byte(tiny_model, output):
    model = load(tiny_model)
    model.to("cpu", torch.bfloat16)  # as in a run: the frozen parts in memory are not what is handed over
    train_a_little(model)
    model.save_pipeline(output, None)
    for part in ("vae", "tokenizer", "text_encoder", "scheduler"):
        assert hashes(output / part) == hashes(tiny_model / part)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= hashes(output / "tokenizer").keys()
    assert (output / "model_index.json").read_bytes() == (tiny_model / "model_index.json").read_bytes()
    assert hashes(output / "unet")[MAIN] != hashes(tiny_model / "unet")[MAIN]


def test_the_scheduler_says_what_was_trained_and_stays_of_its_class(copied, output):
    base = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
    edit(copied / "scheduler/scheduler_config.json", **base)
    load(copied, prediction_type="v_prediction").save_pipeline(output, None)
    saved = json.loads((output / "scheduler/scheduler_config.json").read_text())
    before = json.loads((copied / "scheduler/scheduler_config.json").read_text())
    assert saved == before | {"prediction_type": "v_prediction"} and saved["_class_name"] == "PNDMScheduler"


def test_no_prediction_type_keeps_the_bases(copied, output):
    edit(copied / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    model = load(copied)
    assert model.scheduler.config.prediction_type == "v_prediction"
    model.save_pipeline(output, None)
    assert hashes(output / "scheduler") == hashes(copied / "scheduler")


def test_the_average_is_the_pipeline_and_the_raw_weights_are_its_variant(tiny_model, output):
    model = load(tiny_model, non_ema_variant="non_ema")
    average = average_of(model)
    trained = {name: value.clone() for name, value in unet_of(model).items()}
    model.save_pipeline(output, average.shadow)
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    averaged = {f"unet.{name}": value for name, value in pipeline.unet.state_dict().items()}
    assert equal(averaged, average.shadow)
    raw = UNet2DConditionModel.from_pretrained(output / "unet", variant="non_ema")
    assert equal(raw.state_dict(), trained) and not equal(raw.state_dict(), pipeline.unet.state_dict())
    assert equal(unet_of(model), trained)


def test_without_an_average_there_is_no_variant(tiny_model, output):
    model = load(tiny_model)
    train_a_little(model)
    model.save_pipeline(output, None)
    assert sorted(hashes(output / "unet")) == ["config.json", MAIN]
    assert equal(StableDiffusionPipeline.from_pretrained(output).unet.state_dict(), unet_of(model))


def test_a_trained_text_encoder_is_written_under_the_names_that_every_tool_knows(tiny_model, output):
    model = load(tiny_model, train_text_encoder=True)
    train_a_little(model)
    model.save_pipeline(output, None)
    written = load_file(output / "text_encoder/model.safetensors")
    assert written.keys() == load_file(tiny_model / "text_encoder/model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in written)
    again = CLIPTextModel.from_pretrained(output / "text_encoder")
    assert equal(again.state_dict(), model.denoiser.text_encoder.state_dict())
    assert hashes(output / "text_encoder")["config.json"] == hashes(tiny_model / "text_encoder")["config.json"]
    piped = StableDiffusionPipeline.from_pretrained(output).text_encoder
    assert equal(piped.state_dict(), model.denoiser.text_encoder.state_dict())


def test_a_trained_text_encoder_has_its_average_and_its_variant(tiny_model, output):
    model = load(tiny_model, train_text_encoder=True)
    average = average_of(model)
    model.save_pipeline(output, average.shadow)
    averaged = CLIPTextModel.from_pretrained(output / "text_encoder").state_dict()
    raw = CLIPTextModel.from_pretrained(output / "text_encoder", variant="non_ema").state_dict()
    shadow = {name: value for name, value in average.shadow.items() if name.startswith("text_encoder.")}
    assert equal({f"text_encoder.{name}": value for name, value in averaged.items()}, shadow)
    assert equal(raw, model.denoiser.text_encoder.state_dict()) and not equal(raw, averaged)


def test_pickles_beside_safetensors_are_left_behind(copied, output):
    (copied / "vae/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (copied / "text_encoder/pytorch_model.bin").write_bytes(b"pickle")
    load(copied).save_pipeline(output, None)
    assert hashes(output / "vae").keys() == {"config.json", MAIN}
    assert hashes(output / "text_encoder").keys() == {"config.json", "model.safetensors"}


def test_files_of_a_variant_take_the_plain_name_where_they_are_all_there_is(copied, output):
    renamed = {"vae": "diffusion_pytorch_model", "text_encoder": "model", "unet": "diffusion_pytorch_model"}
    for part, stem in renamed.items():
        (copied / part / f"{stem}.safetensors").rename(copied / part / f"{stem}.fp16.safetensors")
    load(copied, variant="fp16").save_pipeline(output, None)
    for part in ("vae", "text_encoder"):
        plain, variant = f"{renamed[part]}.safetensors", f"{renamed[part]}.fp16.safetensors"
        assert sorted(hashes(output / part)) == ["config.json", plain]
        assert hashes(output / part)[plain] == hashes(copied / part)[variant]
    StableDiffusionPipeline.from_pretrained(output)  # without naming a variant
