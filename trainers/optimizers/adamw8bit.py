"""AdamW with its two running means in 8 bit (arXiv 2110.02861), by the optional package bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainers.errors import SettingError
from trainers.optimizers.base import OptimizerSettings

if TYPE_CHECKING:
    import torch

    from trainers.eight_bit import Blocks


class AdamW8bitSettings(OptimizerSettings):
    """AdamW with 8-bit state."""

    type: Literal["adamw8bit"] = "adamw8bit"
    """AdamW with its state in 8 bit; needs the optional package bitsandbytes."""
    learning_rate: float = 1e-4
    """Learning rate of the denoiser's adapter."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Pull of the weights towards zero, per unit of learning rate."""

    package: ClassVar[str] = "bitsandbytes"
    moments: ClassVar[Mapping[str, Literal["mean", "square"]]] = {"state1": "mean", "state2": "square"}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See OptimizerSettings.build. Raises SettingError when bitsandbytes is not installed."""
        try:
            import bitsandbytes  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise SettingError(
                "optimizer.type = adamw8bit needs the package bitsandbytes",
                hint="Run `pip install bitsandbytes` in the program's environment, or use optimizer.type=adamw.",
            ) from error
        from trainers.eight_bit import keep_zeros

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, weight_decay=self.weight_decay)
        keep_zeros(optimizer)
        return optimizer

    def blocks(self, state: dict[str, Any], name: str) -> Blocks | None:
        """See OptimizerSettings.blocks."""
        from trainers.eight_bit import blocks_of

        return blocks_of(state, name)
