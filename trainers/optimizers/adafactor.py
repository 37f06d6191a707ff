"""Adafactor (arXiv 1804.04235): the squared gradient kept as row and column means, so almost no state."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Learning rate of the denoiser's adapter: how far a weight moves in a step, whatever its size."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Pull of the weights towards zero, per unit of learning rate."""

    moments: ClassVar[Mapping[str, Literal["mean", "square"]]] = dict.fromkeys(("row_var", "col_var", "variance"), "square")
    views: ClassVar[bool] = True  # rows and columns exist only in matrices

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See OptimizerSettings.build."""
        import torch

        # torch multiplies the rate by max(second eps, RMS of the weights), which is 1e-3 on an `up` that starts at zero;
        # 1 leaves the rate alone. Its first eps, 1e-7 unless given, is a floor under the gradient's mean square: above
        # most gradients of a LoRA. Squared, 1e-16 is still a float32, so a gradient of zero stays one.
        return torch.optim.Adafactor(groups, eps=(1e-16, 1.0), weight_decay=self.weight_decay)
