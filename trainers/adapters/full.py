"""A full difference: the change of a weight as it is, without factors, rank or alpha (parts `diff` in kohya's names)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.adapters.base import Factors, apply_weight, same_layer, scaled

if TYPE_CHECKING:
    import torch


class Full:
    """The mathematics of a full difference; no state. See adapters.base.AdapterKind for the meaning of each method."""

    parts = ("diff",)
    pairs: tuple[tuple[str, str], ...] = ()

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
