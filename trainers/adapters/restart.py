"""Restarts (ReLoRA, arXiv 2307.05695, section 3): W_t = W_{t-1} + s B A, a LoRA that is merged and begun anew every k steps.

At a turn B A goes into a running sum, A is drawn anew (Gaussian, of variance 1 / in, from the seed, the layer's name and the
turn's number), B is zero again. So the update of t periods has a rank of up to t r. The old period's running means would
push A and B back to where they were, so all but the largest few of them are set to zero (`prune`, of each factor by itself,
as the paper does by magnitude), and the rate rises anew over `warmup` steps up to where the schedule has it: with the
schedule `cosine` this is the paper's jagged cosine. The paper's full-rank warm start is left out: for a fine-tune the base
is the warm start.

Its file is a full difference, or a plain LoRA by singular values. See accumulated.py for what the sum costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from trainers.adapters import accumulated
from trainers.adapters.accumulated import SUM
from trainers.adapters.base import Factors, Started, Turn, Weight
from trainers.adapters.lora import LORA
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch


class RestartSettings(LowRankSettings):
    """Restarts (ReLoRA): a LoRA merged into a running sum and begun anew every so many steps, so of a high rank in the end."""

    type: Literal["restart"] = "restart"
    """Kind of adapter."""
    every: int = Field(default=100, ge=1, le=1_000_000)
    """Steps of a period, after which what was learnt goes into a sum and the adapter begins anew."""
    warmup: int = Field(default=20, ge=0, le=100_000)
    """Steps in which the rate rises again after each restart."""
    prune: float = Field(default=0.99, ge=0, le=1)
    """Share of the optimizer's running means, the smallest ones, that a restart sets to zero."""

    @model_validator(mode="after")
    def _the_rate_comes_back(self) -> RestartSettings:
        if self.warmup >= self.every:
            raise ValueError(
                f"adapter.warmup = {self.warmup} must be below adapter.every = {self.every}, or no step is a full one"
            )
        return self

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        return Restart(self.every, self.warmup, self.prune)


class Restart:
    """See base.Trained."""

    kept = (SUM,)

    def __init__(self, every: int, warmup: int, prune: float) -> None:
        self.every, self.warmup, self.prune = every, warmup, prune

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """LoRA's: down is A, up is B."""
        return LORA.factor_shapes(weight, rank)

    def native_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """A full difference's."""
        return {"diff": weight}

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """A LoRA's start, and no sum yet."""
        import torch

        return Started(LORA.start(shape, rank, scale, generator, weight).factors, scale, {SUM: torch.zeros(shape)})

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """s (sum x + B A x)."""
        return accumulated.path(frozen, x, factors[SUM], factors, scale)

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """s (sum + B A) in float64."""
        return scale * accumulated.whole(factors[SUM], factors)

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """A full difference."""
        return accumulated.exported(factors[SUM], factors, scale)

    def file_rank(self, rank: int) -> None:
        """Each period adds its own."""
        return None

    def turn(self, factors: Factors, generator: torch.Generator) -> Turn:
        """A new A, B zero, the running means pruned."""
        import torch

        new = {name: torch.empty(factors[name].shape) for name in ("down", "up")}
        LORA.initialise(new, generator)

        def carry(which: Literal["mean", "square"], factor: str, mean: torch.Tensor) -> torch.Tensor:
            return largest(mean, 1 - self.prune)

        return Turn(new, {SUM: accumulated.whole(factors[SUM], factors)}, carry)


def largest(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """The tensor with all but this share of its numbers, the largest in magnitude, set to zero."""
    import torch

    flat = tensor.flatten()
    kept = flat.abs().topk(round(share * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(tensor.shape)
