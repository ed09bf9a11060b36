"""The model of a run: what is trained and what is frozen, checkpoints, and the pipeline that is handed over."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from finetuning.cli import UserError
from finetuning.diffusion.objective import NoiseArgs
from finetuning.families.model import Model, load_model
from finetuning.families.model_args import ModelArgs, ModelError, StartArgs
from finetuning.families.pipelines import open_pipeline
from finetuning.training.ema import AveragedWeights

MAIN = "diffusion_pytorch_model.safetensors"
RAW = "diffusion_pytorch_model.non_ema.safetensors"
NON_EMA = {"non_ema_variant": "non_ema"}


def load(model, seed=0, **flags):
    start, noise = ({name: flags.pop(name) for name in list(flags) if name in kind.__dataclass_fields__}
                    for kind in (StartArgs, NoiseArgs))  # fmt: skip
    base = ModelArgs(pretrained_model_name_or_path=str(model), **flags)
    return load_model(base, NoiseArgs(**noise), seed, StartArgs(**start))


def weights_of(model, name="unet"):
    return {key: value.detach() for key, value in model.components[name].state_dict().items()}


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)  # torch.equal alone takes 1.0 in half precision for 1.0


def equal(one, other):
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def named(component, weights):
    """The weights of a component under the names that the model's parameters have."""
    return {f"{component}.{name}": value for name, value in weights.items()}


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


def batch_of(captions, model):
    return SimpleNamespace(captions=captions, tokens=model.tokenize(captions))


@pytest.fixture(scope="module")
def main_weights(tiny_model):
    return load_file(tiny_model / "unet" / MAIN)


@pytest.fixture(scope="module")
def raw_weights(tiny_model):
    return load_file(tiny_model / "unet" / RAW)


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


# -- what is trained and what is frozen ------------------------------------------------------------------------------


def test_a_gpu_never_holds_in_fp32_what_is_frozen(tiny_model, monkeypatch):
    model, moved = load(tiny_model), {}
    for name, module in model.components.items():

        def to(*args, name=name, module=module, usual=module.to):
            if "cpu" in args:
                moved[name] = module.dtype
            return usual(*args)

        monkeypatch.setattr(module, "to", to)
    model.to_device("cpu", torch.bfloat16)
    assert moved == {"unet": torch.float32, "text_encoder": torch.bfloat16, "vae": torch.bfloat16}


@pytest.mark.parametrize("with_text", [False, True])
def test_what_is_trained_is_inside_the_denoiser_and_what_is_frozen_outside(with_text, tiny_model, main_weights):
    model = load(tiny_model, train_text_encoder=with_text)
    trained = ("unet", "text_encoder") if with_text else ("unet",)
    assert model.trained == trained and equal(weights_of(model), main_weights) and model.ema_start is None
    inside = {id(parameter) for parameter in model.denoiser.parameters()}
    for name, module in model.components.items():
        assert module.training == (name in trained)
        for parameter in module.parameters():
            assert parameter.requires_grad == (id(parameter) in inside) == (name in trained)
            assert parameter.dtype == torch.float32
    assert list(model.frozen_encoders) == ([] if with_text else ["text_encoder"])
    model.denoiser.train()  # as accelerate and the pipeline do it
    assert model.components["text_encoder"].training == with_text and not model.components["vae"].training


def test_optimizer_groups_hold_the_trained_parameters_in_their_order(tiny_model):
    model = load(tiny_model, train_text_encoder=True)
    groups = model.parameter_groups(1e-4, [1e-5])
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]
    with pytest.raises(ModelError, match="--text_encoder_lr has 2 numbers, and a StableDiffusionPipeline has 1"):
        model.parameter_groups(1e-4, [1e-5, 1e-6])
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert listed == [id(parameter) for parameter in model.trained_parameters().values()]


def test_text_is_encoded_outside_or_inside_the_denoiser_with_the_same_result(tiny_model):
    noisy, timesteps = torch.ones(2, 4, 4, 4), torch.tensor([5, 900])
    found = []
    for with_text in (False, True):
        model = load(tiny_model, train_text_encoder=with_text)
        conditioning = model.condition(batch_of(["circle", ""], model), None)[1]
        assert conditioning.keys() == ({"tokens", "extras"} if with_text else {"text", "extras"})
        predicted = model.denoiser(noisy, timesteps, **conditioning)
        predicted.square().sum().backward()
        gradients = [parameter.grad is not None for parameter in model.components["text_encoder"].parameters()]
        assert any(gradients) == with_text
        found.append(predicted)
    assert torch.equal(*found) and found[0].shape == noisy.shape
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("with_text", [False, True])
def test_what_is_trained_stays_in_fp32(with_text, tiny_model):
    model = load(tiny_model, train_text_encoder=with_text)
    model.to_device("cpu", torch.bfloat16)
    expected = torch.float32 if with_text else torch.bfloat16
    dtypes = {name: module.dtype for name, module in model.components.items()}
    assert dtypes == {"unet": torch.float32, "text_encoder": expected, "vae": torch.bfloat16}
    assert {moment.dtype for moment in model.codec.posterior(torch.zeros(1, 3, 32, 32))} == {torch.float32}


def test_gradient_checkpointing_changes_the_memory_and_not_the_gradient(tiny_model):
    gradients = []
    for on in (False, True):
        model = load(tiny_model, gradient_checkpointing=on, train_text_encoder=True)
        assert model.components["unet"].is_gradient_checkpointing is on
        assert model.components["text_encoder"].is_activation_checkpointing is on
        conditioning = model.condition(batch_of(["circle"], model), None)[1]
        model.denoiser(torch.ones(1, 4, 4, 4), torch.tensor([5]), **conditioning).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.trained_parameters().items() if p.grad is not None})
    assert equal(*gradients) and len(gradients[0]) > 50


def test_images_become_latents_of_an_eighth_of_their_side(tiny_model):
    model = load(tiny_model)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.codec.posterior(pixels)
    assert (model.codec.factor, model.codec.channels) == (8, 4) and mean.shape == std.shape == (2, 4, 4, 6)
    with torch.no_grad():
        expected = model.components["vae"].encode(pixels).latent_dist
    assert torch.equal(mean, expected.mean) and torch.equal(std, expected.std)
    assert torch.equal(model.codec.scale(mean), mean * 0.18215)


def test_the_validation_pipeline_is_in_evaluation_mode_for_as_long_as_it_is_used(tiny_model):
    model = load(tiny_model)
    with pytest.raises(ValueError, match="inside"), model.pipeline() as pipeline:
        assert not model.denoiser.training and pipeline.unet is model.components["unet"]
        raise ValueError("inside")
    assert model.denoiser.training and not model.components["vae"].training


def test_a_pipeline_becomes_a_model_of_which_nothing_is_trained(tiny_model):
    opened, pipeline = load(tiny_model), open_pipeline(tiny_model)
    model = Model.of_pipeline(pipeline)
    assert model.components == {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "vae")}
    assert model.trained == () and not any(module.training for module in model.components.values())
    batch, noisy, timesteps = batch_of(["circle"], opened), torch.ones(1, 4, 4, 4), torch.tensor([5])
    with torch.no_grad():
        found = [one.denoiser(noisy, timesteps, **one.condition(batch, noisy)[1]) for one in (opened, model)]
    assert torch.equal(*found)
    pipeline.__class__ = type("AnotherPipeline", (StableDiffusionPipeline,), {})
    with pytest.raises(ModelError, match="AnotherPipeline"):
        Model.of_pipeline(pipeline)


# -- which weights ---------------------------------------------------------------------------------------------------


def test_variant_is_used_where_a_component_has_it_and_trained_in_fp32(copied):
    half = {}
    for name, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        plain = copied / name / f"{stem}.safetensors"
        half[name] = {key: value.half() for key, value in load_file(plain).items()}
        plain.unlink()
        save_file(half[name], copied / name / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
    edit(copied / "text_encoder/config.json", dtype="float16")  # transformers would follow it
    model = load(copied, variant="fp16")  # the autoencoder has no such file
    assert equal(weights_of(model), {key: value.float() for key, value in half["unet"].items()})
    text = {f"text_model.{key}": value for key, value in weights_of(model, "text_encoder").items()}
    assert equal(text, {key: value.float() for key, value in half["text_encoder"].items()})


def test_non_ema_variant_is_trained_and_the_average_starts_from_the_main_weights(tiny_model, main_weights, raw_weights):
    """diffusers' script does it the other way round."""
    model = load(tiny_model, non_ema_variant="non_ema")
    assert equal(weights_of(model), raw_weights) and not equal(main_weights, raw_weights)
    assert model.ema_start.keys() == model.trained_parameters().keys()
    assert equal(model.take_ema_start(), named("unet", main_weights)) and model.ema_start is None


@pytest.mark.parametrize(
    ("flags", "averaged"),
    [
        ({"revision": "v2"}, None),
        ({"non_ema_revision": "v2"}, 0),
        ({"revision": "v2", "non_ema_variant": "non_ema"}, 1),
    ],
)
def test_of_the_hub_the_revisions_are_trained_and_averaged_that_were_asked_for(
    flags, averaged, hub_cache, main_weights, raw_weights
):
    """diffusers' script crashes on any revision. Those of v2 are the main ones and 1."""
    model = load("org/name", cache_dir=str(hub_cache), **flags)
    later = {name: value + 1 for name, value in main_weights.items()}
    assert equal(weights_of(model), raw_weights if "non_ema_variant" in flags else later)
    if averaged is None:
        assert model.ema_start is None
    else:
        assert equal(model.ema_start, named("unet", later if averaged else main_weights))


# -- models that cannot be trained -----------------------------------------------------------------------------------


def test_components_that_do_not_go_together_are_refused(copied):
    config = UNet2DConditionModel.load_config(copied / "unet") | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(copied / "unet")
    with pytest.raises(ModelError, match=r"9 channels.*4.*inpainting"):
        load(copied)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"non_ema_variant": "other"}, ["--non_ema_variant other"]),
        ({"variant": "other"}, ["variant other"]),
        ({"non_ema_revision": "other"}, ["--non_ema_revision other", "--non_ema_variant"]),  # a folder has none
        ({"unet_config": "no_such_file.yaml"}, ["--unet_config", "no_such_file.yaml"]),
        ({"unet_config": "{layers_per_block: [}"}, ["--unet_config"]),
        ({"unet_config": "{layers_per_blok: 3}"}, ["--unet_config", "layers_per_blok"]),
        ({"unet_config": "{block_out_channels: [8, 16, 32]}"}, ["--unet_config"]),
        ({"unet_config": "{norm_num_groups: 3}"}, ["--unet_config"]),
        ({"unet_config": "{dropout: 0.1}"}, ["--unet_config", "dropout"]),
        ({"unet_config": "{cross_attention_dim: 24}"}, ["24", "16", "--unet_config"]),  # the text encoder gives 16
        ({"unet_config": "{in_channels: 9}"}, ["9", "4"]),
        ({"unet_config": "{out_channels: 3}"}, ["3", "4"]),
        ({"unet_config": "{layers_per_block: 0}"}, ["--unet_config", "layers_per_block 0"]),
        ({"unet_config": "{time_embedding_dim: -1}"}, ["--unet_config", "time_embedding_dim -1"]),
        # What diffusers builds, and what only a forward pass tells
        ({"unet_config": "{num_class_embeds: 3}"}, ["--unet_config {num_class_embeds: 3}", "class_labels"]),
        ({"unet_config": "{encoder_hid_dim: 5}"}, ["--unet_config {encoder_hid_dim: 5}", "cannot be used"]),
        ({"unet_config": "{dual_cross_attention: true}"}, ["--unet_config {dual_cross_attention: true}"]),
        ({"unet_config": "{downsample_padding: 3}"}, ["--unet_config {downsample_padding: 3}"]),
        ({"unet_config": "{conv_out_kernel: 4}"}, ["--unet_config {conv_out_kernel: 4}", "4 x 4", "(3, 3)"]),
    ],
)
def test_flags_that_cannot_be_followed_are_named(flags, names, tiny_model):
    with pytest.raises(ModelError) as caught:
        load(tiny_model, from_scratch="unet_config" in flags, **flags)
    assert [name for name in names if name not in str(caught.value)] == []


def test_a_configuration_that_is_not_utf_8_is_named(tiny_model, tmp_path):
    (tmp_path / "unet.yaml").write_text("{layers_per_block: 1}  # größer", encoding="latin-1")
    with pytest.raises(UserError, match=r"unet\.yaml is not UTF-8"):
        load(tiny_model, from_scratch=True, unet_config=str(tmp_path / "unet.yaml"))


def test_nothing_of_a_pickle_is_loaded_or_copied(copied, output, bomb):
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for name, stem in stems.items():
        for pickle in (f"{stem}.bin", "pytorch_model.bin"):
            torch.save(bomb, copied / name / pickle)
    load(copied).save_pipeline(output, {}, None)
    assert not list(output.rglob("*.bin"))
    (copied / "vae" / MAIN).unlink()
    with pytest.raises(ModelError, match=r"vae.*safetensors"):
        load(copied)
    assert not bomb.path.exists()


# -- from scratch ----------------------------------------------------------------------------------------------------


def test_from_scratch_depends_on_the_seed_alone(tiny_model, main_weights):
    before = torch.get_rng_state()
    first = weights_of(load(tiny_model, seed=1, from_scratch=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert equal(first, weights_of(load(tiny_model, seed=1, from_scratch=True)))
    assert not equal(first, weights_of(load(tiny_model, seed=2, from_scratch=True)))
    assert first.keys() == main_weights.keys() and not equal(first, main_weights)


def test_unet_config_is_read_from_text_and_from_files(tiny_model, tmp_path):
    (tmp_path / "unet.json").write_text('{"layers_per_block": 2}')
    (tmp_path / "unet.yaml").write_text("layers_per_block: 2\n")
    longer_than_a_file_name = "{layers_per_block: 2}" + " " * 300
    for config in ("{layers_per_block: 2}", tmp_path / "unet.json", tmp_path / "unet.yaml", longer_than_a_file_name):
        unet = load(tiny_model, from_scratch=True, unet_config=str(config)).components["unet"]
        assert len(unet.down_blocks[0].resnets) == 2
        assert list(unet.config.block_out_channels) == [8, 16]  # what is not named stays as in the base


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_text", [False, True])
def test_trained_weights_and_their_average_come_back_from_a_checkpoint(with_text, tiny_model, output):
    model = load(tiny_model, train_text_encoder=with_text)
    average = average_of(model)
    trained = {name: value.detach().clone() for name, value in model.trained_parameters().items()}
    model.save_trained(output, model.trained_parameters())
    model.save_trained(output, average.shadow, "_ema")
    assert {path.name for path in output.iterdir()} == {
        f"{name}{end}" for name in model.trained for end in ("", "_ema")
    }

    again = load(tiny_model, train_text_encoder=with_text)
    shadow = again.load_trained(output, ema=True)
    assert equal({name: value.detach() for name, value in again.trained_parameters().items()}, trained)
    assert equal(shadow, average.shadow) and not equal(shadow, trained)
    assert again.load_trained(output, ema=False) is None


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {"train_text_encoder": True}, r"text_encoder.*--train_text_encoder"),
        ({"from_scratch": True, "unet_config": "{layers_per_block: 2}"}, {}, r"unet.*unknown.*of another shape"),
        (None, {}, "no trained unet: it was made by train_lora"),
    ],
)
def test_a_checkpoint_of_another_run_is_named(before, now, named, tiny_model, output):
    if before is not None:
        load(tiny_model, **before).save_trained(output, {})
    with pytest.raises(ModelError, match=named) as caught:
        load(tiny_model, **now).load_trained(output, ema=False)
    assert len(str(caught.value)) < 1000


# -- the finished pipeline -------------------------------------------------------------------------------------------


def test_components_that_were_not_trained_are_copied_byte_for_byte(tiny_model, output):
    model = load(tiny_model)
    model.to_device("cpu", torch.bfloat16)  # as in a run: the frozen components in memory are not what is handed over
    train_a_little(model)
    model.save_pipeline(output, model.trained_parameters(), None)
    for name in ("vae", "tokenizer", "text_encoder", "scheduler"):
        assert hashes(output / name) == hashes(tiny_model / name)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= hashes(output / "tokenizer").keys()
    assert (output / "model_index.json").read_bytes() == (tiny_model / "model_index.json").read_bytes()
    # Without an average there is no variant
    assert sorted(hashes(output / "unet")) == ["config.json", MAIN]
    assert equal(StableDiffusionPipeline.from_pretrained(output).unet.state_dict(), weights_of(model))
    assert not equal(weights_of(model), load_file(tiny_model / "unet" / MAIN))


PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}


def with_scheduler(model, **settings):
    """Give a pipeline another scheduler, in both of its files; returns that of its configuration."""
    edit(model / "scheduler/scheduler_config.json", **settings)
    if "_class_name" in settings:
        edit(model / "model_index.json", scheduler=["diffusers", settings["_class_name"]])
    return model / "scheduler/scheduler_config.json"


@pytest.mark.parametrize(("base", "flag"), [("epsilon", "v_prediction"), ("v_prediction", None)])
def test_the_scheduler_says_what_was_trained_and_stays_of_its_class(base, flag, copied, output):
    with_scheduler(copied, **PNDM, prediction_type=base)
    model = load(copied, prediction_type=flag)
    assert model.scheduler.config.prediction_type == model.schedule.prediction_type == (flag or base)
    model.save_pipeline(output, model.trained_parameters(), None)
    saved, before = (folder / "scheduler/scheduler_config.json" for folder in (output, copied))
    assert json.loads(saved.read_text()) == json.loads(before.read_text()) | {"prediction_type": flag or base}
    assert flag or saved.read_bytes() == before.read_bytes()


@pytest.mark.parametrize(
    "settings", [PNDM, {"_class_name": "EulerDiscreteScheduler"}, {"_class_name": "DDIMScheduler"}]
)
def test_zero_snr_is_trained_validated_and_handed_over(settings, copied, output):
    path = with_scheduler(copied, **settings, rescale_betas_zero_snr=False)
    if settings is PNDM:
        path.write_text(path.read_text().replace('"clip_sample"', '"of_another_class"'))
    model = load(copied, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    expected = diffusers.DDIMScheduler.from_config(model.scheduler.config).alphas_cumprod
    assert torch.equal(model.schedule.alpha_bar, expected) and expected[-1] == 0 and expected[-2] > 0
    with model.pipeline() as pipeline:
        validation = pipeline.scheduler
    model.save_pipeline(output, {}, None)
    saved = StableDiffusionPipeline.from_pretrained(output).scheduler
    kind = settings["_class_name"].replace("PNDM", "DDIM")  # which does not know it
    assert type(saved).__name__ == kind == json.loads((output / "model_index.json").read_text())["scheduler"][1]
    for scheduler in (validation, saved):
        config = scheduler.config
        assert (config.rescale_betas_zero_snr, config.timestep_spacing) == (True, "trailing")
        assert config.prediction_type == "v_prediction" and scheduler.alphas_cumprod[-1] <= 2**-24
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999
    if settings is PNDM:  # PNDM never clipped latents, which is DDIM's default
        assert saved.config.clip_sample is False and "skip_prk_steps" not in saved.config


def test_a_scheduler_that_cannot_sample_what_was_trained_gives_way_to_ddim(copied, output):
    with_scheduler(copied, **PNDM)
    model = load(copied, prediction_type="sample")
    model.save_pipeline(output, {}, None)
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    assert (
        type(pipeline.scheduler).__name__ == "DDIMScheduler" and pipeline.scheduler.config.prediction_type == "sample"
    )
    assert pipeline("a red circle", num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)


def test_zero_snr_of_the_base_stays_without_the_flag(copied, output):
    path = with_scheduler(copied, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    model = load(copied)
    assert model.schedule.alpha_bar[-1] == 0
    model.save_pipeline(output, {}, None)
    assert (output / "scheduler/scheduler_config.json").read_bytes() == path.read_bytes()


def test_the_average_is_the_pipeline_and_the_raw_weights_are_its_variant(tiny_model, output):
    model = load(tiny_model, non_ema_variant="non_ema", train_text_encoder=True)
    average = average_of(model)
    trained = {name: {key: value.clone() for key, value in weights_of(model, name).items()} for name in model.trained}
    model.save_pipeline(output, model.trained_parameters(), average.shadow)
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    for name, cls in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        averaged = getattr(pipeline, name).state_dict()
        own = {key: value for key, value in average.shadow.items() if key.startswith(f"{name}.")}
        assert equal(named(name, averaged), own)
        raw = cls.from_pretrained(output / name, variant="non_ema").state_dict()
        assert equal(raw, trained[name]) and not equal(raw, averaged)
        assert equal(weights_of(model, name), trained[name])


def test_a_trained_text_encoder_is_written_under_the_names_that_every_tool_knows(tiny_model, output):
    model = load(tiny_model, train_text_encoder=True)
    train_a_little(model)
    model.save_pipeline(output, model.trained_parameters(), None)
    written = load_file(output / "text_encoder/model.safetensors")
    assert written.keys() == load_file(tiny_model / "text_encoder/model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in written)
    assert hashes(output / "text_encoder")["config.json"] == hashes(tiny_model / "text_encoder")["config.json"]
    for again in (
        CLIPTextModel.from_pretrained(output / "text_encoder"),
        StableDiffusionPipeline.from_pretrained(output).text_encoder,
        load(output).components["text_encoder"],
    ):
        assert equal(again.state_dict(), weights_of(model, "text_encoder"))
