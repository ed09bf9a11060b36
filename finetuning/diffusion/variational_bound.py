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
    log_small, log_large, of_original, of_noisy = (one[timesteps] for one in _steps_back(schedule, timesteps.device))
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


def _steps_back(schedule, device):
    """log beta~, log beta, and what the mean of q(x_t-1 | x_t, x_0) takes of x_0 and x_t: [timesteps, 1, 1, 1] each."""
    now = schedule.alpha_bar.double()
    before = torch.cat([torch.ones(1, dtype=now.dtype), now[:-1]])
    beta = 1 - now / before
    small = beta * (1 - before) / (1 - now)
    small[0] = small[1]  # 0 at the first step, whose logarithm there is not
    of_original = beta * before.sqrt() / (1 - now)
    of_noisy = (now / before).sqrt() * (1 - before) / (1 - now)
    return [one.float().view(-1, 1, 1, 1).to(device) for one in (small.log(), beta.log(), of_original, of_noisy)]


def _log_likelihood(original, mean, deviation):
    """Of pixels of 256 levels in [-1, 1] under a Gaussian, each level the interval around it (Ho et al., eq. 13)."""
    below, above = (torch.special.ndtr((original - mean + side / 255) / deviation) for side in (-1, 1))
    below, above = torch.where(original < -0.999, 0, below), torch.where(original > 0.999, 1, above)
    return (above - below).clamp(min=1e-12).log()
