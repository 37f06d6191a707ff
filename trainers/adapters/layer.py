"""AdaptedLayer: stands in for a frozen Linear, Conv2d or Embedding and adds adapters, each at its own strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainers.adapters.base import AdapterKind
from trainers.adapters.dropout import LayerDropout
from trainers.errors import SettingError
from trainers.frozen import FrozenLayer, SharedRows

Strength = float | torch.Tensor  # one number, or (B,) with one strength for each row of the batch


@dataclass(frozen=True)
class Adapter:
    """One adapter on one layer: its mathematics, its factors and its scale (alpha / rank for LoRA), as `prepare` gives them."""

    kind: AdapterKind  # an entry of ADAPTERS
    factors: Mapping[str, torch.Tensor]
    scale: float
    dropout: LayerDropout | None = None

    @property
    def drops(self) -> bool:
        """Whether something of its path is left out now."""
        return self.dropout is not None and self.dropout.keys.of_rows is not None

    def path(self, frozen: Any, x: torch.Tensor, strength: Strength) -> torch.Tensor:
        """What it adds to frozen(x)."""
        scale = self.scale * strength
        if self.dropout is None or not self.drops:
            return self.kind.forward(frozen, x, self.factors, scale)
        return self.dropout.path(self.kind, frozen, x, self.factors, scale)

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update at strength 1 in float64, of the shape of the frozen `weight`, which only a DoRA has to see."""
        return self.kind.delta({k: v.detach() for k, v in self.factors.items()}, self.scale, weight)


def is_zero(strength: Strength) -> bool:
    """Whether an adapter is off altogether, for every row."""
    return isinstance(strength, float) and strength == 0.0


class AdaptedLayer(nn.Module):
    """y = frozen(x) + sum over adapters of strength * the adapter's own path(x), factored.

    At strength 0, and with no adapter, the output is the frozen layer's, bit for bit: the path is not even computed.
    """

    def __init__(self, frozen: nn.Linear | nn.Conv2d | nn.Embedding | FrozenLayer) -> None:
        super().__init__()
        self.frozen = frozen
        self.adapters: dict[str, Adapter] = {}
        self.strengths: dict[str, Strength] = {}
        self._kept: torch.Tensor | None = None  # the frozen weight's own copy while adapters are merged into it

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight; some models look at its shape or dtype."""
        return self.frozen.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return getattr(self.frozen, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., in) -> (B, ..., out), or (B, in, H, W) -> (B, out, H', W'), or words (B, n) -> (B, n, width)."""
        if self._kept is not None:
            return self.frozen(x)  # type: ignore[no-any-return]
        active = self.active()
        joined = _joined(self.frozen, x, [active])
        if joined is not None:
            return joined
        y: torch.Tensor = self.frozen(x)
        for adapter, strength in active:
            y = y + adapter.path(self.frozen, x, strength)
        return y

    def active(self) -> list[tuple[Adapter, Strength]]:
        """The adapters that are not off, each with its strength."""
        return [(self.adapters[name], strength) for name, strength in self.strengths.items() if not is_zero(strength)]

    def merge(self) -> None:
        """Puts all adapters at their present strengths into the frozen weight. `unmerge` restores its exact bits.

        Raises ValueError for a strength per row, SettingError for a packed weight, and leaves the layer as it was.
        """
        if isinstance(self.frozen, FrozenLayer):
            what = f"An adapter cannot be merged into weights kept in {self.frozen.kind}: the next rounding would swallow it"
            raise SettingError(what, "train.base_weights", "Merge into the base in full.")
        kept = self.frozen.weight.detach().clone() if self._kept is None else self._kept
        total = kept.double()
        for name, adapter in self.adapters.items():
            strength = self.strengths[name]
            if not isinstance(strength, float):
                raise ValueError("A strength per row cannot be merged: one weight serves all rows.")
            if strength != 0.0:
                total = total + strength * adapter.delta(kept)
        self._kept = kept
        with torch.no_grad():
            self.frozen.weight.copy_(total)

    def unmerge(self) -> None:
        """Undoes `merge` from the kept copy."""
        if self._kept is not None:
            with torch.no_grad():
                self.frozen.weight.copy_(self._kept)
            self._kept = None


def answer_together(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What several layers answer to the same x, one by one, or one behind the other in a single (B, ..., sum of out).

    The latter where their frozen weights lie one above the other, so that x is read once.
    """
    frozen = [layer.frozen if isinstance(layer, AdaptedLayer) else layer for layer in layers]
    whole = frozen[0].whole if isinstance(frozen[0], SharedRows) else None
    if whole is None or any(not isinstance(layer, SharedRows) or layer.whole is not whole for layer in frozen):
        return [layer(x) for layer in layers]
    answer = None
    if not any(isinstance(layer, AdaptedLayer) and layer.active() for layer in layers):
        answer = whole(x)
    else:
        answer = _joined(whole, x, [layer.active() if isinstance(layer, AdaptedLayer) else [] for layer in layers], frozen)
    return [layer(x) for layer in layers] if answer is None else [answer]


def _joined(
    frozen: nn.Module,
    x: torch.Tensor,
    layers: Sequence[list[tuple[Adapter, Strength]]],
    alone: Sequence[Any] = (),
) -> torch.Tensor | None:
    """frozen(x) and all adapters as one node; None unless all are of a type that knows how, at one strength, one at a layer.

    Of several layers some may have none: `alone` are the frozen ones, which tell their widths.
    """
    active = [one for layer in layers for one in layer]
    if not active or any(len(layer) > 1 for layer in layers) or not all(isinstance(strength, float) for _, strength in active):
        return None
    kind = active[0][0].kind
    if not hasattr(kind, "joined") or any(adapter.kind is not kind or adapter.drops for adapter, _ in active):
        return None
    own: list[Any] = [
        (layer[0][0].factors, layer[0][0].scale * layer[0][1]) if layer else alone[number].weight.shape[0]
        for number, layer in enumerate(layers)
    ]
    return kind.joined(frozen, x, own)  # type: ignore[no-any-return]
