"""Work beside the training's own: in its order, with what it gives or raises, and forgotten once it is done."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from trainers.background import in_background


class Weights:
    """Something large."""


def test_pieces_are_done_one_after_the_other_and_tell_what_they_gave_or_raised() -> None:
    order: list[str] = []
    gate = threading.Event()

    def first() -> int:
        gate.wait(10)
        order.append("first")
        return 1

    def second() -> int:
        order.append("second")
        raise ValueError("no such number")

    futures = in_background({"first": first, "second": second, "third": lambda: 3})
    assert not futures["second"].done()
    gate.set()
    assert (futures["first"].result(10), futures["third"].result(10)) == (1, 3)
    with pytest.raises(ValueError, match="no such number"):
        futures["second"].result(10)
    assert order == ["first", "second"]


def test_a_piece_is_forgotten_while_the_next_is_done() -> None:
    weights = Weights()
    alive = weakref.ref(weights)
    gate = threading.Event()
    futures = in_background({"large": lambda held=weights: held is not None, "next": lambda: gate.wait(10)})  # type: ignore[misc]
    del weights
    assert futures["large"].result(10)
    gc.collect()
    assert alive() is None
    gate.set()
    assert futures["next"].result(10)
