"""A full difference: the change of a weight as it is, without factors, rank or alpha (parts `diff` in kohya's names).

Trained, it is full fine-tuning of the layers that it is put beside, W = W0 + s D with W0 frozen: the corner opposite to the
base in the plane of which matrices learn and at what rank. It takes four numbers of memory for each weight, and its forward
a second product of the layer's own size, which a loop that rewrites W0 does not; here the base stays, and a strength blends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from trainers.adapters.base import Factors, Started, Weight, apply_weight, same_layer, scaled
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch


class FullSettings(LowRankSettings):
    """Full fine-tuning of the targets' weights: it has no rank, and alpha / rank is its scale alone."""

    type: Literal["full"] = "full"
    """Kind of adapter."""

    @model_validator(mode="after")
    def _has_no_rank(self) -> FullSettings:
        if self.rank_pattern:
            raise ValueError("an adapter of type full has no rank, so adapter.rank_pattern must be empty; see alpha_pattern")
        if self.scaling != "standard":
            raise ValueError(f"an adapter of type full has no rank, so adapter.scaling = {self.scaling} says nothing of it")
        return self

    @property
    def has_rank(self) -> bool:
        """See LowRankSettings."""
        return False

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        return FULL


class Full:
    """The mathematics of a full difference; no state. See adapters.base.AdapterKind and Trained for what each method does."""

    parts = ("diff",)
    pairs: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def factor_shapes(weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """The weight's own."""
        return {"diff": weight}

    @staticmethod
    def start(shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """Zero."""
        import torch

        return Started({"diff": torch.zeros(shape)}, scale)

    @staticmethod
    def exported(factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """At scale 1, as a file has no alpha for it."""
        return "full", {"diff": factors["diff"] * scale}, 1.0

    @staticmethod
    def file_rank(rank: int) -> None:
        """None holds it."""
        return None

    @staticmethod
    def fault(factors: Factors) -> str:
        """diff (out, in[, kh, kw]) must be there."""
        if "diff" not in factors:
            return "has no difference of its weight"
        return "" if factors["diff"].ndim in (2, 4) else f"has a difference of shape {tuple(factors['diff'].shape)}"

    @staticmethod
    def rank(factors: Factors) -> int:
        """No alpha applies."""
        return 0

    @staticmethod
    def shape(factors: Factors) -> tuple[int, ...]:
        """The difference's own."""
        return tuple(factors["diff"].shape)

    @staticmethod
    def fit(factors: Factors, shape: tuple[int, ...]) -> dict[str, torch.Tensor] | None:
        """2-D for a 1x1 convolution becomes 4-D, or the reverse."""
        return {"diff": factors["diff"].reshape(shape)} if same_layer(factors["diff"].shape, shape) else None

    @staticmethod
    def prepare(factors: Factors, scale: float, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """As they are."""
        return dict(factors), scale

    @staticmethod
    def forward(frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """x through the difference."""
        return scaled(apply_weight(frozen, x, factors["diff"]), scale)

    @staticmethod
    def delta(factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The difference in float64."""
        return scale * factors["diff"].double()

    @staticmethod
    def norm(factors: Factors, scale: float) -> float:
        """Of the difference."""
        return abs(scale) * float(factors["diff"].double().norm())


FULL = Full()
