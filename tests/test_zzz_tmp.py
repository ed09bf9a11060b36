"""Adapters on a frozen base: how they begin, what trains, what is saved, and what loads it again."""

import copy
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finetuning.data.training_set import DataArgs
from finetuning.draws import gaussian
from finetuning.families import load_model
from finetuning.families.contract import ModelArgs, ModelProblem
from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    KOHYA_NAME,
    RAW_NAME,
    read_lora,
    weights_hash,
    write_diffusers,
)
from finetuning.families.sd import Denoiser
from finetuning.training.ema import AveragedWeights
from finetuning.training.lora import PositionalDropout, add_adapters
from finetuning.training.lora_layout import LoraArgs
from finetuning.training.noise import NoiseArgs
from finetuning.training.optim import OptimArgs, build_optimizer
from finetuning.training.run import RunArgs

TARGETS = ["attn2.to_k", "to_v", "ff.net.2", "proj_in", "conv1", "conv_in", "linear_1"]  # some of every shape
EVERYWHERE = {"train_text_encoder": True, "lora_target_modules": TARGETS}
PATTERNS = {"lora_rank_pattern": ["attn2.to_k=6", "conv1=2"], "lora_alpha_pattern": ["to_v=2.5", "q_proj=7"]}
FACTS = {"steps": 30, "pictures": 11, "dataset_hash": "abc", "dataset": "shapes", "caption_prefix": "a photo of"}
KINDS = {
    "plain": {},
    "odd alpha": {"rank": 7, "lora_alpha": 3.3},
    "rslora": {"rank": 6, "lora_alpha": 5.0, "use_rslora": True},
    "dora": {"use_dora": True, "lora_alpha": 3.0},
    "everywhere": {**EVERYWHERE, "text_encoder_rank": 3},
    "everywhere, dora, patterns": {**EVERYWHERE, **PATTERNS, "rank": 3, "lora_alpha": 1.1, "use_dora": True},
}
kinds = pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)


@dataclass
class Args(RunArgs, OptimArgs, NoiseArgs, DataArgs, LoraArgs, ModelArgs):
    """The flags that adapters and their files know of."""

    seed: int = 0
    output_dir: str = "runs/chalk"
    resolution: str = "32"


class FakeRun(SimpleNamespace):
    """A run without accelerate; `said` holds what the person at the terminal reads."""

    def __init__(self, dtype):
        super().__init__(device=torch.device("cpu"), weights_dtype=dtype, said=[])
        self.say = self.said.append


@pytest.fixture(scope="module")
def base(tiny_model):
    """The model as it comes: read once for the same flags, and copied."""
    opened = {}

    def make(variant=None, gradient_checkpointing=False, train_text_encoder=False, **_others):
        flags = (variant, gradient_checkpointing, train_text_encoder)
        if flags not in opened:
            names = ("variant", "gradient_checkpointing", "train_text_encoder")
            args = ModelArgs(str(tiny_model), **dict(zip(names, flags, strict=True)))
            opened[flags] = load_model(args, None, seed=0)
        model = copy.copy(opened[flags])
        model.denoiser, model.vae = copy.deepcopy(model.denoiser), copy.deepcopy(model.vae)
        return model

    return make


@pytest.fixture(scope="module")
def adapt(tiny_model, base):
    """Adapters with these flags, on few layers unless they name some; `said` is what the run was told."""

    def make(dtype=torch.float32, **flags):
        flags = {"lora_target_modules": ["to_v", "attn2.to_k"], **flags}
        args, run = Args(pretrained_model_name_or_path=str(tiny_model), **flags), FakeRun(dtype)
        adapted = add_adapters(args, base(**flags), run)
        adapted.said = run.said
        return adapted

    return make


@pytest.fixture(scope="module")
def train(adapt):
    """The same after training: every adapter has moved to random places."""

    def make(**flags):
        return scramble(adapt(**flags))

    return make


@pytest.fixture(scope="module")
def drawn_by_diffusers(base):
    """The prediction of a fresh pipeline that has loaded a LoRA by diffusers' own loader."""

    def predict(folder, name=DIFFUSERS_NAME):
        with base().pipeline() as pipeline:
            pipeline.load_lora_weights(str(folder), weight_name=name)
            return prediction(Denoiser(pipeline.unet, pipeline.text_encoder))

    return predict


@torch.no_grad()
def scramble(adapted, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.trained_parameters().values():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted


def forward(denoiser, rows=(0, 1, 2, 3)):
    """The prediction for these rows, each of which has its own noise, timestep and caption."""
    rows = list(rows)
    noisy, tokens = gaussian(0, "noisy", 0, rows, (4, 4, 4)), torch.arange(64).reshape(4, 16)
    return denoiser(noisy, torch.tensor([100, 300, 500, 900])[rows], tokens[rows])


@torch.no_grad()
def prediction(denoiser, dtype=torch.float32):
    was_training = denoiser.training
    denoiser.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        predicted = forward(denoiser).float()
    denoiser.train(was_training)
    return predicted


def distance(one, other):
    """Relative to the second."""
    return ((one - other).norm() / other.norm()).item()


def values(adapted):
    return {name: parameter.detach().clone() for name, parameter in adapted.trained_parameters().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def frozen(adapted):
    return [parameter for parameter in adapted.denoiser.parameters() if not parameter.requires_grad]


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


import time
def test_time(adapt, base, train, drawn_by_diffusers, tmp_path):
    def t(name, f, n=6):
        f()
        a=time.process_time()
        for i in range(n): r=f(i) if name.startswith("save") else f()
        print("::", name, (time.process_time()-a)/n*1000)
        return r
    t("base", base)
    b=base(); t("vae", lambda: copy.deepcopy(b.vae)); t("unet", lambda: copy.deepcopy(b.denoiser.unet))
    t("hash", lambda: weights_hash(b.denoiser.unet))
    t("adapt", adapt); t("adapt attention", lambda: adapt(lora_target_modules=["attention"])); t("adapt everywhere", lambda: adapt(**EVERYWHERE))
    a = t("train", train)
    def save(i=99):
        (tmp_path/str(i)).mkdir(); a.save_lora(tmp_path/str(i), None, FACTS)
    t("save", save)
    t("diffusers", lambda: drawn_by_diffusers(tmp_path/"0"))
    t("pred", lambda: prediction(a.denoiser))
    t("load", lambda: load_model(a.args, None, 0))
    from finetuning.training.lora_check import check_files
    from finetuning.training import lora_check
    f=load_model(a.args, None, 0)
    t("check", lambda: check_files(tmp_path/"0", {DIFFUSERS_NAME: a.layers()}, f))
    m = base()
    def pl():
        with m.pipeline() as p: pass
    t("pipeline", pl)
    assert 0
