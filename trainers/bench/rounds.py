"""The protocol: one process, warm-up, interleaved rounds; medians, and the median of per-round ratios with its spread.

What another program takes away is taken from all contestants of a round alike, so a ratio of one round is worth more than
a time, and a median of such ratios more than a ratio of medians. No torch.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WARM_UP = 2
SPREAD = 0.25
OWN_LOAD = 0.5
"""How far the load may lie above the number of cores while the bench itself keeps them all busy."""


@dataclass(frozen=True)
class Took:
    """What a step answers whose seconds are not simply how long it ran."""

    seconds: float


Step = Callable[[int], object]
"""Runs the step of a round. Its answer is ignored unless it is a `Took`."""


@dataclass(frozen=True)
class Spread:
    """Some numbers, of rounds in their order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Their median."""
        return statistics.median(self.values)

    @property
    def relative(self) -> float:
        """(largest - smallest) / median; 0 for a median of 0."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    def facts(self) -> dict[str, object]:
        """For JSON."""
        return {
            "median": self.median, "min": min(self.values), "max": max(self.values), "spread": self.relative,
            "rounds": list(self.values),
        }  # fmt: skip


@dataclass(frozen=True)
class Rounds:
    """Seconds of each contestant, and the one-minute load of the machine before and after each round."""

    seconds: Mapping[str, Spread]
    loads: tuple[float, ...]

    def ratio(self, over: str, under: str) -> Spread:
        """`over` / `under`, round by round."""
        pairs = zip(self.seconds[over].values, self.seconds[under].values, strict=True)
        return Spread(tuple(a / b for a, b in pairs))

    def doubts(self, cores: int) -> list[str]:
        """Why no verdict may rest on these rounds; empty when one may."""
        found = [
            f"{name} spreads by {seconds.relative:.0%} (at most {SPREAD:.0%})"
            for name, seconds in self.seconds.items()
            if seconds.relative > SPREAD
        ]
        if self.loads and self.loads[0] > cores:
            found.append(f"the load was {self.loads[0]:.1f} on {cores} cores before the first round")
        elif self.loads and max(self.loads) > cores + OWN_LOAD:
            found.append(f"the load rose to {max(self.loads):.1f} on {cores} cores")
        return found


def load() -> float:
    """The machine's one-minute load; 0 where it is not told."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def run_rounds(
    contestants: Mapping[str, Step],
    rounds: int,
    told: Callable[[int, int], None] = lambda done, total: None,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[[], float] = load,
) -> Rounds:
    """Runs WARM_UP rounds and then `rounds` that count, each contestant once in every round, in turn.

    `told` hears how many rounds of how many are done; `synchronise` waits for a GPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    loads = [load()]
    for number in range(WARM_UP + rounds):
        for name, step in contestants.items():
            synchronise()
            begun = clock()
            answer = step(number)
            synchronise()
            taken = clock() - begun
            if number >= WARM_UP:
                seconds[name].append(answer.seconds if isinstance(answer, Took) else taken)
        loads.append(load())
        told(number + 1, WARM_UP + rounds)
    return Rounds({name: Spread(tuple(values)) for name, values in seconds.items()}, tuple(loads))
