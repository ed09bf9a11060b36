"""Opening whatever a person has as a pipeline that draws."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.families.lora_files import DIFFUSERS_NAME, KOHYA_NAME, RAW_NAME
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError
from finetuning.families.pipelines import SCHEDULERS, ModelSource, open_pipeline
from finetuning.training.ema import AveragedWeights

MAIN = "unet/diffusion_pytorch_model.safetensors"
RAW = "unet/diffusion_pytorch_model.non_ema.safetensors"


def equal(module, weights):
    own = module.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


def values(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


@pytest.fixture
def trained(tiny_model):
    """A model with a trained text encoder, and an average that differs from the trained weights."""
    args = ModelArgs(pretrained_model_name_or_path=str(tiny_model), train_text_encoder=True)
    model = load_model(args, None, seed=0)
    average = AveragedWeights(model.trained_parameters(), 0.5, "warm")
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter += 0.1
    average.update()
    return model, average


@pytest.fixture
def checkpoint(trained, tiny_model, tmp_path):
    """A checkpoint in the layout of training/checkpoint.py, as far as drawing needs it."""
    model, average = trained
    folder = tmp_path / "run" / "checkpoint-4"
    model.save_trained(folder)
    model.save_trained(folder, "_ema", average.shadow)
    args = {"pretrained_model_name_or_path": str(tiny_model), "revision": None, "variant": None, "cache_dir": None}
    state = {"step": 4, "args": args | {"prediction_type": "v_prediction"}}
    (folder / "training_state.json").write_text(json.dumps(state))
    return folder


def parts(named, part):
    """The weights of one part out of {"unet.name": tensor, "text_encoder.name": tensor}."""
    return {name.removeprefix(f"{part}."): value for name, value in named.items() if name.startswith(f"{part}.")}


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "path"),
    [
        ("base=models/mini-sd", "base", "models/mini-sd"),
        ("models/mini-sd", "mini-sd", "models/mini-sd"),
        ("runs/chalk/", "chalk", "runs/chalk/"),
        ("runs/chalk/checkpoint-300", "chalk/checkpoint-300", "runs/chalk/checkpoint-300"),
        ("after 300=runs/chalk/checkpoint-300", "after 300", "runs/chalk/checkpoint-300"),
        ("org/name", "name", "org/name"),
        ("runs/lr=1e-4", "lr=1e-4", "runs/lr=1e-4"),
        ("x=runs/lr=1e-4", "x", "runs/lr=1e-4"),
        ("loras/style.safetensors", "style", "loras/style.safetensors"),
        ("org/name/style.v2.safetensors", "style.v2", "org/name/style.v2.safetensors"),
        (f"runs/chalk/{DIFFUSERS_NAME}", "chalk", f"runs/chalk/{DIFFUSERS_NAME}"),
        (f"runs/chalk/{RAW_NAME}", "chalk", f"runs/chalk/{RAW_NAME}"),
        (f"raw=runs/chalk/{RAW_NAME}", "raw", f"runs/chalk/{RAW_NAME}"),
        (f"chalk/checkpoint-30/{DIFFUSERS_NAME}", "chalk/checkpoint-30", f"chalk/checkpoint-30/{DIFFUSERS_NAME}"),
        (f"runs/chalk/{KOHYA_NAME}", "kohya_lora_weights", f"runs/chalk/{KOHYA_NAME}"),
    ],
)
def test_a_model_is_named_by_its_label_or_its_path(text, label, path):
    assert ModelSource.parse(text) == ModelSource(label, path)


# -- which weights ---------------------------------------------------------------------------------------------------


def test_a_pipeline_folder_opens_with_its_averaged_or_its_raw_weights(tiny_model):
    assert equal(open_pipeline(tiny_model).unet, load_file(tiny_model / MAIN))
    assert equal(open_pipeline(tiny_model, weights="raw").unet, load_file(tiny_model / RAW))


def test_where_there_is_one_kind_of_weights_that_one_is_used(tiny_model, tmp_path):
    copied = Path(shutil.copytree(tiny_model, tmp_path / "copied", ignore=shutil.ignore_patterns("*non_ema*")))
    assert equal(open_pipeline(copied, weights="raw").unet, load_file(copied / MAIN))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_finished_pipeline_gives_both_its_trained_parts_of_one_kind(weights, trained, tmp_path):
    model, average = trained
    model.save_pipeline(tmp_path, average.shadow)
    expected = average.shadow if weights == "ema" else values(model.trained_parameters())
    pipeline = open_pipeline(tmp_path, weights=weights)
    assert equal(pipeline.unet, parts(expected, "unet"))
    assert equal(pipeline.text_encoder, parts(expected, "text_encoder"))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_checkpoint_opens_on_the_model_that_its_run_started_from(weights, checkpoint, trained, tiny_model):
    model, average = trained
    expected = average.shadow if weights == "ema" else values(model.trained_parameters())
    pipeline = open_pipeline(checkpoint, weights=weights)
    assert equal(pipeline.unet, parts(expected, "unet"))
    assert equal(pipeline.text_encoder, parts(expected, "text_encoder"))
    assert equal(pipeline.vae, load_file(tiny_model / "vae/diffusion_pytorch_model.safetensors"))


def test_a_checkpoint_without_an_average_gives_its_trained_weights(checkpoint, trained):
    shutil.rmtree(checkpoint / "unet_ema")
    shutil.rmtree(checkpoint / "text_encoder_ema")
    expected = values(trained[0].trained_parameters())
    assert equal(open_pipeline(checkpoint, weights="ema").unet, parts(expected, "unet"))


def shifted_vae(source, target):
    """The autoencoder of `source` with every weight 1 higher, in the folder `target`."""
    shutil.copytree(source / "vae", target)
    path = target / "diffusion_pytorch_model.safetensors"
    weights = {name: value + 1 for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return weights


def test_base_wins_over_the_model_that_the_run_started_from(checkpoint, tiny_model, tmp_path):
    other = Path(shutil.copytree(tiny_model, tmp_path / "other", ignore=shutil.ignore_patterns("vae")))
    weights = shifted_vae(tiny_model, other / "vae")
    assert equal(open_pipeline(checkpoint, base=other).vae, weights)


@pytest.mark.parametrize("inside", ["", "vae"])
def test_another_autoencoder_comes_from_its_own_folder_or_from_a_pipelines(inside, tiny_model, tmp_path):
    weights = shifted_vae(tiny_model, tmp_path / "other" / inside)
    assert equal(open_pipeline(tiny_model, vae=str(tmp_path / "other")).vae, weights)


def test_dtype_is_that_of_every_part(tiny_model):
    pipeline = open_pipeline(tiny_model, weights="raw", dtype=torch.bfloat16)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}


def test_what_is_not_a_pipeline_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be opened as a diffusers pipeline"):
        open_pipeline(tmp_path)


@pytest.mark.parametrize("file", [DIFFUSERS_NAME, f"lora/{DIFFUSERS_NAME}"])
@pytest.mark.parametrize("options", [{}, {"weights": "raw"}, {"base": "models/mini-sd"}])
def test_a_folder_of_a_lora_is_no_model_and_goes_with_its_base(file, options, tmp_path):
    """The folder of a run, and a checkpoint-N that is open for resuming."""
    folder = tmp_path / "checkpoint-4"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_bytes(b"")
    (folder / "training_state.json").write_text("{}")
    for source in (folder, str(folder)):
        with pytest.raises(ModelError) as caught:
            open_pipeline(source, **options)
        assert str(caught.value).startswith(f"{folder} holds a LoRA, not a whole model")
        assert "name its base with --model, and it with --lora" in str(caught.value)


def test_a_folder_that_holds_a_lora_of_another_name_is_not_opened_either(tmp_path):
    (tmp_path / KOHYA_NAME).write_bytes(b"")
    for source in (str(tmp_path), str(tmp_path / KOHYA_NAME)):
        with pytest.raises(ModelError, match="cannot be opened as a diffusers pipeline"):
            open_pipeline(source)


# -- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SCHEDULERS)
def test_every_sampler_draws_an_image(key, tiny_model):
    pipeline = open_pipeline(tiny_model, scheduler=key)
    assert type(pipeline.scheduler) is getattr(diffusers, SCHEDULERS[key])
    draw = lambda seed: pipeline(
        "a red circle", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(seed)
    ).images[0]
    assert draw(0).size == (32, 32)
    assert draw(0).tobytes() == draw(0).tobytes() != draw(1).tobytes()


def test_another_sampler_still_knows_what_the_model_predicts(tiny_model, tmp_path):
    copied = Path(shutil.copytree(tiny_model, tmp_path / "copied"))
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert open_pipeline(copied, scheduler="euler").scheduler.config.prediction_type == "v_prediction"


def test_no_scheduler_keeps_the_pipelines_own(tiny_model):
    assert type(open_pipeline(tiny_model).scheduler) is diffusers.DDPMScheduler
