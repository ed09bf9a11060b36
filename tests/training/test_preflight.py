"""What is checked and said before the first step."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention

from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.order import Order
from finetuning.data.training_set import DataArgs
from finetuning.diffusion.objective import NoiseArgs
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError
from finetuning.training import preflight
from finetuning.training.checkpoint import CheckpointArgs
from finetuning.training.ema import EMAArgs, build_ema
from finetuning.training.optim import OptimArgs, build_optimizer
from finetuning.training.preflight import check_before_start, choose_attention
from finetuning.training.run import RunArgs

FLAG = "--enable_xformers_memory_efficient_attention"


@dataclass
class Args(RunArgs, CheckpointArgs, EMAArgs, OptimArgs, NoiseArgs, BucketArgs, CaptionArgs, DataArgs, ModelArgs):
    """The flags of a training script, as far as they are looked at here."""


class FakeRun(SimpleNamespace):
    """A run without accelerate; `said` holds what the person at the terminal reads."""

    def __init__(self, output_dir=None, device="cpu", dtype=torch.float32):
        accelerator = SimpleNamespace(mixed_precision="no")
        super().__init__(output_dir=output_dir, device=torch.device(device), accelerator=accelerator, said=[])
        self.weights_dtype, self.say = dtype, self.said.append


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)


@pytest.fixture
def check(model, tmp_path):
    """check_before_start for 11 rows in steps of 2 x 2; returns what was said."""

    def run_check(model=model, total_steps=6, buckets=(), **flags):
        args = Args(output_dir="runs/x", train_batch_size=2, gradient_accumulation_steps=2, **flags)
        order = Order(rows=11, micro_batch=2, accumulation=2, processes=1, process=0, seed=0, buckets=buckets)
        run = FakeRun(tmp_path / "not" / "there" / "yet")
        check_before_start(args, run, model, range(11), range(3), order, total_steps)
        return "\n".join(run.said)

    return run_check


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "named"),
    [
        ("60", ["--resolution 60 does not fit the autoencoder: take a multiple of 8, e.g. 64"]),
        ("69", ["--resolution 69 does not fit the autoencoder: take a multiple of 8, e.g. 72"]),
        ("3", ["--resolution 3 does not fit the autoencoder: take a multiple of 8, e.g. 8"]),
        ("32x50", ["--resolution 50 does not fit the autoencoder: take a multiple of 8, e.g. 48"]),
        ("33x50", ["--resolution 33 ", "--resolution 50 "]),
    ],
)
def test_a_resolution_that_does_not_fit_is_named_with_the_nearest_that_does(resolution, named, check):
    with pytest.raises(ModelError) as problem:
        check(resolution=resolution)
    lines = str(problem.value).splitlines()
    assert len(lines) == len(named)
    assert all(line.startswith(start) for line, start in zip(lines, named, strict=True))


def test_buckets_that_do_not_fit_the_autoencoder_are_named(check):
    with pytest.raises(ModelError, match=r"^--bucket_step 12 does not fit .* multiple of 8, e\.g\. 16$"):
        check(resolution="24", aspect_buckets=True, bucket_step=12)
    assert check(resolution="32", aspect_buckets=True, bucket_step=16)


def test_a_disk_without_room_for_a_checkpoint_is_refused(check, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"the disk of --output_dir runs/x has 0\.0 GB left"):
        check(resolution="32")


def test_every_problem_is_named_at_once(check, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"(?s)--resolution 60.*--output_dir runs/x"):
        check(resolution="60")


def test_dream_is_refused_for_a_base_that_does_not_predict_epsilon(tiny_model, check):
    base = ModelArgs(pretrained_model_name_or_path=str(tiny_model))
    with pytest.raises(ModelError, match=r"--dream_training .*v_prediction"):
        check(model=load_model(base, "v_prediction", seed=0), resolution="32", dream_training=True)
    assert check(resolution="32", dream_training=True)


# -- what is said ----------------------------------------------------------------------------------------------------


def test_the_plan_is_said_in_numbers(check):
    said = check(resolution="32", total_steps=6)
    assert "dataset: 11 rows, 3 held out" in said
    # 11 rows make three steps of at most 4
    assert "6 steps of 4 rows (2 x 2 accumulated x 1 processes), 2.0 epochs" in said
    assert "text encoder" in said and "frozen" in said and "activations fp32" in said


def test_steps_that_buckets_leave_short_are_said(check):
    # 6 + 5 rows in steps of 4: 4 + 2 and 4 + 1
    said = check(resolution="32", total_steps=8, buckets="aaaaaabbbbb")
    assert "buckets: 2, and every step is of one: 2 of the 4 steps of an epoch have fewer than 4 rows" in said
    assert "8 steps of 4 rows (2 x 2 accumulated x 1 processes), 2.0 epochs" in said
    assert "buckets" not in check(resolution="32", buckets="a" * 11)


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_the_size_that_is_said_is_the_size_of_a_checkpoint(optimizer, use_ema, tiny_model, tmp_path, monkeypatch):
    args = Args(optimizer=optimizer, use_ema=use_ema, output_dir=str(tmp_path), resolution="32", learning_rate=1.0)
    model = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)
    average = build_ema(args, model.trained_parameters(), None)
    steps = build_optimizer(args, model.parameter_groups(1.0, 1.0))
    for parameter in model.trained_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    steps.step()
    kept = [*model.trained_parameters().values(), *(average.shadow or {}).values()]
    kept += [value for state in steps.state.values() for value in state.values() if torch.is_tensor(value)]
    actual = sum(value.numel() * value.element_size() for value in kept)

    order = Order(rows=11, micro_batch=2, accumulation=2, processes=1, process=0, seed=0)
    # Without a limit two checkpoints are the least that a run comes to; then the pipeline: trained parts and files.
    exported = 4 * (1 + use_ema) * sum(p.numel() for p in model.trained_parameters().values())
    exported += sum(path.stat().st_size for path in tiny_model.rglob("*") if path.is_file())
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1.8 * actual + exported))
    with pytest.raises(ModelError, match="checkpoints of"):
        check_before_start(args, FakeRun(tmp_path), model, range(11), None, order, 6)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2.25 * actual + exported))
    check_before_start(args, FakeRun(tmp_path), model, range(11), None, order, 6)


# -- attention -------------------------------------------------------------------------------------------------------


class FakeUNet:
    def __init__(self):
        self.calls = []

    def enable_xformers_memory_efficient_attention(self):
        self.calls.append("xformers")

    def compile(self):
        self.calls.append("compile")

    def modules(self):
        """Heads of 8 and 16: the kernels are tried at the sizes that the model has."""
        return [Attention(query_dim=32, heads=4, dim_head=8), Attention(query_dim=32, heads=2, dim_head=16)]


def chosen(run, **flags):
    """What choose_attention does to a UNet."""
    unet = FakeUNet()
    args = Args(**flags)
    choose_attention(args, run, SimpleNamespace(denoiser=SimpleNamespace(unet=unet)))
    return unet.calls


def test_xformers_without_a_gpu_is_one_line_and_pytorchs_attention():
    run = FakeRun()
    assert chosen(run, enable_xformers_memory_efficient_attention=True) == []
    assert run.said == [f"{FLAG}: xformers needs a GPU, PyTorch's attention is used"]


def test_nothing_is_switched_on_that_was_not_asked_for():
    assert chosen(FakeRun()) == [] and chosen(FakeRun(), compile=True) == ["compile"]


def attention(query, key, value, scale=None):
    """What xformers has to give: [batch, tokens, heads, width] in and out."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)


class NanBackward(torch.autograd.Function):
    """The right value and a gradient that is not a number, as xformers has had on the RTX and A6000 (#517, #631)."""

    @staticmethod
    def forward(context, tensor):
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.nan


def half_gradient(query, key, value):
    output = attention(query, key, value)
    return (output.detach() + output) / 2


def no_kernel(query, key, value):
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")


@pytest.fixture
def xformers(monkeypatch):
    """Puts a function in the place of xformers' attention; the rest of xformers needs a GPU and is not imported."""

    def install(function):
        ops = SimpleNamespace(memory_efficient_attention=function)
        monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)

    return install


def on_gpu(monkeypatch):
    """A run that takes itself to be on a GPU; tensors that are sent there stay where they are."""
    run = FakeRun(device="cuda")
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, dtype: real(tensor, dtype))
    return run


def test_xformers_is_switched_on_where_it_agrees_with_pytorch(xformers, monkeypatch):
    xformers(attention)
    run = on_gpu(monkeypatch)
    assert chosen(run, enable_xformers_memory_efficient_attention=True) == ["xformers"] and run.said == []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda q, k, v: attention(q, k, v, scale=1.0), "differs from PyTorch's by"),
        (lambda q, k, v: attention(q, v, k), "differs from PyTorch's by"),
        (half_gradient, "differs from PyTorch's by 50.0%"),
        (lambda q, k, v: attention(q, k, NanBackward.apply(v)), "differs from PyTorch's by nan"),
        (lambda q, k, v: attention(NanBackward.apply(q), k, v), "differs from PyTorch's by nan"),
        (lambda q, k, v: attention(q, k, v) * torch.nan, "differs from PyTorch's by nan"),
        (no_kernel, "fails on this GPU .No operator found"),
    ],
    ids=["scale", "swapped", "gradient", "nan gradient of value", "nan gradient of query", "nan", "no kernel"],
)
def test_xformers_that_is_wrong_stops_the_run_with_advice(function, said, xformers, monkeypatch):
    xformers(function)
    with pytest.raises(ModelError, match=rf"{said}.*leave {FLAG} out"):
        chosen(on_gpu(monkeypatch), enable_xformers_memory_efficient_attention=True)


def test_xformers_that_is_not_installed_stops_the_run_with_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ModelError, match=f"cannot be imported.*leave {FLAG} out"):
        chosen(on_gpu(monkeypatch), enable_xformers_memory_efficient_attention=True)
