"""Talks to the render worker, a process of its own that keeps a base model warm: started when asked, stopped when idle."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.processes import start_worker
from trainers.errors import sentence

State = Literal["waiting", "loading", "drawing", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
WORKER = (sys.executable, "-P", "-m", "trainers.worker")
IDLE_SECONDS = 600.0
"""After which an unused worker gives its memory back, in seconds."""
REMEMBERED = 200
"""How many requests can be looked at; of more, the oldest that have ended are forgotten."""
_DIED = "The renderer ended unexpectedly"
_DIED_HINT = "Draw again: it starts anew. If it ends again, the memory may be too small for this size."


@dataclass
class _Job:
    """What is known of one request; `process` is the worker that was asked."""

    process: subprocess.Popen[bytes] | None = None
    state: State = "waiting"
    done: int = 0
    total: int = 0
    pictures: dict[float, str] = field(default_factory=dict)
    cells: dict[int, str] = field(default_factory=dict)
    answer: dict[str, Any] | None = None
    problem: str = ""


class Studio:
    """The window's renderer. All methods may be called from any thread; none waits for a picture."""

    def __init__(self, home: Path, *, command: Sequence[str] | None = None, idle_seconds: float = IDLE_SECONDS) -> None:
        self.folder = home / "window" / "studio"
        """Where the pictures are written; named by what they show, so that each is drawn only once."""
        self._home, self._command, self._idle_seconds = home, tuple(command or WORKER), idle_seconds
        self._lock = threading.RLock()
        self._jobs: dict[int, _Job] = {}
        self._next = 1
        self._process: subprocess.Popen[bytes] | None = None
        self._used = 0.0
        self._timer: threading.Timer | None = None
        self._closed = False

    def ask(self, request: dict[str, Any]) -> int:
        """Sends a request (trainers.cells has the fields; render unless it says what to `do`); returns its id.

        With `"replaces": True` all unfinished requests before it are cancelled. Never raises: what goes wrong, also a
        worker that cannot be started, is told by `look`.
        """
        with self._lock:
            number, self._next = self._next, self._next + 1
            job = self._jobs[number] = _Job()
            self._forget_old()
            try:
                message = {"folder": str(self.folder), "do": "render", **request, "id": number}
                self._send(json.dumps(message).encode(), job)
            except (OSError, TypeError, ValueError) as error:
                job.state = "failed"
                job.problem = sentence(f"The renderer could not be asked: {error}", hint="Try again.")
            return number

    def look(self, number: int) -> dict[str, Any]:
        """How a request stands: state, done and total (sampling steps), pictures, problem ("" if none).

        The pictures by strength as `pictures` and by their cell's number as `cells`, both with the file's path; of what is
        no drawing, `answer`, once it is there.

        state: waiting, loading, drawing, and at last done, failed or cancelled. Raises KeyError for an id never given,
        or long forgotten.
        """
        return self.watch(number)()

    def watch(self, number: int) -> Callable[[], dict[str, Any]]:
        """A `look` for whoever keeps it, which is not forgotten however much is asked after it. Raises KeyError as `look`."""
        with self._lock:
            job = self._jobs[number]
        return functools.partial(self._told, job)

    def _told(self, job: _Job) -> dict[str, Any]:
        with self._lock:
            return {
                "state": job.state,
                "done": job.done,
                "total": job.total,
                "pictures": dict(job.pictures),
                "cells": dict(job.cells),
                "answer": job.answer,
                "problem": job.problem,
            }

    def cancel(self, number: int) -> None:
        """Asks the worker to abandon a request at its next sampling step. One that has ended, or is unknown, stays as it is."""
        with self._lock:
            job = self._jobs.get(number)
            if job is None or job.state in ENDED or job.process is None:
                return
            # A pipe that is broken: the worker has died, and its reader is about to say so.
            with contextlib.suppress(OSError, ValueError):
                self._write(job.process, json.dumps({"do": "cancel", "id": number}).encode())

    def close(self) -> None:
        """Ends the worker, within some seconds; what it was drawing is cancelled, and nothing can be asked any more."""
        with self._lock:
            self._closed = True
            if self._timer:
                self._timer.cancel()
            for job in self._jobs.values():
                if job.state not in ENDED:
                    job.state = "cancelled"
            process, self._process = self._process, None
        if process:
            _end(process, patience=3.0)

    def _send(self, line: bytes, job: _Job) -> None:
        if self._closed:
            raise ValueError("the window is closing")
        for fresh in (False, True):
            if fresh or self._process is None or self._process.poll() is not None:
                self._process = self._start()
            job.process = self._process
            try:
                self._write(self._process, line)
                break
            except OSError:  # it died between the look and the write
                if fresh:
                    raise
        self._stay_awake()

    def _write(self, process: subprocess.Popen[bytes], line: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(line + b"\n")
        process.stdin.flush()

    def _start(self) -> subprocess.Popen[bytes]:
        process = start_worker(self._command, self._home, self.folder / "worker.log")
        threading.Thread(target=self._listen, args=(process,), daemon=True, name="listen to the renderer").start()
        return process

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Takes in what one worker tells, until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a line cut off by a kill
                event = json.loads(line)
                with self._lock:
                    self._take(event, process)
        process.stdout.close()
        process.wait()
        with self._lock:
            for job in self._jobs.values():
                if job.process is process and job.state not in ENDED:
                    job.state = "failed"
                    job.problem = sentence(_DIED, f"exit code {process.returncode}", _DIED_HINT)
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()

    def _take(self, event: dict[str, Any], process: subprocess.Popen[bytes]) -> None:
        job = self._jobs.get(event["id"])
        if job is None or job.process is not process or job.state in ENDED:
            return
        match event["event"]:
            case "loading":
                job.state = "loading"
            case "step":
                job.state, job.done, job.total = "drawing", event["done"], event["total"]
            case "picture":
                job.pictures[float(event["strength"])] = job.cells[event["cell"]] = event["path"]
            case "answer":
                job.answer = event["answer"]
            case "failed":
                job.state, job.problem = "failed", sentence(event["what"], event["where"], event["hint"])
            case "done" | "cancelled" as ended:
                job.state = ended
        if job.state in ENDED:
            self._stay_awake()

    def _forget_old(self) -> None:
        ended = [number for number, job in self._jobs.items() if job.state in ENDED]
        for number in ended[: max(0, len(self._jobs) - REMEMBERED)]:
            del self._jobs[number]

    def _stay_awake(self) -> None:
        """Lets the idle time begin anew."""
        if self._timer:
            self._timer.cancel()
        if self._closed:
            return
        self._used = time.monotonic()
        self._timer = threading.Timer(self._idle_seconds, self._stop_when_idle)
        self._timer.daemon = True
        self._timer.start()

    def _stop_when_idle(self) -> None:
        with self._lock:
            process = self._process
            busy = any(job.process is process and job.state not in ENDED for job in self._jobs.values())
            # The clock too: a timer that had already fired cannot be cancelled. A busy worker's end starts another.
            if process is None or busy or time.monotonic() - self._used < self._idle_seconds * 0.9:
                return
            self._process = None
        _end(process, patience=10.0)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Closes a worker's input, which ends it, and kills one that has not ended after `patience` seconds."""
    with contextlib.suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
