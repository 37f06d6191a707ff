"""LoRAs with random numbers for the tests of files, on the layers of the tiny models or on made-up ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainers.formats import ModuleWeights

SHAPES: dict[str, tuple[int, ...]] = {
    "unet.down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 24),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (32, 32),
    "unet.down_blocks.0.resnets.0.conv1": (48, 32, 3, 3),
    "text_encoder.encoder.layers.0.self_attn.q_proj": (24, 24),
    "text_encoder.encoder.layers.0.mlp.fc1": (48, 24),
}
"""A handful of layers of an imagined base: Linear, 1x1 and 3x3 convolution, both parts."""


def random_weights(shape: tuple[int, ...], rank: int, alpha: float, seed: int) -> ModuleWeights:
    """A LoRA of a layer with weight `shape`, both factors Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    out, *inner = shape
    ones = [1] * (len(shape) - 2)
    return ModuleWeights(
        {
            "down": torch.randn(rank, *inner, generator=generator) * 0.1,
            "up": torch.randn(out, rank, *ones, generator=generator) * 0.02,
        },
        alpha,
    )


def random_lora(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, ModuleWeights]:
    """Every layer gets its own rank (2 to 6) and an alpha that is not the rank."""
    return {name: random_weights(shape, 2 + i % 5, 1.5 + i % 3, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def leaf_shapes(part: str, model: Any) -> dict[str, tuple[int, ...]]:
    """Canonical name -> weight shape of every Linear and Conv2d that a kohya LoRA may adapt."""
    excluded = ("conv_in", "conv_out", "time_embedding.", "add_embedding.", "text_projection")
    return {
        f"{part}.{path}": tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not path.startswith(excluded)
    }


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, tensor data) of a safetensors file, read without the code under test."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path: Path, header: Any, data: bytes) -> Path:
    """Writes a safetensors file from a header that may be wrong in any way."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
