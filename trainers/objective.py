"""What the denoiser is asked: timesteps, noise, target and weight, all drawn from (seed, step, slot).

q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)                    arXiv 2006.11239, eq. 4
epsilon target: the noise; v target: sqrt(abar) eps - sqrt(1-abar) x0  arXiv 2202.00512, appendix D
min-SNR weight: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v   arXiv 2303.09556, section 3.4
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch

PredictionType = Literal["epsilon", "v_prediction"]


def generator_for(*key: object) -> torch.Generator:
    """A CPU generator that depends on nothing but `key`, for example (seed, step, slot, 'noise')."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Objective:
    """Noise schedule and prediction type of a base model. `alphas_cumprod` is (T,) float32, falling from ~1 to ~0."""

    alphas_cumprod: torch.Tensor
    prediction_type: PredictionType

    @property
    def timesteps(self) -> int:
        """Number of training timesteps T."""
        return int(self.alphas_cumprod.shape[0])

    def to(self, device: torch.device) -> Objective:
        """The same, its noise schedule on `device`: there a step then waits for no copy of it."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t for latents and noise (B, C, h, w) at timesteps (B,) in [0, T)."""
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should answer, (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return signal * noise - sigma * latents

    def weight(self, timesteps: torch.Tensor, min_snr_gamma: float | None) -> torch.Tensor:
        """Weight of each example's squared error, (B,) float32; 1 without gamma."""
        if min_snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        divisor = snr if self.prediction_type == "epsilon" else snr + 1
        # A zero-terminal schedule ends at SNR 0; there the epsilon weight's limit is 1.
        return torch.where(divisor > 0, snr.clamp(max=min_snr_gamma) / divisor.clamp(min=1e-20), 1.0)

    def _signal_and_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)


def draw_noise(shape: tuple[int, int, int], offset: float, *key: object) -> torch.Tensor:
    """Noise (C, h, w) float32 for one example; `offset` adds a constant to each channel (Guttenberg 2023)."""
    generator = generator_for(*key, "noise")
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn((shape[0], 1, 1), generator=generator)
    return noise


def draw_timestep(timesteps: int, *key: object) -> int:
    """One timestep, uniform in [0, timesteps)."""
    return int(torch.randint(timesteps, (1,), generator=generator_for(*key, "timestep")))


def mean_of_squares(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted squared error of each example, averaged within it: (B, C, h, w), (B,) -> (B,) float32.

    `mask` (B, 1, h, w), of mean 1 in each example, weighs places: the mean over what it shows, however small that is.
    """
    squares = (prediction.float() - target.float()).square()
    if mask is not None:
        squares = squares * mask
    return squares.flatten(1).mean(1) * weight
