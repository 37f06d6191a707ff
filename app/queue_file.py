"""What waits its turn, as one file in the home folder: queue.json, written whole."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from app.refusals import disk_refusal
from trainers.files import write_atomically

Hold = Literal["", "person", "paused", "interrupted", "refused"]
"""Why the queue does not go on by itself: not at all; somebody holds it; the run before is paused; its process is gone
without a word; or the next one could not be started."""
RUN_HOLDS = ("paused", "interrupted")
"""Those that a run is the cause of: the state's `last`."""


class Entry(BaseModel):
    """One prepared run, or one that is to go on where it was stopped."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    run: str
    """Name of its folder; that of a prepared run holds config.toml and edits.json, and nothing that a training has written."""
    project: str
    title: str = ""
    """In words, as it was when it was added: 400 steps on pocket."""
    added: float = 0.0
    """Seconds since 1970; 0 where it was not noted."""
    steps: int = 0
    seconds: float | None = None
    """How long it will take by two real steps, or by the steps that it has done, where they had been measured."""
    resumes: bool = False
    """Whether it was begun before: its folder stays when it is taken out."""
    begun: int | None = None
    """Of one that resumes: the event that its latest process had begun with, by which one that went on elsewhere is known."""
    force: bool = False
    """Whether it goes on although what went into it has changed."""


class QueueState(BaseModel):
    """The queue: what comes first stands first."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    entries: tuple[Entry, ...] = ()
    hold: Hold = ""
    why: str = ""
    """What the system said, where the next run could not be started."""
    last: str = ""
    """The run that trained when somebody last looked; the first entry goes on after it."""

    def entry_of(self, run: str) -> Entry | None:
        """The entry of a run that waits; None for any other."""
        return next((entry for entry in self.entries if entry.run == run), None)


class QueueFile:
    """Reads and writes the file, from any thread; one that has not changed is not read again. A damaged one is put aside."""

    def __init__(self, home: Path) -> None:
        self.path = home / "queue.json"
        self._known: tuple[tuple[int, int], QueueState] | None = None
        self._lock = threading.Lock()

    def read(self) -> QueueState:
        """The queue as it is; empty where there is none. What cannot be read now is as it was, else Refusal is raised."""
        with self._lock:
            try:
                return self._read()
            except FileNotFoundError:
                return QueueState()
            except OSError as error:
                if self._known is None:
                    raise disk_refusal(error) from error
                return self._known[1]

    def _read(self) -> QueueState:
        mark = self._mark()
        if self._known is None or self._known[0] != mark:
            try:
                found = QueueState(**json.loads(self.path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, ValidationError):
                self.path.replace(self.path.with_suffix(".damaged"))
                self._known = None
                return QueueState()
            self._known = mark, found
        return self._known[1]

    def write(self, state: QueueState) -> None:
        """Puts it in the place of what was there, whole. Raises OSError."""
        with self._lock:
            write_atomically(self.path, state.model_dump_json(indent=1).encode())
            self._known = self._mark(), state

    def _mark(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size
