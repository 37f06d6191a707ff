"""Several processes of one training watch each other: one that dies or fails ends them all, in words, and none waits for it.

Each writes down in the run folder who it is, and, if it fails, why. What dies on the same machine is seen within a second,
whatever the others are doing; of a process on another machine its words are seen, or the next sum over all processes fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from trainers.errors import LostProcessError
from trainers.files import write_atomically
from trainers.process_id import is_same, made_at

GRACE = 3.0
"""Seconds in which a process may end by itself once another one is lost, before it is ended in the midst of its work."""
_LOOK = 1.0  # seconds from one look at the others to the next
_GOES_ON = "What was saved until now is kept; `impasto resume` goes on."


@dataclass(frozen=True)
class _Peer:
    """One of the processes, by its own word. `machine` tells whether its id means anything here; `words`: why it failed."""

    process: int
    made: float
    machine: str
    words: str = ""

    @property
    def lives(self) -> bool:
        """Whether it runs; of one on another machine that is not known, and taken to be so."""
        return self.machine != _machine() or is_same(self.process, self.made)


class Peers:
    """This process, `index` of `count`, and the others. With `count` 1 it does nothing.

    `end` gets a sentence, from a thread, when this process has not ended by itself after another one was lost; it is to
    tell it, and the process then ends with exit code 1, which harms no file: all are written aside and renamed.
    """

    def __init__(self, folder: Path, index: int, count: int, end: Callable[[str], None]) -> None:
        self._folder, self._index, self._count, self._end = folder, index, count, end
        self._met: dict[int, _Peer] = {}
        self._lost, self._failed = "", False
        self._found, self._closed = threading.Event(), threading.Event()

    @contextmanager
    def watching(self, asked: Callable[[], bool]) -> Iterator[None]:
        """Waits until all processes are there, then watches them while held.

        Raises LostProcessError when it is `asked` to stop before all are there; raised while held, it gets to say which
        process was lost, and how.
        """
        if self._index == 0:
            _sweep(self._folder)
        if self._count == 1:
            yield
            return
        self._write("")
        try:
            self._meet(asked)
            threading.Thread(target=self._watch, daemon=True, name="peers").start()
            yield
        except (LostProcessError, KeyboardInterrupt) as error:
            if isinstance(error, LostProcessError):
                self._found.wait(2 * _LOOK)  # its end may have been felt before it was seen
            if self._lost:
                raise LostProcessError(self._lost) from error
            raise
        finally:
            self._closed.set()
            if not self._failed:
                self._path(self._index).unlink(missing_ok=True)

    def fail(self, words: str) -> None:
        """Tells the others why this process, which is not the first, is about to end."""
        self._failed = self._count > 1
        if self._failed:
            self._write(words)

    def await_first(self) -> None:
        """Returns once the first process has ended: a launcher ends all that are left when one is gone."""
        first = self._met.get(0)
        while first is not None and first.lives and self._read(0) == first:
            time.sleep(0.1)

    def _path(self, index: int) -> Path:
        return self._folder / f".process-{index}"

    def _write(self, words: str) -> None:
        me = _Peer(os.getpid(), made_at(os.getpid()) or 0.0, _machine(), words)
        write_atomically(self._path(self._index), json.dumps(asdict(me)).encode(), fsync=False)

    def _read(self, index: int) -> _Peer | None:
        return _read(self._path(index))

    def _meet(self, asked: Callable[[], bool]) -> None:
        others = [index for index in range(self._count) if index != self._index]
        while missing := [index for index in others if index not in self._met]:
            for index in missing:
                peer = self._read(index)
                if peer is not None and peer.lives:  # not one that an earlier training left
                    self._met[index] = peer
            if asked():
                names = ", ".join(self._name(index) for index in missing)
                raise LostProcessError("The training was ended before all its processes were there", f"still missing: {names}")
            time.sleep(0.05)

    def _name(self, index: int) -> str:
        return f"process {index + 1} of {self._count}"

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK):
            for index, met in list(self._met.items()):
                now, lives = self._read(index), met.lives
                if now is not None and (now.words or not lives):
                    self._lose(index, now)
                    return
                if now is None and index == 0:
                    self._lose(index, met)
                    return
                if now is None:  # at its end in order, or as it has lost another one, which is still to be found
                    del self._met[index]

    def _lose(self, index: int, peer: _Peer) -> None:
        name = self._name(index).capitalize()
        if peer.words:
            self._lost = f"{name} failed: {peer.words}"
        elif self._read(index) is None:
            self._lost = f"{name} has ended. What it says stands in the run folder"
        else:
            died = f"{name} (id {peer.process}) has died without a word, as when it is killed or memory runs short"
            self._lost = f"{died}. What was saved until now is kept; `impasto resume` goes on"
        self._found.set()
        if not self._closed.wait(GRACE):
            # The main thread is at long work, or waits in a library for a process that will never answer.
            try:
                self._end(self._lost)
            finally:
                os._exit(1)


def _machine() -> str:
    """Tells machines apart without naming one."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def _read(path: Path) -> _Peer | None:
    try:
        return _Peer(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _sweep(folder: Path) -> None:
    """Removes what killed processes of an earlier training have left."""
    for path in folder.glob(".process-*"):
        peer = _read(path)
        if peer is None or not peer.lives:
            with contextlib.suppress(OSError):
                path.unlink()
