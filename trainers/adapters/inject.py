"""Puts adapters into a model's parts and lays all trainable factors out in one flat buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trainers.adapters.base import AdapterKind, Factors, Started
from trainers.adapters.dropout import Dropout, Keys, layer_dropout
from trainers.adapters.layer import AdaptedLayer, Adapter, Strength
from trainers.adapters.plan import LayerPlan, Strengths, block_of, canonical_name, strength_at
from trainers.frozen import FrozenLayer

ADAPTABLE = (nn.Linear, nn.Conv2d, FrozenLayer, AdaptedLayer)  # layers that an adapter can go into
TRAINED = "trained"  # name of the adapter that a run trains


@dataclass(frozen=True)
class FlatParameters:
    """All trainable factors of a run as views of one buffer: one optimizer call per group, one norm, one write.

    `weights` and `gradient` are float32 (N,); `groups` gives each learning-rate group's slice of them;
    `views` holds nn.Parameters whose data and gradient share the buffers' memory.
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    groups: dict[str, slice]
    views: dict[str, dict[str, nn.Parameter]]  # layer name -> factor name -> view
    shapes: dict[str, dict[str, tuple[int, slice, tuple[int, ...]]]]
    used: dict[str, dict[str, torch.Tensor]]  # what the layers compute with: the views, or within `working` their copies
    constants: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # what they compute with beside them, by layer
    exact: tuple[str, ...] = ()  # factors that stay float32 within `working`
    dropped_by: Keys = field(default_factory=Keys)  # set within `working`
    kept: tuple[str, ...] = ()  # constants that a training state holds, as they cannot be made again from another weight

    def parameters(self, group: str, as_views: bool) -> list[nn.Parameter]:
        """What an optimizer gets for `group`: its factors as matrices, or one flat parameter that shares their memory."""
        part = self.groups[group]
        if as_views:
            return [
                view
                for layer, factors in self.views.items()
                for factor, view in factors.items()
                if part.start <= self.shapes[layer][factor][1].start < part.stop
            ]
        flat = nn.Parameter(self.weights[part])
        flat.grad = self.gradient[part]
        return [flat]

    def in_order(self) -> list[tuple[str, str, slice, tuple[int, ...]]]:
        """(layer, factor, place, shape) of every factor as they lie in the buffer."""
        every = [(layer, factor, *where[1:]) for layer, own in self.shapes.items() for factor, where in own.items()]
        return sorted(every, key=lambda one: one[2].start)

    @contextmanager
    def working(self, dtype: torch.dtype, keys: torch.Tensor | None = None) -> Iterator[None]:
        """Within, the layers compute with copies of the factors in `dtype`, whose gradients one backward pass adds up.

        Factors of which small differences matter, as their type says, stay float32. Where there is dropout, `keys` (B, 2)
        says of each row what is left out.

        One cast of the whole buffer on the way there; on the way back one concatenation, one cast and one sum.
        """
        leaf = nn.Parameter(self.weights)
        leaf.grad = self.gradient
        places = [(layer, factor, shape) for layer, factor, _, shape in self.in_order()]
        sizes = [math.prod(shape) for _, _, shape in places]
        pieces = leaf.to(dtype).split(sizes)  # type: ignore[no-untyped-call]
        exact = leaf.split(sizes) if self.exact else pieces  # type: ignore[no-untyped-call]
        for (layer, factor, shape), *piece in zip(places, pieces, exact, strict=True):
            self.used[layer][factor] = piece[factor in self.exact].view(shape)
        self.dropped_by.of_rows = keys
        try:
            yield
        finally:
            self.dropped_by.of_rows = None
            for layer, factors in self.views.items():
                self.used[layer].update(factors)

    def split(self, flat: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        """Another flat tensor (N,), for example the running mean, cut into layer name -> factor name -> tensor."""
        return {
            layer: {factor: flat[place].view(shape) for factor, (_, place, shape) in factors.items()}
            for layer, factors in self.shapes.items()
        }


UP = " up"
"""Ends the name of a learning-rate group that holds the factors which learn at another rate than the rest of theirs."""


def lay_out(
    plans: Sequence[LayerPlan],
    layers: Mapping[str, AdaptedLayer],
    kind: object,
    device: torch.device,
    apart: Sequence[str] = (),
) -> FlatParameters:
    """Flat float32 buffers for all `plans`, group after group in the order given, and the parameters that view them.

    The factors named in `apart` lie behind the others of their group, as a group of their own.
    """
    shapes: dict[str, dict[str, tuple[int, slice, tuple[int, ...]]]] = {}
    groups: dict[str, slice] = {}
    offset = 0
    for group, away in [(group, away) for group in dict.fromkeys(plan.group for plan in plans) for away in (False, True)]:
        start = offset
        for plan in (plan for plan in plans if plan.group == group):
            wanted = kind.factor_shapes(tuple(layers[plan.name].weight.shape), plan.rank)  # type: ignore[attr-defined]
            shapes.setdefault(plan.name, {})
            for factor, shape in wanted.items():
                if (factor in apart) == away:
                    size = math.prod(shape)
                    shapes[plan.name][factor] = (plan.rank, slice(offset, offset + size), shape)
                    offset += size
        if offset > start:
            groups[group + UP * away] = slice(start, offset)
    weights = torch.zeros(offset, dtype=torch.float32, device=device)
    gradient = torch.zeros_like(weights)
    views: dict[str, dict[str, nn.Parameter]] = {}
    for layer, factors in shapes.items():
        views[layer] = {}
        for factor, (_, place, shape) in factors.items():
            view = nn.Parameter(weights[place].view(shape))
            view.grad = gradient[place].view(shape)  # autograd then adds into the flat gradient in place
            views[layer][factor] = view
    used: dict[str, dict[str, torch.Tensor]] = {layer: dict(factors) for layer, factors in views.items()}
    exact, kept = (tuple(getattr(kind, name, ())) for name in ("exact", "kept"))
    return FlatParameters(weights, gradient, groups, views, shapes, used, exact=exact, kept=kept)


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
) -> FlatParameters:
    """Freezes `parts`, adds the adapter named TRAINED to every planned layer, and initialises it from `seed`.

    Every layer draws from its own generator, so a layer's start does not depend on which others are adapted. A layer that
    `given` has, by name, goes on from those factors and their scale. `apart` is as in `lay_out`.
    """
    for module in parts.values():
        module.requires_grad_(False)
    layers = adapt_layers(parts, [plan.name for plan in plans])
    flat = lay_out(plans, layers, kind, device, apart)
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
    """Takes every adapter out: the frozen layers stand again where they stood before."""
    for module in parts.values():
        adapted = [(path, child) for path, child in module.named_modules() if isinstance(child, AdaptedLayer)]
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
