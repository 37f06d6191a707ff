"""Work that goes on beside the training's own, in a thread that yields to it: hashing lets go of Python's lock."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
_YIELDING = 10


def in_background(work: Mapping[str, Callable[[], T]]) -> dict[str, Future[T]]:
    """Does pieces of work one after the other in one thread. What each gives, or raises, stands in its Future.

    The thread ends with the program, wherever it is. Each piece is forgotten as soon as it is done.
    """
    waiting = dict(work)
    futures: dict[str, Future[T]] = {name: Future() for name in waiting}

    def run() -> None:
        if threading.current_thread() is not threading.main_thread() and sys.platform == "linux":
            with contextlib.suppress(OSError):  # only there a thread has a priority of its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _YIELDING)
        for name in tuple(waiting):
            piece = waiting.pop(name)
            try:
                futures[name].set_result(piece())
            except BaseException as error:
                futures[name].set_exception(error)
            del piece

    start_beside(run)
    return futures


def start_beside(run: Callable[[], object]) -> threading.Thread | None:
    """Runs something in a thread that ends with the program; here and now, giving None, where there is no room for one."""
    thread = threading.Thread(target=run, name="impasto-beside", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        run()
        return None
    return thread
