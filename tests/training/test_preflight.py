"""What is checked and said before the first step."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.buckets import BucketArgs
from finetuning.data.cache import CacheArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.training_set import DataArgs
from finetuning.diffusion.objective import NoiseArgs
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError, UpscalingArgs
from finetuning.training import preflight
from finetuning.training.checkpoint import CheckpointArgs
from finetuning.training.ema import EMAArgs, build_ema
from finetuning.training.evaluator import RetentionArgs, ValidationArgs
from finetuning.training.optim import OptimArgs, build_optimizer
from finetuning.training.preflight import _probe_xformers, check_before_start, set_up_kernels
from finetuning.training.run import RunArgs

FLAG = "--enable_xformers_memory_efficient_attention"


@dataclass
class Args(
    RunArgs, RetentionArgs, ValidationArgs, CheckpointArgs, EMAArgs, OptimArgs, NoiseArgs, CacheArgs, BucketArgs,
    CaptionArgs, DataArgs, UpscalingArgs, ModelArgs,
):  # fmt: skip
    """The flags of a training script, as far as they are looked at here."""


class FakeRun(SimpleNamespace):
    """A run without accelerate; `said` holds what the person at the terminal reads."""

    def __init__(self, output_dir=None, device="cpu", dtype=torch.float32):
        accelerator = SimpleNamespace(mixed_precision="no")
        super().__init__(output_dir=output_dir, device=torch.device(device), accelerator=accelerator, said=[])
        self.weights_dtype, self.say, self.any = dtype, self.said.append, bool


NOTHING_CACHED = SimpleNamespace(bytes_needed=0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)))


def data_of(total_steps, buckets=()):
    """11 rows in steps of 2 x 2."""
    sampler = BatchSampler(rows=11, micro_batch=2, accumulation=2, processes=1, process=0, seed=0, buckets=buckets)
    return SimpleNamespace(batch_sampler=sampler, total_steps=total_steps, summary=lambda: "11 rows, 3 held out")


@pytest.fixture
def check(model, tmp_path):
    """check_before_start for 11 rows in steps of 2 x 2; returns what was said."""

    def run_check(model=model, total_steps=6, buckets=(), encoder=NOTHING_CACHED, **flags):
        args = Args(output_dir="runs/x", train_batch_size=2, gradient_accumulation_steps=2, **flags)
        run = FakeRun(tmp_path / "not" / "there" / "yet")
        check_before_start(args, run, model, data_of(total_steps, buckets), encoder)
        return "\n".join(run.said)

    return run_check


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "named"),
    [
        ("60", [("--resolution 60", 64)]),
        ("69", [("--resolution 69", 72)]),
        ("3", [("--resolution 3", 8)]),
        ("32x50", [("--resolution 50", 48)]),
        ("33x50", [("--resolution 33", 32), ("--resolution 50", 48)]),
    ],
)
def test_a_resolution_that_does_not_fit_is_named_with_the_nearest_that_does(resolution, named, check):
    with pytest.raises(ModelError) as problem:
        check(resolution=resolution)
    lines = str(problem.value).splitlines()
    for line, (flag, near) in zip(lines, named, strict=True):
        assert line.startswith(f"{flag} ") and line.endswith(f" {near}")


def test_buckets_that_do_not_fit_the_autoencoder_are_named(check):
    with pytest.raises(ModelError, match=r"^--bucket_step 12 .* 16$"):
        check(resolution="24", aspect_buckets=True, bucket_step=12)
    assert check(resolution="32", aspect_buckets=True, bucket_step=16)


def test_every_problem_is_named_at_once_also_a_disk_without_room(check, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"(?s)--resolution 60.*--output_dir runs/x"):
        check(resolution="60")
    with pytest.raises(ModelError, match=r"^2 checkpoints of .*--output_dir runs/x"):
        check(resolution="32")


@pytest.mark.parametrize(("cache_latents", "free"), [("on", 3e9), ("on", 2e9), ("auto", 3e9), ("auto", 2e9)])
def test_a_cache_without_room_beside_the_checkpoints_is_refused_or_left_out(check, monkeypatch, cache_latents, free):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    turned_off = []
    encoder = SimpleNamespace(bytes_needed=2_000_000_000, turn_off=lambda: turned_off.append(True))
    words = {"resolution": "32", "cache_latents": cache_latents, "encoder": encoder}
    if cache_latents == "on" and free == 2e9:
        with pytest.raises(ModelError, match=r"^--cache_latents: 2.0 GB are needed in .*--cache_folder"):
            check(**words)
    else:
        assert ("cache: off, 2.0 GB are needed" in check(**words)) == (free == 2e9)
    assert bool(turned_off) == ((cache_latents, free) == ("auto", 2e9))


def test_dream_is_refused_for_a_base_that_does_not_predict_epsilon(tiny_model, check):
    base = ModelArgs(pretrained_model_name_or_path=str(tiny_model))
    with pytest.raises(ModelError, match=r"--dream_training .*v_prediction"):
        check(model=load_model(base, "v_prediction"), resolution="32", dream_training=True)
    assert check(resolution="32", dream_training=True)


# -- what is said ----------------------------------------------------------------------------------------------------


def test_the_plan_is_said_in_numbers(check):
    said = check(resolution="32", total_steps=6)
    assert "dataset: 11 rows, 3 held out" in said
    # 11 rows make three steps of at most 4
    assert "6 steps of 4 rows (2 x 2 accumulated x 1 processes), 2.0 epochs" in said
    assert "trained: unet" in said and "frozen: text_encoder" in said and "activations fp32" in said


@pytest.mark.parametrize(
    ("flags", "said"), [({"lr_scheduler": "cosine"}, True), ({"lr_warmup_steps": 5}, False), ({}, False)]
)
def test_a_warm_up_that_never_ends_is_said(flags, said, check):
    assert ("--lr_warmup_steps 500" in check(resolution="32", total_steps=6, **flags)) is said


def test_checkpoints_that_will_fill_the_disk_are_said(check, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 2**20))
    every = {"resolution": "32", "total_steps": 1000, "checkpointing_steps": 1}
    assert "--checkpoints_total_limit" in check(**every)
    assert "--checkpoints_total_limit" not in check(**every, checkpoints_total_limit=1)


def test_steps_that_buckets_leave_short_are_said(check):
    # 6 + 5 rows in steps of 4: 4 + 2 and 4 + 1
    said = check(resolution="32", total_steps=8, buckets="aaaaaabbbbb", aspect_buckets=True)
    assert "buckets: 2, and every step is of one: 2 of the 4 steps of an epoch have fewer than 4 rows" in said
    assert "8 steps of 4 rows (2 x 2 accumulated x 1 processes), 2.0 epochs" in said
    assert "buckets" not in check(resolution="32")


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adamw", "fp32"), ("adamw", "bf16"), ("adafactor", "fp32"), ("prodigy", "fp32")]
)
def test_the_size_that_is_said_is_the_size_of_a_checkpoint(
    optimizer, precision, use_ema, tiny_model, tmp_path, monkeypatch
):
    args = Args(
        optimizer=optimizer, weights_precision=precision, use_ema=use_ema, output_dir=str(tmp_path), resolution="32",
        learning_rate=1.0, seed=0,
    )  # fmt: skip
    model = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)))
    average = build_ema(args, model.trained_parameters(), None)
    steps = build_optimizer(args, model, 4)
    for parameter in model.trained_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    steps.step()
    kept = [*model.trained_parameters().values(), *(average.shadow or {}).values()]
    kept += [value for state in steps.state.values() for value in state.values() if torch.is_tensor(value)]
    actual = sum(value.numel() * value.element_size() for value in kept)

    data, run = data_of(6), FakeRun(tmp_path)
    run.accelerator.mixed_precision = "bf16"
    # Without a limit two checkpoints are the least that a run comes to; then the pipeline: trained parts and files.
    exported = sum(p.numel() * (p.element_size() + 4 * use_ema) for p in model.trained_parameters().values())
    exported += sum(path.stat().st_size for path in tiny_model.rglob("*") if path.is_file())
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1.8 * actual + exported))
    with pytest.raises(ModelError, match="checkpoints of"):
        check_before_start(args, run, model, data, NOTHING_CACHED)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2.25 * actual + exported))
    check_before_start(args, run, model, data, NOTHING_CACHED)


# -- attention -------------------------------------------------------------------------------------------------------


def switched_on(run, model, monkeypatch, **flags):
    """What set_up_kernels does to a denoiser of the tiny model, whose heads are 4 and 8 wide."""
    calls, unet = [], model.denoiser.denoiser
    monkeypatch.setattr(unet, "enable_xformers_memory_efficient_attention", lambda: calls.append("xformers"))
    monkeypatch.setattr(unet, "compile", lambda: calls.append("compile"))
    monkeypatch.setattr(unet, "to", lambda **kind: calls.append(*kind.values()))
    set_up_kernels(Args(**flags), run, model)
    return calls


def test_xformers_without_a_gpu_is_one_line_and_pytorchs_attention(model, monkeypatch):
    run = FakeRun()
    assert switched_on(run, model, monkeypatch, enable_xformers_memory_efficient_attention=True) == []
    assert len(run.said) == 1 and FLAG in run.said[0]


def test_nothing_is_switched_on_that_was_not_asked_for(model, monkeypatch):
    assert switched_on(FakeRun(), model, monkeypatch) == []
    assert switched_on(FakeRun(), model, monkeypatch, compile=True, channels_last=True) == ["compile"]


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
def probe(model, monkeypatch):
    """Try a function in the place of xformers' attention; the rest of xformers needs a GPU and is not imported."""

    def run_probe(function):
        ops = SimpleNamespace(memory_efficient_attention=function)
        monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
        monkeypatch.setitem(sys.modules, "xformers.ops", ops if function else None)
        _probe_xformers(FakeRun(), model.denoiser.denoiser)

    return run_probe


def test_xformers_that_agrees_with_pytorch_is_taken_at_every_head_size(probe):
    seen = set()
    probe(lambda query, key, value: (seen.add((query.shape[-1], key.shape[1])), attention(query, key, value))[1])
    assert seen == {(4, 64), (4, 77), (8, 64), (8, 77)}


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda q, k, v: attention(q, k, v, scale=1.0), "differs"),
        (lambda q, k, v: attention(q, v, k), "differs"),
        (half_gradient, "50.0%"),
        (lambda q, k, v: attention(q, k, NanBackward.apply(v)), "nan"),
        (lambda q, k, v: attention(NanBackward.apply(q), k, v), "nan"),
        (lambda q, k, v: attention(q, k, v) * torch.nan, "nan"),
        (no_kernel, "No operator found"),
        (None, "cannot be imported"),
    ],
    ids=[
        "scale",
        "swapped",
        "gradient",
        "nan gradient of value",
        "nan gradient of query",
        "nan",
        "no kernel",
        "absent",
    ],
)
def test_xformers_that_is_wrong_stops_the_run_with_advice(function, named, probe):
    with pytest.raises(ModelError, match=rf"{named}.*leave {FLAG} out"):
        probe(function)
