"""What every optimizer's settings can do: check a learning rate, and build the torch optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from trainers.settings import Settings

if TYPE_CHECKING:
    import torch


class OptimizerSettings(Settings):
    """Base of the optimizers' settings."""

    learning_rate: float
    """Learning rate."""

    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 0.05
    usual: ClassVar[str] = "Around 1e-4 is usual (1e-3 on pocket); above 0.05 a LoRA breaks within a few steps."

    @classmethod
    def check_rate(cls, rate: float, name: str) -> None:
        """Raises ValueError when `rate` lies outside of what this optimizer can use."""
        if not cls.lowest < rate <= cls.highest:
            raise ValueError(f"{name} = {rate:g} must be above {cls.lowest:g} and at most {cls.highest:g}. {cls.usual}")

    @model_validator(mode="after")
    def _rate(self) -> OptimizerSettings:
        self.check_rate(self.learning_rate, "learning_rate")
        return self

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer over parameter groups [{'params': [...], 'lr': rate}]; each group keeps its own rate."""
        raise AssertionError("each optimizer's settings build their own")

    views: ClassVar[bool] = False
    """Whether the optimizer needs the parameters as matrices (True) or takes one flat buffer per rate (False)."""
