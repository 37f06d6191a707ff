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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.processes import tail
from trainers.config import TrainConfig, write_config
from trainers.preflight import Measured, memory_hints

if TYPE_CHECKING:
    from trainers.launch import RunPlan

MEASURE = (sys.executable, "-P", "-m", "trainers.preflight")


@dataclass
class Check:
    """One measurement: still going on while it has a `process`, then `measured` or a `problem` with its `hint`."""

    key: str
    process: subprocess.Popen[bytes] | None
    measured: Measured | None = None
    problem: str = ""
    hint: str = ""


class Preflight:
    """The window's measurements. All methods may be called from any thread; none waits for a step."""

    def __init__(self, home: Path, *, command: Sequence[str] | None = None) -> None:
        self._home, self._command = home, tuple(command or MEASURE)
        self._lock = threading.Lock()
        self._check: Check | None = None

    def look(self, plan: RunPlan, edits: bytes) -> Check:
        """How the measurement of such a run stands; begins it when these settings are new, and gives up any other.

        What changes no step is not measured again: how many there are, samples, checkpoints, the file's name.
        """
        free: dict[str, Any] = {"samples": True, "checkpoints": True, "output": True}
        free |= {"train": {"steps", "epochs"}, "dataset": {"edits"}}
        known = (plan.config.model_dump_json(exclude=free), str(plan.data.bucket_counts()), edits.decode())
        key = hashlib.sha256("\n".join(known).encode()).hexdigest()
        with self._lock:
            if self._check is None or self._check.key != key:
                self._stop()
                self._check = self._start(key, plan.config, edits)
            return self._check

    def stop(self) -> None:
        """Gives up what is being measured: its machine is wanted for a run, or the window closes."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Measures anew when asked again, also for the same settings."""
        with self._lock:
            self._stop()
            self._check = None

    def _stop(self) -> None:
        if self._check and self._check.process:
            self._check.process.kill()
            self._check = None

    def _start(self, key: str, config: TrainConfig, edits: bytes) -> Check:
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
        check = Check(key, process)
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
                check.measured = Measured(**answer)
            elif answer:
                check.problem, check.hint = str(answer["what"]), str(answer["hint"])
            elif process.returncode == -9:  # POSIX: by signal 9
                check.problem = "The system ended the two steps, as it does when memory runs out"
                check.hint = " ".join(memory_hints(config))
            else:
                last = next(reversed(tail(log, 1)), f"exit code {process.returncode}")
                check.problem, check.hint = (
                    f"The two steps could not be taken: {last[:300]}",
                    "Start all the same, or look at the log.",
                )
