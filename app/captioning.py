"""Captions by a model that the person names: the process that writes them, how far it is, and what it has written."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from app.processes import start_worker
from trainers.errors import sentence

State = Literal["none", "loading", "writing", "done", "failed", "cancelled"]
CAPTIONER = (sys.executable, "-P", "-m", "trainers.captioner")
_DIED = "The captioner ended unexpectedly"
_DIED_HINT = "The memory may be too small for this model. captioner.log in the window's folder says more."


class CaptioningAnswer(BaseModel):
    """GET /api/projects/{id}/captioning: `done` of `total` pictures. What is written can be looked at, and is not saved."""

    state: State
    model: str = ""
    device: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    captions: dict[str, str] = {}
    skipped: dict[str, str] = {}
    """Name -> why it has no caption."""
    problem: str = ""
    busy: bool = False
    """Whether it writes for another project."""


@dataclass
class _Job:
    """One request; `process` writes it."""

    project: str
    model: str
    total: int
    process: subprocess.Popen[bytes] | None = None
    state: State = "loading"
    device: str = ""
    began: float = 0.0
    """When the model was loaded: its first picture comes then."""
    captions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def is_over(self) -> bool:
        return self.state not in ("loading", "writing")


class Captioning:
    """The window's captioner: one project at a time. All methods may be called from any thread; none waits for a caption."""

    def __init__(self, home: Path, *, command: Sequence[str] | None = None) -> None:
        self._home, self._command = home, tuple(command or CAPTIONER)
        self._lock = threading.RLock()
        self._job: _Job | None = None

    def start(self, project: str, request: dict[str, Any]) -> bool:
        """Begins, and forgets what was written before; False, and nothing done, while captions are being written.

        `request`: the fields of trainers.captioner.CaptionRequest. Raises OSError when no process can be started.
        """
        with self._lock:
            if self._job is not None and not self._job.is_over:
                return False
            job = _Job(project, str(request["model"]), len(request["pictures"]))
            job.process = start_worker(self._command, self._home, self._home / "window" / "captioner.log")
            self._job = job
        threading.Thread(target=self._serve, args=(job, request), daemon=True, name="listen to the captioner").start()
        return True

    def look(self, project: str) -> CaptioningAnswer:
        """How it stands for a project."""
        with self._lock:
            job = self._job
            if job is None or job.project != project:
                return CaptioningAnswer(state="none", busy=job is not None and not job.is_over)
            done = len(job.captions) + len(job.skipped)
            left = (time.monotonic() - job.began) / done * (job.total - done) if done and job.state == "writing" else None
            return CaptioningAnswer(
                state=job.state,
                model=job.model,
                device=job.device,
                done=done,
                total=job.total,
                seconds_left=left,
                captions=dict(job.captions),
                skipped=dict(job.skipped),
                problem=job.problem,
            )

    def cancel(self, project: str) -> None:
        """Ends the process at once; what it has written stays to be looked at."""
        with self._lock:
            job = self._job
            if job is None or job.project != project or job.is_over:
                return
            job.state = "cancelled"
        _end(job)

    def close(self) -> None:
        """Ends the process with the window."""
        with self._lock:
            job = self._job
            if job is None or job.is_over:
                return
            job.state = "cancelled"
        _end(job)

    def _serve(self, job: _Job, request: dict[str, Any]) -> None:
        """Sends the request and takes in what is told, until the process ends."""
        process = job.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # it died, or was ended: told below
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()  # and left open: its end would end the process
        for line in process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut off by a kill
                event = json.loads(line)
                with self._lock:
                    _take(job, event)
        process.stdout.close()
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        with self._lock:
            if not job.is_over:
                job.state, job.problem = "failed", sentence(_DIED, f"exit code {process.returncode}", _DIED_HINT)


def _take(job: _Job, event: dict[str, Any]) -> None:
    if job.is_over:
        return
    match event["event"]:
        case "loaded":
            job.state, job.device, job.began = "writing", event["device"], time.monotonic()
        case "caption":
            job.captions[event["name"]] = event["text"]
        case "skipped":
            job.skipped[event["name"]] = event["what"]
        case "failed":
            job.state, job.problem = "failed", sentence(event["what"], event["where"], event["hint"])
        case "done":
            job.state = "done"


def _end(job: _Job) -> None:
    """Kills: a model that is loading hears nothing, and there is nothing to save."""
    if job.process is not None:
        job.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(5)
