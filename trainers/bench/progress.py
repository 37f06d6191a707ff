"""Lines that tell on stderr what the bench is doing and how long it still takes. No torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from trainers.console import time_in_words

EVERY = 5.0
"""Seconds between two lines of one count."""


class Progress:
    """Where the lines go; None: nowhere."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._begun = stream, clock, clock()

    def say(self, text: str) -> None:
        """One line, with the seconds since the beginning."""
        if self._stream is not None:
            print(f"[{self._clock() - self._begun:7.1f} s] {text}", file=self._stream, flush=True)

    def counter(self, name: str) -> Callable[[int, int], None]:
        """A function that is told how many of how many are done, and says so with the time left."""
        begun = self._clock()
        last = begun - EVERY

        def told(done: int, total: int) -> None:
            nonlocal last
            now = self._clock()
            if now - last < EVERY and done < total:
                return
            last = now
            left = (now - begun) / done * (total - done) if done else 0.0
            self.say(f"{name}: {done} of {total}, {time_in_words(left)} left")

        return told


def to_stderr() -> Progress:
    """For a person at a terminal."""
    return Progress(sys.stderr)
