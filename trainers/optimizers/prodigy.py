"""Prodigy (arXiv 2306.06101): finds the learning rate by itself; the setting is a factor on it, 1 is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainers.optimizers.base import OptimizerSettings

if TYPE_CHECKING:
    import torch


class ProdigySettings(OptimizerSettings):
    """Prodigy."""

    type: Literal["prodigy"] = "prodigy"
    """Prodigy: finds the learning rate by itself."""
    learning_rate: float = 1.0
    """Factor on the rate that Prodigy finds; 1 is right."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Pull of the weights towards zero, per unit of learning rate."""
    growth: float | None = Field(default=None, gt=1, le=1000)
    """Largest growth of the found rate from one step to the next. Unset: any; 1.02 is cautious and wants long runs."""

    lowest: ClassVar[float] = 0.05
    highest: ClassVar[float] = 2.0
    one_rate: ClassVar[bool] = True  # its step fails on groups of different rates
    usual: ClassVar[str] = "Prodigy finds the rate by itself: 1 is right, 0.5 is cautious."

    moments: ClassVar[Mapping[str, Literal["mean", "square"]]] = {"exp_avg": "mean", "exp_avg_sq": "square"}

    def begin_anew(self, optimizer: torch.optim.Optimizer) -> None:
        """The way from the start, of which it finds its rate, begins where the weights are now; the rate stays."""
        for group in optimizer.param_groups:
            group["d_numerator"] = 0.0
            for parameter in group["params"]:
                if state := optimizer.state.get(parameter):
                    state["s"].zero_()
                    state["p0"] = parameter.detach().flatten().clone()

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See OptimizerSettings.build."""
        import prodigyopt

        # Prodigy shares one estimate over all groups and wants their rates equal; LoRA+ style ratios would break it.
        growth = self.growth or float("inf")
        optimizer: torch.optim.Optimizer = prodigyopt.Prodigy(
            groups, lr=self.learning_rate, weight_decay=self.weight_decay, growth_rate=growth, safeguard_warmup=True
        )
        return optimizer
