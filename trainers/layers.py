"""Which layers of a base get an adapter, and how large it is: known from settings and weight files' headers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan, canonical_name
from trainers.config import TrainConfig
from trainers.families import BaseModelFacts, stored_tensors
from trainers.families.targets import trainable_paths

_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_METADATA = 4000
"""Bytes of metadata that a file has beside its weights, about; captions' words, where asked for, come on top."""
_ENTRY = 110
"""Bytes that one tensor takes in a file's header, about."""


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is: trained layers, trainable numbers, and about how many bytes its file will have."""

    layers: int
    parameters: int
    file_bytes: int


def plan_layers(config: TrainConfig, parts: Sequence[str], find: Callable[[str, Sequence[str]], list[str]]) -> list[LayerPlan]:
    """Which layers get an adapter, with rank and scale: the denoiser's, then the text encoder's unless its rate is 0.

    `find(part, targets)` gives the paths inside a part of the layers that groups of targets name.
    """
    adapter, text = config.adapter, config.text_encoder
    plans = []
    for part in parts if adapter.changes_layers else ():
        denoiser = part == "unet"
        if not denoiser and not config.text_encoder_rate:
            continue
        rank = adapter.rank if denoiser else config.text_encoder_rank
        alpha = adapter.effective_alpha if denoiser else config.text_encoder_alpha
        scale = adapter.scale_of(alpha, rank)
        group = "unet" if denoiser else "text_encoder"
        paths = find(part, adapter.targets if denoiser else text.targets)
        plans += [LayerPlan(canonical_name(part, path), rank, scale, group) for path in paths]
    return plans


def adapter_size(config: TrainConfig, base: BaseModelFacts) -> AdapterSize:
    """How large the adapter of these settings is on this base. Raises BaseModelError for a damaged weight file."""
    plans, named, kind = planned_layers(config, base), layer_shapes(base), config.adapter.trained
    parameters = _numbers(kind.factor_shapes(named[plan.name], plan.rank) for plan in plans)
    widths = [base.configs[part]["hidden_size"] for part in base.family.text_encoders]
    parameters += config.adapter.trigger_vectors * sum(widths)
    native = config.output.kind == "native"
    # A plain LoRA where the delta has a low rank, else one of the most that is written.
    ranks = [kind.file_rank(plan.rank) or config.output.most_rank for plan in plans]
    own = getattr(kind, "native_shapes", kind.factor_shapes)
    factors = [
        own(named[plan.name], plan.rank) if native else LORA.factor_shapes(named[plan.name], rank)
        for plan, rank in zip(plans, ranks, strict=True)
    ]
    alphas = [0 if "diff" in shapes else 1 for shapes in factors]  # a full difference alone has none
    header = (sum(map(len, factors)) + sum(alphas)) * _ENTRY + _METADATA
    weights = _numbers(factors) * _BYTES[config.output.dtype] if plans else parameters * _BYTES["fp32"]  # an embedding alone
    return AdapterSize(len(plans), parameters, weights + header)


def _numbers(layers: Iterable[Mapping[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for shapes in layers for shape in shapes.values())


def planned_layers(config: TrainConfig, base: BaseModelFacts) -> list[LayerPlan]:
    """What `plan_layers` will say of the loaded base, known from headers. Raises BaseModelError for a damaged weight file."""
    paths = {part: _weight_shapes(base, part) for part in base.family.parts}
    return plan_layers(config, base.family.parts, lambda part, targets: trainable_paths(base, part, targets, paths[part]))


def layer_shapes(base: BaseModelFacts) -> dict[str, tuple[int, ...]]:
    """Canonical name -> weight shape, as it is stored, of every Linear and convolution that an adapter may change.

    Raises BaseModelError for a damaged weight file.
    """
    return {
        canonical_name(part, path): shape
        for part in base.family.parts
        for path, shape in _weight_shapes(base, part).items()
        if len(shape) in (2, 4) and _is_layer(part, path)
    }


def _is_layer(part: str, path: str) -> bool:
    """Tables of a text encoder are looked up and not multiplied; only the second encoder's projection is ever read."""
    return not path.startswith("embeddings.") and (part == "text_encoder_2" or path != "text_projection")


def _weight_shapes(base: BaseModelFacts, part: str) -> dict[str, tuple[int, ...]]:
    """Path -> shape of its weight, in the order of the files; norms and tables among them."""
    stored = stored_tensors(base, part)
    return {name.removesuffix(".weight"): tensor.shape for name, tensor in stored.items() if name.endswith(".weight")}
