"""Adapters of several types with random numbers on the layers of a tiny base, for the tests of merging."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.formats.examples import random_weights
from trainers.families import recognise_base
from trainers.formats import ModuleWeights, write_adapter
from trainers.layers import layer_shapes

# Part of a canonical name -> type. A 1x1 and a 3x3 convolution, attention, and the text encoders are among them.
PLAIN = {"attn1.to_q": "lora", "attn2.to_k": "lora", "proj_in": "lora", "mlp.fc1": "lora", "self_attn.v_proj": "lora"}
MIXED = PLAIN | {"resnets.0.conv1": "lora", "attn1.to_v": "dora", "resnets.0.conv2": "dora", "attn2.to_q": "loha"}


def save_adapter(
    path: Path, base: Path, kinds: dict[str, str], rank: int = 3, alpha: float = 2.0, seed: int = 0, dtype: str = "fp32"
) -> Path:
    """A file with an adapter on each layer of `base` whose name ends as `kinds` says, strong enough to be seen."""
    facts = recognise_base(str(base))
    modules = {}
    for number, (name, shape) in enumerate(layer_shapes(facts).items()):
        kind = next((kind for ending, kind in kinds.items() if name.endswith(ending)), None)
        if kind is not None:
            modules[name] = _weights(kind, shape, rank, alpha, 1000 * seed + number)
    told = {"modelspec.trigger_phrase": f"word{seed}", "ss_base_model_version": facts.family.base_version}
    write_adapter(path, modules, told, dtype, family=facts.family.name)  # type: ignore[arg-type]
    return path


def _weights(kind: str, shape: tuple[int, ...], rank: int, alpha: float, seed: int) -> ModuleWeights:
    lora = random_weights(shape, rank, alpha, seed)
    factors = {"down": lora.factors["down"], "up": lora.factors["up"] * 10}
    if kind == "dora":
        magnitude = torch.rand(shape[0], *(1 for _ in shape[1:]), generator=torch.Generator().manual_seed(seed)) + 0.3
        return ModuleWeights(factors | {"dora_scale": magnitude}, alpha, "dora")
    if kind == "loha":
        other = random_weights(shape, rank, alpha, seed + 1)
        names = {"w1_a": factors["up"], "w1_b": factors["down"], "w2_a": other.factors["up"], "w2_b": other.factors["down"]}
        return ModuleWeights({name: factor * 3 for name, factor in names.items()}, alpha, "loha")
    return ModuleWeights(factors, alpha)
