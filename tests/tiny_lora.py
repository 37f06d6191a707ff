"""A LoRA of a few layers of the tiny base, strong enough to be seen."""

from __future__ import annotations

from pathlib import Path

import torch

from trainers.formats import ModuleWeights, write_adapter

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UNET_OUT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_encoder.encoder.layers.0.self_attn.v_proj"


def save_lora(path: Path, *layers: str, seed: int = 0) -> Path:
    """A strong random LoRA of 32x32 layers of the tiny base."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleWeights(
            {"down": torch.randn(2, 32, generator=generator) * 1.5, "up": torch.randn(32, 2, generator=generator) * 1.5}, 2.0
        )
        for name in layers or (UNET, UNET_OUT)
    }
    write_adapter(path, modules, {}, "fp32")
    return path
