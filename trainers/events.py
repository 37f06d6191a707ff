"""What a run tells while it goes on: event types, one JSON line each in events.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; `time` in seconds since 1970."""

    type: ClassVar[str] = "event"
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """One line of strict JSON; a number that is not finite becomes null."""
        values = {name: _finite(value) for name, value in asdict(self).items()}
        return json.dumps({"type": self.type, **values}, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """A process took the run up at `step` of `steps`, with so many own, prior and held-out pictures.

    `parameters` are trainable numbers, `device` says where and why. `process` is its id, `made` the seconds from the
    machine's start to the process's, which tells it from a later one of the same id.
    """

    type: ClassVar[str] = "started"
    step: int
    steps: int
    images: int
    prior: int
    held_out: int
    parameters: int
    device: str
    process: int
    made: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage(Event):
    """A part of the work begins: scan, load, prior, cache, train, export, verify. `done` of `total` where it can be counted."""

    type: ClassVar[str] = "stage"
    name: str
    detail: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimizer update is done. Times in seconds, memory in bytes (resident, or allocated on the GPU)."""

    type: ClassVar[str] = "step"
    step: int
    steps: int
    loss: float
    held_out_loss: float | None
    learning_rates: dict[str, float]
    gradient_norm: float
    seconds_per_step: float
    seconds_left: float
    memory: int


@dataclass(frozen=True, kw_only=True)
class Sample(Event):
    """A sample image was written; `path` is relative to the run folder, and `seconds` its share of the time of the drawing."""

    type: ClassVar[str] = "sample"
    step: int
    path: str
    prompt: str
    seed: int
    strength: float
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Event):
    """An adapter was exported; `path` is relative to the run folder."""

    type: ClassVar[str] = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something a person should know that does not end the run."""

    type: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, kw_only=True)
class Recovered(Event):
    """The numbers broke after `broke` steps: the run went back to `step`, whose later steps are told once more.

    `rate` is the factor on the learning rates from now on; `attempt` counts from 1.
    """

    type: ClassVar[str] = "recovered"
    step: int
    broke: int
    attempt: int
    rate: float
    message: str


@dataclass(frozen=True, kw_only=True)
class Paused(Event):
    """The run was paused at `step` with everything saved."""

    type: ClassVar[str] = "paused"
    step: int


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run was stopped at `step` with everything saved; `path` is the adapter as it stands."""

    type: ClassVar[str] = "stopped"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The run is complete; `path` is the LoRA, relative to the run folder, and `proof` what reading it back has shown.
    `ranks` tells how much of its ranks it uses, in a sentence; empty where that is not known.

    It took `seconds`, `sample_seconds` of them for the samples, in all processes that took it up.
    """

    type: ClassVar[str] = "finished"
    step: int
    path: str
    seconds: float
    sample_seconds: float = 0.0
    proof: str = ""
    ranks: str = ""


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run ended with an error, told in a sentence. `changed`: `resume --force` would go on all the same."""

    type: ClassVar[str] = "failed"
    message: str
    changed: bool = False


Emit = Callable[[Event], None]


def append(path: Path, event: Event) -> None:
    """Adds one line and flushes it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(event.to_json() + "\n")


def read_since(path: Path, offset: int = 0, most: int = -1) -> tuple[list[dict[str, Any]], int]:
    """Complete events after byte `offset`, and the offset to ask from next. A line still being written is left for later.

    Reads about `most` bytes, to the end of a line; -1 reads all there is.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(most)
        if most > 0 and not data.endswith(b"\n"):
            data += file.readline()
    end = data.rfind(b"\n") + 1
    return list(_parse(data[:end])), offset + end


def continue_file(path: Path) -> list[dict[str, Any]]:
    """The events told so far. A line torn by a crash is cut off, so that the next one is not glued to it."""
    told, end = read_since(path)
    if path.exists() and path.stat().st_size > end:
        with path.open("r+b") as file:
            file.truncate(end)
    return told


def _parse(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:  # torn by a crash in mid-write
            continue
        if isinstance(value, dict):
            yield value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
