"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, a pooled state, and the picture's size and crop.

Both encoders are read one layer before their ends (section 2.1), without the last norm, and joined: 768 + 1280 = 2048.
The first one's last layer is therefore read by nothing and cannot learn; the second one's is, through the pooled state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainers.families.base import Conditioning
from trainers.families.facts import BaseModelFacts
from trainers.families.latent_diffusion import LatentDiffusion


def load(facts: BaseModelFacts, dtype: torch.dtype, device: torch.device) -> LatentDiffusion:
    """UNet and text encoders in `dtype`, the VAE in float32. Raises BaseModelError for what is missing or damaged."""
    return LatentDiffusion(facts, dtype, device, encode, extras)


def encode(model: LatentDiffusion, tokens: Mapping[str, torch.Tensor]) -> Conditioning:
    """tokens -> both encoders' states side by side (B, 77, 2048), and the second one's pooled state (B, 1280)."""
    states = []
    for part, encoder in model.text_encoders.items():
        answer = encoder(tokens[part], output_hidden_states=True)
        states.append(answer.hidden_states[-1 - model.facts.clip_skip])
    return Conditioning(torch.cat(states, dim=-1), {"pooled": answer.text_embeds})  # the last encoder's


def extras(conditioning: Conditioning, framing: torch.Tensor) -> dict[str, Any]:
    """The pooled state, and original size, crop and target size as (height, width) pairs (section 2.2)."""
    states, device = conditioning.hidden_states, framing.device
    return {"added_cond_kwargs": {"text_embeds": conditioning.extras["pooled"].to(device, states.dtype), "time_ids": framing}}
