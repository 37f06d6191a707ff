"""A running mean in 8 bits, as bitsandbytes keeps it (arXiv 2110.02861): changed in places, and elsewhere left to the byte.

Of each 256 numbers the largest magnitude is kept, and of each number the nearest of 256 levels between -1 and 1 or 0 and 1.
So no number can be changed by itself beyond the largest of its block: a larger one would move the level of every other, and
round them all anew. What comes anew into a block that has old numbers is therefore cut at their largest; a block in which
all is new, or all that is old is zero, gets a largest of its own.

bitsandbytes itself takes a level beside zero for a running mean that is zero, and so moves weights that have never had a
gradient. What relies on it that these stay zero, as a growing LoRA does, needs `keep_zeros`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

BLOCK = 256
"""Numbers of a block, as bitsandbytes has them since 0.44."""


@dataclass(frozen=True)
class Blocks:
    """codes (n,) uint8 into `levels` (256,), rising, times `largest` (n / 256, rounded up)."""

    codes: torch.Tensor
    levels: torch.Tensor
    largest: torch.Tensor

    def mean(self) -> torch.Tensor:
        """The numbers (n,) float32."""
        return self.levels[self.codes.long()] * self.largest.repeat_interleave(BLOCK)[: len(self.codes)]

    def pairs(self, new: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(place, what comes there) so that the mean becomes `new` (n,) as nearly as it can, where that is another number."""
        old = self.mean()
        new, old = (pad(numbers.to(old), (0, -len(old) % BLOCK)).view(-1, BLOCK) for numbers in (new, old))
        changed = new != old
        free = changed.any(1) & ~(~changed & (old != 0)).any(1)
        largest = torch.where(free, new.abs().amax(1), self.largest)
        share = (new / largest.where(largest > 0, 1.0)[:, None]).clamp(-1, 1)
        after = torch.searchsorted(self.levels, share).clamp(1, len(self.levels) - 1)
        nearer_below = share - self.levels[after - 1] <= self.levels[after] - share
        nearest = (after - nearer_below.long()).flatten()[: len(self.codes)].to(self.codes)
        kept = ~(changed | free[:, None]).flatten()[: len(self.codes)]  # with another largest a code is another number
        return [(self.codes, torch.where(kept, self.codes, nearest)), (self.largest, largest)]


def blocks_of(state: dict[str, Any], name: str) -> Blocks | None:
    """The running mean `name`, state1 or state2, of a parameter's state; None of a small one, which is kept in float32."""
    number = name.removeprefix("state")
    if f"absmax{number}" not in state:
        return None
    return Blocks(state[name].view(-1), state[f"qmap{number}"], state[f"absmax{number}"])


def keep_zeros(optimizer: torch.optim.Optimizer) -> None:
    """From here on a step leaves a weight of zero whose gradient is zero as it is."""
    still: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before(own: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in own.param_groups for parameter in group["params"] if parameter.grad is not None]
        still.extend((parameter, (parameter == 0) & (parameter.grad == 0)) for parameter in parameters)

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter, zero in still:
            parameter.masked_fill_(zero, 0.0)
        still.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
