"""The objective: what is added to the latents, what the denoiser has to answer, and how the answer is weighed.

Only torch is needed here. To train on another objective, change `diffusion_loss` and nothing else.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from finetuning.cli import flag
from finetuning.diffusion.variational_bound import bound_term
from finetuning.rng import gaussian, sent, uniform

VLB_WEIGHT = 0.001  # lambda of the hybrid loss (arXiv 2102.09672, section 4)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BIASED = tuple(f"timestep_bias_strategy={name}" for name in ("earlier", "later", "range"))


@dataclass
class NoiseArgs:
    """Objective"""

    prediction_type: str | None = flag(
        None, "what the denoiser predicts; none keeps the base's. The saved scheduler says the same",
        choices=PREDICTION_TYPES,
    )  # fmt: skip
    rescale_betas_zero_snr: bool = flag(
        False, "the last timestep is noise alone (zero terminal SNR, arXiv 2305.08891), for v_prediction or sample. "
        "The saved scheduler says the same; without the flag the base's own schedule stays",
    )  # fmt: skip
    snr_gamma: float | None = flag(None, "min-SNR weighting (arXiv 2303.09556); 5.0 is usual", above=0)
    noise_offset: float = flag(0.0, "add this much noise that is constant over each channel; 0.05 is usual")
    input_perturbation: float = flag(0.0, "perturb the noise that is added, not the target; 0.1 is usual")
    loss_type: str = flag("l2", "squared error, or Huber's: linear beyond --huber_c", choices=("l2", "huber"))
    huber_c: float = flag(
        0.1, "where --loss_type huber turns from squared to linear", above=0, requires="loss_type=huber"
    )
    timestep_bias_strategy: str = flag(
        "none", "which timesteps are drawn more often: the last (later), the first (earlier), or a range",
        choices=("none", "earlier", "later", "range"),
    )  # fmt: skip
    timestep_bias_multiplier: float = flag(1.0, "how many times as often; below 1 less often", above=0, requires=BIASED)
    timestep_bias_portion: float = flag(
        0.25, "share of the timesteps that earlier and later mean", min=0, max=1, requires=BIASED[:2]
    )
    timestep_bias_begin: int = flag(0, "first timestep of the range", min=0, requires=BIASED[2:])
    timestep_bias_end: int = flag(1000, "timestep at which the range ends", min=1, requires=BIASED[2:])
    dream_training: bool = flag(False, "DREAM (arXiv 2312.00210): one more forward pass, epsilon only")
    dream_detail_preservation: float = flag(
        1.0, "DREAM's p; smaller aligns more with sampling", requires="dream_training"
    )
    vlb_weight: float | None = flag(
        None, "weight of the variational bound, for a denoiser that learns its variance; 0: the variance is not "
        "trained (none: 0.001, arXiv 2102.09672)", min=0,
    )  # fmt: skip

    def problems(self):
        if self.timestep_bias_strategy == "range" and self.timestep_bias_begin >= self.timestep_bias_end:
            yield (
                f"--timestep_bias_begin {self.timestep_bias_begin} must be smaller than --timestep_bias_end "
                f"{self.timestep_bias_end}"
            )
        if self.dream_training and self.prediction_type not in (None, "epsilon"):
            yield f"--dream_training works with --prediction_type epsilon, not {self.prediction_type}"
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            yield "--rescale_betas_zero_snr does not go with --prediction_type epsilon: take v_prediction or sample"


def scheduler_changes(flags):
    """What the flags of a run, {name: value}, change in the scheduler configuration of its base."""
    changes = {"prediction_type": flags["prediction_type"]} if flags.get("prediction_type") else {}
    if flags.get("rescale_betas_zero_snr"):  # sampling has to begin where there is noise alone
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


@dataclass(frozen=True)
class NoiseDraws:
    """Everything random in one micro-batch's loss, drawn per row from (seed, step, row)."""

    noise: torch.Tensor  # [batch, channels, height, width]
    timesteps: torch.Tensor  # [batch], int64
    offset: torch.Tensor  # [batch, channels, 1, 1]
    perturbation: torch.Tensor  # like noise


def draw_noise(seed, step, rows, latents, schedule, args: NoiseArgs):
    """NoiseDraws for these rows at this step, on the latents' device."""
    shape, device = latents.shape[1:], latents.device
    share = uniform(seed, "timestep", step, rows)
    draw = lambda purpose, size: sent(gaussian(seed, purpose, step, rows, size), device)
    return NoiseDraws(
        noise=draw("noise", shape),
        timesteps=sent(biased_timesteps(share, len(schedule), args), device),
        offset=draw("noise offset", (shape[0], 1, 1)) if args.noise_offset else torch.zeros(1, device=device),
        perturbation=draw("perturbation", shape) if args.input_perturbation else torch.zeros(1, device=device),
    )


def biased_timesteps(share, count, args: NoiseArgs):
    """The timestep of each row, [batch] int64: the quantile at `share` in [0, 1) of --timestep_bias_strategy's weights
    on `count` timesteps. Noise grows with the timestep, so `later` is the noisier part."""
    strategy, portion = args.timestep_bias_strategy, int(args.timestep_bias_portion * count)
    if strategy == "none":
        return (share * count).long()
    weights = torch.ones(count, dtype=torch.float64)
    first, last = {
        "earlier": (0, portion), "later": (count - portion, count),
        "range": (args.timestep_bias_begin, args.timestep_bias_end),
    }[strategy]  # fmt: skip
    weights[first:last] *= args.timestep_bias_multiplier
    reached = weights.cumsum(0) / weights.sum()
    return torch.searchsorted(reached, share, right=True).clamp_max(count - 1)


def diffusion_loss(predict, schedule, latents, draws, args: NoiseArgs):
    """The loss of each row, [batch], fp32.

    `predict(noisy_latents, timesteps)` is the denoiser with its text. Latents and draws are fp32. Where it answers with
    twice the channels, it learns its variance as well, by the hybrid loss.
    """
    noise = draws.noise + args.noise_offset * draws.offset
    added = noise + args.input_perturbation * draws.perturbation
    noisy = schedule.add_noise(latents, added, draws.timesteps)
    target = schedule.target(latents, noise, draws.timesteps)
    if args.dream_training:
        noisy, target = _dream(predict, schedule, noisy, target, noise, draws.timesteps, args.dream_detail_preservation)
    answer, *variance = predict(noisy, draws.timesteps).float().split(latents.shape[1], 1)
    error = elementwise_error(answer, target.float(), args).flatten(1).mean(1)  # [batch]
    if args.snr_gamma is not None:
        error = error * schedule.min_snr_weight(draws.timesteps, args.snr_gamma)
    weight = VLB_WEIGHT if args.vlb_weight is None else args.vlb_weight
    if variance and weight:
        # The bound is the sum over the timesteps, of which one was drawn
        error = error + weight * len(schedule) * bound_term(
            schedule, latents, noisy, answer, *variance, draws.timesteps
        )
    return error


def elementwise_error(answer, target, args: NoiseArgs):
    """Squared error, or Huber's scaled so that it equals the squared error below --huber_c."""
    if args.loss_type == "l2":
        return (answer - target) ** 2
    return 2 * F.huber_loss(answer, target, reduction="none", delta=args.huber_c)


@torch.no_grad()
def _dream(predict, schedule, noisy, target, noise, timesteps, detail_preservation):
    """DREAM's rectified input and target (arXiv 2312.00210, algorithm 1)."""
    sigma = schedule.signal_and_noise(timesteps)[1]
    correction = (noise - predict(noisy, timesteps).float()) * sigma**detail_preservation
    return noisy + sigma * correction, target + correction
