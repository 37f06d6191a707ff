"""Start-up and peak memory: the trainer's own command and the usual script, each in a process of its own. No torch."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.bench.cases import LEARNING_RATE, Case, recipe
from trainers.config import write_config
from trainers.errors import TrainingError
from trainers.families import locate_base

STEPS = 3
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Start:
    """One process. Seconds from its start to the end of its first step, and of each part on the way; bytes at the most
    until its last step, and until its end."""

    seconds: float
    parts: Mapping[str, float]
    peak_bytes: int
    whole_peak_bytes: int


@dataclass(frozen=True)
class Command:
    """What is started: `words` after the interpreter; `home` is its home folder, whose cache of latents is emptied before."""

    words: tuple[str, ...]
    home: Path
    run: Path | None = None


def train_command(case: Case, base: str, images: Path, work: Path, precision: str, batch: int, rank: int) -> Command:
    """`impasto train` with the case's recipe. It has a home of its own, so that a first start finds nothing there."""
    own = {"adapter": {"rank": rank}, "train": {"batch_size": batch, "steps": STEPS}}
    folder = work / f"start-{precision}"
    folder.mkdir(parents=True)
    preset = folder / "recipe.toml"
    preset.write_text(write_config(recipe(case, base, images, precision, own)), encoding="utf-8")
    run = folder / "run"
    words = ("-m", "trainers", "train", str(images), "--output", str(run), "--base", base, "--preset", str(preset), "--json")
    return Command((*words, "--force"), folder / "home", run)


def script_command(case: Case, base: str, images: Path, work: Path, precision: str, batch: int, rank: int) -> Command:
    """The usual script with the same recipe."""
    words = ["-m", "trainers.bench.script", "--base", str(locate_base(base)), "--images", str(images)]
    words += ["--dtype", _DTYPES[precision], "--rate", str(LEARNING_RATE), "--steps", str(STEPS)]
    words += ["--resolution", str(case.resolution), "--batch", str(batch), "--rank", str(rank)]
    return Command(tuple(words), work / "script-home")


@dataclass(frozen=True)
class Ran:
    """What a process told and held: its events, when it began (seconds since the epoch), and bytes at the most."""

    events: list[dict[str, Any]]
    begun: float
    peak_at_step: int
    peak_bytes: int


def start(command: Command) -> Start:
    """Runs a command to its end, watching. Raises TrainingError with the end of what it said when it fails."""
    shutil.rmtree(command.home / "cache" / "latents", ignore_errors=True)
    if command.run is not None:
        shutil.rmtree(command.run, ignore_errors=True)
    ran = run_to_end(command.words, command.home, STEPS)
    return Start(*_split(ran.events, ran.begun), ran.peak_at_step, ran.peak_bytes)


def run_to_end(words: Sequence[str], home: Path, step: int = 0) -> Ran:
    """This Python with `words`, which tells events as JSON lines, under a home folder of its own; memory also at a `step`.

    Raises TrainingError with the end of what it said when it fails or makes no step.
    """
    python_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "IMPASTO_HOME": str(home), "PYTHONPATH": python_path, "PYTHONUTF8": "1"}
    begun = time.time()
    process = subprocess.Popen(
        [sys.executable, "-P", *words], env=environment, encoding="utf-8", errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    watcher = _Watcher(process.pid)
    listener.start()
    watcher.start()
    events: list[dict[str, Any]] = []
    peak_at_step = 0
    for line in process.stdout:
        event = _event(line)
        events += [event] if event else []
        if event and event["type"] == "step" and event["step"] == step:
            peak_at_step = watcher.look()
    code = process.wait()
    listener.join(5)
    if code or not any(event["type"] == "step" for event in events):
        end = "".join(said).strip()[-500:] or str(events[-1:])
        raise TrainingError("A process that was to be measured failed", " ".join(words[:3]), end)
    return Ran(events, begun, peak_at_step, watcher.look())


def _event(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "type" in found and "time" in found else None


def _split(events: Sequence[Mapping[str, Any]], begun: float) -> tuple[float, dict[str, float]]:
    """Seconds to the end of the first step, and those of import, load, cache and first step on the way."""

    def first(kind: str, name: str | None = None) -> float | None:
        return next((one["time"] for one in events if one["type"] == kind and one.get("name", name) == name), None)

    end = first("step")
    assert end is not None
    marks = {"import": first("stage", "scan"), "load": first("started"), "cache": first("stage", "train"), "first step": end}
    parts, last = {}, begun
    for name, mark in marks.items():
        mark = last if mark is None else mark
        parts[name], last = mark - last, mark
    return end - begun, parts


def peak_of(process: int) -> int:
    """The most bytes that a process has held in memory, or where the system does not keep it, that it holds now; 0 when gone.

    Not what a parent is told of its children: on Linux a child begins with its parent's own peak.
    """
    import psutil

    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024 if lines else 0
    except OSError:
        pass
    try:
        info = psutil.Process(process).memory_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "peak_wset", info.rss))


class _Watcher(threading.Thread):
    """Keeps the most memory that a process has held, looking ten times a second."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process, self._peak = process, 0

    def look(self) -> int:
        """Bytes at the most until now."""
        self._peak = max(self._peak, peak_of(self._process))
        return self._peak

    def run(self) -> None:
        """Looks until the process is gone."""
        import psutil

        while psutil.pid_exists(self._process):
            self.look()
            time.sleep(0.1)


def middle(starts: Sequence[Start]) -> dict[str, Any]:
    """Several starts of one command as medians, with their spread."""
    seconds = [one.seconds for one in starts]
    return {
        "seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
        "parts": {name: statistics.median(one.parts[name] for one in starts) for name in starts[0].parts},
        "peak_bytes": max(one.peak_bytes for one in starts),
        "whole_peak_bytes": max(one.whole_peak_bytes for one in starts),
    }  # fmt: skip
