"""The small interface behind which the families differ. The loop and the renderer know nothing else of a model.

A further family writes a class with these attributes and methods. One with two text encoders joins their states and
puts the rest into `Conditioning.extras`; one with a flow objective brings its own `Objective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from trainers.families import BaseModelFacts
from trainers.objective import Objective


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser reads beside noisy latents: text states (B, tokens, width), and what else a family needs."""

    hidden_states: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def join(rows: Sequence[Conditioning]) -> Conditioning:
        """Puts batches one behind the other."""
        extras = {key: torch.cat([row.extras[key] for row in rows]) for key in rows[0].extras}
        return Conditioning(torch.cat([row.hidden_states for row in rows]), extras)


class DiffusionModel(Protocol):
    """A loaded, frozen base model.

    pixels (B, 3, H, W) float32 in [-1, 1]; latents (B, C, H/f, W/f) float32, scaled so that the denoiser likes them.
    """

    facts: BaseModelFacts
    objective: Objective
    scheduler_config: dict[str, Any]

    def parts(self) -> dict[str, nn.Module]:
        """The modules that adapters may go into, by the part's name in files: unet, text_encoder, ..."""

    def find_targets(self, part: str, targets: Sequence[str]) -> list[str]:
        """Paths inside `part` of the layers that the groups `targets` name."""

    def fingerprint(self, part: str) -> str:
        """SHA-256 over the weights of a part (unet, vae, text_encoder) as they are used."""

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels -> mean and standard deviation of the unscaled latents."""

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """unscaled latents -> latents as the denoiser reads them."""

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """latents -> pixels."""

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        """captions -> Conditioning; differentiable in the text encoder's adapters."""

    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """noisy latents, timesteps (B,) -> the denoiser's answer, of the latents' shape."""

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
