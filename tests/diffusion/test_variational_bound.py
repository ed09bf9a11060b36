"""The bound beside the paper's formulas in float64, and beside the variances that diffusers' sampler uses."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from finetuning.diffusion.objective import VLB_WEIGHT, NoiseArgs, NoiseDraws, diffusion_loss
from finetuning.diffusion.schedule import NoiseSchedule
from finetuning.diffusion.variational_bound import bound_term

SCHEDULERS = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear"},
    "v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "sample": {"beta_schedule": "linear", "prediction_type": "sample"},
}


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    return DDPMScheduler(variance_type="learned_range", **SCHEDULERS[request.param])


@pytest.fixture
def images():
    """(original of 256 levels, noise, variance), [4, 3, 2, 2] each."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(0, 256, (4, 3, 2, 2), generator=generator) / 127.5 - 1
    original[0, 0] = torch.tensor([[-1.0, 1.0], [0.0, 1.0]])
    rest = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    return original, *rest


def by_the_paper(scheduler, original, noisy, answer, variance, t):
    """Eq. 4 to 7 and 15 for one row, number by number, in float64, in bits per dimension."""
    numbers = (one.double().flatten().tolist() for one in (original, noisy, answer, variance))
    terms = [_of_one(scheduler, t, *row) for row in zip(*numbers, strict=True)]
    return sum(terms) / len(terms) / math.log(2)


def _of_one(scheduler, t, x0, xt, answer, v):
    bars = [1.0, *scheduler.alphas_cumprod.double().tolist()]  # from timestep -1 on
    now, before = bars[t + 1], bars[t]
    beta = 1 - now / before
    first = max(t, 1)
    tilde = (1 - bars[first]) / (1 - bars[first + 1]) * (1 - bars[first + 1] / bars[first])
    found = {
        "epsilon": (xt - math.sqrt(1 - now) * answer) / math.sqrt(now),
        "v_prediction": math.sqrt(now) * xt - math.sqrt(1 - now) * answer,
        "sample": answer,
    }[scheduler.config.prediction_type]
    mean = lambda x: (math.sqrt(before) * beta * x + math.sqrt(now / before) * (1 - before) * xt) / (1 - now)
    deviation = math.exp(0.5 * ((v + 1) / 2 * math.log(beta) + (1 - (v + 1) / 2) * math.log(tilde)))
    if t:
        distance = tilde + (mean(x0) - mean(found)) ** 2
        return math.log(deviation / math.sqrt(tilde)) - 0.5 + distance / (2 * deviation**2)
    below_of = lambda x: 0.5 * (1 + math.erf((x - mean(found)) / deviation / math.sqrt(2)))
    above = 1.0 if x0 > 0.999 else below_of(x0 + 1 / 255)
    below = 0.0 if x0 < -0.999 else below_of(x0 - 1 / 255)
    return -math.log(max(above - below, 1e-12))


@pytest.mark.parametrize("t", [0, 1, 7, 500, 998, 999])
def test_the_term_is_the_papers(scheduler, images, t):
    original, noise, variance = images
    schedule, timesteps = NoiseSchedule.of(scheduler), torch.full((4,), t)
    noisy = schedule.add_noise(original, noise, timesteps)
    answer = schedule.target(original, noise, timesteps) + 0.1 * variance.roll(1, 0)
    found = bound_term(schedule, original, noisy, answer, variance.tanh(), timesteps)
    for row in range(4):
        wanted = by_the_paper(scheduler, original[row], noisy[row], answer[row], variance.tanh()[row], t)
        assert found[row].item() == pytest.approx(wanted, rel=2e-3, abs=1e-5)


def test_its_variances_are_those_of_the_sampler(scheduler):
    log_small, log_large, *_ = NoiseSchedule.of(scheduler).steps_back.flatten(1)
    for t in (2, 500, 998):
        for v, ours in ((-1.0, log_small[t]), (1.0, log_large[t])):
            theirs = scheduler._get_variance(t, predicted_variance=torch.tensor(v))  # a logarithm
            assert ours.item() == pytest.approx(theirs.item(), abs=1e-3)


def hybrid(scheduler, images, **flags):
    """(losses, gradient of the prediction, gradient of the variance) of a denoiser that answers with both."""
    original, noise, variance = images
    answer = torch.cat([0.5 * noise, variance.tanh()], 1).requires_grad_()
    still = torch.zeros(1)
    draws = NoiseDraws(noise, torch.tensor([0, 10, 500, 999]), still, still)
    losses = diffusion_loss(lambda *_: answer, NoiseSchedule.of(scheduler), original, draws, NoiseArgs(**flags))
    losses.sum().backward()
    return losses.detach(), *answer.grad.split(3, 1)


def test_the_hybrid_loss_teaches_the_variance_by_the_bound_alone(scheduler, images):
    simple, of_answer, of_variance = hybrid(scheduler, images, vlb_weight=0)
    assert of_answer.any() and not of_variance.any()
    losses, same, moved = hybrid(scheduler, images)
    assert torch.equal(same, of_answer) and moved.any()
    original, noise, variance = images
    timesteps = torch.tensor([0, 10, 500, 999])
    schedule = NoiseSchedule.of(scheduler)
    noisy = schedule.add_noise(original, noise, timesteps)
    term = bound_term(schedule, original, noisy, 0.5 * noise, variance.tanh(), timesteps)
    assert torch.allclose(losses, simple + VLB_WEIGHT * len(schedule) * term)
