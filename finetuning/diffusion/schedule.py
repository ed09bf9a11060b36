"""The noise schedule: how much signal and noise a timestep has, and what the denoiser has to answer there."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process: alpha_bar [timesteps], fp32, and what the denoiser predicts."""

    alpha_bar: torch.Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler, prediction_type=None):
        """From a diffusers scheduler; `prediction_type` overrides its config."""
        return cls(scheduler.alphas_cumprod.float(), prediction_type or scheduler.config.prediction_type)

    def __len__(self):
        return len(self.alpha_bar)

    def to(self, device):
        """The same on the device, where a step then waits for no copy of it."""
        return replace(self, alpha_bar=self.alpha_bar.to(device))

    def signal_and_noise(self, timesteps):
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)), each [batch, 1, 1, 1]."""
        alpha_bar = self.alpha_bar.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, latents, noise, timesteps):
        """x_t of DDPM (arXiv 2006.11239, eq. 4)."""
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents, noise, timesteps):
        """What the denoiser has to answer."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * noise - sigma * latents  # v of arXiv 2202.00512, appendix D

    def original(self, noisy, answer, timesteps):
        """The latents x_0 that a denoiser's answer stands for."""
        if self.prediction_type == "sample":
            return answer
        signal, sigma = self.signal_and_noise(timesteps)
        if self.prediction_type == "v_prediction":
            return signal * noisy - sigma * answer
        return (noisy - sigma * answer) / signal

    @cached_property
    def steps_back(self):
        """Of q(x_t-1 | x_t, x_0) at each timestep: log beta~ and log beta, between which its variance lies, and what
        its mean takes of x_0 and of x_t (arXiv 2102.09672, eq. 10 and 11): fp32 [4, timesteps, 1, 1, 1]."""
        now = self.alpha_bar.double()
        before = torch.cat([now.new_ones(1), now[:-1]])
        beta = 1 - now / before
        small = beta * (1 - before) / (1 - now)
        small[0] = small[1]  # 0 at the first step, whose logarithm there is not
        of_original = beta * before.sqrt() / (1 - now)
        of_noisy = (now / before).sqrt() * (1 - before) / (1 - now)
        return torch.stack([small.log(), beta.log(), of_original, of_noisy]).float().view(4, -1, 1, 1, 1)

    def signal_to_noise(self, timesteps):
        """alpha_bar / (1 - alpha_bar), [batch]."""
        alpha_bar = self.alpha_bar.to(timesteps.device)[timesteps]
        return alpha_bar / (1 - alpha_bar)

    def min_snr_weight(self, timesteps, gamma):
        """Weight of each row's squared error, [batch]: min(SNR, gamma) in units of x_0 (arXiv 2303.09556, eq. 5)."""
        snr = self.signal_to_noise(timesteps)
        clipped = snr.clamp(max=gamma)
        if self.prediction_type == "sample":
            return clipped
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        # epsilon: min(SNR, gamma) / SNR, written so that a zero-terminal-SNR schedule gives 1 and not 0 / 0
        return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr.clamp(min=gamma))
