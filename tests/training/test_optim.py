"""Optimizers that really optimize, schedules that can be entered at any step, and resuming both."""

import io
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import SchedulerType

from finetuning.families.model_args import ModelArgs
from finetuning.rng import torch_generator
from finetuning.training.optim import (
    OneByOne,
    OptimArgs,
    build_optimizer,
    build_schedule,
    learning_rates,
    load_optimizer,
    rounded_at_random,
    update_problems,
)

OPTIMIZERS = {"adamw": 1e-2, "adamw8bit": 1e-2, "adafactor": 1e-2, "prodigy": 1.0}  # a learning rate that suits each
TARGET = 0.5
FUSED, BF16 = {"fused_backward_pass": True}, {"weights_precision": "bf16"}
ONE_BY_ONE = [(kind, flags) for kind in ("adamw", "adamw8bit", "adafactor") for flags in (FUSED, BF16, FUSED | BF16)]


@dataclass
class Args(OptimArgs):
    """The flags that an optimizer reads."""

    seed: int = 0


@dataclass
class OptimAndModelArgs(OptimArgs, ModelArgs):
    """The same beside those of the model."""


def weights():
    """One tensor that is big enough for 8-bit states, and one that is not."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((64, 64), (8,))]


def optimizer_for(kind, *groups, total_batch_size=1, **flags):
    """The optimizer of a model whose denoiser, and whose text encoder if there are two groups, has these weights."""
    args = Args(optimizer=kind, **({"learning_rate": OPTIMIZERS[kind]} | flags))
    of = lambda rate, of_text: [{"params": own, "lr": one} for own, one in zip(groups, [rate, *of_text], strict=False)]
    return build_optimizer(args, SimpleNamespace(parameter_groups=of), total_batch_size)


def distance(parameters):
    return sum((p.double() - TARGET).square().sum() for p in parameters)


def take_steps(optimizer, parameters, count):
    for _ in range(count):
        optimizer.zero_grad()
        distance(parameters).backward()
        optimizer.step()


def through_a_file(state):
    """As a checkpoint keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_comes_closer(kind):
    parameters = weights()
    optimizer = optimizer_for(kind, parameters, adam_weight_decay=0.0)
    distances = [distance(parameters).item()]
    for _ in range(5):
        take_steps(optimizer, parameters, 1)
        distances.append(distance(parameters).item())
    assert distances == sorted(distances, reverse=True) and len(set(distances)) == 6


def test_8_bit_adam_keeps_8_bit_moments_of_big_tensors():
    parameters = weights()
    optimizer = optimizer_for("adamw", parameters, use_8bit_adam=True)
    assert type(optimizer) is type(optimizer_for("adamw8bit", weights()))
    take_steps(optimizer, parameters, 1)
    big, small = (optimizer.state[parameter] for parameter in parameters)
    assert big["state1"].dtype == big["state2"].dtype == torch.uint8
    assert small["state1"].dtype == torch.float32


def test_adamw_makes_its_first_step_by_hand():
    """Bias-corrected, the first step is learning rate x sign of the gradient, after the decoupled weight decay."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer = optimizer_for("adamw", [weight], learning_rate=0.1, adam_weight_decay=0.5)
    take_steps(optimizer, [weight], 1)
    torch.testing.assert_close(weight.detach(), torch.tensor([2 * 0.95 - 0.1, -3 * 0.95 + 0.1]))


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "prodigy"])
def test_adams_flags_arrive(kind):
    flags = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.3, "adam_epsilon": 1e-5}
    (group,) = optimizer_for(kind, weights(), **flags).param_groups
    assert (tuple(group["betas"]), group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.3, 1e-5)


# -- one weight after another ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor"])
def test_updates_in_the_backward_pass_are_those_after_it_to_the_last_bit(kind):
    first, second = weights(), weights()
    plain, fused = optimizer_for(kind, *zip(first)), optimizer_for(kind, *zip(second), **FUSED)
    for _ in range(4):
        for parameters in (first, second):
            distance(parameters).backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in first])
        assert torch.equal(fused.take_gradient_norm(), norm)
        for optimizer in (plain, fused):
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("flags", [FUSED, FUSED | BF16])
def test_no_two_gradients_are_there_at_once(flags, monkeypatch):
    parameters, alive = [*weights(), *weights()], []
    update = OneByOne._update
    count = lambda: sum(parameter.grad is not None for parameter in parameters)
    monkeypatch.setattr(
        OneByOne, "_update", lambda *args: (alive.append(count()), update(*args), alive.append(count()))
    )
    optimizer = optimizer_for("adamw", parameters, **flags)
    distance(parameters).backward()
    assert alive == [1, 0] * 4
    optimizer.step()
    assert len(alive) == 8


def test_rounding_takes_a_neighbour_and_the_mean_is_the_value():
    values = torch.tensor([1 + 2**-9, -(1 + 2**-10), 3e-41, 1e38, 0.1]).repeat(20_000, 1)
    rounded = rounded_at_random(values, torch_generator(0, "rounding", 1)).float()
    bits = values.view(torch.int32) & -(1 << 16)
    below, above = bits.view(torch.float32), (bits + (1 << 16)).view(torch.float32)  # towards zero, and away from it
    assert ((rounded == below) | (rounded == above)).all()
    share = (rounded == above).double().mean(0)
    expected = ((values.double() - below) / (above.double() - below))[0]
    torch.testing.assert_close(share, expected, rtol=0, atol=4 * math.sqrt(0.25 / 20_000))
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**-130, math.inf, -math.inf, math.nan])
    exact[-1:].view(torch.int32).fill_(0x7FFFFFFF)  # as a GPU writes nan: one more would be -0.0
    twice = rounded_at_random(exact, torch_generator(0, "rounding", 2)).float()
    torch.testing.assert_close(twice, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor"])
def test_updates_too_small_for_bf16_arrive_on_average(kind):
    weight = torch.nn.Parameter(torch.ones(64, 64))
    rate = 1e-4  # the next number below 1 is 1 - 2^-8
    optimizer = optimizer_for(kind, [weight], learning_rate=rate, adam_weight_decay=0.0, **BF16)
    assert weight.dtype == torch.bfloat16 and (weight - rate).equal(weight)
    for _ in range(20):
        weight.sum().backward()
        optimizer.step()
    assert (1 - weight.float()).mean().item() == pytest.approx(20 * rate, rel=0.2)
    assert all(value.dtype != torch.bfloat16 for value in optimizer.state_dict()["state"][0].values()
               if isinstance(value, torch.Tensor))  # fmt: skip


def test_rounding_is_a_function_of_seed_step_and_weight():
    def after(steps, seed):
        parameters = [torch.nn.Parameter(torch.ones(256)) for _ in range(2)]
        optimizer = optimizer_for("adamw", parameters, learning_rate=1e-3, seed=seed, **BF16)
        take_steps(optimizer, parameters, steps)
        return [parameter.detach() for parameter in parameters]

    (one, other), (again, _), (of_another_seed, _) = after(1, 0), after(1, 0), after(1, 1)
    assert one.equal(again) and not one.equal(other) and not one.equal(of_another_seed)


@pytest.mark.parametrize(
    ("flags", "precision", "processes", "named"),
    [
        (BF16, "no", 1, "--weights_precision bf16 .* add --mixed_precision bf16"),
        (FUSED, "fp16", 1, "--fused_backward_pass .* --mixed_precision bf16"),
        (FUSED, "no", 2, "--fused_backward_pass .* 2 processes"),
        (FUSED | BF16, "bf16", 1, None),
    ],
)
def test_devices_and_precisions_that_do_not_go_with_it_are_named(flags, precision, processes, named):
    accelerator = SimpleNamespace(mixed_precision=precision)
    run = SimpleNamespace(accelerator=accelerator, processes=processes, is_sharded=False, zero_stage=0)
    problems = list(update_problems(OptimArgs(**flags), run))
    assert len(problems) == bool(named) and all(re.match(named, problem) for problem in problems)


# -- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ({}, (1e-4, [1e-4])),
        ({"text_encoder_lr": [1e-5]}, (1e-4, [1e-5])),
        ({"text_encoder_lr": [0.0]}, (1e-4, [0.0])),
        ({"text_encoder_lr": [1e-5], "scale_lr": True}, (3.2e-3, [3.2e-4])),
    ],
)
def test_each_group_has_its_own_rate_and_scale_lr_multiplies_by_the_rows_of_a_step(flags, rates):
    first, second = weights()
    args = OptimArgs(learning_rate=1e-4, **flags)
    rate, of_text = learning_rates(args, 32)
    rates = [rates[0], *rates[1]]
    assert [rate, *of_text] == pytest.approx(rates)
    optimizer = optimizer_for("adamw", [first], [second], total_batch_size=32, learning_rate=1e-4, **flags)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)


# -- schedules -------------------------------------------------------------------------------------------------------

TOTAL = 20
PEAKS = (1e-2, 1e-3)


@pytest.mark.parametrize("rules", ["1:10,0.1:20,0.01", "1e-1:5,.5:7,0", "0.3"])
def test_the_rules_that_the_help_shows_are_taken(rules, problems_of):
    assert problems_of(OptimArgs, lr_scheduler="piecewise_constant", lr_step_rules=rules) == []


def schedule_args(kind, **flags):
    rules = "1:5,0.5:10,0.1" if kind == "piecewise_constant" else None
    usual = {"lr_warmup_steps": 4, "lr_num_cycles": 2, "lr_power": 2.0}
    return OptimArgs(lr_scheduler=kind, lr_step_rules=rules, **(usual | flags))


def two_groups(peaks=PEAKS):
    return torch.optim.AdamW(
        [{"params": [p], "lr": peak} for p, peak in zip(weights(), peaks, strict=True)], lr=peaks[0]
    )


def rates(args, first_step, total=TOTAL, optimizer=None):
    """The learning rates that the steps from `first_step` on are made with: [(denoiser's, text encoder's), ...]."""
    optimizer = optimizer or two_groups()
    schedule = build_schedule(args, optimizer, total, first_step)
    used = []
    for _ in range(first_step, total):
        used.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_a_schedule_moves_an_optimizer_that_updates_one_weight_after_another_the_same_way(kind):
    one_by_one = OneByOne(two_groups(), [], 0)
    build_schedule(schedule_args(kind), one_by_one, TOTAL, 3)
    assert [group["lr"] for group in one_by_one.param_groups] == list(rates(schedule_args(kind), 3)[0])


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_a_schedule_entered_at_any_step_goes_on_like_an_uninterrupted_one(kind):
    args = schedule_args(kind)
    straight = rates(args, 0)
    assert len(set(straight)) > 1 or kind == "constant"
    for first_step in (1, 4, 7, 19):
        assert rates(args, first_step) == straight[first_step:]


def test_rates_by_hand():
    warm_up = [0, 0.25, 0.5, 0.75]
    constant = [one for one, _ in rates(schedule_args("constant_with_warmup"), 0)]
    assert constant == pytest.approx([1e-2 * share for share in warm_up + [1] * 16])
    linear = [one for one, _ in rates(schedule_args("linear"), 0)]
    assert linear == pytest.approx([1e-2 * share for share in warm_up + [1 - n / 16 for n in range(16)]])
    cosine = [one for one, _ in rates(schedule_args("cosine"), 0)]
    falling = [0.5 * (1 + math.cos(math.pi * n / 16)) for n in range(16)]
    assert cosine == pytest.approx([1e-2 * share for share in warm_up + falling])
    pieces = [one for one, _ in rates(schedule_args("piecewise_constant"), 0)]
    assert pieces == pytest.approx([1e-2] * 5 + [5e-3] * 5 + [1e-3] * 10)


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_a_warm_up_as_long_as_the_run_ends_like_any_other(kind):
    """diffusers' polynomial schedule divides by the steps that are left after the warm-up."""
    assert len(rates(schedule_args(kind, lr_warmup_steps=TOTAL), 0)) == TOTAL


@pytest.mark.parametrize(("flags", "keeps"), [({}, True), ({"use_8bit_adam": True}, False), (
    {"use_8bit_adam": True, "weights_precision": "bf16"}, True)])  # fmt: skip
def test_channels_last_is_refused_where_the_optimizer_undoes_it(flags, keeps, problems_of):
    kernel = torch.nn.Parameter(torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last))
    take_steps(optimizer_for("adamw", [kernel], **flags), [kernel], 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last) is keeps
    flags |= {"pretrained_model_name_or_path": "models/mini-sd", "channels_last": True}
    assert len(problems_of(OptimAndModelArgs, **flags)) == (not keeps)


# -- going on from a checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "flags"), [*((kind, {}) for kind in OPTIMIZERS), *ONE_BY_ONE])
def test_a_resumed_optimizer_makes_the_steps_of_an_uninterrupted_one(kind, flags):
    straight = weights()
    optimizer = optimizer_for(kind, straight, **flags)
    take_steps(optimizer, straight, 4)
    state = through_a_file(optimizer.state_dict())
    resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in straight]
    successor = optimizer_for(kind, resumed, **flags)
    load_optimizer(successor, state)
    take_steps(optimizer, straight, 4)
    take_steps(successor, resumed, 4)
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))
    # The moments matter: without them the same four steps lead elsewhere.
    fresh = [torch.nn.Parameter(weight.detach().clone()) for weight in weights()]
    load_nothing = optimizer_for(kind, fresh)
    take_steps(load_nothing, fresh, 4)
    assert not torch.equal(fresh[0], resumed[0])


def test_the_flags_win_over_the_checkpoint_on_resume():
    parameters = weights()
    optimizer = optimizer_for("adamw", parameters)
    build_schedule(schedule_args("cosine"), optimizer, TOTAL)
    take_steps(optimizer, parameters, 3)
    changed = {"learning_rate": 3e-2, "adam_beta1": 0.5, "adam_weight_decay": 0.2, "adam_epsilon": 1e-6}
    successor = optimizer_for("adamw", weights(), **changed)
    load_optimizer(successor, through_a_file(optimizer.state_dict()))
    (group,) = successor.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (3e-2, (0.5, 0.999), 0.2, 1e-6)


@pytest.mark.parametrize("fused", [True, None])
def test_adamw_is_fused_where_its_own_device_wants_it_wherever_the_checkpoint_was_made(fused):
    """A GPU's loss scaler speaks to the fused one alone, which wants its count of steps on the GPU."""
    before, after = (torch.optim.AdamW(weights(), fused=one) for one in (None if fused else True, fused))
    before.param_groups[0]["params"][0].grad = torch.ones(64, 64)
    before.step()
    seen = []
    after.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["param_groups"][0]["fused"]))
    load_optimizer(after, through_a_file(before.state_dict()))
    assert seen == [fused] and after.param_groups[0]["fused"] is fused


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("formats", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")])
def test_moments_lie_in_memory_as_the_weights_of_the_run_that_resumes(formats, precision):
    """A checkpoint may be of a run with the other choice of --channels_last; the fused kernel goes by memory alone."""
    values, ways = torch.randn(6, 4, 3, 3), {"weights_precision": precision}
    kernels = [
        torch.nn.Parameter(values.clone(memory_format=getattr(torch, one)))
        for one in ("contiguous_format", *formats)
    ]  # fmt: skip
    straight, before, after = optimizers = [optimizer_for("adamw", [kernel], **ways) for kernel in kernels]
    for optimizer in optimizers:
        optimizer.param_groups[0]["fused"] = True
    take_steps(straight, kernels[:1], 2)
    take_steps(before, kernels[1:2], 1)
    load_optimizer(after, through_a_file(before.state_dict()))
    kernels[2].data.copy_(kernels[1])
    take_steps(after, kernels[2:], 1)
    torch.testing.assert_close(kernels[2].data, kernels[0].data, rtol=1e-6, atol=0)


def test_a_changed_learning_rate_is_used_by_the_schedule_after_a_resume():
    before, args = two_groups(), schedule_args("cosine")
    build_schedule(
        args, before, TOTAL
    )  # leaves its peaks in the optimizer's state, where the next run must not find them
    after = two_groups(peaks=(5e-2, 5e-3))
    load_optimizer(after, through_a_file(before.state_dict()))
    ten_steps_on = [tuple(5 * rate for rate in pair) for pair in rates(args, 0)[10:]]
    assert rates(args, 10, optimizer=after) == [pytest.approx(pair) for pair in ten_steps_on]


# -- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"use_8bit_adam": True, "optimizer": "prodigy", "learning_rate": 1}, "--use_8bit_adam"),
        ({"optimizer": "prodigy", "learning_rate": 1, "text_encoder_lr": 1e-5}, "--text_encoder_lr"),
        ({"optimizer": "prodigy"}, "--optimizer prodigy finds the learning rate itself: set --learning_rate 1"),
        ({"adam_beta1": 1.0}, "--adam_beta1"),
        ({"learning_rate": -1e-4}, "--learning_rate"),
        ({"learning_rate": math.nan}, "--learning_rate"),
        ({"lr_scheduler": "piecewise_constant"}, "--lr_scheduler"),
        ({"lr_step_rules": "1:10,0.1"}, "--lr_scheduler"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:-1,0.1"}, "--lr_step_rules 1:-1,0.1"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "--lr_scheduler polynomial"),
        ({"lr_scheduler": "polynomial", "lr_power": -1}, "--lr_power"),
        ({"fused_backward_pass": True}, "--fused_backward_pass and --max_grad_norm 1.0: "),
        ({"weights_precision": "bf16", "optimizer": "prodigy", "learning_rate": 1}, "--weights_precision bf16 updates"),
    ],
)
def test_flags_that_cannot_work_are_named(flags, named, problems_of):
    (problem,) = problems_of(OptimArgs, **flags)
    assert problem.startswith(named)
    assert not problems_of(OptimArgs)
