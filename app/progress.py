"""What a run's events add up to: phase, step, time left, and how it ended in one plain sentence."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from trainers.console import samples_share, time_in_words

State = Literal["waiting", "starting", "running", "paused", "stopped", "finished", "failed", "lost"]
"""`waiting`: in the queue; `lost`: the process is gone and has not said why."""

PHASES = {
    "scan": "Reading your pictures",
    "load": "Loading the base model",
    "cache": "Preparing the pictures",
    "prior": "The base model draws pictures to remember",
    "train": "Training",
    "export": "Writing the file",
    "verify": "Reading the file back",
}
_ENDINGS = ("paused", "stopped", "finished", "failed")


@dataclass
class Progress:
    """All events up to byte `offset`, folded. Times in seconds since 1970, memory in bytes."""

    offset: int = 0
    count: int = 0
    """How many events that are."""
    begun: int = 0
    """The number of the event by which the latest process took the run up; 0 before."""
    ended: int = 0
    """The number of the event that ended it."""
    told: float = 0.0
    """When the latest event was told."""
    process: int | None = None
    """Its id, once it has told it."""
    process_made: float = 0.0
    """When the system made that process, in seconds since it started itself."""
    phase: str = ""
    detail: str = ""
    done: int = 0
    total: int = 0
    step: int = 0
    steps: int = 0
    first_step: int = 0
    """The step at which the latest process began."""
    loss: float | None = None
    held_out_loss: float | None = None
    seconds_left: float | None = None
    seconds_per_step: float | None = None
    memory: int | None = None
    device: str = ""
    sample: str = ""
    warnings: list[str] = field(default_factory=list)
    ending: dict[str, Any] | None = None
    """The event that ended it, while nothing came after."""

    def apply(self, event: dict[str, Any]) -> None:
        """Adds one event as it stands in events.jsonl; what it lacks is left as it was."""
        kind = event.get("type")
        self.count += 1
        self.told = float(event.get("time") or self.told)
        if kind in _ENDINGS:
            self.ending, self.ended = event, self.count
            self.step = int(event.get("step") or self.step)
            return
        self.ending = None
        if kind == "stage":
            self._enter(event)
        elif kind == "started":
            self.process, self.device = event.get("process"), str(event.get("device") or "")
            self.process_made = float(event.get("made") or 0.0)
            self.step = self.first_step = int(event.get("step") or 0)
            self.steps = int(event.get("steps") or 0)
        elif kind == "step":
            self.step, self.steps = int(event.get("step") or 0), int(event.get("steps") or self.steps)
            self.loss = event.get("loss")
            self.held_out_loss = event.get("held_out_loss") if event.get("held_out_loss") is not None else self.held_out_loss
            self.seconds_left, self.seconds_per_step = event.get("seconds_left"), event.get("seconds_per_step")
            self.memory = event.get("memory")
        elif kind == "sample":
            self.sample = str(event.get("path") or "")
        elif kind == "recovered":
            self.step = self.first_step = int(event.get("step") or 0)
            self._warn(event)
        elif kind == "warning":
            self._warn(event)

    def _warn(self, event: dict[str, Any]) -> None:
        if event.get("message") not in self.warnings:
            self.warnings.append(str(event.get("message")))

    def _enter(self, event: dict[str, Any]) -> None:
        self.phase, self.detail = str(event.get("name") or ""), str(event.get("detail") or "")
        self.done, self.total = int(event.get("done") or 0), int(event.get("total") or 0)
        if self.phase == "scan":  # where every process begins
            self.begun, self.process, self.warnings, self.seconds_left = self.count, None, [], None

    def left_now(self, now: float | None = None) -> float | None:
        """Seconds to the end, from the moment of asking. None before three steps are done: the first ones mislead."""
        if self.seconds_left is None or self.phase != "train" or self.step < self.first_step + min(3, self.steps):
            return None
        return max(0.0, self.seconds_left - max(0.0, (time.time() if now is None else now) - self.told))


def state_of(progress: Progress, alive: bool, before: int) -> State:
    """The run's state. `before` events were told when the window last started a process for it, 0 when it never did.

    Events are counted and not compared by their times, as somebody may set the clock.
    """
    ending = progress.ending
    if ending is not None and progress.ended > before:
        kind: State = ending["type"]
        return kind
    if not alive:
        return "lost"
    return "running" if progress.phase and progress.begun > before else "starting"


def in_a_sentence(state: State, progress: Progress, saved_step: int, exit_code: int | None = None, last_line: str = "") -> str:
    """How it ended, or what it is doing, as one plain sentence or two. `last_line` is the process's own last word."""
    at = f"step {progress.step} of {progress.steps}" if progress.steps else f"step {progress.step}"
    resume = f"Resume goes on from step {saved_step}." if saved_step else "Resume begins it again."
    event = progress.ending or {}
    match state:
        case "starting":
            return "Starting."
        case "running":
            counted = f" {progress.done} of {progress.total}" if progress.total and progress.phase != "train" else ""
            where = f", {at}" if progress.phase == "train" else ""
            return f"{PHASES.get(progress.phase, progress.phase)}{counted}{where}."
        case "paused":
            return f"Paused at {at}. Everything is saved; Resume goes on."
        case "stopped":
            return f"Stopped at {at}. The LoRA as it stands is kept; Resume goes on."
        case "finished":
            seconds = float(event.get("seconds") or 0)
            share = samples_share(seconds, float(event.get("sample_seconds") or 0))
            done = f"Finished: {progress.step} steps in {time_in_words(seconds)}{share and f'; {share}'}."
            return " ".join([done, *(str(event[name]) for name in ("ranks", "proof") if event.get(name))])
        case "failed":
            return f"Training failed: {event.get('message') or 'no reason was given'}"
    if not progress.phase and last_line.startswith("impasto: "):
        return f"Training could not begin: {last_line.removeprefix('impasto: ')}"
    where = f"at {at}" if progress.steps else "before its first step"
    if exit_code == -9:  # POSIX: by signal 9
        return f"Training was killed {where}, as the system does when memory runs out. {resume}"
    return f"Training ended unexpectedly {where}. {resume}"
