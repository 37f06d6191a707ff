"""The measured check: a process that takes two real steps of the run that is asked about; one at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.processes import tail
from trainers.config import TrainConfig, write_config
from trainers.preflight import Measured, memory_hints

if TYPE_CHECKING:
    from trainers.launch import RunPlan

REMEMBERED = 50
"""How many answers are kept for sliders that go back to where they were."""
MEASURE = (sys.executable, "-P", "-m", "trainers.preflight")


@dataclass
class Check:
    """One measurement: still going on while it has a `process`, then `measured` or a `problem` with its `hint`."""

    project: str
    key: str
    process: subprocess.Popen[bytes] | None = None
    measured: Measured | None = None
    problem: str = ""
    hint: str = ""


class Preflight:
    """The window's measurements. All methods may be called from any thread; none waits for a step."""

    def __init__(self, home: Path, *, command: Sequence[str] | None = None) -> None:
        self._home, self._command = home, tuple(command or MEASURE)
        self._lock = threading.Lock()
        self._now: Check | None = None
        self._done: dict[str, Measured] = {}

    def look(self, project: str, plan: RunPlan, edits: bytes) -> Check:
        """How the measurement of such a run stands; begins it when these settings are new to us.

        It takes the place of another one of the same project, and waits for that of another project. What changes no
        step is not measured again: how many there are, samples, checkpoints, the file's name. A failure is told once;
        asked again, it is tried again.
        """
        key = _key(plan, edits)
        with self._lock:
            if key in self._done:
                return Check(project, key, measured=self._done[key])
            now = self._now
            if now and now.problem and now.key == key:
                self._now = None
                return now
            if now and now.process and now.key != key and now.project != project:
                return Check(project, key, process=now.process)
            if now is None or now.key != key:
                self._stop()
                now = self._now = self._start(Check(project, key), plan.config, edits)
            return replace(now)

    def known(self, plan: RunPlan, edits: bytes) -> Measured | None:
        """What was measured for such a run; None where nothing was. Measures nothing."""
        with self._lock:
            return self._done.get(_key(plan, edits))

    def stop(self) -> None:
        """Gives up what is being measured: its machine is wanted for a run, or the window closes."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._now and self._now.process:
            self._now.process.kill()
        self._now = None

    def _start(self, check: Check, config: TrainConfig, edits: bytes) -> Check:
        folder = self._home / "window" / "preflight"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "edits.json").write_bytes(edits)
        dataset = config.dataset.model_copy(update={"edits": str(folder / "edits.json")})
        (folder / "config.toml").write_text(write_config(config.model_copy(update={"dataset": dataset})), encoding="utf-8")
        with (folder / "preflight.log").open("wb") as log:
            process = subprocess.Popen(
                [*self._command, str(folder / "config.toml")],
                cwd=self._home,
                env={**os.environ, "IMPASTO_HOME": str(self._home)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        check.process = process
        threading.Thread(
            target=self._await, args=(check, process, config, folder / "preflight.log"), daemon=True, name="measure"
        ).start()
        return check

    def _await(self, check: Check, process: subprocess.Popen[bytes], config: TrainConfig, log: Path) -> None:
        said, _ = process.communicate()
        answer: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            answer = json.loads(said)
        with self._lock:
            check.process = None
            if "step_seconds" in answer:
                self._remember(check.key, Measured(**answer))
            elif answer:
                check.problem, check.hint = str(answer["what"]), str(answer["hint"])
            elif process.returncode == -9:  # POSIX: by signal 9
                check.problem = "The system ended the two steps, as it does when memory runs out"
                check.hint = " ".join(memory_hints(config))
            else:
                last = next(reversed(tail(log, 1)), f"exit code {process.returncode}")
                check.problem = f"The two steps could not be taken: {last[:300]}"
                check.hint = f"All it said is in {log}."

    def _remember(self, key: str, measured: Measured) -> None:
        self._done[key] = measured
        for old in list(self._done)[:-REMEMBERED]:
            del self._done[old]


def _key(plan: RunPlan, edits: bytes) -> str:
    """What decides how long a step takes and what it holds, as a hash."""
    free: dict[str, Any] = {"samples": True, "checkpoints": True, "output": True}
    free |= {"train": {"steps", "epochs"}, "dataset": {"edits"}}
    known = (plan.config.model_dump_json(exclude=free), str(plan.data.bucket_counts()), edits.decode())
    return hashlib.sha256("\n".join(known).encode()).hexdigest()
