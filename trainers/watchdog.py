"""Says when a step takes far longer than steps do, while it still hangs: a full memory, a sleeping disk, a stuck GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TIMES = 10
"""A step is told that takes so many times the median."""
_LEAST = 10.0  # seconds: shorter ones are nobody's worry


class Watchdog:
    """One thread for a run. `tell` gets a sentence, once for a step, from that thread."""

    def __init__(self, tell: Callable[[str], None], least: float = _LEAST) -> None:
        self._tell, self._least = tell, least
        self._changed = threading.Condition()
        self._until: float | None = None
        self._about = (0, 0.0)
        self._closed = False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Runs the thread while held."""
        self._thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify()
            self._thread.join()

    @contextmanager
    def step(self, number: int, median: float) -> Iterator[None]:
        """One step, whose like take `median` seconds; 0 when that is not known yet."""
        if median <= 0:
            yield
            return
        # Without a wake-up: the thread looks by itself when the shortest time that matters is over.
        self._about, self._until = (number, median), time.monotonic() + max(self._least, TIMES * median)
        try:
            yield
        finally:
            self._until = None

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                until = self._until
                if until is not None and time.monotonic() >= until:
                    self._until = None
                    number, median = self._about
                    taken = max(self._least, TIMES * median)
                    what = f"Step {number} has been taking more than {taken:.0f} s, where {median:.2g} s is usual"
                    self._tell(f"{what}. The computer may be busy or short of memory; the training goes on waiting.")
                self._changed.wait(self._least / 4)
