"""What train_lora.py does besides the invariants of every training script, which test_train_scripts.py holds it to."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from finetuning.families.lora_files import DIFFUSERS_NAME, KOHYA_NAME, read_lora
from finetuning.files import check_manifest, sha256
from finetuning.training import adapters


@pytest.fixture(scope="module")
def words(tiny_model, shapes_folder):
    """A short run."""
    return f"""
        --pretrained_model_name_or_path {tiny_model} --train_data_dir {shapes_folder} --resolution 32
        --train_batch_size 2 --gradient_accumulation_steps 2 --max_train_steps 4 --seed 3 --learning_rate 1e-2
        --checkpointing_steps 2 --validation_epochs 0 --validation_loss_rows 0 --report_to none
    """.split()


@pytest.fixture(scope="module")
def train(training, words):
    """train(folder, *flags): the exit status of a short run."""
    return lambda folder, *flags: training.run("train_lora", words, folder, *flags)


@pytest.fixture(scope="module")
def averaged(train, tmp_path_factory):
    """A run with an average, and with files of every kind. Never write to it."""
    folder = tmp_path_factory.mktemp("averaged")
    flags = ("--use_ema", "--ema_decay", 0.5, "--save_kohya", "--train_text_encoder", "--lora_alpha", 3)
    assert train(folder, *flags) == 0
    return folder


def image(pipeline):
    noise = torch.Generator().manual_seed(0)
    made = pipeline("a red circle", num_inference_steps=2, height=32, width=32, generator=noise, output_type="np")
    return made.images[0]


def opened(tiny_model, *path, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if path:
        pipeline.load_lora_weights(*map(str, path), **options)
    return pipeline


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_dropout 0.5 --train_text_encoder",
        "--lora_dropout 0.5 --gradient_checkpointing --dataloader_num_workers 1",
        "--use_dora --use_rslora --lora_alpha 3 --lora_target_modules all-linear conv",
        "--base_precision nf4 --lora_dropout 0.2",
        "--mixed_precision bf16",
        "--optimizer prodigy --learning_rate 1 --use_ema --ema_decay 0.9",
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(words, training, tmp_path, flags):
    """The invariant of every script, for what only adapters have."""
    words = [*words, *flags.split()]
    assert training.run("train_lora", words, tmp_path / "straight") == 0
    torch.rand(3)  # what torch's own generator has drawn meanwhile does not matter
    training.assert_resumes_exactly("train_lora", words, tmp_path / "straight", 2, tmp_path / "resumed")


def test_checkpoints_hold_the_adapters_and_not_the_base(averaged):
    checkpoint = averaged / "checkpoint-4"
    check_manifest(checkpoint)
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert names == {
        f"lora/{DIFFUSERS_NAME}", f"lora_ema/{DIFFUSERS_NAME}", "optimizer.pt", "training_state.json", "manifest.json",
    }  # fmt: skip
    adapters = load_file(checkpoint / "lora" / DIFFUSERS_NAME)
    assert {key.split(".lora_")[1] for key in adapters} == {"A.weight", "B.weight"}
    assert not (averaged / "unet").exists()


def test_the_result_generates_in_diffusers_what_the_last_checkpoint_does(averaged, tiny_model):
    """Also where the folder alone is named, which holds three files of which diffusers has to take the right one."""
    expected = image(opened(tiny_model, averaged / "checkpoint-4/lora_ema"))
    assert np.abs(expected - image(opened(tiny_model))).max() > 1e-3
    for name in (None, DIFFUSERS_NAME, KOHYA_NAME):
        assert np.abs(image(opened(tiny_model, averaged, weight_name=name)) - expected).max() < 1e-5


def test_convolutions_without_an_average_act_in_diffusers_as_the_last_checkpoint(train, tiny_model, tmp_path):
    assert train(tmp_path, "--save_kohya", "--lora_alpha", 3, "--lora_target_modules", "conv") == 0
    expected = image(opened(tiny_model, tmp_path / "checkpoint-4/lora"))
    assert np.abs(expected - image(opened(tiny_model))).max() > 1e-3
    for name in (DIFFUSERS_NAME, KOHYA_NAME):
        assert np.abs(image(opened(tiny_model, tmp_path, weight_name=name)) - expected).max() < 1e-5


@pytest.mark.parametrize("name", [DIFFUSERS_NAME, KOHYA_NAME, "checkpoint-4"])
def test_training_goes_on_from_a_lora(averaged, train, tiny_model, tmp_path, name):
    """At a learning rate of 0 the second run hands over what the first one did, in adapters twice the size."""
    again = ("--init_lora", averaged / name, "--rank", 8, "--use_rslora", "--learning_rate", 0, "--train_text_encoder")
    assert train(tmp_path, *again, "--max_train_steps", 1) == 0
    pipeline = opened(tiny_model)
    components = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    one, other = (read_lora(folder / DIFFUSERS_NAME, components).layers for folder in (averaged, tmp_path))
    assert one.keys() == other.keys() and {layer.rank for layer in other.values()} == {8}
    for key, layer in one.items():
        torch.testing.assert_close(other[key].delta(), layer.delta(), rtol=1e-4, atol=1e-6)


def test_the_file_says_how_it_was_made(averaged, tiny_model):
    with safe_open(averaged / DIFFUSERS_NAME, framework="pt") as file:
        facts = file.metadata()
    assert (facts["base_model"], facts["rank"], facts["alpha"], facts["steps"]) == (str(tiny_model), "4", "3", "4")
    assert facts["target_modules"] == "attention" and len(facts["base_model_hash"]) == len(facts["dataset_hash"]) == 64
    assert facts["caption_prefix"] == "a" and facts["images"] == "11"
    with safe_open(averaged / KOHYA_NAME, framework="pt") as file:
        facts = file.metadata()
    assert (facts["ss_network_dim"], facts["ss_network_alpha"], facts["ss_steps"]) == ("4", "3", "4")
    assert facts["modelspec.architecture"] == "stable-diffusion/lora" and facts["ss_network_module"] == "networks.lora"


def test_everything_that_does_not_fit_is_named_at_once(train, tmp_path, capfd):
    wrong = ("--lora_target_modules", "to_q", "to_z", "--rank", 100, "--lora_rank_pattern", "up_blocks.7=3")
    assert train(tmp_path, *wrong, "--base_precision", "fp16") == 1
    message = capfd.readouterr().err
    for words in ("--lora_target_modules to_z", "rank 100", "--lora_rank_pattern up_blocks.7", "--base_precision fp16"):
        assert words in message
    assert not list(tmp_path.glob("*"))


def test_a_file_that_does_something_else_is_not_handed_over_and_an_older_result_stays(
    train, tmp_path, capfd, monkeypatch
):
    """An error in the writer, which a person would notice in their images only."""
    assert train(tmp_path, "--max_train_steps", 1) == 0
    before, right = sha256(tmp_path / DIFFUSERS_NAME), adapters.write_diffusers_for_all
    less = lambda path, layers, *others: right(path, dict(list(layers.items())[1:]), *others)
    monkeypatch.setattr(adapters, "write_diffusers_for_all", less)
    assert train(tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "latest") == 1
    assert f"error: {DIFFUSERS_NAME} does not do" in capfd.readouterr().err
    assert sha256(tmp_path / DIFFUSERS_NAME) == before and (tmp_path / "checkpoint-2").is_dir()
    assert not list(tmp_path.glob(".incomplete*"))
