"""The trainer's process: started so that it outlives the window, found again by its id and the time it was made."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainers import events
from trainers.files import write_atomically
from trainers.process_id import is_same, made_at
from trainers.run_folder import RunFolder

# Windows' word for a session of its own; 0 elsewhere, where these names are missing.
_APART = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)


@dataclass(frozen=True)
class Process:
    """The last process that the window started for a run, as process.json in the run folder has it."""

    project: str
    """Id of the project that the run belongs to; empty when nobody knows."""
    pid: int
    made: float
    """When the system made the process, in seconds since it started itself: ids are used again, this pair is not."""
    before: int
    """How many events the run had told: those are not of this process."""
    exit_code: int | None = None
    """How it ended, negative for a signal, where the window was there to see it."""


def process_file(run: RunFolder) -> Path:
    """Where the window notes the process; it is the only writer."""
    return run.path / "process.json"


def read_process(run: RunFolder) -> Process | None:
    """The noted process; None when there is none, or the note is damaged."""
    try:
        return Process(**json.loads(process_file(run).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def start_process(run: RunFolder, project: str, home: Path, force: bool = False) -> Process:
    """Starts `trainers resume RUN` apart from the window, all it says going into trainer.log, and notes it."""
    before = len(events.read_since(run.events)[0])
    with run.log.open("ab") as log:
        started = subprocess.Popen(
            # -P: without it a stray trainers.py in the working folder would run instead.
            [sys.executable, "-P", "-m", "trainers", "resume", str(run.path), *(["--force"] if force else [])],
            cwd=home,
            env={**os.environ, "IMPASTO_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Closing the window's terminal, or Ctrl-C in it, must not reach a training.
            start_new_session=True,
            creationflags=_APART,
        )
    process = Process(project, started.pid, made_at(started.pid) or 0.0, before)
    try:
        _note(run, process)
    except OSError:  # a training that nobody could find again
        started.kill()
        raise
    threading.Thread(target=_await_end, args=(started, run, process), daemon=True, name=f"await {run.path.name}").start()
    return process


def start_worker(command: Sequence[str], home: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts a process of the window's own that is asked on stdin and answers on stdout, its stderr going into `log`.

    Ctrl-C is for the window, which then closes it; a window that crashes closes the pipe, which ends it too. Raises OSError.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stderr:
        return subprocess.Popen(
            command,
            cwd=home,
            env={**os.environ, "IMPASTO_HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )


def _await_end(started: subprocess.Popen[bytes], run: RunFolder, process: Process) -> None:
    """Notes how it ended. Without a wait a dead child stays in the system's table."""
    code = started.wait()
    now = read_process(run)
    if now is not None and (now.pid, now.made) == (process.pid, process.made):
        with contextlib.suppress(OSError):
            _note(run, Process(**{**asdict(now), "exit_code": code}))


def _note(run: RunFolder, process: Process) -> None:
    write_atomically(process_file(run), json.dumps(asdict(process)).encode(), fsync=False)


def is_alive(process: Process) -> bool:
    """Whether it still runs: the same id, made at the same time, and not only waiting to be buried."""
    return process.exit_code is None and is_same(process.pid, process.made)


def tail(path: Path, lines: int = 200, most: int = 256 * 1024) -> list[str]:
    """The last lines of a log, of at most its last `most` bytes. Empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            data = file.read(most)
    except OSError:
        return []
    found = data.decode("utf-8", "replace").splitlines()
    return found[1:][-lines:] if size > most else found[-lines:]
