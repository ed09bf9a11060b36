"""Pipelines to generate with: which weights, which autoencoder, which sampler."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.families.lora_files import DIFFUSERS_NAME, KOHYA_NAME, RAW_NAME
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import SCHEDULERS, ModelSource, check_models, open_pipeline

MAIN = "unet/diffusion_pytorch_model.safetensors"
RAW = "unet/diffusion_pytorch_model.non_ema.safetensors"


def equal(module, weights):
    own = module.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


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


# -- what it is made of ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "file"), [("ema", MAIN), ("raw", RAW)])
def test_a_pipeline_has_the_averaged_or_the_raw_weights_in_the_dtype_asked_for(tiny_model, weights, file):
    assert equal(open_pipeline(tiny_model, weights=weights).unet, load_file(tiny_model / file))
    pipeline = open_pipeline(tiny_model, weights=weights, dtype=torch.bfloat16)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}
    assert type(pipeline.scheduler) is diffusers.DDPMScheduler  # its own, where none is asked for


def test_where_there_is_one_kind_of_weights_that_one_is_used(copied):
    (copied / RAW).unlink()
    assert equal(open_pipeline(copied, weights="raw").unet, load_file(copied / MAIN))


def test_a_variant_is_not_asked_of_a_checkpoint(tiny_model, copied, tmp_path):
    """A command has one --variant for all its models."""
    shutil.copytree(tiny_model / "unet", tmp_path / "checkpoint-4/unet")
    (tmp_path / "checkpoint-4/training_state.json").write_text("{}")
    assert open_pipeline(tmp_path / "checkpoint-4", variant="fp16", base=tiny_model)


@pytest.mark.parametrize("inside", ["", "vae"])
def test_another_autoencoder_comes_from_its_own_folder_or_from_a_pipelines(inside, tiny_model, tmp_path):
    target = tmp_path / "other" / inside
    shutil.copytree(tiny_model / "vae", target)
    path = target / "diffusion_pytorch_model.safetensors"
    weights = {name: value + 1 for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    assert equal(open_pipeline(tiny_model, vae=str(tmp_path / "other")).vae, weights)


# -- generating ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SCHEDULERS)
def test_every_sampler_generates_an_image(key, tiny_model):
    pipeline = open_pipeline(tiny_model, scheduler=key)
    assert type(pipeline.scheduler) is getattr(diffusers, SCHEDULERS[key])
    image = lambda seed: pipeline(
        "a red circle", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(seed)
    ).images[0]
    assert image(0).size == (32, 32)
    assert image(0).tobytes() == image(0).tobytes() != image(1).tobytes()


def test_another_sampler_still_knows_what_the_model_predicts(copied):
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert open_pipeline(copied, scheduler="euler").scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("key", ["euler_a", "pndm"])
def test_a_sampler_that_diffusers_has_not_finished_is_refused_and_not_met_in_a_traceback(key, copied):
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ModelError, match="predict the sample: take another --scheduler"):
        open_pipeline(copied, scheduler=key)
    for other in SCHEDULERS.keys() - {"euler_a", "pndm"}:
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        assert open_pipeline(copied, scheduler=other)("a red circle", **options).images.isfinite().all()


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(("key", "predicts", "refused"), [
    *((key, "v_prediction", key == "pndm") for key in SCHEDULERS), ("ddim", "sample", False),
    ("dpm++", "sample", False), ("ddim", "epsilon", True), ("ddpm", "epsilon", True),
])  # fmt: skip
def test_a_sampler_honours_zero_snr_or_is_refused(key, predicts, refused, copied):
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ZERO_SNR | {"prediction_type": predicts}))
    if refused:
        with pytest.raises(ModelError, match=r"(PNDM|DDIM|DDPM)Scheduler, which .*rescale_betas_zero_snr.*--scheduler"):
            open_pipeline(copied, scheduler=key)
        return
    pipeline = open_pipeline(copied, scheduler=key)
    assert pipeline.scheduler.alphas_cumprod[-1] <= 2**-24
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    assert pipeline("a red circle", **options).images.isfinite().all()


@pytest.mark.parametrize("key", [None, "dpm++"])
def test_a_checkpoint_samples_with_the_zero_snr_that_its_run_trained_with(key, tiny_model, tmp_path):
    shutil.copytree(tiny_model / "unet", tmp_path / "checkpoint-4/unet")
    args = {"pretrained_model_name_or_path": str(tiny_model), "prediction_type": "v_prediction"}
    state = json.dumps({"args": args | {"rescale_betas_zero_snr": True}})
    (tmp_path / "checkpoint-4/training_state.json").write_text(state)
    config = open_pipeline(tmp_path / "checkpoint-4", scheduler=key).scheduler.config
    assert ZERO_SNR.items() <= config.items()


@pytest.mark.parametrize(("models", "upscalers", "said"), [
    (["models/mini-x4"], [], "enlarges images and makes none"),
    ([], ["models/mini-sd"], "is no upscaler"),
])  # fmt: skip
def test_what_enlarges_and_what_does_not_are_not_taken_for_each_other(models, upscalers, said, root):
    with pytest.raises(ModelError, match=said):
        check_models([root / name for name in models], upscalers=[root / name for name in upscalers])
