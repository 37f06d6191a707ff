"""A LoRA that begins at a low rank and gets more where the singular values of its update say that all it has is used.

Every `every` steps each layer is looked at by itself: it grows where its weakest singular value holds more than a share of
the update's squared norm. (AdaLoRA, arXiv 2303.10512, goes the other way: it begins with all ranks, writes the update as a
singular value decomposition, and takes away those that matter least, under one budget for all layers.) New rows of A are
Gaussian, drawn from the seed, the layer's name and the turn's number, and the new columns of B are zero, so that the layer
answers as before, bit for bit. The scale is alpha / adapter.rank, the most that a layer may have, and stays: nothing jumps.

The factors are laid out at that most from the start, and what is not in use is zero on both sides. There it stays without a
mask: the gradient of B's column is a product with A's row, and the other way round, and no optimizer moves a zero whose
gradients were all zero (of one in 8 bits this is seen to). So nothing moves in memory, a training state tells the ranks by
itself, and a step takes the time and memory of a LoRA of the most rank. What is won is the file, in which each layer has its
own rank, and that no layer gets ranks that it does not use. To look at a layer takes two thin QRs and an SVD of (rank, rank),
on the CPU; all of a model's take less time than a step there. Several processes hold the same numbers and so decide alike.

The running mean of the squared gradients begins for a new part where it stands on the average of the old part: from zero its
first steps would be up to twice as large with AdamW, and more with Adafactor, which corrects no start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from trainers.adapters.base import Factors, Started, Turn, Weight

if TYPE_CHECKING:
    import torch


class Growing:
    """See base.Trained. `lora` is the mathematics of the layers; `first`, `every` and `share` are the settings grow_*."""

    def __init__(self, lora: Any, first: int, every: int, share: float) -> None:
        self._lora, self.first, self.every, self.share = lora, first, every, share

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """LoRA's, of the most rank."""
        return self._lora.factor_shapes(weight, rank)  # type: ignore[no-any-return]

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """That of a LoRA of rank `first`, or of `rank` where that is lower, and zeros."""
        import torch

        drawn = self._lora.start(shape, min(self.first, rank), scale, generator, weight).factors["down"]
        factors = {name: torch.zeros(size) for name, size in self.factor_shapes(shape, rank).items()}
        factors["down"][: len(drawn)] = drawn
        return Started(factors, scale)

    def forward(
        self,
        frozen: Any,
        x: torch.Tensor,
        factors: Factors,
        scale: float | torch.Tensor,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """LoRA's."""
        return self._lora.forward(frozen, x, factors, scale, dropped)  # type: ignore[no-any-return]

    def joined(self, frozen: Any, x: torch.Tensor, adapters: Sequence[tuple[Factors, float]]) -> torch.Tensor | None:
        """LoRA's."""
        return self._lora.joined(frozen, x, adapters)  # type: ignore[no-any-return]

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """LoRA's."""
        return self._lora.delta(factors, scale, weight)  # type: ignore[no-any-return]

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """A LoRA of the rank in use."""
        rank = rank_in_use(factors)
        return "lora", {"down": factors["down"][:rank], "up": factors["up"][:, :rank].contiguous()}, scale

    def file_rank(self, rank: int) -> int:
        """At the most its own."""
        return rank

    def turn(self, factors: Factors, generator: torch.Generator) -> Turn:
        """`first` ranks more, up to the most, where all are used; else all stays as it is."""
        import torch

        down, up = factors["down"].clone(), factors["up"]
        rank = rank_in_use(factors)
        more = min(self.first, len(down) - rank) if self.is_used_up(factors) else 0
        if more:
            drawn = {"down": torch.empty(more, *down.shape[1:]), "up": torch.empty(len(up), more)}
            self._lora.initialise(drawn, generator)
            down[rank : rank + more] = drawn["down"].to(down)

        def carry(which: Literal["mean", "square"], factor: str, mean: torch.Tensor) -> torch.Tensor:
            axis = 0 if factor == "down" else 1
            if not more or which == "mean" or mean.shape[axis] != len(down):
                return mean
            begun = mean.clone()
            begun.narrow(axis, rank, more).copy_(mean.narrow(axis, 0, rank).mean(axis, keepdim=True))
            return begun

        return Turn({"down": down, "up": up}, {}, carry, more > 0)

    def is_used_up(self, factors: Factors) -> bool:
        """Whether the weakest of the ranks in use holds more than `share` of the update's squared norm."""
        rank = rank_in_use(factors)
        inner = {"down": factors["down"][:rank].cpu(), "up": factors["up"][:, :rank].cpu()}  # small: a GPU is slower at it
        if not all(bool(factor.isfinite().all()) for factor in inner.values()):
            return False
        values = self._lora.singular_values(inner, 1.0)
        if values is None:  # it has as many ranks as the layer's smaller side
            return False
        squares = values.square()
        return bool(squares[-1] > self.share * squares.sum())


def rank_in_use(factors: Factors) -> int:
    """Rows of `down` (r, ...) up to the last one that is not zero, at least 1."""
    rows = factors["down"].detach().flatten(1).ne(0).any(1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 1
