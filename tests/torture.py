"""Kills a training again and again with SIGKILL, resumes it until it is done, and compares it with one that was left alone.

`python -m tests.torture --kills 200 --base tiny` (or pocket) prints the stage that each kill fell in, found out
afterwards from what lies on the disk, and fails unless all stages were hit and every byte is the same.

Each run is a process of its own, forked from one that has imported the libraries and done nothing else: what takes four
seconds is done once. A kill is aimed: the victim watches the files that it opens (an audit hook of Python, no function of
ours is replaced)
and, at the chosen one, is killed from a thread within some milliseconds, which is before, amid or after the write.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tests.command_line import ROOT, impasto, read_events, result_of, tensor_bytes

STAGES = ("load", "cache", "train", "sample", "state", "export")
_SLOWEST = {"load": 0.05, "cache": 0.01, "train": 0.03, "sample": 0.004, "state": 0.004, "export": 0.004}
"""Seconds that a kill comes at most after the file was made that it is aimed at."""
OPTIONS = (
    *("--set", "adapter.rank=4", "--set", "train.batch_size=2", "--set", "train.accumulation=2", "--set", "dataset.flip=true"),
    *("--set", "samples.every=8", "--set", "samples.steps=2", "--set", "checkpoints.every=8", "--set", "train.ema=0.9"),
    *("--set", "train.save_state_seconds=0.1", "--set", "dataset.caption_shuffle=true", "--set", "output.verify=false"),
)


@dataclass(frozen=True)
class Aim:
    """Where a kill goes: the `nth` file of `stage` that is opened, and the seconds after that."""

    stage: str
    nth: int
    delay: float


def matches(stage: str, path: str, run: Path, home: Path) -> bool:
    """Whether opening `path` belongs to a stage."""
    written = path.endswith(".tmp")
    match stage:
        case "load":
            return path.endswith("config.json")
        case "cache":
            return written and path.startswith(str(home))
        case "train":
            return path == str(run / "events.jsonl") and _last_stage(run) == "train"
        case "sample":
            return written and path.startswith(str(run / "samples"))
        case "state":
            return written and path.startswith(str(run / "state"))
    return written and (
        path.startswith(str(run / "checkpoints")) or (os.path.dirname(path) == str(run) and _last_stage(run) == "export")
    )


def aim_at(run: Path, home: Path, aim: Aim) -> None:
    """From here on this process kills itself where it was told."""
    left = [aim.nth]
    looking: list[str] = []

    def kill(path: str) -> None:
        end = time.monotonic() + 0.005
        while not os.path.exists(path) and time.monotonic() < end:  # this is told before the file is made
            time.sleep(0)
        time.sleep(aim.delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: Any) -> None:
        if event != "open" or not isinstance(arguments[0], str) or left[0] <= 0 or looking:
            return
        looking.append(arguments[0])  # to look opens files, too
        found = matches(aim.stage, arguments[0], run, home)
        looking.clear()
        if found:
            left[0] -= 1
            if left[0] == 0:
                threading.Thread(target=kill, args=(arguments[0],)).start()

    sys.addaudithook(hook)


def nursery() -> int:
    """Forks a child for each line of JSON on stdin, [home, file for its output, words for `impasto`, run and aim or null].

    Prints each child's exit code, minus the number of the signal that killed it, and ends with stdin.
    """
    for name in ("trainers.train", "diffusers.AutoencoderKL", "diffusers.UNet2DConditionModel", "transformers.CLIPTextModel"):
        pkgutil.resolve_name(name)

    for line in sys.stdin:
        home, output, words, target = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ["IMPASTO_HOME"] = home
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            if target:
                run, *aim = target
                aim_at(Path(run), Path(home), Aim(*aim))
            return impasto(*words)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


def _last_stage(run: Path) -> str:
    stages = [event["name"] for event in _events(run) if event["type"] == "stage"]
    return stages[-1] if stages else ""


def _events(run: Path) -> list[dict[str, Any]]:
    """The whole lines: the last one may be torn."""
    text = (run / "events.jsonl").read_text(encoding="utf-8", errors="replace") if (run / "events.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def stage_of_death(run: Path) -> str:
    """Where a killed process was, by its last word and by the files that it left half-written."""
    left = [path.parent for path in run.rglob(".*.tmp")]
    if run / "state" in left:
        return "state"
    if run / "samples" in left:
        return "sample"
    last = _last_stage(run)
    if last == "export" or run / "checkpoints" in left:
        return "export"
    return {"scan": "load", "": "load"}.get(last, last)


class Torture:
    """One folder of work: the pictures, the unbroken run, and chains of killed ones."""

    def __init__(self, folder: Path, base: str, pictures: Path, steps: int, seed: int) -> None:
        self._folder, self._base, self._pictures, self._steps = folder, base, pictures, steps
        self._random = random.Random(seed)
        self.hit: Counter[str] = Counter()
        self.unbroken = folder / "unbroken"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
        command = [sys.executable, "-P", "-m", "tests.torture", "--nursery"]
        self._nursery = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self._start(self.unbroken, folder / "home-unbroken")

    def close(self) -> None:
        """Ends the process that the runs are forked from."""
        self._nursery.communicate()

    def _run(self, home: Path, *words: object, killed: tuple[Path, Aim] | None = None) -> int:
        """`impasto WORDS` in a process of its own, killed where that is asked; its exit code, 0 or -SIGKILL."""
        assert self._nursery.stdin and self._nursery.stdout
        output = self._folder / "output.txt"
        target = [str(killed[0]), *astuple(killed[1])] if killed else None
        self._nursery.stdin.write(json.dumps([str(home), str(output), [str(word) for word in words], target]) + "\n")
        self._nursery.stdin.flush()
        code = int(self._nursery.stdout.readline())
        assert code in (0, -signal.SIGKILL if killed else 0), f"{code} {output.read_text(encoding='utf-8')[-4000:]}"
        return code

    def _start(self, run: Path, home: Path) -> None:
        """Trains without a kill."""
        home.mkdir(parents=True)
        words = ("train", self._pictures, "--output", run, "--base", self._base, "--steps", self._steps, *OPTIONS, "--json")
        self._run(home, *words)

    def chain(self, number: int, stages: tuple[str, ...]) -> list[str]:
        """A new run on a cold cache, killed once in each of `stages` and then resumed to its end. Returns what was hit.

        Where not all stages are asked for, some were missed before: there the kill comes as soon as the file is made.
        """
        run, home = self._folder / f"run-{number}", self._folder / f"home-{number}"
        run.mkdir()
        home.mkdir()
        shutil.copyfile(self.unbroken / "config.toml", run / "config.toml")
        hit = []
        for stage in stages:
            if any(event["type"] == "finished" for event in _events(run)):
                break
            nth = 1 if stage in ("load", "export") else self._random.randint(1, 3)
            late = self._random.uniform(0, _SLOWEST[stage]) if set(STAGES) <= set(stages) else 0.0
            aim = Aim(stage, nth, self._random.choice((0.0, late)))
            if self._run(home, "resume", run, "--json", killed=(run, aim)) == 0:  # it was done before
                print(f"  chain {number}: aimed at {stage}, ended by itself", flush=True)
                continue
            # Pictures are encoded in the steps that first show them: only the aim tells that from the rest of a step.
            hit.append("cache" if stage == "cache" and not aim.delay else stage_of_death(run))
            self.hit[hit[-1]] += 1
            done_steps = max((event["step"] for event in _events(run) if event["type"] == "step"), default=0)
            print(f"  chain {number}: killed in {hit[-1]} (aimed at {stage}), step {done_steps}", flush=True)
        self._run(home, "resume", run, "--json")
        compare(run, self.unbroken)
        shutil.rmtree(run)
        shutil.rmtree(home)
        return hit


def compare(run: Path, unbroken: Path) -> None:
    """Raises AssertionError when anything that was learnt, drawn or told differs."""
    assert tensor_bytes(result_of(run)) == tensor_bytes(result_of(unbroken)), "the LoRA differs"
    for folder in ("samples", "checkpoints"):
        one, other = ({path.name: path for path in (where / folder).iterdir()} for where in (run, unbroken))
        assert one.keys() == other.keys(), (folder, one.keys() ^ other.keys())
        for name, path in one.items():
            read = tensor_bytes if folder == "checkpoints" else Path.read_bytes
            assert read(path) == read(other[name]), (folder, name)

    def told(where: Path) -> list[tuple[Any, ...]]:
        kept = [event for event in read_events(where) if event["type"] in ("step", "sample", "checkpoint")]
        return sorted(
            (e["type"], e["step"], e.get("path", ""), e.get("loss"), e.get("held_out_loss"), e.get("gradient_norm"))
            for e in kept
        )

    assert told(run) == told(unbroken), "the events differ"


def torture(kills: int, base: str, pictures: Path, folder: Path, *, steps: int, seed: int = 0) -> Counter[str]:
    """Kills `kills` times in chains of one kill a stage. Raises AssertionError when bytes differ or a stage was not hit."""
    begun = time.monotonic()
    work = Torture(folder, base, pictures, steps, seed)
    number = 0
    try:
        while work.hit.total() < kills or (set(STAGES) - work.hit.keys() and number < kills):
            left = STAGES[: kills - work.hit.total()] or tuple(stage for stage in STAGES if stage not in work.hit)
            work.chain(number, left)
            number += 1
    finally:
        work.close()
    missed = set(STAGES) - work.hit.keys()
    assert not missed, f"never killed in: {missed}"
    print(
        f"{work.hit.total()} kills, {number} runs, all as the unbroken one: {dict(work.hit)}; {time.monotonic() - begun:.0f} s"
    )
    return work.hit


@contextmanager
def _work_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="impasto-torture-") as folder:
        yield Path(folder)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nursery", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.nursery:
        return nursery()
    from tests.conftest import make_pictures
    from tests.tiny_models import save_tiny_pipeline

    with _work_folder() as folder:
        base = str(save_tiny_pipeline(folder / "tiny")) if given.base == "tiny" else given.base
        torture(given.kills, base, make_pictures(folder / "pictures"), folder, steps=given.steps, seed=given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
