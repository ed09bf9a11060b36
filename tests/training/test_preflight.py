"""What is checked and said before the first step."""

import copy
import inspect
import json
import re
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.buckets import BucketArgs
from finetuning.data.cache import CacheArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.streams import StreamArgs
from finetuning.data.training_set import DataArgs
from finetuning.diffusion.objective import NoiseArgs
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError, UpscalingArgs
from finetuning.training import preflight
from finetuning.training.checkpoint import CheckpointArgs, Checkpointer
from finetuning.training.ema import EMAArgs, build_ema
from finetuning.training.evaluator import RetentionArgs, ValidationArgs
from finetuning.training.optim import OptimArgs, build_optimizer, build_schedule
from finetuning.training.preflight import (
    PreflightArgs,
    _advise_on_precision,
    _probe_xformers,
    _xformers_is_faster,
    check_before_start,
    forecast,
    largest_step,
    memory_of,
    prepare_memory,
    set_up_kernels,
    undoing,
)
from finetuning.training.run import RunArgs

FLAG = "--enable_xformers_memory_efficient_attention"


@dataclass
class Args(
    RunArgs, PreflightArgs, RetentionArgs, ValidationArgs, CheckpointArgs, EMAArgs, OptimArgs, NoiseArgs, CacheArgs,
    BucketArgs, CaptionArgs, StreamArgs, DataArgs, UpscalingArgs, ModelArgs,
):  # fmt: skip
    """The flags of a training script, as far as they are looked at here."""


NOTHING_CACHED = SimpleNamespace(bytes_needed=0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)))


def data_of(total_steps, buckets=()):
    """11 rows in steps of 2 x 2."""
    sampler = BatchSampler(rows=11, micro_batch=2, accumulation=2, processes=1, process=0, seed=0, buckets=buckets)
    return SimpleNamespace(batch_sampler=sampler, total_steps=total_steps, summary=lambda: "11 rows, 3 held out")


@pytest.fixture
def check(model, tmp_path, fake_run):
    """check_before_start for 11 rows in steps of 2 x 2; returns what was said."""

    def run_check(model=model, total_steps=6, buckets=(), encoder=NOTHING_CACHED, launcher=None, **flags):
        args = Args(output_dir="runs/x", train_batch_size=2, gradient_accumulation_steps=2, **flags)
        run = fake_run(tmp_path / "not" / "there" / "yet")
        vars(run).update(launcher or {})
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


@pytest.mark.parametrize(
    ("launcher", "shares"),
    [({}, (1, 1, 2, 1)), ({"is_sharded": True}, (0.5, 0.5, 1, 0.5)), ({"zero_stage": 1}, (1, 1.5, 1.5, 1)),
     ({"zero_stage": 2}, (1, 1, 1.5, 1))],
)  # fmt: skip
def test_what_two_processes_divide_is_counted_as_each_of_them_has_it(check, mini_sd, launcher, shares):
    trained = 4 * sum(weight.numel() for weight in mini_sd.trained_parameters().values())
    said = check(mini_sd, resolution="32", use_ema=True, launcher={"processes": 2, **launcher})
    for name, share in zip(("weights", "gradients", "optimizer", "average"), shares, strict=True):
        (size,) = re.findall(rf"{name} ([\d.]+) MB", said)
        assert float(size) == pytest.approx(share * trained / 1e6, abs=0.06), name


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
        check(model=load_model(base, NoiseArgs("v_prediction")), resolution="32", dream_training=True)
    assert check(resolution="32", dream_training=True)


@pytest.mark.parametrize(("base", "flags", "said"), [
    (False, {"rescale_betas_zero_snr": True}, "^--rescale_betas_zero_snr"),
    (True, {}, "^the schedule of this base"),
    (True, {"prediction_type": "v_prediction"}, None),
    (False, {"rescale_betas_zero_snr": True, "prediction_type": "sample"}, None),
])  # fmt: skip
def test_zero_snr_is_refused_where_the_model_predicts_epsilon(base, flags, said, tiny_model, tmp_path, check):
    copied = shutil.copytree(tiny_model, tmp_path / "model")
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": base}))
    model = load_model(ModelArgs(pretrained_model_name_or_path=str(copied)), NoiseArgs(**flags))
    if said:
        with pytest.raises(ModelError, match=rf"{said} .*--prediction_type v_prediction or sample"):
            check(model=model, resolution="32", **flags)
    else:
        assert check(model=model, resolution="32", **flags)


# -- what is said ----------------------------------------------------------------------------------------------------


def test_the_plan_is_said_in_numbers(check):
    said = check(resolution="32", total_steps=6)
    assert "dataset: 11 rows, 3 held out" in said
    # 11 rows make three steps of at most 4
    assert "6 steps of 4 rows (2 x 2 accumulated x 1 process), 2.0 epochs" in said
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
    assert "8 steps of 4 rows (2 x 2 accumulated x 1 process), 2.0 epochs" in said
    assert "buckets" not in check(resolution="32")


@pytest.fixture(scope="module")
def mini_sd(root):
    """The embedded model, large enough that names and headers do not count beside its weights."""
    return load_model(ModelArgs(pretrained_model_name_or_path=str(root / "models/mini-sd")))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("adamw", "fp32"), ("adamw8bit", "fp32"), ("adafactor", "fp32"), ("prodigy", "fp32"), ("adafactor", "bf16")],
)
def test_the_sizes_that_are_said_are_those_in_memory_and_on_disk(
    optimizer, precision, mini_sd, tmp_path, monkeypatch, fake_run
):
    output, mini_sd = tmp_path / "run", copy.deepcopy(mini_sd)
    flags = {"optimizer": optimizer, "weights_precision": precision, "use_ema": True, "learning_rate": 1.0, "seed": 0}
    args = Args(**flags, output_dir=str(output), resolution="64")
    parameters = mini_sd.trained_parameters()
    average, steps = build_ema(args, parameters, None), build_optimizer(args, mini_sd, 4)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-9)
    gradients = [one.grad for one in parameters.values()]
    steps.step()
    held = lambda values: sum(value.nbytes for value in values if torch.is_tensor(value))
    measured = {
        "weights": held(parameters.values()), "gradients": held(gradients),
        "optimizer": sum(held(state.values()) for state in steps.state.values()),
        "average": held(average.shadow.values()),
    }  # fmt: skip
    steps.zero_grad()
    assert memory_of(args, mini_sd) == pytest.approx(measured, rel=0.1)

    run = fake_run(output)
    run.accelerator.mixed_precision = precision.replace("fp32", "no")
    data = data_of(6)
    data.training = SimpleNamespace(fingerprint=lambda: "rows")
    Checkpointer(args, mini_sd, average, steps, run, data).save(1)
    files = lambda folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    checkpoint = files(output / "checkpoint-1")
    mini_sd.save_pipeline(tmp_path, mini_sd.trained_parameters(), average.shadow)
    needed = 2 * checkpoint + files(tmp_path) - files(output)
    for free, enough in ((0.9 * needed, False), (1.1 * needed, True)):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        with nullcontext() if enough else pytest.raises(ModelError, match="2 checkpoints of"):
            check_before_start(args, run, mini_sd, data, NOTHING_CACHED)


@pytest.mark.parametrize(
    ("capability", "flags", "said"),
    [
        ((7, 5), {}, ""),
        ((7, 5), {"dtype": torch.bfloat16}, "has no bf16 and imitates it, slowly: --mixed_precision fp16"),
        ((9, 0), {}, "--mixed_precision bf16 (as fast as fp16, nothing overflows) and --allow_tf32"),
        ((8, 0), {"allow_tf32": True}, "has --mixed_precision bf16"),
        ((8, 0), {"allow_tf32": True, "dtype": torch.bfloat16}, ""),
    ],
)
def test_what_the_card_could_do_and_was_not_asked_for_is_said(capability, flags, said, monkeypatch, fake_run):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A6000")
    run = fake_run(device="cuda", dtype=flags.pop("dtype", torch.float16))
    _advise_on_precision(Args(**flags), run)
    assert len(run.said) == bool(said) and said in "".join(run.said).replace("also has", "has")


# -- the rehearsal ---------------------------------------------------------------------------------------------------


def test_the_step_that_is_tried_is_the_one_with_most_pixels():
    # Landscape is smallest; of the two others portrait has a full micro-batch, and the square one has more pixels a row
    sizes = [(32, 48)] * 4 + [(48, 40)] * 4 + [(48, 48)]
    same = [(32, 48)] * 4 + [(48, 32)] * 2
    sampler = BatchSampler(rows=9, micro_batch=2, accumulation=2, processes=1, process=0, seed=0, buckets=sizes)
    step = largest_step(sampler, SimpleNamespace(sizes=sizes))
    assert {sizes[row] for row in sampler.groups(0)[step]} == {(48, 40)}
    for seed in range(9):  # a step of one full micro-batch alone would say too little of how long the others take
        sampler = BatchSampler(rows=6, micro_batch=2, accumulation=2, processes=1, process=0, seed=seed, buckets=same)
        assert len(sampler.groups(0)[largest_step(sampler, SimpleNamespace(sizes=same))]) == 4
    assert largest_step(SimpleNamespace(rows=None), None) == 0  # of a stream


def test_an_average_that_is_the_weights_is_kept_once_with_them():
    weight, apart = (torch.nn.Parameter(torch.full((4,), value)) for value in (1.0, 2.0))
    names = {"weight": weight, "apart": apart}
    average = build_ema(Args(use_ema=True), names, {"apart": torch.full((4,), 3.0)})
    undo = undoing(names, average, [])
    kept = inspect.getclosurevars(undo.__wrapped__).nonlocals["kept"]
    assert len({tensor.data_ptr() for tensor in kept}) == 3
    average.update()
    weight.data.zero_()
    undo()
    assert [one[0].item() for one in (weight, apart, *average.shadow.values())] == [1.0, 2.0, 1.0, 3.0]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "prodigy"])
def test_what_a_step_changes_is_undone_to_the_last_bit(name):
    weight = torch.nn.Parameter(torch.tensor([[-0.0, 0.1], [2.0, 3.0]]).repeat(64, 64))
    model = SimpleNamespace(parameter_groups=lambda *rates: [{"params": [weight], "lr": rates[0]}])
    args = Args(optimizer=name, learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=0, use_ema=True)
    optimizer, average = build_optimizer(args, model, 4), build_ema(args, {"weight": weight}, None)
    owners = [optimizer, build_schedule(args, optimizer, 10), torch.amp.GradScaler("cpu", init_scale=4.0)]

    def state():
        bits = lambda tensor: tensor.detach().clone().view(torch.int32).tolist()
        known = [{key: value for key, value in one.state_dict().items() if key != "param_groups"} for one in owners]
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return copy.deepcopy([bits(weight), bits(average.shadow["weight"]), average.updates, known, groups])

    before = state()
    undo = undoing({"weight": weight}, average, owners)
    owners[2].scale((weight**2).sum()).backward()
    for call in (lambda: owners[2].step(optimizer), owners[2].update, owners[1].step, average.update):
        call()
    assert all(one != other for one, other in zip(state()[:3], before[:3], strict=True))
    undo()
    assert state() == before


def test_a_gpu_is_limited_to_what_another_would_leave_and_its_peak_is_said(monkeypatch):
    limits, gpu, reset = [], torch.device("cuda"), []  # of one process accelerate's device has no number
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: reset.append("cache"))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: reset.append("peak"))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (70e9, 80e9))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 9e9)
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda device: 12e9)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    set_fraction = lambda share, number: limits.append((share, number))
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", set_fraction, raising=False)
    for memory in (None, "17GB", "17.0 gb", "500"):
        prepare_memory(PreflightArgs(assume_memory=memory), gpu)
    assert limits == [(0.2, 0), (0.2, 0), (1.0, 0)]  # 1 GB lies there besides
    assert reset == ["cache", "peak"] * 4  # what loading took is not the steps' peak
    said = forecast(gpu, rows=8, seconds=0.5, steps=7200)
    assert "12.0 GB of the GPU's 80.0 GB" in said and "16 images a second" in said and "1:00:00" in said
    assert "GPU" not in forecast(torch.device("cpu"), rows=8, seconds=0.5, steps=7200)


def test_on_a_cpu_what_is_known_of_the_memory_is_compared(check):
    assert check(resolution="32", preflight=True, assume_memory="1GB")
    with pytest.raises(ModelError, match=r"(?s)^--assume_memory 0.0001GB: weights .*--use_8bit_adam\n"):
        check(resolution="32", preflight=True, assume_memory="0.0001GB")


@pytest.mark.parametrize(
    ("flags", "gone"),
    [
        ({"mixed_precision": "bf16"}, "--mixed_precision"),
        ({"cached_crops": 4}, "--cache_latents"),
        ({"optimizer": "adafactor"}, "--use_8bit_adam"),
        ({"use_ema": True, "offload_ema": True}, "--offload_ema"),
        ({"train_batch_size": 1}, "--train_batch_size"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing"),
        ({"fused_backward_pass": True}, "--fused_backward_pass"),
        ({"fused_backward_pass": True}, "--gradient_accumulation_steps"),  # which does not go with it
        ({"weights_precision": "bf16"}, "--weights_precision"),
    ],
)
def test_advice_names_only_what_is_not_set_yet(flags, gone, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    plain = {"train_batch_size": 9, "use_ema": True}
    before, after = Args(**plain).memory_advice(), Args(**plain | flags).memory_advice()
    assert gone in before and gone not in after
    assert "--train_batch_size 3 --gradient_accumulation_steps 3" in before  # the same rows in a step


@pytest.mark.parametrize(
    ("launcher", "gone", "there"),
    [
        ({}, {"fused"}, {"fsdp2", "8bit", "offload", "weights_precision"}),
        ({"FSDP_VERSION": "2"}, {"fsdp2", "fused", "8bit", "offload", "weights_precision"}, set()),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {"fused", "8bit", "weights_precision"}, {"fsdp2", "offload"}),
    ],
)
def test_advice_to_several_processes_names_only_what_goes_with_them(launcher, gone, there, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", **launcher}.items():
        monkeypatch.setenv(name, value)
    advice = Args(use_ema=True).memory_advice()
    assert {word for word in gone | there if word in advice} == there


@pytest.mark.parametrize("other", [{"gradient_accumulation_steps": 2}, {"compile": True}])
def test_what_makes_gradients_live_longer_does_not_go_with_updates_in_the_backward_pass(other, problems_of):
    flags = {"train_data_dir": "datasets/chalk", "pretrained_model_name_or_path": "models/mini-sd", "max_grad_norm": 0}
    before = problems_of(Args, **flags, fused_backward_pass=True)
    (problem,) = set(problems_of(Args, **flags, fused_backward_pass=True, **other)) - set(before)
    assert problem == f"--fused_backward_pass and --{next(iter(other))} cannot be given together"


# -- attention -------------------------------------------------------------------------------------------------------


def switched_on(run, model, monkeypatch, **flags):
    """What set_up_kernels does to a denoiser of the tiny model, whose heads are 4 and 8 wide."""
    calls, unet = [], model.denoiser.denoiser
    monkeypatch.setattr(unet, "enable_xformers_memory_efficient_attention", lambda: calls.append("xformers"))
    monkeypatch.setattr(unet, "compile", lambda: calls.append("compile"))
    monkeypatch.setattr(unet, "to", lambda **kind: calls.append(*kind.values()))
    set_up_kernels(Args(**flags), run, model)
    return calls


def test_xformers_without_a_gpu_is_one_line_and_pytorchs_attention(model, monkeypatch, fake_run):
    run = fake_run()
    assert switched_on(run, model, monkeypatch, enable_xformers_memory_efficient_attention=True) == []
    assert len(run.said) == 1 and FLAG in run.said[0]


def test_nothing_is_switched_on_that_was_not_asked_for(model, monkeypatch, fake_run):
    assert switched_on(fake_run(), model, monkeypatch) == []
    assert switched_on(fake_run(), model, monkeypatch, compile=True, channels_last=True) == ["compile"]


@pytest.mark.parametrize("faster", [True, False])
def test_xformers_is_switched_on_where_it_is_faster(faster, model, monkeypatch, fake_run):
    monkeypatch.setattr(preflight, "_probe_xformers", lambda run, denoiser: None)
    monkeypatch.setattr(preflight, "_xformers_is_faster", lambda args, run, model: faster)
    flags = {"enable_xformers_memory_efficient_attention": True}
    assert switched_on(fake_run(device="meta"), model, monkeypatch, **flags) == ["xformers"] * faster


@pytest.mark.parametrize("slow", ["xformers", "pytorch"])
def test_attention_is_timed_where_it_has_the_most_tokens(slow, model, monkeypatch, fake_run):
    shapes, run = set(), fake_run()

    def as_slow_as(name):
        def function(query, key, value):
            shapes.add(tuple(query.shape))
            time.sleep(0.01 * (name == slow))
            return attention(query, key, value)

        return function

    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=as_slow_as("xformers")))
    monkeypatch.setattr(preflight, "_pytorch_attention", as_slow_as("pytorch"))
    args = Args(resolution="64x32", train_batch_size=3)
    assert _xformers_is_faster(args, run, model) is (slow == "pytorch")
    assert shapes == {(3, 8 * 4, 2, 4)} and len(run.said) == 1  # the first block's: 8 pixels a latent, 2 heads of 4


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
def probe(model, monkeypatch, fake_run):
    """Try a function in the place of xformers' attention; the rest of xformers needs a GPU and is not imported."""

    def run_probe(function):
        ops = SimpleNamespace(memory_efficient_attention=function)
        monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
        monkeypatch.setitem(sys.modules, "xformers.ops", ops if function else None)
        _probe_xformers(fake_run(), model.denoiser.denoiser)

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
