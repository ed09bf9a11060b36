"""The objective, beside diffusers' own maths and beside numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

from finetuning.diffusion import objective
from finetuning.diffusion.objective import (
    PREDICTION_TYPES,
    NoiseArgs,
    NoiseDraws,
    diffusion_loss,
    draw_noise,
    elementwise_error,
)
from finetuning.diffusion.schedule import NoiseSchedule

TIMESTEPS = torch.tensor([0, 250, 500, 999])


def ddpm(**options):
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def normal(number, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def latents():
    return normal(1, 4, 4, 2, 2)


@pytest.fixture
def draws():
    return NoiseDraws(normal(2, 4, 4, 2, 2), TIMESTEPS, normal(3, 4, 4, 1, 1), normal(4, 4, 4, 2, 2))


class Denoiser:
    """A stand-in for the UNet that remembers what it was asked."""

    def __init__(self, answer=lambda noisy: 0.5 * torch.tanh(noisy)):
        self.answer, self.inputs, self.with_gradient = answer, [], []

    def __call__(self, noisy, timesteps):
        self.inputs.append(noisy)
        self.with_gradient.append(torch.is_grad_enabled())
        return self.answer(noisy)


def loss_and_input(latents, draws, schedule, **flags):
    """The rows' loss of a denoiser that always answers 0, and the noisy latents that it was given."""
    denoiser = Denoiser(torch.zeros_like)
    return diffusion_loss(denoiser, schedule, latents, draws, NoiseArgs(**flags)), denoiser.inputs[-1]


# -- the forward process ---------------------------------------------------------------------------------------------


def test_noisy_latents_are_those_of_diffusers(latents, draws):
    expected = ddpm().add_noise(latents, draws.noise, TIMESTEPS)
    torch.testing.assert_close(NoiseSchedule.of(ddpm()).add_noise(latents, draws.noise, TIMESTEPS), expected)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_target_is_that_of_diffusers(kind, latents, draws):
    expected = {
        "epsilon": draws.noise,
        "sample": latents,
        "v_prediction": ddpm().get_velocity(latents, draws.noise, TIMESTEPS),
    }[kind]
    torch.testing.assert_close(NoiseSchedule.of(ddpm(), kind).target(latents, draws.noise, TIMESTEPS), expected)


def test_the_flag_wins_over_the_scheduler_and_none_keeps_the_schedulers():
    scheduler = ddpm(prediction_type="v_prediction")
    assert NoiseSchedule.of(scheduler).prediction_type == "v_prediction"
    assert NoiseSchedule.of(scheduler, "sample").prediction_type == "sample"


def test_zero_snr_is_diffusers_rescaling_and_makes_nothing_infinite(latents, draws):
    scheduler = ddpm(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    rescaled, every = NoiseSchedule.of(scheduler), torch.full((4,), 999)
    torch.testing.assert_close(rescaled.alpha_bar, (1 - rescale_zero_terminal_snr(ddpm().betas)).cumprod(0))
    assert rescaled.alpha_bar[-1] == 0 and rescaled.steps_back.isfinite().all()
    torch.testing.assert_close(rescaled.target(latents, draws.noise, every), -latents)
    torch.testing.assert_close(rescaled.original(draws.noise, -latents, every), latents)


# -- min-SNR ---------------------------------------------------------------------------------------------------------


def test_signal_to_noise_is_that_of_diffusers_at_every_timestep():
    every = torch.arange(1000)
    expected = compute_snr(ddpm(), every)
    torch.testing.assert_close(NoiseSchedule.of(ddpm()).signal_to_noise(every), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("epsilon", [1.0, 1.0, 5 / 9]),  # min(SNR, 5) / SNR
        ("v_prediction", [0.2, 0.8, 0.5]),  # min(SNR, 5) / (SNR + 1)
        ("sample", [0.25, 4.0, 5.0]),  # min(SNR, 5)
    ],
)
def test_min_snr_weights_by_hand(kind, expected):
    schedule = NoiseSchedule(torch.tensor([0.2, 0.8, 0.9]), kind)  # SNR 1/4, 4 and 9
    weights = schedule.min_snr_weight(torch.arange(3), gamma=5.0)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(("kind", "at_the_end"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_zero_terminal_snr_gives_no_nan(kind, at_the_end):
    """diffusers' scripts divide 0 by 0 there (epsilon)."""
    schedule = NoiseSchedule(torch.tensor([0.9, 0.0]), kind)
    assert schedule.min_snr_weight(torch.tensor([1]), gamma=5.0).item() == at_the_end
    rescaled = NoiseSchedule.of(ddpm(rescale_betas_zero_snr=True), kind)
    assert rescaled.min_snr_weight(torch.arange(1000), gamma=5.0).isfinite().all()


def test_snr_gamma_multiplies_each_rows_loss(latents, draws):
    schedule = NoiseSchedule.of(ddpm())
    plain, _ = loss_and_input(latents, draws, schedule)
    weighted, _ = loss_and_input(latents, draws, schedule, snr_gamma=5.0)
    weights = schedule.min_snr_weight(TIMESTEPS, 5.0)
    assert weights[0] < 0.01 and weights[-1] == 1  # so that the weights matter here
    torch.testing.assert_close(weighted, weights * plain)


# -- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"snr_gamma": 5.0}, {"loss_type": "huber"}, {"dream_training": True}])
def test_a_rows_loss_does_not_depend_on_the_other_rows(flags, latents, draws):
    args, schedule = NoiseArgs(**flags), NoiseSchedule.of(ddpm())
    together = diffusion_loss(Denoiser(), schedule, latents, draws, args)
    alone = [
        diffusion_loss(
            Denoiser(),
            schedule,
            latents[row : row + 1],
            NoiseDraws(*(value[row : row + 1] for value in vars(draws).values())),
            args,
        )
        for row in range(4)
    ]
    assert together.shape == (4,)
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_loss_is_fp32_where_the_denoiser_answers_in_half_precision(latents, draws):
    denoiser = Denoiser(lambda noisy: torch.zeros_like(noisy, dtype=torch.bfloat16))
    loss = diffusion_loss(denoiser, NoiseSchedule.of(ddpm()), latents, draws, NoiseArgs())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, draws.noise.square().mean((1, 2, 3)))


def test_huber_equals_the_squared_error_below_huber_c_and_is_linear_above():
    answer, target = torch.tensor([0.0, 0.05, -0.1, 1.0, -3.0]), torch.zeros(5)
    squared = elementwise_error(answer, target, NoiseArgs())
    huber = elementwise_error(answer, target, NoiseArgs(loss_type="huber", huber_c=0.1))
    torch.testing.assert_close(squared, torch.tensor([0.0, 0.0025, 0.01, 1.0, 9.0]))
    # 2 c (|e| - c / 2): 0.2 * 0.95 and 0.2 * 2.95
    torch.testing.assert_close(huber, torch.tensor([0.0, 0.0025, 0.01, 0.19, 0.59]))


def test_noise_offset_shifts_each_channel_as_a_whole(latents, draws):
    schedule = NoiseSchedule.of(ddpm())
    loss, noisy = loss_and_input(latents, draws, schedule, noise_offset=0.5)
    sigma = (1 - ddpm().alphas_cumprod[TIMESTEPS]).sqrt().view(4, 1, 1, 1)
    shift = (noisy - schedule.add_noise(latents, draws.noise, TIMESTEPS)) / sigma
    torch.testing.assert_close(shift, (0.5 * draws.offset).expand_as(shift), rtol=1e-4, atol=1e-5)
    assert len(draws.offset.unique()) == 16  # another shift for every row and channel
    # The noise that is to be found has the offset in it.
    torch.testing.assert_close(loss, (draws.noise + 0.5 * draws.offset).square().mean((1, 2, 3)))


def test_input_perturbation_changes_the_input_and_not_the_target(latents, draws):
    schedule = NoiseSchedule.of(ddpm())
    plain_loss, _ = loss_and_input(latents, draws, schedule)
    loss, noisy = loss_and_input(latents, draws, schedule, input_perturbation=0.1)
    torch.testing.assert_close(noisy, schedule.add_noise(latents, draws.noise + 0.1 * draws.perturbation, TIMESTEPS))
    assert torch.equal(loss, plain_loss)


@pytest.mark.parametrize("detail", [1.0, 0.5])
def test_dream_is_that_of_diffusers(detail, latents, draws):
    scheduler, ours = ddpm(), Denoiser()
    noisy, target = compute_dream_and_update_latents(
        lambda noisy, timesteps, text: SimpleNamespace(sample=Denoiser()(noisy, timesteps)), scheduler, TIMESTEPS,
        draws.noise, scheduler.add_noise(latents, draws.noise, TIMESTEPS), draws.noise, None, detail,
    )  # fmt: skip
    args = NoiseArgs(dream_training=True, dream_detail_preservation=detail)
    loss = diffusion_loss(ours, NoiseSchedule.of(scheduler), latents, draws, args)
    torch.testing.assert_close(ours.inputs[1], noisy)
    torch.testing.assert_close(loss, (0.5 * torch.tanh(noisy) - target).square().mean((1, 2, 3)))
    assert ours.with_gradient == [False, True]


# -- the draws -------------------------------------------------------------------------------------------------------

EVERYTHING = NoiseArgs(noise_offset=0.1, input_perturbation=0.1)


def drawn(rows, seed=0, step=3, args=EVERYTHING):
    return vars(draw_noise(seed, step, rows, torch.zeros(len(rows), 4, 2, 2), NoiseSchedule.of(ddpm()), args))


def test_one_batch_of_eight_draws_what_two_of_four_draw():
    rows = [5, 0, 17, 3, 8, 2, 11, 6]
    whole, first, second = drawn(rows), drawn(rows[:4]), drawn(rows[4:])
    assert all(torch.equal(whole[name], torch.cat([first[name], second[name]])) for name in whole)


@pytest.mark.parametrize("name", ["noise", "timesteps", "offset", "perturbation"])
def test_draws_differ_between_rows_steps_and_seeds(name):
    rows = range(8)
    values = drawn(rows)[name]
    assert len({tuple(row.flatten().tolist()) for row in values}) == 8
    for other in (drawn(rows, step=4)[name], drawn(rows, seed=1)[name], drawn(range(8, 16))[name]):
        assert not (values == other).flatten(1 if values.dim() > 1 else 0).all(-1).any()


def test_the_offset_is_one_number_for_each_row_and_channel():
    assert drawn(range(8))["offset"].shape == (8, 4, 1, 1)


def test_noise_offset_and_perturbation_are_drawn_apart():
    values = drawn(range(8))
    pairs = [("noise", "perturbation"), ("noise", "offset"), ("perturbation", "offset")]
    for one, other in pairs:
        first = values[one][:, :, :1, :1].flatten()
        assert abs(torch.corrcoef(torch.stack([first, values[other][:, :, :1, :1].flatten()]))[0, 1]) < 0.5


def test_noise_has_mean_0_and_variance_1():
    values = drawn(range(2000))["noise"]
    assert abs(values.mean().item()) < 0.02  # 32,000 numbers: five standard errors are 0.028 and 0.04
    assert abs(values.var().item() - 1) < 0.04


def test_timesteps_are_uniform_from_0_to_999():
    schedule = NoiseSchedule.of(ddpm())
    timesteps = draw_noise(0, 0, range(20_000), torch.zeros(20_000, 1, 1, 1), schedule, NoiseArgs()).timesteps
    counts = torch.bincount(timesteps, minlength=1000).double()
    assert len(counts) == 1000 and counts.min() > 0
    chi_square = ((counts - 20) ** 2 / 20).sum().item()
    assert abs(chi_square - 999) < 4 * math.sqrt(2 * 999)  # mean and standard deviation of chi-square with 999 degrees


@pytest.mark.parametrize(
    ("flags", "biased"),
    [
        ({"strategy": "earlier", "portion": 0.1}, range(100)),
        ({"strategy": "later", "portion": 0.1}, range(900, 1000)),
        ({"strategy": "range", "begin": 300, "end": 500}, range(300, 500)),
    ],
)
def test_biased_timesteps_are_drawn_so_many_times_as_often(flags, biased):
    args = NoiseArgs(**{f"timestep_bias_{name}": value for name, value in flags.items()}, timestep_bias_multiplier=3)
    share = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = torch.bincount(objective.biased_timesteps(share, 1000, args), minlength=1000).double()
    inside = torch.zeros(1000, dtype=torch.bool).index_fill(0, torch.tensor(biased), True)
    assert counts[inside].mean() / counts[~inside].mean() == pytest.approx(3, rel=1e-3)
    args.timestep_bias_multiplier = 1  # the quantile of the same draw: where nothing is biased, the same timesteps
    assert torch.equal(objective.biased_timesteps(share, 1000, args), (share * 1000).long())


@pytest.mark.parametrize(("share", "timestep"), [(0.0, 0), (math.nextafter(1.0, 0.0), 999)])
def test_the_first_and_the_last_timestep_can_be_drawn_and_no_other(share, timestep, monkeypatch):
    """GLIDE's training never drew the last one."""
    monkeypatch.setattr(objective, "uniform", lambda *position: torch.tensor([share], dtype=torch.float64))
    assert drawn([0])["timesteps"].tolist() == [timestep]


# -- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"snr_gamma": 0.0},
        {"huber_c": 0.0},
        {"dream_training": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
    ],
)
def test_flags_that_cannot_work_are_named(flags, problems_of):
    (problem,) = problems_of(NoiseArgs, **flags)
    assert problem.startswith(f"--{next(iter(flags))}")
    assert not problems_of(NoiseArgs, snr_gamma=5.0, dream_training=True, prediction_type="epsilon")


def test_a_schedule_that_was_sent_to_a_device_stays_there():
    there = NoiseSchedule.of(ddpm()).to("meta")  # where nothing of the CPU can be mixed in
    timesteps = torch.zeros(4, dtype=torch.int64, device="meta")
    found = (*there.signal_and_noise(timesteps), there.min_snr_weight(timesteps, 5.0), there.steps_back[:, timesteps])
    assert {tensor.device.type for tensor in found} == {"meta"}
