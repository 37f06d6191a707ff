"""Puts adapters into a model's parts, those that a run trains over one flat buffer, and takes them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainers.adapters.base import AdapterKind, Factors, Started
from trainers.adapters.dropout import Dropout, layer_dropout
from trainers.adapters.flat import FlatParameters, lay_out
from trainers.adapters.layer import AdaptedLayer, Adapter, Strength
from trainers.adapters.pivotal import LENGTH, VECTORS, lengths_of, start_vectors
from trainers.adapters.plan import LayerPlan, Strengths, VectorPlan, block_of, canonical_name, strength_at
from trainers.adapters.vectors import VectorTable, add_tables
from trainers.frozen import FrozenLayer

ADAPTABLE = (nn.Linear, nn.Conv2d, FrozenLayer, AdaptedLayer)  # layers that an adapter can go into
TRAINED = "trained"  # name of the adapter that a run trains


def find_layers(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Canonical name -> layer, for every Linear and Conv2d (packed, adapted or not) of the given parts, in module order."""
    found: dict[str, nn.Module] = {}
    for part, module in parts.items():
        for path, child in module.named_modules():
            inside = any(isinstance(module.get_submodule(above), AdaptedLayer) for above in _ancestors(path))
            if isinstance(child, ADAPTABLE) and not inside:
                found[canonical_name(part, path)] = child
    return found


def _ancestors(path: str) -> list[str]:
    pieces = path.split(".")
    return [".".join(pieces[:n]) for n in range(1, len(pieces))]


def adapt_layers(parts: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, AdaptedLayer]:
    """Replaces the named layers by AdaptedLayers (kept where already there). Raises KeyError for an unknown name."""
    layers: dict[str, AdaptedLayer] = {}
    paths = {canonical_name(part, path): (module, path) for part, module in parts.items() for path, _ in module.named_modules()}
    for name in names:
        root, path = paths[name]
        child = root.get_submodule(path)
        if not isinstance(child, AdaptedLayer):
            child = AdaptedLayer(child)  # type: ignore[arg-type]
            parent, _, leaf = path.rpartition(".")
            setattr(root.get_submodule(parent), leaf, child)
        layers[name] = child
    return layers


def inject_trainable(
    parts: Mapping[str, nn.Module],
    plans: Sequence[LayerPlan],
    kind: object,
    seed: int,
    device: torch.device,
    given: Mapping[str, tuple[Factors, float]] | None = None,
    apart: Sequence[str] = (),
    dropout: Dropout = Dropout(),  # noqa: B008 - frozen
    vectors: Sequence[VectorPlan] = (),
) -> FlatParameters:
    """Freezes `parts`, adds the adapter named TRAINED to every planned layer, and initialises it from `seed`.

    Every layer draws from its own generator, so a layer's start does not depend on which others are adapted. A layer that
    `given` has, by name, goes on from those factors and their scale. `apart` is as in `lay_out`. `vectors` are put beside the
    text encoders' tables.
    """
    for module in parts.values():
        module.requires_grad_(False)
    layers = adapt_layers(parts, [plan.name for plan in plans])
    tables = add_tables(parts, [plan.name for plan in vectors])
    flat = lay_out(plans, {**layers, **tables}, kind, device, apart, vectors)
    for own_vectors in vectors:
        _start_vectors(flat, own_vectors, tables[own_vectors.name])
    for plan in plans:
        layer = layers[plan.name]
        started = start_of(plan, kind, seed, layer)
        if given is not None and plan.name in given:
            own, scale = given[plan.name]
            kind.continue_from(started.factors, own, scale / plan.scale)  # type: ignore[attr-defined]
        with torch.no_grad():
            for factor, view in flat.views[plan.name].items():
                view.copy_(started.factors[factor])
        flat.constants[plan.name] = {name: _sent(constant, device) for name, constant in started.constants.items()}
        flat.used[plan.name].update(flat.constants[plan.name])
        drops = layer_dropout(dropout, plan.name, flat.dropped_by)
        layer.adapters[TRAINED] = Adapter(kind, flat.used[plan.name], started.scale, drops)  # type: ignore[arg-type]
        layer.strengths[TRAINED] = 1.0
    return flat


@torch.no_grad()
def _start_vectors(flat: FlatParameters, plan: VectorPlan, table: VectorTable) -> None:
    view = flat.views[plan.name][VECTORS]
    view.copy_(start_vectors(table.weight, plan.tokens, plan.count))
    flat.constants[plan.name] = {LENGTH: lengths_of(view)} if plan.keeps_length else {}
    flat.used[plan.name].update(flat.constants[plan.name])
    table.words[plan.word] = flat.used[plan.name]


def start_of(plan: LayerPlan, kind: object, seed: int, layer: Any) -> Started:
    """How an adapter begins: the same for the same seed, layer and frozen weight, whatever else is adapted."""
    from trainers.objective import generator_for

    started: Started = kind.start(  # type: ignore[attr-defined]
        tuple(layer.weight.shape),
        plan.rank,
        plan.scale,
        generator_for(seed, "adapter", plan.name),
        lambda: layer.weight.detach().float().cpu(),
    )
    return started


def _sent(constant: torch.Tensor, device: torch.device) -> torch.Tensor:
    return constant.float().to(device) if device.type == "mps" else constant.to(device)  # Apple's GPUs have no float64


def attach(layer: AdaptedLayer, name: str, kind: AdapterKind, factors: Mapping[str, torch.Tensor], scale: float) -> None:
    """Adds an adapter that is not trained to a layer, at strength 1: prepared beside the frozen weight, on its device."""
    weight = layer.weight.detach()
    prepared, scale = kind.prepare({part: factor.to(weight.device) for part, factor in factors.items()}, scale, weight)
    layer.adapters[name] = Adapter(kind, prepared, scale)
    layer.strengths[name] = 1.0


def restore_layers(parts: Mapping[str, nn.Module]) -> None:
    """Takes every adapter and learned word out: the frozen layers stand again where they stood before."""
    for module in parts.values():
        adapted = [(path, child) for path, child in module.named_modules() if isinstance(child, AdaptedLayer | VectorTable)]
        for path, child in adapted:
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, child.frozen)


def set_strength(parts: Mapping[str, nn.Module], adapter: str, strength: Strength | Strengths) -> None:
    """Sets the strength of one adapter on every layer of `parts` that has it.

    A tensor (B,) gives one per batch row; Strengths give one by part and block.
    """
    for name, layer in _adapted(parts):
        if adapter in layer.adapters:
            layer.strengths[adapter] = strength.at(block_of(name)) if isinstance(strength, Strengths) else strength


def set_row_strengths(parts: Mapping[str, nn.Module], rows: Sequence[Mapping[str, float | Strengths]]) -> None:
    """Sets the strengths of all adapters, by name, for each row of a batch; one that a row does not name is off there."""
    made: dict[tuple[str, str], Strength] = {}  # many layers of a block share one tensor
    for name, layer in _adapted(parts):
        block, device = block_of(name), layer.weight.device
        for adapter in layer.adapters:
            if (adapter, block) not in made:
                values = [strength_at(row.get(adapter, 0.0), block) for row in rows]
                # One number for all rows keeps strength 0 exact: the layer then skips the adapter altogether.
                same = len(set(values)) == 1
                made[adapter, block] = values[0] if same else torch.tensor(values, dtype=torch.float32, device=device)
            layer.strengths[adapter] = made[adapter, block]


def _adapted(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, AdaptedLayer]]:
    for part, module in parts.items():
        for path, child in module.named_modules():
            if isinstance(child, AdaptedLayer):
                yield canonical_name(part, path), child


@contextmanager
def keeping_strengths(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts every adapter's strength back at the end, so that a sample in mid-training changes nothing about the training."""
    layers = [layer for _, layer in _adapted(parts)]
    before = [dict(layer.strengths) for layer in layers]
    try:
        yield
    finally:
        for layer, strengths in zip(layers, before, strict=True):
            layer.strengths = strengths
