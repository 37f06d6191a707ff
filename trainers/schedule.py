"""How the learning rate moves: warm-up, then constant, linear or cosine down to a floor."""

from __future__ import annotations

import math
from typing import Literal


def rate_factor(kind: Literal["constant", "linear", "cosine"], warmup: int, floor: float, step: int, steps: int) -> float:
    """Factor in (0, 1] on the learning rate of update number `step` (0-based) of `steps`.

    The warm-up rises linearly over `warmup` updates and never starts at 0; a fall ends at `floor` after the last one.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    falling = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (1 - floor) * falling
