"""The variational bound, by which a denoiser learns the variance of its steps (Nichol and Dhariwal, arXiv 2102.09672).

Such a denoiser answers with twice as many channels: what it predicts, and v in [-1, 1], which places the logarithm of
the variance between those of beta~ and beta (eq. 15).
"""

import math

import torch


def bound_term(schedule, original, noisy, answer, variance, timesteps):
    """The term of each row's timestep in the bound, [batch], in bits per dimension (eq. 4 to 7).

    original, noisy, answer, variance  [batch, channels, height, width]; original in [-1, 1], of 256 levels

    No gradient goes to `answer`: the bound teaches the variance alone (section 4).
    """
    log_small, log_large, of_original, of_noisy = schedule.steps_back.to(timesteps.device)[:, timesteps]
    log_variance = log_small + (variance + 1) / 2 * (log_large - log_small)
    mean = lambda found: of_original * found + of_noisy * noisy
    truth, predicted = mean(original), mean(schedule.original(noisy, answer.detach(), timesteps))
    divergence = 0.5 * (
        log_variance
        - log_small
        - 1
        + (log_small - log_variance).exp()
        + (truth - predicted) ** 2 * (-log_variance).exp()
    )
    first = -_log_likelihood(original, predicted, (0.5 * log_variance).exp())
    is_first = (timesteps == 0).view(-1, 1, 1, 1)
    return torch.where(is_first, first, divergence).flatten(1).mean(1) / math.log(2)


def _log_likelihood(original, mean, deviation):
    """Of pixels of 256 levels in [-1, 1] under a Gaussian, each level the interval around it (Ho et al., eq. 13)."""
    up_to = lambda distance: 0.5 * torch.special.erfc(-distance / deviation / math.sqrt(2))  # ndtr has no tail in fp32
    apart = (original - mean).abs()  # taken in the lower tail, where fp32 can tell two small numbers apart
    likelihood = up_to(1 / 255 - apart) - up_to(-1 / 255 - apart)
    likelihood = torch.where(original < -0.999, up_to(original - mean + 1 / 255), likelihood)  # the ends reach on
    likelihood = torch.where(original > 0.999, up_to(mean - original + 1 / 255), likelihood)
    return likelihood.clamp(min=1e-12).log()
