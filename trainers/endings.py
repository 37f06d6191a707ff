"""How a training is ended from outside, and what is said of an error that ended it: shared by all its processes."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainers.errors import NoSpaceError, TrainingError, is_out_of_memory
from trainers.run_folder import RunFolder

_KEPT = "What was saved until now is kept."


def in_words(error: Exception, run: RunFolder, details: str = "trainer.log") -> str:
    """What happened and what to do about it; of an unforeseen error, that `details` has more."""
    if isinstance(error, TrainingError):
        return str(error)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if is_out_of_memory(error):
        return (
            "Out of memory. Set `checkpointing = true` under [train] in config.toml and resume, or train anew with a lower"
            " train.batch_size or dataset.resolution."
        )
    if isinstance(error, NoSpaceError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        needed = f": {_size(error.needed)} were needed, {_size(error.free)} are free" if isinstance(error, NoSpaceError) else ""
        return f"The disk is full{needed} ({error.filename or run.path}). {_KEPT} Free some space; then resume goes on."
    if isinstance(error, OSError):
        what = error.strerror or text
        return f"A file cannot be read or written: {what} ({error.filename or run.path}). {_KEPT} Then resume goes on."
    return f"{type(error).__name__}: {text} (details in {details})."


def _size(count: int) -> str:
    """Bytes in a person's units."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second Ctrl-C does not wait."""
    asked = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
