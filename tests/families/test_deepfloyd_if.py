"""Pixel-space models: DeepFloyd IF's base and upscaler of random weights go through everything that a run does."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate_model
import generate_images
import merge_checkpoints
from finetuning.families.deepfloyd_if import downscaled
from finetuning.families.generation import UpscalerArgs, back_projected, generate, upscale
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError, UpscalingArgs
from finetuning.families.pipelines import SCHEDULERS, open_pipeline
from finetuning.merging.merged_pipeline import MergedPipeline
from finetuning.merging.sweep import SweepArgs
from models import pixel_start

TINY = {"block_out_channels": (8, 16), "attention_head_dim": 4, "norm_num_groups": 4, "sample_size": 16}
TEXT = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
KINDS = {"base": ("mini-if", IFPipeline), "upscaler": ("mini-x4", IFSuperResolutionPipeline)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder of a pipeline of random weights}. Never write to them."""
    made = {}
    for kind, (preset, _) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        side, predicts = {"upscaler": (32, "v_prediction"), "base": (16, "epsilon")}[kind]
        pixel_start.make(made[kind], preset, TINY | {"sample_size": side}, TEXT, predicts)
    return made


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind):
    return folders[kind]


def batch_of(captions, model):
    return SimpleNamespace(
        captions=captions, tokens=model.tokenize(captions), step=3, rows=list(range(len(captions))),
        sizes=torch.zeros(len(captions), 6),
    )  # fmt: skip


@pytest.fixture
def tuned(folders, tmp_path):
    """The base with another denoiser and another text encoder."""
    target = shutil.copytree(folders["base"], tmp_path / "tuned")
    for path in target.glob("*/*.safetensors"):
        tensors = {key: value + 0.1 * torch.ones_like(value) for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_sums_that_leave_fp16s_range_are_fp32_where_images_are_validated_too(folders):
    """Training encodes text outside of autocast, a pipeline within it."""
    model, seen = load_model(ModelArgs(str(folders["base"]))), []
    model.to_device(torch.device("cpu"), torch.float16)
    for name, layer in model.components["text_encoder"].named_modules():
        if name.endswith(".wo"):
            with torch.no_grad():
                layer.weight.fill_(1e6)
            layer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            model.encode_text(model.tokenize(["a red circle"]))
    assert len(seen) == 2 and all(one.dtype == torch.float32 and one.isfinite().all() for one in seen)


def test_it_is_merged_into_a_pipeline_and_not_into_a_single_file(folders, tuned, tmp_path, capsys):
    words = ["--base", folders["base"], "--tuned", tuned, "--ratio", 0.5, "--output_dir"]
    assert merge_checkpoints.main([*map(str, words), str(tmp_path / "merged")]) == 0
    for component in ("unet", "text_encoder"):
        base, merged = (
            next((folder / component).glob("*.safetensors")) for folder in (folders["base"], tmp_path / "merged")
        )
        for key, value in load_file(merged).items():
            torch.testing.assert_close(value, load_file(base)[key] + 0.05)
    IFPipeline.from_pretrained(tmp_path / "merged")
    for flags, said in ((["--single_file"], "leave --single_file out"), (["--block_ratios", "0", "1"], "blocks")):
        assert merge_checkpoints.main([*map(str, words), str(tmp_path / "no"), *flags]) == 1
        assert said in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_it_is_mixed_in_memory_with_its_tied_weights(folders, tuned):
    args = SweepArgs(base=str(folders["base"]), tuned=[str(tuned)], output_dir="unused")
    mixed = MergedPipeline(args, args.open_models(args.origin), "dpm++")
    mixed.set(1.0)
    expected = open_pipeline(str(tuned))
    for component in ("unet", "text_encoder"):
        found = getattr(mixed.pipeline, component).state_dict()
        assert all(torch.equal(found[key], value) for key, value in getattr(expected, component).state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("captions", [["A Red circle ", "a blue square"], ["a red circle", ""]], ids=["case", "empty"])
def test_its_prediction_is_the_pipelines_own(folder, kind, captions):
    model = load_model(ModelArgs(str(folder)))
    theirs = KINDS[kind][1].from_pretrained(folder, use_safetensors=True)
    embeds, _ = theirs.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False, clean_caption=False)
    images, timesteps = torch.randn(2, 3, 16, 16).clamp(-1, 1), torch.tensor([200, 700])
    latents, conditioning = model.condition(batch_of(captions, model), images, seed=1)
    ours = model.denoiser.eval()(latents, timesteps, **conditioning)
    extra = {}
    if kind == "upscaler":
        low, level = (conditioning["extras"][name] for name in ("low_resolution", "noise_level"))
        images, extra = torch.cat([images, low], 1), {"class_labels": level}
    assert torch.equal(ours, theirs.unet(images, timesteps, embeds, return_dict=False, **extra)[0])


def test_the_small_image_is_that_of_the_pipeline_and_a_patch_is_cut_from_the_whole(folders):
    model = load_model(ModelArgs(str(folders["upscaler"])))
    images, batch = torch.rand(2, 3, 32, 32) * 2 - 1, batch_of(["", ""], model)
    model.conditioning_args = UpscalingArgs(max_noise_level=0)
    whole, conditioning = model.condition(batch, images)
    theirs = F.interpolate(downscaled(images, 4), (32, 32), mode="bilinear", align_corners=True)
    noisy = conditioning["extras"]["low_resolution"]
    assert whole is images and conditioning["extras"]["noise_level"].tolist() == [0, 0]
    assert torch.allclose(noisy, theirs, atol=0.1) and not torch.equal(noisy, theirs)  # the noise of timestep 0

    model.conditioning_args = UpscalingArgs(max_noise_level=0, patch_size=16)
    patches, conditioning = model.condition(batch, images)
    for row, patch in enumerate(patches):
        places = [
            (top, left) for top in range(17) for left in range(17)
            if torch.equal(images[row, :, top : top + 16, left : left + 16], patch)
        ]  # fmt: skip
        ((top, left),) = places
        small = conditioning["extras"]["low_resolution"][row]
        assert torch.allclose(small, theirs[row, :, top : top + 16, left : left + 16], atol=0.1)


def test_noise_levels_reach_from_nothing_to_the_most(folders):
    model = load_model(ModelArgs(str(folders["upscaler"])))
    model.conditioning_args = UpscalingArgs(max_noise_level=3)
    batch = batch_of([""] * 200, model)
    levels = model.condition(batch, torch.zeros(200, 3, 8, 8))[1]["extras"]["noise_level"]
    assert sorted(set(levels.tolist())) == [0, 1, 2, 3]


def test_a_sharded_t5_is_trained_like_a_whole_one_although_two_of_its_weights_are_one(
    folders, training, shapes_folder, tmp_path
):
    words = f"""
        --pretrained_model_name_or_path {folders["base"]} --train_data_dir {shapes_folder} --resolution 16 --seed 3
        --train_batch_size 2 --max_train_steps 2 --train_text_encoder --learning_rate 1e-4 --lr_warmup_steps 0
        --validation_epochs 0 --validation_loss_rows 0 --report_to none
    """.split()
    script, fsdp = "train_text_to_image", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    # Both on two processes: its dropout draws for each
    assert training.on_two_processes(script, words, tmp_path / "whole") == [0, 0]
    assert training.on_two_processes(script, words, tmp_path / "sharded", **fsdp) == [0, 0]
    start, whole, sharded = (
        load_file(folder / "text_encoder/model.safetensors")
        for folder in (folders["base"], tmp_path / "whole", tmp_path / "sharded")
    )
    assert not torch.equal(sharded["shared.weight"], start["shared.weight"])
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("flags", ["", "--train_text_encoder"], ids=["unet", "all"])
def test_it_is_trained_saved_resumed_and_handed_over(script, training, kind, folder, shapes_folder, tmp_path, flags):
    if script == "train_lora" and flags:
        pytest.skip("a T5 takes no adapters")
    words = f"""
        --pretrained_model_name_or_path {folder} --train_data_dir {shapes_folder} --resolution 32 --seed 3
        --train_batch_size 2 --max_train_steps 2 --checkpointing_steps 1 --use_ema --proportion_empty_prompts 0.3
        --random_flip --learning_rate 1e-2 --validation_epochs 0 --report_to none --lr_warmup_steps 0 {flags}
    """.split()
    if kind == "upscaler":
        words += ["--patch_size", "16"]
    straight, resumed = tmp_path / "straight/run", tmp_path / "resumed/run"
    assert training.run(script, words, straight) == 0
    training.assert_resumes_exactly(script, words, straight, 1, resumed)
    if script == "train_lora":
        assert load_file(straight / "pytorch_lora_weights.safetensors")
        return
    before, after = (KINDS[kind][1].from_pretrained(one, use_safetensors=True) for one in (folder, straight))
    changed = lambda part: (
        not all(
            torch.equal(*pair)
            for pair in zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        )
    )
    assert changed("unet") and changed("text_encoder") is bool(flags)


def test_the_text_encoder_of_a_lora_run_is_refused(training, folders, shapes_folder, tmp_path, capsys):
    words = f"--pretrained_model_name_or_path {folders['base']} --train_data_dir {shapes_folder} --resolution 16"
    assert training.run("train_lora", words.split(), tmp_path / "run", "--train_text_encoder", "--save_kohya") == 1
    error = capsys.readouterr().err
    assert "--train_text_encoder" in error and "--save_kohya" in error


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_every_sampler_generates(folder, kind, scheduler):
    if kind == "upscaler" and scheduler in ("euler", "euler_a"):
        with pytest.raises(ModelError, match="Euler"):
            open_pipeline(folder, scheduler=scheduler)
        return
    pipeline = open_pipeline(folder, scheduler=scheduler)
    generators = [torch.Generator().manual_seed(0)]
    if kind == "base":
        (image,) = generate(pipeline, ["a red circle"], generators, batch_size=1, num_inference_steps=3)
        assert image.size == (16, 16)
        with pytest.raises(ModelError, match="finite"):
            pipeline.unet.conv_in.weight.data.fill_(float("nan"))
            list(generate(pipeline, ["a red circle"], generators, batch_size=1, num_inference_steps=2))
        return
    small = [Image.new("RGB", (8, 4), "red")]
    args = UpscalerArgs(upscaler_steps=3, upscaler_guidance_scale=2.0, upsample_temperature=0.997)
    (image,) = upscale(pipeline, small, ["a red circle"], generators, args, 1)
    assert image.size == (32, 16)


@pytest.mark.parametrize(
    "changed",
    [
        {"upsample_temperature": 0.5}, {"upscaler_noise_level": 400}, {"upscaler_guidance_scale": 9.0},
        {"upscaler_steps": 4}, {"back_projections": 1},
    ],
)  # fmt: skip
def test_every_flag_of_an_upscaler_changes_its_image(folders, changed):
    pipeline, small = open_pipeline(folders["upscaler"]), [Image.new("RGB", (8, 8), "red")]

    def image(**flags):
        args, generators = UpscalerArgs(**{"upscaler_steps": 2} | flags), [torch.Generator().manual_seed(0)]
        return next(upscale(pipeline, small, ["a red circle"], generators, args, 1)).tobytes()

    assert image() == image() != image(**changed)
    assert image() == image(upsample_temperature=1.0)  # nothing of the other settings stays in the pipeline


def test_an_upscaler_alone_generates_nothing(folders, tmp_path, capsys):
    words = ["--model", str(folders["upscaler"]), "--prompt", "x", "--output_dir", str(tmp_path / "out")]
    assert generate_images.main(words) == 1
    assert "--upscaler" in capsys.readouterr().err


def broken(folder, target, **settings):
    """A copy of a pipeline whose UNet has other settings."""
    model = KINDS["upscaler"][1].from_pretrained(folder)
    model.unet = type(model.unet).from_config(copy.deepcopy(dict(model.unet.config)) | settings)
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    "settings, why",
    [({"class_embed_type": None}, "class_embed_type"), ({"in_channels": 3}, "6 channels"), ({"out_channels": 3}, "6")],
)
def test_an_upscaler_that_would_be_told_nothing_is_refused(folders, tmp_path, settings, why):
    with pytest.raises(ModelError, match=why):
        load_model(ModelArgs(str(broken(folders["upscaler"], tmp_path / "model", **settings))))


def test_the_thresholding_of_the_start_is_the_clip_of_glide(folders):
    scheduler = DDPMScheduler.from_pretrained(folders["base"] / "scheduler")
    sample = torch.randn(2, 3, 8, 8) * 3
    assert torch.equal(scheduler._threshold_sample(sample), sample.clamp(-1, 1))


# -- the chain -------------------------------------------------------------------------------------------------------


def test_every_image_goes_through_the_upscaler(folders, tmp_path, capsys):
    words = f"--model {folders['base']} --num_inference_steps 2 --seed 0 1 --batch_size 2 --prompt star".split()
    small, large = tmp_path / "small", tmp_path / "large"
    assert generate_images.main([*words, "--output_dir", str(small)]) == 0
    words += f"--upscaler {folders['upscaler']} --upscaler_steps 2 --upsample_temperature 0.997".split()
    assert generate_images.main([*words, "--output_dir", str(large)]) == 0
    before, after = (json.loads((folder / "images.json").read_text()) for folder in (small, large))
    assert [one["size"] for one in before + after] == [[16, 16]] * 2 + [[32, 32]] * 2
    assert "upscaler" not in before[0] and after[0]["upsample_temperature"] == 0.997
    with pytest.raises(SystemExit):
        generate_images.main([*words[:2], "--prompt", "star", "--upscaler_steps", "2", "--output_dir", "x"])
    assert "--upscaler_steps does nothing without --upscaler" in capsys.readouterr().err


def test_a_chain_is_evaluated_beside_its_base_at_both_sizes(folders, shapes_folder, tmp_path):
    words = f"""
        --dataset {shapes_folder} --split validation --max_rows 2 --model base={folders["base"]} --no-noise_floor
        --checker finetuning.shapes.checker --upscaler_steps 2
        --num_inference_steps 2 --general_prompts none --metrics shapes --resolutions 16 32
        --output_dir {tmp_path / "report"}
    """.split()
    words += ["--chain", f"base, chained={folders['base']},{folders['upscaler']}"]
    assert evaluate_model.main(words) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert {side: list(found) for side, found in report["summary"]["shapes"].items()} == {
        "16": ["base", "base, chained"], "32": ["base", "base, chained"],
    }  # fmt: skip
    assert report["models"][1]["source"] == f"{folders['base']}, enlarged by {folders['upscaler']}"
    sizes = {label: Image.open(tmp_path / "report" / path).size for label, path in report["rows"][0]["images"].items()}
    assert sizes == {"base": (16, 16), "base, chained": (32, 32)}


def test_back_projection_brings_the_reduction_of_an_enlarged_image_nearer_to_the_small_one():
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
    large = small.resize((64, 48), Image.Resampling.NEAREST)

    def distance(image):
        reduced = np.asarray(image.resize(small.size, Image.Resampling.BICUBIC), float)
        return np.abs(reduced - np.asarray(small, float)).mean()

    assert back_projected(large, small, 0) is large
    none, one, many = (distance(back_projected(large, small, times)) for times in (0, 1, 5))
    assert many < one < none
    assert back_projected(large, small, 1).size == large.size
