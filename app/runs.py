"""Runs: start one, find those that run already, what they do now, and stop, pause, resume. All state is in their folders."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from app.planning import plan_project, take_edits
from app.processes import Process, is_alive, read_process, start_process, tail
from app.progress import Progress, State, in_a_sentence, state_of
from app.projects import Project, add_run, drop_run, make_slug, read_project
from app.queue_file import QueueFile
from app.refusals import CONFLICT, NOT_FOUND, Refusal
from app.scanning import Scanner
from app.versions import pin
from trainers import events
from trainers.dataset.edits import write_edits
from trainers.files import write_atomically
from trainers.launch import RunPlan
from trainers.process_id import is_same
from trainers.run_folder import RunFolder, new_run

Ask = Literal["stop", "pause", "sample-now", "save-now"]
_UNTOLD_SECONDS = 120.0
"""A run started elsewhere tells its process only when the base is loaded; so long it is taken to be at work."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands."""

    run: RunFolder
    state: State
    progress: Progress
    sentence: str
    project: str
    process: Process | None
    asked: Literal["stop", "pause"] | None
    """What it was asked for and has not done yet."""
    saved_step: int
    """The step that Resume goes on from."""

    @property
    def id(self) -> str:
        """The run folder's name."""
        return self.run.path.name

    @property
    def is_at_work(self) -> bool:
        """Whether a process works on it."""
        return self.state in ("starting", "running")

    @property
    def has_begun(self) -> bool:
        """Whether a process ever worked on it; one that was only prepared has not."""
        return self.state != "waiting" or self.process is not None or self.progress.count > 0

    @property
    def can(self) -> list[str]:
        """What may be asked of it now."""
        if self.state in ("finished", "waiting"):
            return []
        if not self.is_at_work:
            changed = self.state == "failed" and bool((self.progress.ending or {}).get("changed"))
            return ["resume", "resume-anyway"] if changed else ["resume"]
        return {"stop": [], "pause": ["stop"], None: ["stop", "pause", "sample-now", "save-now"]}[self.asked]


class Runs:
    """The runs of a home folder. Remembers only how far each run's events were read."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.queue = QueueFile(home)
        self.turn = threading.RLock()
        """Held by whoever starts, prepares or deletes a run, or changes the queue."""
        self._told: dict[str, Progress] = {}
        self._reading = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where the runs are."""
        return self.home / "runs"

    def standings(self) -> list[Standing]:
        """All runs, the newest first."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        runs = [RunFolder(self.folder / name) for name in names]
        made = [(run.config.stat().st_mtime, run) for run in runs if run.config.is_file()]
        return [self.standing(run) for _, run in sorted(made, key=lambda pair: (-pair[0], pair[1].path.name))]

    def find(self, run_id: str) -> RunFolder:
        """The run of this id, looked up in what is there. Raises Refusal when there is none."""
        run = RunFolder(self.folder / run_id)
        if not self.folder.is_dir() or run_id not in os.listdir(self.folder) or not run.config.is_file():
            raise Refusal("There is no such run", run_id[:80], "Go back to the list of projects.", status=NOT_FOUND)
        return run

    def standing(self, run: RunFolder) -> Standing:
        """Where a run stands now, read from its folder and the system's table of processes."""
        process = read_process(run)
        progress = self._read(run)
        entry = self.queue.read().entry_of(run.path.name)
        if entry and not entry.resumes and process is None and not progress.count:
            sentence = "Nothing was trained yet: it begins after those before it."
            return Standing(run, "waiting", progress, sentence, entry.project, None, None, 0)
        state = state_of(progress, _is_alive(progress, process), process.before if process else 0)
        saved = _saved_step(run)
        last = ""
        if state == "lost":
            last = next((line for line in reversed(tail(run.log, 20)) if line.startswith("impasto: ")), "")
        sentence = in_a_sentence(state, progress, saved, process.exit_code if process else None, last)
        waits = entry and entry.resumes and entry.begun in (None, progress.begun)
        if waits and state not in ("starting", "running", "finished"):
            state, sentence = "waiting", f"It goes on from step {saved} after those before it."
        asked = run.stop_asked() if state in ("starting", "running") else None
        return Standing(run, state, progress, sentence, process.project if process else "", process, asked, saved)

    def _read(self, run: RunFolder) -> Progress:
        """The run's progress, brought up to date by the bytes that were added since the last time."""
        with self._reading:
            progress = self._told.setdefault(run.path.name, Progress())
            size = run.events.stat().st_size if run.events.exists() else 0
            if size < progress.offset:  # another run under the same name, or a torn line was cut off
                progress = self._told[run.path.name] = Progress()
            if size > progress.offset:
                told, progress.offset = events.read_since(run.events, progress.offset)
                for event in told:
                    progress.apply(event)
            return progress

    def start(
        self, project: Project, scanner: Scanner, settings: dict[str, Any], preset: str | None = None, force: bool = False
    ) -> RunFolder:
        """Checks and starts a run of a project. Raises Refusal for settings that cannot be and while another one trains."""
        with self.turn:
            self._refuse_second()
            run, _ = self.prepare(project, scanner, settings, preset, force)
            try:
                start_process(run, project.id, self.home)
            except Exception:
                self.drop_prepared(project, run)
                raise
        return run

    def drop_prepared(self, project: Project, run: RunFolder) -> None:
        """Removes what `prepare` has made and nobody will ever start."""
        shutil.rmtree(run.path, ignore_errors=True)
        self._forget(project.id, run)

    def prepare(
        self, project: Project, scanner: Scanner, settings: dict[str, Any], preset: str | None = None, force: bool = False
    ) -> tuple[RunFolder, RunPlan]:
        """A run folder with all that a training of the project needs, not started. Raises Refusal as `start`."""
        with self.turn:
            edits = take_edits(project, scanner)
            path = self._free_path(project)
            plan = plan_project(project, scanner, settings, edits, path / "edits.json", preset, force)
            run = new_run(path)
            try:
                write_atomically(run.path / "edits.json", write_edits(edits))
                write_atomically(run.dataset, pin(project, scanner, edits))
                write_atomically(run.config, plan.toml().encode())
                add_run(project, run.path.name)
            except Exception:
                shutil.rmtree(run.path, ignore_errors=True)
                raise
        return run, plan

    def start_prepared(self, run: RunFolder, project: str) -> None:
        """Starts what `prepare` has made. Raises Refusal while another one trains, OSError when the system refuses."""
        with self.turn:
            self._refuse_second()
            start_process(run, project, self.home)

    def resume(self, run: RunFolder, force: bool = False) -> None:
        """Goes on with a run that has ended before its end, with `force` also where what went into it has changed.

        Raises Refusal when it is finished or something trains.
        """
        with self.turn:
            standing = self.standing(run)
            if standing.state == "finished":
                raise Refusal("This run is finished", hint="Start a new one to train again.", status=CONFLICT)
            self._refuse_second()
            if standing.process:
                _await_death(standing.process)
            for name in ("stop", "sample-now", "save-now"):  # left over from the process before
                run.take_flag(name)
            start_process(run, standing.project, self.home, force)

    def delete(self, run: RunFolder, project: str = "") -> None:
        """Deletes a run with its samples, checkpoints and LoRA. Raises Refusal while it trains.

        `project` is the id of its project where no process ever noted that.
        """
        with self.turn:
            standing = self.standing(run)
            if standing.is_at_work:
                raise Refusal("This run is training", standing.id, "Stop it first.", status=CONFLICT)
            if standing.process:
                _await_death(standing.process)
            run.config.unlink()  # from here on it is no run, whatever else may not be deleted
            self._told.pop(run.path.name, None)
            shutil.rmtree(run.path)
            self._forget(project or standing.project, run)

    def _forget(self, project: str, run: RunFolder) -> None:
        with contextlib.suppress(Refusal, OSError):  # the project may be gone too, or the disk full
            drop_run(read_project(self.home, project), run.path.name)

    def ask(self, run: RunFolder, what: Ask) -> None:
        """Asks a training to stop, pause, draw samples or save, after the step it is at. Raises Refusal when none runs."""
        standing = self.standing(run)
        if not standing.is_at_work:
            raise Refusal("This run is not training now", hint=standing.sentence, status=CONFLICT)
        # Whole or not at all: a half-written `pause` would be read as a stop.
        name, content = ("stop", b"pause\n") if what == "pause" else (what, b"")
        write_atomically(run.path / name, content, fsync=False)

    def at_work(self) -> Standing | None:
        """The run that trains now, if there is one."""
        return next((standing for standing in self.standings() if standing.is_at_work), None)

    def _refuse_second(self) -> None:
        other = self.at_work()
        if other:
            what = f"Another training is going on: {other.id}"
            raise Refusal(what, hint="One at a time is fastest: wait for it, or stop it first.", status=CONFLICT)

    def _free_path(self, project: Project) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{datetime.now():%Y-%m-%d-%H%M%S}_{make_slug(project.name, 'run')}"
        number = 1
        while True:
            path = self.folder / (name if number == 1 else f"{name}-{number}")
            if not path.exists():
                return path
            number += 1


def lora_files(run: RunFolder) -> list[tuple[int | None, Path]]:
    """(step, file) of every LoRA that the run has written, the finished one first with None, then the newest."""
    saved = [(_step_of(path), path) for path in run.checkpoints.glob("*.safetensors")]
    result = run.result
    found: list[tuple[int | None, Path]] = [(None, result)] if result else []
    return found + sorted((pair for pair in saved if pair[0] is not None), key=lambda pair: -(pair[0] or 0))


def find_lora(run: RunFolder, step: int | None) -> Path:
    """The LoRA of a step, or without one the finished one, else the newest. Raises Refusal when there is none."""
    files = lora_files(run)
    found = [path for known, path in files if step is None or known == step]
    if not found:
        what = "This run has no LoRA yet" if not files else f"There is no LoRA of step {step}"
        raise Refusal(what, run.path.name, "Stop and keep writes one at any moment.", status=NOT_FOUND)
    return found[0]


def _step_of(path: Path) -> int | None:
    match = re.search(r"-(\d{8,})$", path.stem)
    return int(match[1]) if match else None


def _saved_step(run: RunFolder) -> int:
    """The newest training state's step, 0 without one."""
    return max((_step_of(path) or 0 for path in run.state.glob("step-*.safetensors")), default=0)


def _is_alive(progress: Progress, process: Process | None) -> bool:
    """Whether a process works on the run: the one that the window started, or the one that the run names."""
    if process and is_alive(process):
        return True
    if progress.process is not None:
        return is_same(progress.process, progress.process_made)
    return process is None and progress.begun > 0 and time.time() - progress.told < _UNTOLD_SECONDS


def _await_death(process: Process, seconds: float = 15) -> None:
    """A process that has told its end still holds the run folder for a moment."""
    end = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.05)
