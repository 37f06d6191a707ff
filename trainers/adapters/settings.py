"""The settings that all adapter types have in common. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from trainers.adapters.dropout import Dropout
from trainers.settings import Settings

Target = Literal["attention", "cross_attention", "self_attention", "feed_forward", "projections", "convolutions"]
Projection = Literal["q", "k", "v", "out"]


class LowRankSettings(Settings):
    """An adapter on the denoiser; its type says what its numbers do."""

    type: str
    """Kind of adapter."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Inner width of the adapter: how much it can learn, and the size of the file."""
    alpha: float | None = Field(default=None, gt=0, le=4096)
    """The update is scaled by alpha / rank. Unset: equal to the rank, so the scale is 1."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(default={})
    """Other ranks by layer, as {to_q = 32, "attn2.*" = 4}: whole parts of a name, * for anything; the longest one counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=4096)]] = Field(default={})
    """Other alphas by layer, as `adapter.rank_pattern` has ranks."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard`: alpha / rank. `rslora`: alpha / sqrt(rank) (arXiv 2312.03732), for high ranks."""
    targets: tuple[Target, ...] = ("attention",)
    """Which layers learn: attention (cross_attention and self_attention), feed_forward, projections, convolutions."""
    projections: tuple[Projection, ...] = ("q", "k", "v", "out")
    """Which of the attention's matrices learn, among those that targets name; in the text encoder too."""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0, le=1000)
    """LoRA+ (arXiv 2402.12354): the up side learns at so many times the learning rate, 16 for example, with a lower rate."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the numbers that an adapter reads which are left out, others at each step and picture: peft's lora_dropout."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a LoRA's rank that is left out, other components at each step and picture; with adapter.init gaussian."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which a layer's adapter is off altogether, other layers at each step."""
    start_from: str = ""
    """LoRA file to train on from, of this rank or a lower one. Empty: from nothing, so that step 0 is the base."""

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _dots_are_part_of_a_pattern(cls, value: Any) -> Any:
        return dict(_joined(value)) if isinstance(value, Mapping) else value

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one group of layers, for example attention")
        return value

    @field_validator("projections")
    @classmethod
    def _some_projection(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one of q, k, v and out; adapter.targets leaves attention out altogether")
        return value

    @field_validator("start_from")
    @classmethod
    def _only_a_lora_starts_from_one(cls, value: str) -> str:
        if value and not cls.starts_from_files():
            raise ValueError("only an adapter of type lora with init gaussian can train on from a file")
        return value

    @field_validator("rank_dropout")
    @classmethod
    def _only_a_lora_drops_of_its_rank(cls, value: float) -> float:
        if value and not cls.drops_ranks():
            raise ValueError("only an adapter of type lora drops of its rank; adapter.dropout and module_dropout are for all")
        return value

    @classmethod
    def drops_ranks(cls) -> bool:
        """Whether `rank_dropout` is possible."""
        return False

    @field_validator("loraplus_lr_ratio")
    @classmethod
    def _only_a_lora_has_an_up_side(cls, value: float) -> float:
        if value != 1 and not cls.ups():
            raise ValueError("only an adapter of type lora or dora has an up side that can learn at a rate of its own")
        return value

    @classmethod
    def ups(cls) -> tuple[str, ...]:
        """The factors that `loraplus_lr_ratio` lets learn at another rate."""
        return ()

    @property
    def apart(self) -> tuple[str, ...]:
        """The factors that learn at another rate than the rest."""
        return self.ups() if self.loraplus_lr_ratio != 1 else ()

    @classmethod
    def starts_from_files(cls) -> bool:
        """Whether `start_from` is possible."""
        return False

    @property
    def changes_layers(self) -> bool:
        """Whether layers get an adapter; else the trigger's vectors are all that learns."""
        return True

    @property
    def has_rank(self) -> bool:
        """Whether what learns in the layers is of a rank, which can be judged, and with it the rate."""
        return self.changes_layers

    @property
    def trigger_vectors(self) -> int:
        """How many vectors of its own the trigger word has; 0 where it is read as the base reads it."""
        return 0

    @property
    def dropouts(self) -> Dropout:
        """What is dropped in training."""
        return Dropout(self.dropout, self.rank_dropout, self.module_dropout)

    @property
    def effective_alpha(self) -> float:
        """Alpha, resolved: the rank where it is unset."""
        return float(self.rank) if self.alpha is None else self.alpha

    def scale_of(self, alpha: float, rank: int) -> float:
        """Factor on the low-rank path."""
        return alpha / (rank if self.scaling == "standard" else math.sqrt(rank))


def _joined(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """{"attn2": {"to_q": 8}}, as TOML and --set read attn2.to_q = 8, -> "attn2.to_q", 8."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _joined(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
