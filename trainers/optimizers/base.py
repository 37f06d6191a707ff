"""What every optimizer's settings can do: check a learning rate, and build the torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from trainers.settings import Settings

if TYPE_CHECKING:
    import torch

    from trainers.eight_bit import Blocks


class OptimizerSettings(Settings):
    """Base of the optimizers' settings."""

    learning_rate: float
    """Learning rate."""

    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 0.05
    one_rate: ClassVar[bool] = False  # whether all parts must learn at the same rate
    package: ClassVar[str] = ""  # of Python, where it needs one that is not always there
    usual: ClassVar[str] = "Around 1e-4 is usual (1e-3 on pocket); above 0.05 a LoRA breaks within a few steps."

    @classmethod
    def check_rate(cls, rate: float) -> float:
        """`rate`; raises ValueError when it lies outside of what this optimizer can use."""
        if not cls.lowest < rate <= cls.highest:
            raise ValueError(f"must be above {cls.lowest:g} and at most {cls.highest:g}. {cls.usual}")
        return rate

    @field_validator("learning_rate")
    @classmethod
    def _rate(cls, rate: float) -> float:
        return cls.check_rate(rate)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer over parameter groups [{'params': [...], 'lr': rate}]; each group keeps its own rate."""
        raise AssertionError("each optimizer's settings build their own")

    moments: ClassVar[Mapping[str, Literal["mean", "square"]]] = {}
    """Names in its state of the running means of the gradient, and of its square. None: the state has another form."""

    def blocks(self, state: dict[str, Any], name: str) -> Blocks | None:
        """One of the `moments` in a parameter's `state` where it is kept in fewer bits; None where it lies there as it is."""
        return None

    def begin_anew(self, optimizer: torch.optim.Optimizer) -> None:
        """The weights are others all at once, their running means are seen to: what else `optimizer` holds of the old ones."""

    views: ClassVar[bool] = False
    """Whether the optimizer needs the parameters as matrices (True) or takes one flat buffer per rate (False)."""
