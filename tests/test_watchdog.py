"""The watchdog barks while a step hangs, once, and not at quick ones."""

from __future__ import annotations

import time

from trainers.watchdog import Watchdog


def test_a_step_of_ten_times_the_median_is_told_while_it_hangs() -> None:
    told: list[str] = []
    with Watchdog(told.append, least=0.1).watching() as watchdog:
        for number in range(3):
            with watchdog.step(number, 0.001):
                pass
        with watchdog.step(7, 0.01):
            end = time.monotonic() + 10
            while not told and time.monotonic() < end:
                time.sleep(0.01)
            assert len(told) == 1 and told[0].startswith("Step 7 has been taking")
            time.sleep(0.3)
        with watchdog.step(8, 0.0):  # the first step of all: nothing to compare with
            time.sleep(0.3)
    assert len(told) == 1
