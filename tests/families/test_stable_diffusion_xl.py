"""SDXL, a tiny one of random weights, goes through everything that a run does."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError

CAPTIONS = ["a red circle", "a blue square"]


@torch.no_grad()
def predictions(folder, captions=CAPTIONS):
    """(ours, the pipeline's own) of a folder, for the same noisy latents, captions, sizes and crops."""
    noisy, timesteps = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([200, 700])
    sizes = torch.tensor([[64, 64, 0, 0, 32, 32], [80, 48, 3, 5, 32, 32]])
    model = load_model(ModelArgs(str(folder)))
    batch = SimpleNamespace(captions=captions, tokens=model.tokenize(captions), sizes=sizes)
    ours = model.denoiser.eval()(noisy, timesteps, **model.condition(batch, noisy)[1])

    theirs = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)
    embeds, nothing, pooled, nothing_pooled = theirs.encode_prompt(captions, device="cpu", negative_prompt=None)
    for row, caption in enumerate(captions):
        if not caption:
            embeds[row], pooled[row] = nothing[row], nothing_pooled[row]
    time_ids = torch.cat([
        theirs._get_add_time_ids(tuple(row[:2]), tuple(row[2:4]), tuple(row[4:]), torch.float32, pooled.shape[1])
        for row in sizes.tolist()
    ])  # fmt: skip
    conditions = {"text_embeds": pooled, "time_ids": time_ids}
    return ours, theirs.unet(noisy, timesteps, embeds, added_cond_kwargs=conditions, return_dict=False)[0]


@pytest.mark.parametrize("captions", [CAPTIONS, ["a red circle", ""]], ids=["captions", "one dropped"])
def test_its_prediction_is_the_pipelines_own(tiny_sdxl, captions):
    ours, theirs = predictions(tiny_sdxl, captions)
    assert torch.equal(ours, theirs)


@pytest.fixture
def copied(tiny_sdxl, tmp_path):
    """A function (file, key=value, ...): a copy of the model with other settings in one of its JSON files."""

    def copy(file="model_index.json", **settings):
        folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | settings))
        return folder

    return copy


def test_a_dropped_caption_is_the_text_of_nothing_where_the_pipeline_says_so(tiny_sdxl, copied):
    ours, theirs = predictions(copied(force_zeros_for_empty_prompt=False), ["a red circle", ""])
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours[1], predictions(tiny_sdxl, ["a red circle", ""])[0][1])


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_in_fp16_stays_fp32_whatever_the_run_computes_in(copied, upcast):
    model = load_model(ModelArgs(str(copied("vae/config.json", force_upcast=upcast))))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = model.codec.posterior(pixels)[0]
    images = model.components["vae"].decode(latents).sample
    model.to_device(torch.device("cpu"), torch.float16)
    vae = model.components["vae"]
    assert vae.dtype == (torch.float32 if upcast else torch.float16)
    assert model.components["text_encoder"].dtype == torch.float16
    if upcast:
        assert torch.equal(model.codec.posterior(pixels)[0], latents)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vae.decode(latents).sample, images)


def test_another_autoencoder_is_trained_with_and_handed_over(tiny_sdxl, tiny_model, tmp_path):
    model = load_model(ModelArgs(str(tiny_sdxl), pretrained_vae_model_name_or_path=str(tiny_model)))
    model.save_pipeline(tmp_path, model.trained_parameters(), None)
    for of, same in ((tiny_model, True), (tiny_sdxl, False)):
        config, weights = (of / "vae" / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
        assert (config.read_bytes() == (tmp_path / "vae/config.json").read_bytes()) is same
        assert (weights.read_bytes() == (tmp_path / "vae" / weights.name).read_bytes()) is same


def test_each_text_encoder_may_have_a_learning_rate_of_its_own(tiny_sdxl):
    model = load_model(ModelArgs(str(tiny_sdxl), train_text_encoder=True))
    for given, expected in (([1e-5], [1e-4, 1e-5, 1e-5]), ([1e-5, 1e-6], [1e-4, 1e-5, 1e-6])):
        assert [group["lr"] for group in model.parameter_groups(1e-4, given)] == expected


def test_what_it_lacks_is_named_in_one_line(copied):
    folder = copied()
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(ModelError, match=r"^\S+ lacks tokenizer_2, which its model_index.json names[^\n]*$"):
        load_model(ModelArgs(str(folder)))


def test_sizes_that_are_no_multiple_of_8_are_refused(script, training, arguments, tmp_path, capfd):
    assert training.run(script, [*arguments, "--resolution", "36"], tmp_path / "run") == 1
    assert "--resolution 36" in capfd.readouterr().err


@pytest.mark.parametrize("forced", [True, False])
def test_its_pipeline_keeps_the_settings_of_its_model_index(copied, forced):
    folder = copied(force_zeros_for_empty_prompt=forced)
    with load_model(ModelArgs(str(folder))).pipeline() as pipeline:
        assert pipeline.config.force_zeros_for_empty_prompt is forced


@torch.no_grad()
def predictions_of_text(folder, name):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)
    return getattr(pipeline, name)(torch.arange(16)[None], return_dict=False)[0]


@pytest.fixture
def arguments(tiny_sdxl, shapes_folder):
    return f"""
        --pretrained_model_name_or_path {tiny_sdxl} --train_data_dir {shapes_folder} --resolution 32 --seed 3
        --train_batch_size 2 --max_train_steps 2 --checkpointing_steps 1 --use_ema --proportion_empty_prompts 0.3
        --random_flip --learning_rate 1e-2 --validation_epochs 0 --report_to none --lr_warmup_steps 0
        --center_crop --cache_latents
    """.split()


@pytest.mark.parametrize("flags", ["", "--train_text_encoder"], ids=["unet", "all"])
def test_it_is_trained_saved_resumed_and_handed_over(script, training, arguments, tmp_path, flags, tiny_sdxl):
    words = [*arguments, *flags.split()]
    if script == "train_lora":
        words.append("--save_kohya")
    elif not flags:
        words += ["--validation_prompt", "circle", "--validation_inference_steps", "1"]
    straight, resumed = tmp_path / "straight/run", tmp_path / "resumed/run"  # kohya files hold the name
    assert training.run(script, words, straight) == 0
    training.assert_resumes_exactly(script, words, straight, 1, resumed)
    if script == "train_lora":  # the run itself has loaded each file into a fresh pipeline and compared
        keys = load_file(straight / "pytorch_lora_weights.safetensors")
        assert any(key.startswith("text_encoder_2.") for key in keys) is bool(flags)
        keys = load_file(straight / "kohya_lora_weights.safetensors")
        assert any(key.startswith("lora_te2_") for key in keys) is bool(flags)
        return
    ours, theirs = predictions(straight)
    assert torch.equal(ours, theirs) and not torch.equal(ours, predictions(tiny_sdxl)[0])
    for name in ("text_encoder", "text_encoder_2"):
        before, after = (predictions_of_text(folder, name) for folder in (tiny_sdxl, straight))
        assert torch.equal(before, after) is not bool(flags)
