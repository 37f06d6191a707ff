"""The small interface behind which the families differ. The loop and the renderer know nothing else of a model.

A further family writes a class with these attributes and methods, or a pair of functions for LatentDiffusion. Checked on
paper against two that are not built:

- Stable Diffusion 3.5: `sd3.py` with SD3Transformer2DModel as the part "transformer" (its layers' groups in targets.py, its
  names in files `lora_transformer_...`), 16 latent channels with a shift (the VAE's configuration says both), CLIP-L, CLIP-G
  and T5 as three text encoders whose states it joins, pooled states in `Conditioning.extras`, and an `Objective` of the
  flow kind: x_t = (1 - s) x_0 + s noise, target noise - x_0, timesteps in [0, 1) from a logit-normal, weight 1.
- Flux: `flux.py` with FluxTransformer2DModel likewise; latents packed 2x2 into 64 channels inside `predict`, position ids made
  there from the latents' size, CLIP-L's pooled state and T5's states, guidance as a constant in `predict`.

What would have to change around them: "unet" as the word for the denoiser's learning rate and part (setup.py, layers.py),
a `draw_timestep` that belongs to the Objective, and single files in their layouts (ldm.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from trainers.families.facts import BaseModelFacts
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
    vae: nn.Module
    words: dict[str, int]
    """Learned words and how many vectors each has; whoever adds one puts the vectors into the encoders."""
    encodes_in: str
    """The number format in which pixels are encoded: float32, or bfloat16."""

    def parts(self) -> dict[str, nn.Module]:
        """The modules that adapters may go into, by the part's name in files: unet, text_encoder, ..."""

    def find_targets(self, part: str, targets: Sequence[str]) -> list[str]:
        """Paths inside `part` of the layers that the groups `targets` name."""

    def fingerprint(self, part: str) -> str:
        """SHA-256 over the weights of a part (unet, vae, text_encoder, ...) as they are used."""

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels -> mean and standard deviation of the unscaled latents."""

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """unscaled latents -> latents as the denoiser reads them."""

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """latents -> pixels."""

    def tokenise(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """captions -> for each text encoder its tokens (B, n) int64, in the machine's memory."""

    def word_tokens(self, part: str, text: str) -> tuple[int, ...]:
        """The tokens of some words in a text encoder, without begin, end or padding."""

    def encode_tokens(self, tokens: Mapping[str, torch.Tensor]) -> Conditioning:
        """tokens -> Conditioning; differentiable in the text encoders' adapters. Nothing in it waits for the device."""

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        """captions -> Conditioning: both of the above."""

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, framing: torch.Tensor
    ) -> torch.Tensor:
        """noisy latents, timesteps (B,) -> the denoiser's answer, of the latents' shape.

        `framing` (B, 6) float32: the picture's own height and width, the crop's top and left, and the height and width that
        it is trained or drawn at, all in pixels. Only SDXL reads it.
        """

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""

    def pipeline(self) -> Any:
        """diffusers' own pipeline around the same modules, with its DDIM sampler: what other programs would do with them."""
