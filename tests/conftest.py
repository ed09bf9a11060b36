"""Shared fixtures: a tiny random Stable Diffusion, a tiny dataset, and runs of the scripts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores can be ten times slower than one

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetuning.files import write_json
from finetuning.shapes.write_dataset import write as write_shapes
from models.make_start import MODEL_INDEX, vocabulary

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """A test with an argument `script` is run with every training script, unless it names its own."""
    named = any("script" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "script" in metafunc.fixturenames and not named:
        metafunc.parametrize("script", sorted(path.stem for path in ROOT.glob("train_*.py")))


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def training_scripts():
    """Every train_*.py: each has to hold the same invariants."""
    return sorted(ROOT.glob("train_*.py"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Stable Diffusion of random weights and a few thousand parameters, with a non_ema variant. Never write to it."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    torch.manual_seed(0)
    entries, merges = vocabulary()
    CLIPTokenizer(vocab=entries, merges=merges, model_max_length=16).save_pretrained(folder / "tokenizer")
    write_json(folder / "tokenizer/vocab.json", entries)
    merge_lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (folder / "tokenizer/merges.txt").write_text(merge_lines + "\n", encoding="utf-8")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(entries),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=len(entries) - 2,
            eos_token_id=len(entries) - 1,
        )
    )
    text_encoder.config.save_pretrained(folder / "text_encoder")
    prefixed = {f"text_model.{name}": value for name, value in text_encoder.state_dict().items()}
    save_file(prefixed, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    raw = {name: value + 0.01 * torch.randn_like(value) for name, value in unet.state_dict().items()}
    save_file(raw, folder / "unet/diffusion_pytorch_model.non_ema.safetensors", metadata={"format": "pt"})
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", MODEL_INDEX)
    return folder


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """11 captioned images in train/ and 4 in validation/: 11 leaves a partial group in every epoch."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder / "train", 11, "filled", ("circle", "square"), 0.5, False, seed=0)
    write_shapes(folder / "validation", 4, "filled", ("circle", "square"), 0.5, True, seed=0)
    return folder


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its state in the process: forget it, and the signal handlers of a run, after each test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_script():
    """Run a script as a user does; returns the CompletedProcess with its text output. `check=False` for failures."""

    def run(name, *arguments, check=True, **options):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, **options)
        if check and done.returncode:
            raise AssertionError(f"{name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def tensors():
    """Read all safetensors files below a folder: {relative path: {name: tensor}}."""

    def read(folder):
        folder = Path(folder)
        return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}

    return read
