"""Stable Diffusion 2.x: OpenCLIP-H text encoder, read one layer before its end; epsilon at 512 px, v-prediction at 768 px.

In diffusers' layout that last layer is not there (23 layers for 24), and of a single file it is not read: so both are
read at their end here, and nothing is skipped twice. OpenCLIP pads captions with token 0, which the tokenizer says.
"""

from __future__ import annotations

import torch

from trainers.families.facts import BaseModelFacts
from trainers.families.latent_diffusion import LatentDiffusion, encode_with_one_encoder


def load(facts: BaseModelFacts, dtype: torch.dtype, device: torch.device) -> LatentDiffusion:
    """UNet and text encoder in `dtype`, the VAE in float32. Raises BaseModelError for what is missing or damaged."""
    return LatentDiffusion(facts, dtype, device, encode_with_one_encoder)
