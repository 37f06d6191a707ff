"""The settings that all adapter types have in common. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from trainers.settings import Settings

Target = Literal["attention", "cross_attention", "self_attention", "feed_forward", "projections", "convolutions"]


class LowRankSettings(Settings):
    """An adapter on the denoiser; its type says what its numbers do."""

    type: str
    """Kind of adapter."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Inner width of the adapter: how much it can learn, and the size of the file."""
    alpha: float | None = Field(default=None, gt=0, le=4096)
    """The update is scaled by alpha / rank. Unset: equal to the rank, so the scale is 1."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard`: alpha / rank. `rslora`: alpha / sqrt(rank) (arXiv 2312.03732), for high ranks."""
    targets: tuple[Target, ...] = ("attention",)
    """Which layers learn: attention (cross_attention and self_attention), feed_forward, projections, convolutions."""
    start_from: str = ""
    """LoRA file to train on from, of this rank or a lower one. Empty: from nothing, so that step 0 is the base."""

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one group of layers, for example attention")
        return value

    @field_validator("start_from")
    @classmethod
    def _only_a_lora_starts_from_one(cls, value: str) -> str:
        if value and not cls.starts_from_files():
            raise ValueError("only an adapter of type lora with init gaussian can train on from a file")
        return value

    @classmethod
    def starts_from_files(cls) -> bool:
        """Whether `start_from` is possible."""
        return False

    @property
    def changes_layers(self) -> bool:
        """Whether layers get an adapter; else the trigger's vectors are all that learns."""
        return True

    @property
    def trigger_vectors(self) -> int:
        """How many vectors of its own the trigger word has; 0 where it is read as the base reads it."""
        return 0

    @property
    def effective_alpha(self) -> float:
        """Alpha, resolved: the rank where it is unset."""
        return float(self.rank) if self.alpha is None else self.alpha

    def scale_of(self, alpha: float, rank: int) -> float:
        """Factor on the low-rank path."""
        return alpha / (rank if self.scaling == "standard" else math.sqrt(rank))
