"""generate_images.py, run as a user runs it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import generate_images
import train_lora
import train_text_to_image

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SMALL = ["--num_inference_steps", "2", "--size", "32"]


def generate(folder, *arguments):
    assert generate_images.main([*map(str, arguments), *SMALL, "--output_dir", str(folder)]) == 0
    return json.loads((folder / "images.json").read_text())


def test_prompts_by_seeds_by_models_by_guidance_make_images_a_grid_and_a_record(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\n")
    models = ["--model", f"one={tiny_model}", f"two={tiny_model}"]
    records = generate(
        tmp_path / "out", *models, "--prompt", "a red circle", "--prompts_file", prompts, "--seed", 0, 1,
        "--guidance_scale", 1, 3,
    )  # fmt: skip
    assert len(records) == 2 * 2 * 2 * 2
    assert len({record["file"] for record in records}) == len(records)
    for record in records:
        assert Image.open(tmp_path / "out" / record["file"]).size == (32, 32)
    assert "000_a-red-circle_two_seed1_g3_s2.png" in {record["file"] for record in records}
    width, height = Image.open(tmp_path / "out/grid.png").size
    assert width > 4 * 160 and height > 4 * 160  # two models x two scales; two prompts x two seeds


def test_an_image_depends_on_its_seed_alone_not_on_the_batch(tiny_model, tmp_path):
    common = ["--model", f"m={tiny_model}", "--prompt", "a red circle", "a blue square", "a green star", "--seed", 5]
    generate(tmp_path / "alone", *common, "--batch_size", 1)
    generate(tmp_path / "together", *common, "--batch_size", 3)
    for path in (tmp_path / "alone").glob("*seed5*.png"):
        one, other = (
            np.asarray(Image.open(folder / path.name), dtype=int) for folder in (path.parent, tmp_path / "together")
        )
        assert np.abs(one - other).max() <= 1


def test_checkpoints_and_raw_weights_are_columns_too(tiny_model, shapes_folder, tmp_path):
    run = tmp_path / "run"
    arguments = f"""--pretrained_model_name_or_path {tiny_model} --train_data_dir {shapes_folder} --resolution 32
        --train_batch_size 4 --max_train_steps 2 --checkpointing_steps 1 --learning_rate 0.01 --use_ema --seed 0
        --ema_start warm --validation_epochs 0 --validation_loss_rows 0 --report_to none --output_dir {run}"""
    assert train_text_to_image.main(arguments.split()) == 0
    models = ["--model", run / "checkpoint-1", run / "checkpoint-2", f"final={run}", "--prompt", "a red circle"]
    records = generate(tmp_path / "ema", *models, "--weights", "ema")
    assert [record["model"] for record in records] == ["run/checkpoint-1", "run/checkpoint-2", "final"]
    raw = generate(tmp_path / "raw", *models, "--weights", "raw")
    pixels = lambda folder, record: (folder / record["file"]).read_bytes()
    assert pixels(tmp_path / "ema", records[1]) == pixels(tmp_path / "ema", records[2])
    assert pixels(tmp_path / "raw", raw[1]) == pixels(tmp_path / "raw", raw[2])
    assert pixels(tmp_path / "raw", raw[1]) != pixels(tmp_path / "ema", records[1])


@pytest.mark.parametrize(("prompts", "models"), [
    (["a red circle " * 10 + "one", "a red circle " * 10 + "two", "日本", "中国"], ["m"]),
    (["a"], ["日本", "🐈", "🐕", "a+b", "a b", "A B", "x" * 300, "x" * 301]),
])  # fmt: skip
def test_names_that_look_alike_keep_their_images_apart(prompts, models, tiny_model, tmp_path):
    models = [f"{label}={tiny_model}" for label in models]
    records = generate(tmp_path, "--model", *models, "--prompt", *prompts, "--guidance_scale", 1, 1.00000001)
    files = {record["file"].lower() for record in records}
    assert len(files) == 2 * len(prompts) * len(models) == len(list(tmp_path.glob("*seed0*.png")))


def test_weights_that_are_not_finite_are_an_error_not_a_black_image(tiny_model, tmp_path, capsys):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    path = broken / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"][0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    arguments = ["--model", str(broken), "--prompt", "a", "--output_dir", str(tmp_path / "out"), *SMALL]
    assert generate_images.main(arguments) == 1
    assert "finite" in capsys.readouterr().err or "NaN" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


def test_prompts_that_are_cut_are_named_once(tiny_model, tmp_path, capsys):
    long = "a red circle " * 20
    generate(tmp_path / "out", "--model", tiny_model, "--prompt", long, "a dog", "--seed", 0, 1, "--batch_size", 1)
    message = capsys.readouterr().err
    assert message.count(long.strip()) == 1 and "first 16 tokens are read (1)" in message


def test_what_is_wrong_is_said_together(tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate_images.main(["--model", "a", "b/a", "--size", "64by64", "--scheduler", "magic"])
    message = capsys.readouterr().err
    assert "--scheduler magic" in message
    with pytest.raises(SystemExit):
        generate_images.main(["--model", "a", "b/a", "--size", "64by64"])
    message = capsys.readouterr().err
    assert "--prompt" in message and "--size 64by64" in message and "same name" in message
    (tmp_path / "prompts.txt").write_text("größer", encoding="latin-1")
    with pytest.raises(SystemExit):
        generate_images.main(["--model", "a", "--size", "64by64", "--prompts_file", str(tmp_path / "prompts.txt")])
    message = capsys.readouterr().err
    assert "prompts.txt is not UTF-8" in message and "Traceback" not in message


@pytest.mark.parametrize("below", ["", "images"])
def test_nothing_is_written_into_a_model(below, tiny_model, capsys):
    with pytest.raises(SystemExit):
        generate_images.main(["--model", str(tiny_model), "--prompt", "a", "--output_dir", str(tiny_model / below)])
    assert "--output_dir" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path, capsys):
    assert (
        generate_images.main(["--model", str(tmp_path / "none"), "--prompt", "a", "--output_dir", str(tmp_path)]) == 1
    )
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.fixture(scope="module")
def lora_run(tiny_model, shapes_folder, tmp_path_factory):
    """A run of train_lora.py with two checkpoints and strong adapters."""
    run = tmp_path_factory.mktemp("runs") / "style"
    arguments = f"""--pretrained_model_name_or_path {tiny_model} --train_data_dir {shapes_folder} --resolution 32
        --train_batch_size 4 --max_train_steps 2 --checkpointing_steps 1 --learning_rate 0.1 --seed 0 --save_kohya
        --train_text_encoder --validation_epochs 0 --validation_loss_rows 0 --report_to none --output_dir {run}"""
    assert train_lora.main(arguments.split()) == 0
    return run


def test_checkpoints_by_lora_scales_make_one_grid_whose_zero_is_the_base(tiny_model, lora_run, tmp_path):
    common = ["--prompt", "a red circle", "a blue square", "--seed", 1, 2]
    loras = ["--lora", lora_run / "checkpoint-1", lora_run, "--lora_scale", 0, 0.5, 1]
    records = generate(tmp_path / "grid", "--model", f"base={tiny_model}", *loras, *common)
    assert len(records) == 2 * 2 * 2 * 3 == len({record["file"] for record in records})
    assert {(one["lora"], one["lora_scale"]) for one in records} == {
        (label, scale) for label in ("style/checkpoint-1", "style") for scale in (0.0, 0.5, 1.0)
    }
    width, height = Image.open(tmp_path / "grid/grid.png").size
    assert width > 6 * 160 and height > 4 * 160
    base = {
        (one["prompt"], one["seed"]): (tmp_path / "base" / one["file"]).read_bytes()
        for one in generate(tmp_path / "base", "--model", f"base={tiny_model}", *common)
    }
    for one in records:
        same = (tmp_path / "grid" / one["file"]).read_bytes() == base[one["prompt"], one["seed"]]
        assert same == (one["lora_scale"] == 0)


def test_what_is_wrong_with_a_lora_is_one_clear_message(tiny_model, lora_run, tmp_path, capsys):
    pickled = tmp_path / "style.pt"
    pickled.write_bytes(b"\x80")
    common = ["--prompt", "a", "--output_dir", str(tmp_path / "out")]
    for arguments, said in (
        (["--model", str(tiny_model), "--lora", str(pickled)], "style.pt"),
        (["--model", str(lora_run)], "--lora"),
        (["--model", str(lora_run / "checkpoint-1")], "--lora"),
    ):
        assert generate_images.main([*arguments, *common]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate_images.main(["--model", str(tiny_model), "--lora_scale", "0.5", "0.5", *common])
    message = capsys.readouterr().err
    assert "--lora_scale" in message and "--lora" in message


def test_a_lora_of_other_weights_is_drawn_and_said(tiny_model, lora_run, tmp_path, capsys):
    model = ["--model", tiny_model, "--weights", "raw", "--lora", lora_run, "--prompt", "a"]
    generate(tmp_path, *model)
    assert "has other weights" in capsys.readouterr().err
