"""The embedded models: load as any Stable Diffusion or SDXL does, are small, and really have learned."""

import json

import pytest
import torch
from diffusers import (
    IFSuperResolutionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from finetuning.families.pipelines import open_pipeline
from finetuning.shapes.scenes import SHAPES
from finetuning.shapes.write_dataset import write
from models import measure_mini_x4
from models.measure_mini_sd import generate, held_out_scenes, score, table

pytestmark = pytest.mark.run


@pytest.fixture(scope="module", params=["mini-sd", "mini-sdxl"])
def folder(root, request):
    return root / "models" / request.param


def test_it_is_a_plain_sdxl_that_tells_its_text_encoders_by_their_widths(root):
    pipeline = StableDiffusionXLPipeline.from_pretrained(root / "models/mini-sdxl", add_watermarker=False)
    assert pipeline.vae_scale_factor == 8 and pipeline.config.force_zeros_for_empty_prompt
    first, second = pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size
    assert first != second and pipeline.unet.config.cross_attention_dim == first + second


def test_it_is_a_plain_stable_diffusion_with_both_weights(root):
    folder = root / "models/mini-sd"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.vae_scale_factor == 8 and pipeline.unet.config.in_channels == 4
    raw = UNet2DConditionModel.from_pretrained(folder / "unet", variant="non_ema")
    averaged = pipeline.unet.state_dict()
    assert any(not torch.equal(value, averaged[name]) for name, value in raw.state_dict().items())


def test_it_holds_safetensors_only_and_at_most_16_megabytes(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]


def test_combinations_that_were_never_trained_on_are_drawn_right(folder):
    """A small sample of what the card reports in full."""
    singles, _ = held_out_scenes(512)
    scenes = singles[:24]
    images = generate(open_pipeline(folder, scheduler="dpm++"), scenes, guidance_scale=3.0, steps=20)
    assert score(scenes, images)["shape and color"] >= 0.8


def test_the_card_shows_the_figures_that_were_measured(folder):
    figures = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    assert table(figures) in (folder / "README.md").read_text(encoding="utf-8")
    checker = [result for name, result in figures.items() if "truth" in name]
    assert len(checker) == 2 and all(result["shape and color"] >= 0.99 for result in checker)


# -- the upscaler ------------------------------------------------------------------------------------------------------


def test_the_upscaler_is_a_plain_one_and_its_card_shows_the_figures_that_were_measured(root):
    folder = root / "models/mini-x4"
    assert IFSuperResolutionPipeline.from_pretrained(folder).unet.config.class_embed_type == "timestep"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    report = json.loads((folder / "upscaling.json").read_text(encoding="utf-8"))
    assert measure_mini_x4.table(report) in (folder / "README.md").read_text(encoding="utf-8")


def test_images_that_were_never_seen_are_enlarged_better_than_by_lanczos(root, tmp_path, monkeypatch):
    """A small sample of what the card reports in full."""
    write(tmp_path / "validation", 4, ["filled", "chalk"], SHAPES, 0.5, held_out=True, seed=1, side=256)
    words = ["--data", tmp_path, "--model", root / "models/mini-x4", "--steps", 2, "--output_dir", tmp_path]
    monkeypatch.setattr("sys.argv", ["measure_mini_x4", *map(str, words)])
    measure_mini_x4.main()
    report = json.loads((tmp_path / "upscaling.json").read_text(encoding="utf-8"))
    corrected = report["metrics"]["PSNR"][f"{root / 'models/mini-x4'}, corrected"]
    assert corrected["minus lanczos"]["value"] > 0.3 and (tmp_path / "samples.png").is_file()
