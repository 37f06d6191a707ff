"""Adafactor (arXiv 1804.04235): the squared gradient kept as row and column means, so almost no state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainers.optimizers.base import OptimizerSettings

if TYPE_CHECKING:
    import torch


class AdafactorSettings(OptimizerSettings):
    """Adafactor."""

    type: Literal["adafactor"] = "adafactor"
    """Adafactor: little memory for its state."""
    learning_rate: float = 1e-3
    """Learning rate of the denoiser's adapter, relative to the size of the weights."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Pull of the weights towards zero, per unit of learning rate."""

    views: ClassVar[bool] = True  # rows and columns exist only in matrices

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See OptimizerSettings.build."""
        import torch

        return torch.optim.Adafactor(groups, weight_decay=self.weight_decay)
