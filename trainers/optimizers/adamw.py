"""AdamW (arXiv 1711.05101), fused: one call over one flat buffer for each learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainers.optimizers.base import OptimizerSettings

if TYPE_CHECKING:
    import torch


class AdamWSettings(OptimizerSettings):
    """AdamW."""

    type: Literal["adamw"] = "adamw"
    """AdamW: the usual choice."""
    learning_rate: float = 1e-4
    """Learning rate of the denoiser's adapter."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Pull of the weights towards zero, per unit of learning rate."""
    epsilon: float = Field(default=1e-8, gt=0, le=1e-2)
    """Added to the denominator."""

    moments: ClassVar[Mapping[str, Literal["mean", "square"]]] = {"exp_avg": "mean", "exp_avg_sq": "square"}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See OptimizerSettings.build."""
        import torch

        return torch.optim.AdamW(
            groups, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay, eps=self.epsilon, fused=True
        )
