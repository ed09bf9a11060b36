"""The average: where it starts, how it moves, and that it never leaks into the trained weights."""

import contextlib

import pytest
import torch
from diffusers.training_utils import EMAModel

from finetuning.training.ema import AveragedWeights, EMAArgs, NoAverage, build_ema


def some_parameters():
    generator = torch.Generator().manual_seed(0)
    sizes = {"unet.a": (3, 4), "unet.b": (5,)}
    return {name: torch.nn.Parameter(torch.randn(size, generator=generator)) for name, size in sizes.items()}


@torch.no_grad()
def train_a_little(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def run(average, steps, first=0):
    for step in range(first, steps):
        train_a_little(average.parameters, step)
        average.update()


def copies(values):
    return {name: value.detach().clone() for name, value in values.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- how much of the start remains -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9999, 0.5])  # 0.5 is reached by the ramp after 9 steps
def test_ramp_moves_as_diffusers_average_does(decay):
    parameters = some_parameters()
    ours = AveragedWeights(parameters, decay, "ramp")
    theirs = EMAModel(parameters.values(), decay=decay)
    for step in range(30):
        train_a_little(parameters, step)
        ours.update()
        theirs.step(parameters.values())
        for value, expected in zip(ours.shadow.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.9999, 0.99])
def test_warm_keeps_exactly_decay_to_the_n_of_its_start(decay):
    steps = 1000
    average = AveragedWeights({"w": torch.nn.Parameter(torch.zeros(4))}, decay, "warm", {"w": torch.ones(4)})
    for _ in range(steps):
        average.update()
    assert average.shadow["w"].tolist() == pytest.approx([decay**steps] * 4, rel=1e-4)


def test_ramp_erases_the_start_at_its_first_step():
    parameters = some_parameters()
    average = AveragedWeights(parameters, 0.9999, "ramp", {name: v + 5 for name, v in copies(parameters).items()})
    run(average, 1)
    assert equal(average.shadow, copies(parameters))


def test_parameters_that_the_start_does_not_name_start_as_they_are():
    parameters = some_parameters()
    average = AveragedWeights(parameters, 0.9, "warm", {"unet.a": torch.full((3, 4), 2.0)})
    assert torch.equal(average.shadow["unet.a"], torch.full((3, 4), 2.0))
    assert torch.equal(average.shadow["unet.b"], parameters["unet.b"])


def test_the_average_is_an_fp32_copy_that_training_does_not_touch():
    parameters = {"w": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    start = {"w": torch.ones(3)}
    for average in (AveragedWeights(parameters, 0.5, "warm"), AveragedWeights(parameters, 0.5, "warm", start)):
        with torch.no_grad():
            parameters["w"].fill_(3)
        start["w"].fill_(3)
        assert average.shadow["w"].dtype == torch.float32 and not average.shadow["w"].requires_grad
        assert average.shadow["w"].tolist() == [1, 1, 1]
        average.update()
        assert average.shadow["w"].tolist() == [2, 2, 2]
        with torch.no_grad():
            parameters["w"].fill_(1)
        start["w"].fill_(1)


# -- putting it into the model and taking it out ---------------------------------------------------------------------


def test_within_the_block_the_model_is_the_average_and_afterwards_itself_again():
    average = AveragedWeights(some_parameters(), 0.9, "warm")
    run(average, 3)
    trained, shadow = copies(average.parameters), copies(average.shadow)
    for end in (contextlib.nullcontext(), pytest.raises(KeyboardInterrupt)):  # after an exception too
        with end, average.averaged_weights():
            assert equal(copies(average.parameters), shadow) and not equal(shadow, trained)
            if not isinstance(end, contextlib.nullcontext):
                raise KeyboardInterrupt
        assert equal(copies(average.parameters), trained)
        assert equal(average.shadow, shadow)


# -- going on from a checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["warm", "ramp"])
def test_a_loaded_average_goes_on_as_if_it_had_never_stopped(kind):
    straight = AveragedWeights(some_parameters(), 0.9, kind)
    run(straight, 5)
    kept, weights, updates = copies(straight.shadow), copies(straight.parameters), straight.updates
    resumed = AveragedWeights({name: torch.nn.Parameter(value) for name, value in weights.items()}, 0.9, kind)
    resumed.load(kept, updates)
    run(straight, 12, first=5)
    run(resumed, 12, first=5)
    assert equal(resumed.shadow, straight.shadow) and resumed.updates == 12


def test_a_missing_weight_is_named():
    average = AveragedWeights(some_parameters(), 0.9, "warm")
    with pytest.raises(KeyError, match=r"unet\.b"):
        average.load({"unet.a": torch.zeros(3, 4)}, 1)


# -- what the flags choose -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "started_apart", "kind"),
    [(None, True, "warm"), (None, False, "ramp"), ("ramp", True, "ramp"), ("warm", False, "warm")],
)
def test_average_starts_warm_only_where_weights_were_loaded_apart_or_the_flag_says_so(flag, started_apart, kind):
    parameters = some_parameters()
    start = copies(parameters) if started_apart else None
    average = build_ema(EMAArgs(use_ema=True, ema_start=flag), parameters, start)
    assert (average.start_kind, average.decay) == (kind, 0.9999)


@pytest.mark.parametrize(("offload", "device"), [(True, "cpu"), (False, "meta")])
def test_offload_ema_keeps_the_average_on_the_cpu(offload, device):
    """The meta device stands for the GPU, which not every machine has."""
    parameters = {"w": torch.nn.Parameter(torch.empty(2, device="meta"))}
    args = EMAArgs(use_ema=True, offload_ema=offload)
    average = build_ema(args, parameters, {"w": torch.ones(2)})
    assert average.shadow["w"].device.type == device


def test_weights_of_another_precision_are_never_copied_all_at_once(monkeypatch):
    parameters = {
        str(number): torch.nn.Parameter(torch.full((8,), number, dtype=torch.bfloat16)) for number in range(99)
    }
    average, together, lerp = AveragedWeights(parameters, 0.5, "warm"), [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *lists: (together.append(len(lists[1])), lerp(*lists)))
    for parameter in parameters.values():
        parameter.data += 2
    average.update()
    assert sum(together) == 99 and max(together) <= 33
    assert [value[0].item() for value in average.shadow.values()] == [number + 1 for number in range(99)]


def test_an_average_that_is_off_has_the_calls_of_one_that_is_on():
    parameters = some_parameters()
    before = copies(parameters)
    off = build_ema(EMAArgs(), parameters, None)
    assert isinstance(off, NoAverage)
    train_a_little(parameters, 0)
    trained = copies(parameters)
    off.update()
    with off.averaged_weights():
        assert equal(copies(parameters), trained) and not equal(before, trained)
    assert (off.shadow, off.updates) == (None, 0)
