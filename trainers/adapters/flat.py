"""All that a run trains in one flat buffer: laid out, viewed as factors, and cast for a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trainers.adapters.dropout import Keys
from trainers.adapters.pivotal import VECTORS
from trainers.adapters.plan import LayerPlan, VectorPlan

VECTORS_GROUP = "vectors"
"""Learning-rate group of a trigger word's vectors."""


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
    kept: tuple[str, ...] = ()  # constants that a training state holds, as they cannot be made again

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

    def kept_constants(self) -> dict[str, dict[str, torch.Tensor]]:
        """Layer name -> the constants that a training state holds; empty where there are none."""
        return {layer: {name: own[name] for name in self.kept} for layer, own in self.constants.items() if self.kept}

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
    layers: Mapping[str, Any],
    kind: object,
    device: torch.device,
    apart: Sequence[str] = (),
    vectors: Sequence[VectorPlan] = (),
) -> FlatParameters:
    """Flat float32 buffers for all plans, group after group in the order given, and the parameters that view them.

    The factors named in `apart` lie behind the others of their group, as a group of their own. `layers` are those of `plans`
    and the tables of `vectors`, which come last, by name.
    """
    wanted = [
        (plan.group, plan.name, plan.rank, kind.factor_shapes(tuple(layers[plan.name].weight.shape), plan.rank))  # type: ignore[attr-defined]
        for plan in plans
    ]
    widths = {plan.name: int(layers[plan.name].weight.shape[1]) for plan in vectors}
    wanted += [(VECTORS_GROUP, plan.name, plan.count, {VECTORS: (plan.count, widths[plan.name])}) for plan in vectors]
    shapes: dict[str, dict[str, tuple[int, slice, tuple[int, ...]]]] = {}
    groups: dict[str, slice] = {}
    offset = 0
    for group, away in [(group, away) for group in dict.fromkeys(group for group, *_ in wanted) for away in (False, True)]:
        start = offset
        for _, name, rank, factors in (one for one in wanted if one[0] == group):
            shapes.setdefault(name, {})
            for factor, shape in factors.items():
                if (factor in apart) == away:
                    size = math.prod(shape)
                    shapes[name][factor] = (rank, slice(offset, offset + size), shape)
                    offset += size
        if offset > start:
            groups[group + UP * away] = slice(start, offset)
    weights = torch.zeros(offset, dtype=torch.float32, device=device)
    gradient = torch.zeros_like(weights)
    views: dict[str, dict[str, nn.Parameter]] = {}
    for layer, places in shapes.items():
        views[layer] = {}
        for factor, (_, place, shape) in places.items():
            view = nn.Parameter(weights[place].view(shape))
            view.grad = gradient[place].view(shape)  # autograd then adds into the flat gradient in place
            views[layer][factor] = view
    used: dict[str, dict[str, torch.Tensor]] = {layer: dict(factors) for layer, factors in views.items()}
    exact, kept = (tuple(getattr(kind, name, ())) for name in ("exact", "kept"))
    exact += (VECTORS,) if vectors else ()
    return FlatParameters(weights, gradient, groups, views, shapes, used, exact=exact, kept=kept)
