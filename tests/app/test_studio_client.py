"""The window's side of the renderer: requests followed to their end, and a worker that dies, idles or never starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.studio_client import ENDED, Studio

# Answers as the real one does, without torch; the prompt says what happens.
FAKE = """
import json, os, sys
for line in sys.stdin:
    ask = json.loads(line)
    tell = lambda **event: print(json.dumps({"id": ask["id"], **event}), flush=True)
    if ask["do"] == "cancel":
        tell(event="cancelled")
        continue
    tell(event="loading")
    if ask["prompt"] == "die":
        os._exit(9)
    tell(event="step", done=1, total=2)
    if ask["prompt"] == "wait":
        continue
    if ask["prompt"] == "fail":
        tell(event="failed", what="It is broken", where="a file", hint="Mend it.")
        continue
    tell(event="picture", cell=0, strength=0, path=str(os.getpid()))
    tell(event="done")
"""


@pytest.fixture
def make(home: Path) -> Iterator[Callable[..., Studio]]:
    """make(...) -> a Studio with the fake worker unless told otherwise; closed at the end."""
    made: list[Studio] = []

    def studio(**more: Any) -> Studio:
        made.append(Studio(home, **{"command": (sys.executable, "-c", FAKE), **more}))
        return made[-1]

    yield studio
    for one in made:
        one.close()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def ended(studio: Studio, number: int) -> dict[str, Any]:
    """How a request stands when it has ended."""
    until(lambda: studio.look(number)["state"] in ENDED)
    return studio.look(number)


def worker_of(seen: dict[str, Any]) -> str:
    """Process id of the fake worker that answered."""
    return str(seen["pictures"][0.0])


def test_a_request_is_followed_to_its_end_by_a_worker_that_stays(make: Any) -> None:
    studio = make()
    first, second = (ended(studio, studio.ask({"prompt": "draw"})) for _ in range(2))
    assert (first["state"], first["done"], first["total"], first["problem"]) == ("done", 1, 2, "")
    assert worker_of(first) == worker_of(second)


def test_nothing_is_started_before_it_is_asked(make: Any, home: Path) -> None:
    make()
    assert not (home / "window").exists()


def test_what_the_worker_cannot_do_is_a_sentence(make: Any) -> None:
    studio = make()
    seen = ended(studio, studio.ask({"prompt": "fail"}))
    assert (seen["state"], seen["problem"]) == ("failed", "It is broken (a file). Mend it.")


def test_a_worker_that_dies_is_told_and_the_next_request_starts_another(make: Any) -> None:
    studio = make()
    before = ended(studio, studio.ask({"prompt": "draw"}))
    waiting, killer = studio.ask({"prompt": "wait"}), studio.ask({"prompt": "die"})
    for number in (waiting, killer):
        seen = ended(studio, number)
        assert seen["state"] == "failed" and seen["problem"].startswith("The renderer ended unexpectedly (exit code 9).")
    after = ended(studio, studio.ask({"prompt": "draw"}))
    assert after["state"] == "done" and worker_of(after) != worker_of(before)


def test_cancelling_is_told(make: Any) -> None:
    studio = make()
    number = studio.ask({"prompt": "wait"})
    until(lambda: studio.look(number)["state"] == "drawing")
    studio.cancel(number)
    assert ended(studio, number)["state"] == "cancelled"
    studio.cancel(number)
    studio.cancel(12345)


def test_an_idle_worker_is_stopped_and_a_busy_one_is_not(make: Any) -> None:
    studio = make(idle_seconds=0.3)
    first = ended(studio, studio.ask({"prompt": "draw"}))
    until(lambda: studio._process is None)
    second = ended(studio, studio.ask({"prompt": "draw"}))
    assert worker_of(first) != worker_of(second)
    waiting = studio.ask({"prompt": "wait"})
    time.sleep(0.6)
    assert studio.look(waiting)["state"] == "drawing" and studio._process.poll() is None


def test_closing_ends_the_worker_and_what_it_draws(make: Any) -> None:
    studio = make()
    number = studio.ask({"prompt": "wait"})
    process = studio._process
    studio.close()
    assert process.poll() is not None and studio.look(number)["state"] == "cancelled"
    late = studio.look(studio.ask({"prompt": "draw"}))
    assert late["state"] == "failed" and "closing" in late["problem"]


def test_a_worker_that_cannot_be_started_is_a_sentence(make: Any, tmp_path: Path) -> None:
    studio = make(command=(str(tmp_path / "no such program"),))
    seen = studio.look(studio.ask({"prompt": "draw"}))
    assert seen["state"] == "failed" and "could not be asked" in seen["problem"]


def test_the_real_worker_draws_is_killed_and_draws_again(home: Path, tiny_base: Path) -> None:
    studio = Studio(home)
    usual = {"base": str(tiny_base), "prompt": "a cat", "seed": 1, "width": 32, "height": 32, "strengths": [0.0]}
    try:
        seen = ended(studio, studio.ask({**usual, "steps": 2}))
        assert seen["state"] == "done", seen
        path = Path(seen["pictures"][0.0])
        assert path.is_file() and path.parent == home / "window" / "studio"
        long = studio.ask({**usual, "steps": 500})
        until(lambda: studio.look(long)["state"] == "drawing")
        assert studio._process
        studio._process.kill()
        assert "ended unexpectedly" in ended(studio, long)["problem"]
        again = ended(studio, studio.ask({**usual, "steps": 2}))
        assert again["state"] == "done" and again["pictures"] == seen["pictures"]
    finally:
        studio.close()
