"""Stable Diffusion 1.x: one CLIP-L text encoder, read at its end; also pocket, which has the same parts."""

from __future__ import annotations

import torch

from trainers.families.facts import BaseModelFacts
from trainers.families.latent_diffusion import LatentDiffusion, encode_with_one_encoder


def load(facts: BaseModelFacts, dtype: torch.dtype, device: torch.device) -> LatentDiffusion:
    """UNet and text encoder in `dtype`, the VAE in float32. Raises BaseModelError for what is missing or damaged."""
    return LatentDiffusion(facts, dtype, device, encode_with_one_encoder)
