"""The queue: prepared runs that wait their turn. While the window is open it starts the next one when a run has ended.

One that finished, was stopped or has failed is followed by the next. One that is paused holds the queue until it goes on
and ends, or is put into the queue itself, as whoever pauses wants the machine. So does one whose process is gone without a
word when the window opens, as after a power cut: it is not begun again unasked, and nothing else takes the machine either
until somebody says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.queue_file import RUN_HOLDS, Entry, Hold, QueueState
from app.refusals import CONFLICT, NOT_FOUND, Refusal
from app.runs import Runs, Standing
from trainers.run_folder import RunFolder

LOOK_SECONDS = 1.0
"""Between two looks at whether the next one may start."""
_log = logging.getLogger(__name__)


class RunQueue:
    """The queue of a home folder. All methods may be called from any thread."""

    def __init__(self, runs: Runs, before_start: Callable[[], None] = lambda: None) -> None:
        self._runs, self._before_start = runs, before_start
        self._seen_at_work = ""
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def state(self) -> QueueState:
        """The queue without those that were begun, or whose folders have gone."""
        state = self._runs.queue.read()
        kept = tuple(entry for entry in state.entries if self._waits(entry))
        return state if len(kept) == len(state.entries) else state.model_copy(update={"entries": kept})

    def add(self, entry: Entry) -> None:
        """Puts a run at the end. Raises OSError, and Refusal for one that waits already or cannot go on.

        The folder of a prepared run is then still the caller's.
        """
        with self._runs.turn:
            state = self.state()
            standing = self._runs.standing(self._folder(entry))
            if entry.resumes and (standing.is_at_work or standing.state in ("finished", "waiting")):
                raise Refusal("This run cannot be put into the queue", hint=standing.sentence, status=CONFLICT)
            if entry.resumes:
                entry = entry.model_copy(update={"begun": standing.progress.begun})
            changes: dict[str, Any] = {"entries": (*state.entries, entry)}
            if state.hold in RUN_HOLDS and entry.run == state.last:  # it goes on in its turn, and holds nothing up
                changes["hold"] = ""
            if not state.entries:  # what ended before anything waited holds nothing up
                other = self._runs.at_work()
                changes |= {"hold": "", "why": "", "last": other.id if other else ""}
            self._runs.queue.write(state.model_copy(update=changes))

    def reorder(self, order: list[str]) -> None:
        """Sets the order. Raises Refusal when these are not exactly the runs that wait."""
        with self._runs.turn:
            state = self.state()
            entries = {entry.run: entry for entry in state.entries}
            if sorted(order) != sorted(entries):
                hint = "Look at it again, and move it once more."
                raise Refusal("The queue has changed meanwhile", hint=hint, status=CONFLICT)
            self._runs.queue.write(state.model_copy(update={"entries": tuple(entries[run] for run in order)}))

    def cancel(self, run_id: str) -> None:
        """Takes a run out; the folder of one in which nothing was trained goes. Raises Refusal when it does not wait."""
        with self._runs.turn:
            state = self.state()
            found = next((entry for entry in state.entries if entry.run == run_id), None)
            if found is None:
                raise Refusal("This run does not wait in the queue", run_id[:80], "It may have begun.", status=NOT_FOUND)
            kept = tuple(entry for entry in state.entries if entry is not found)
            self._runs.queue.write(state.model_copy(update={"entries": kept}))
            if not found.resumes:
                self._runs.delete(self._folder(found), found.project)

    def cancel_project(self, project_id: str) -> None:
        """Takes out all runs of a project that is about to be deleted."""
        for entry in self.state().entries:
            if entry.project == project_id:
                self.cancel(entry.run)

    def hold(self) -> None:
        """Starts nothing more until `go_on`; what trains trains on."""
        self._set("person")

    def go_on(self) -> None:
        """Goes on with the next one, whatever became of the run before."""
        self._set("", last="")

    def _set(self, hold: Hold, **changes: str) -> None:
        with self._runs.turn:
            self._runs.queue.write(self.state().model_copy(update={"hold": hold, "why": "", **changes}))

    def look(self) -> None:
        """Starts the first one that waits, if nothing trains and nothing holds the queue."""
        with self._runs.turn:
            known, state = self._runs.queue.read(), self.state()
            if not known.entries:
                return
            following = self._next_state(state)
            if following != known:
                self._runs.queue.write(following)

    def _next_state(self, state: QueueState) -> QueueState:
        at_work = self._runs.at_work()
        if at_work:
            self._seen_at_work = at_work.id
            if state.hold not in RUN_HOLDS:
                return state.model_copy(update={"last": at_work.id})
            # One that was begun beside the queue lifts nothing: `last` still names the run that holds it.
            return state.model_copy(update={"hold": ""}) if at_work.id == state.last else state
        if state.hold or not state.entries:
            return state
        before = self.before(state)
        if before and before.state == "paused":
            return state.model_copy(update={"hold": "paused"})
        if before and before.state == "lost" and self._seen_at_work != before.id:
            return state.model_copy(update={"hold": "interrupted"})
        return self._start_first(state)

    def _start_first(self, state: QueueState) -> QueueState:
        first, rest = state.entries[0], state.entries[1:]
        self._before_start()
        try:
            if first.resumes:
                self._runs.resume(self._folder(first), first.force)
            else:
                self._runs.start_prepared(self._folder(first), first.project)
        except (OSError, Refusal) as error:
            return state.model_copy(update={"hold": "refused", "why": str(error)})
        self._seen_at_work = first.run
        return state.model_copy(update={"entries": rest, "last": first.run, "why": ""})

    def before(self, state: QueueState) -> Standing | None:
        """The run that trained last while something waited; None where there was none, or it was deleted."""
        run = RunFolder(self._runs.folder / state.last)
        return self._runs.standing(run) if state.last and run.config.is_file() else None

    def watch(self) -> None:
        """Looks every second from now on, until `close`."""

        def watch() -> None:
            while not self._ended.wait(LOOK_SECONDS):
                try:
                    self.look()
                except Exception:  # it must not end for a disk that is full for a moment
                    _log.exception("The queue could not be looked after")

        self._ended.clear()
        self._watcher = threading.Thread(target=watch, daemon=True, name="queue")
        self._watcher.start()

    def close(self) -> None:
        """Looks no more. What trains trains on; what waits waits for the next window."""
        self._ended.set()
        if self._watcher:
            self._watcher.join(10)

    def _folder(self, entry: Entry) -> RunFolder:
        return RunFolder(self._runs.folder / Path(entry.run).name)

    def _waits(self, entry: Entry) -> bool:
        """Whether a run has not gone on yet; a prepared one by its folder alone."""
        run = self._folder(entry)
        if entry.resumes:
            return run.config.is_file() and self._runs.standing(run).state == "waiting"
        return run.config.is_file() and not run.events.exists() and not (run.path / "process.json").exists()
