"""The factor on the loss that keeps a half-precision gradient between what underflows and what overflows. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

START = 2.0**16
"""A loss averaged over an image has gradients near 1e-5; float16 begins at 6e-8 and ends at 65504."""
LARGEST = 2.0**24
"""Where it ends: while `up` is zero half of the gradient is too, so nothing else would stop it."""
GROWS_AFTER = 200
"""Good steps before it is doubled. A trial that fails costs one gradient, so half a percent at the most."""


@dataclass(frozen=True)
class LossScale:
    """A power of two, so that multiplying by it and dividing again changes no digit (arXiv 1710.03740, section 3.2).

    `good` counts the finite gradients since it was last changed. Where `largest` is 1 it stays 1.
    """

    factor: float = 1.0
    largest: float = 1.0
    good: int = 0

    @classmethod
    def of(cls, dtype_name: str) -> LossScale:
        """What a run in fp16 begins with; 1, and for ever, in the formats with float32's range."""
        return cls(START, LARGEST) if dtype_name == "fp16" else cls()

    @property
    def lowest(self) -> bool:
        """Whether a gradient that is not finite has another cause."""
        return self.factor <= 1.0

    def lowered(self) -> LossScale:
        """Half of it, after a gradient that is not finite."""
        return replace(self, factor=self.factor / 2, good=0)

    def after_good_step(self) -> LossScale:
        """One finite gradient more; doubled when there have been enough of them."""
        if self.good + 1 < GROWS_AFTER:
            return replace(self, good=self.good + 1)
        return replace(self, factor=min(self.factor * 2, self.largest), good=0)

    def as_in(self, facts: dict[str, Any]) -> LossScale:
        """As it was in a training state; as it is now where that knew of none, and never above `largest`."""
        scale = facts.get("loss_scale", {"factor": self.factor, "good": self.good})
        return replace(self, factor=min(scale["factor"], self.largest), good=scale["good"])

    def facts(self) -> dict[str, Any]:
        """What `as_in` reads, for a training state; nothing where it stays 1, so that a resume in fp16 begins as a run does."""
        return {} if self.largest == 1 else {"loss_scale": {"factor": self.factor, "good": self.good}}
