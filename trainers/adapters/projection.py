"""Random projection (Su Jianlin, kexue.fm/archives/9590; FLoRA, arXiv 2402.03293): W = W0 + s (sum + u C v), u and v random.

u (out, r) and v (r, in) are Gaussian of variance 1 / r, so that the means of u u^T and v^T v are the identity, and are
constants for k steps; C (r, r) learns, from zero. Its gradient is s u^T G v^T for G = dL/dW: the optimizer sees a random
projection of G, and a step of C moves W by one of u u^T G v^T v, in the mean by one of G. At a turn u C v goes into a running
sum, u and v are drawn again (from the seed, the layer's name and the turn's number), and C is zero: so the sum has no low
rank, and no direction of W is moved for long, which is meant against forgetting. With an optimizer that scales its steps, as
AdamW does, each weight moves by about the learning rate in a step, as in a full fine-tune, if mostly in random directions.

Carried into the new projection u', v' are the mean M of the gradients and that of their squares:

M -> c (u'^T u) M (v v'^T), c = 1 / ((1 + (out + 1) / r) (1 + (in + 1) / r))

This is FLoRA's decompression and compression (c = 1, right in the mean) times the c of the least squared error, which u M v
has as an estimate of the mean of G: its noise would have 1 / c - 1 times the energy of the gradient itself. The mean square
of u^T G v^T is |G|^2 / r^2 in each of its places, so the squares become their own mean.

u and v lie in the training state beside the sum, of the size of a LoRA's factors. Its file is a full difference, or a plain
LoRA by singular values. See accumulated.py for what the sum costs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from trainers.adapters import accumulated
from trainers.adapters.accumulated import SUM
from trainers.adapters.base import Factors, Started, Turn, Weight
from trainers.adapters.lora import LORA
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch


class RandomProjectionSettings(LowRankSettings):
    """Random projection: a small matrix of rank x rank between random ones, drawn anew every so many steps and summed up."""

    type: Literal["random_projection"] = "random_projection"
    """Kind of adapter."""
    every: int = Field(default=100, ge=1, le=1_000_000)
    """Steps of a period, after which what was learnt goes into a sum and the adapter begins anew."""

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        return RandomProjection(self.every)


class RandomProjection:
    """See base.Trained. u and v have the shapes of a LoRA's up and down."""

    kept = (SUM, "u", "v")

    def __init__(self, every: int) -> None:
        self.every = every

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """core, C (r, r)."""
        return {"core": (rank, rank)}

    def native_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """A full difference's."""
        return {"diff": weight}

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """C is zero, and so is the sum."""
        import torch

        sizes = LORA.factor_shapes(shape, rank)
        constants = {SUM: torch.zeros(shape), **_drawn({"u": sizes["up"], "v": sizes["down"]}, rank, generator)}
        return Started({"core": torch.zeros(rank, rank)}, scale, constants)

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """s (sum x + u C v x)."""
        return accumulated.path(frozen, x, factors[SUM], _as_lora(factors), scale)

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """s (sum + u C v) in float64."""
        return scale * accumulated.whole(factors[SUM], _as_lora(_wide(factors)))

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """A full difference."""
        return accumulated.exported(factors[SUM], _as_lora(_wide(factors)), scale)

    def file_rank(self, rank: int) -> None:
        """Each period adds its own."""
        return None

    def turn(self, factors: Factors, generator: torch.Generator) -> Turn:
        """New u and v, C zero, the running means carried over."""
        import torch

        u, v, rank = factors["u"].flatten(1), factors["v"].flatten(1), factors["core"].shape[0]
        drawn = _drawn({name: tuple(factors[name].shape) for name in ("u", "v")}, rank, generator)
        left, right = drawn["u"].to(u).flatten(1).T @ u, v @ drawn["v"].to(v).flatten(1).T
        shrunk = 1 / ((1 + (u.shape[0] + 1) / rank) * (1 + (v.shape[1] + 1) / rank))

        def carry(which: Literal["mean", "square"], factor: str, mean: torch.Tensor) -> torch.Tensor:
            return shrunk * left @ mean @ right if which == "mean" else torch.full_like(mean, float(mean.mean()))

        total = accumulated.whole(factors[SUM], _as_lora(factors))
        return Turn({"core": torch.zeros(rank, rank)}, {SUM: total, **drawn}, carry)


def _drawn(shapes: dict[str, tuple[int, ...]], rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.randn(shape, generator=generator) / math.sqrt(rank) for name, shape in shapes.items()}


def _as_lora(factors: Factors) -> dict[str, torch.Tensor]:
    """down = v and up = u C, of which the gradient goes on to C; both in the number format of u and v."""
    u = factors["u"]
    up = u.flatten(1) @ factors["core"].to(u.dtype)
    return {"down": factors["v"], "up": up.reshape(u.shape)}


def _wide(factors: Factors) -> dict[str, torch.Tensor]:
    return {name: factor.double() for name, factor in factors.items() if name != SUM}
