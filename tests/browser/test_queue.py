"""The queue in a real browser: two wait, are moved, outlive the window, and begin one after the other."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.processes import Process, is_alive
from tests.browser.conftest import eventually, expect
from tests.browser.test_window_journey import SAMPLE, shot

RECIPE = {
    "prior": {"prompts": []},
    "train": {"steps": 5000, "batch_size": 4},
    "samples": {"every": 0, "steps": 2},
    "adapter": {"rank": 2},
    "output": {"verify": False},
}


def ask(page: Any, method: str, path: str, body: Any = None) -> Any:
    """What the window answers to the page itself."""
    code = """async ([method, path, body]) => (await fetch(`/api${path}`, { method, body: body && JSON.stringify(body),
      headers: { "Content-Type": "application/json" } })).json()"""
    return page.evaluate(code, [method, path, body])


def project(page: Any, name: str) -> str:
    made = ask(page, "POST", "/projects", {"name": name})["id"]
    ask(page, "PUT", f"/projects/{made}/source", {"folder": str(SAMPLE)})
    ask(page, "PATCH", f"/projects/{made}", {"recipe": RECIPE, "preset": "pocket"})
    return str(made)


def press_start(page: Any, name: str) -> None:
    page.evaluate("id => { location.hash = `#/${id}/recipe`; }", name)
    page.locator("#screen-recipe").get_by_role("heading", name="5000 steps on pocket").wait_for()
    page.locator("#screen-recipe").get_by_role("button", name="Start training").click()


def in_order(page: Any, *names: str) -> None:
    expect(page.locator(".waiting .what a")).to_have_text(list(names))


def at_work(page: Any) -> str:
    """The run that trains, once there is one."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = ask(page, "GET", "/queue")["at_work"]
        if found and found["step"]:
            return str(found["id"])
        page.wait_for_timeout(200)
    raise AssertionError(ask(page, "GET", "/runs"))


@pytest.fixture
def no_trainer_left(own_window: Any) -> Iterator[None]:
    """A training outlives its window, and a test that fails must not leave one behind."""
    yield
    for note in Path(own_window.home).glob("runs/*/process.json"):
        process = Process(**json.loads(note.read_text()))
        if is_alive(process):
            os.kill(process.pid, signal.SIGTERM)


@pytest.mark.usefixtures("no_trainer_left")
def test_a_queue_outlives_the_window(own_window: Any, page: Any) -> None:
    page.goto(own_window.url)
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    first, apples, pears = (project(page, name) for name in ("First", "Apples", "Pears"))
    press_start(page, first)
    page.get_by_role("button", name="Stop and keep").wait_for()
    busy = at_work(page)
    for name in (apples, pears):
        press_start(page, name)
        page.get_by_role("dialog").get_by_role("button", name="Add to the queue").click()
        page.locator("#screen-train").get_by_role("heading", name="Waits its turn").wait_for()
    in_order(page, "Apples", "Pears")
    page.get_by_role("button", name="Earlier: Pears, number 2").click()
    in_order(page, "Pears", "Apples")
    shot(page, "queue")

    page.watched.offline = True
    own_window.restart(kill=True)
    page.reload()
    page.watched.offline = False
    in_order(page, "Pears", "Apples")
    assert at_work(page) == busy, "a training outlives the window"
    in_order(page, "Pears", "Apples")

    page.evaluate("address => { location.hash = address; }", f"#/{first}/train/{busy}")
    page.get_by_role("button", name="Stop and keep").click()
    page.get_by_text("Stopped at step").wait_for()
    in_order(page, "Apples")
    following = at_work(page)
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("dialog").get_by_role("button", name="Add to the queue").click()
    page.locator("#screen-train").get_by_role("heading", name="Waits its turn").wait_for()
    in_order(page, "Apples", "First")
    page.get_by_role("button", name="Take out: First, number 2").click()
    page.get_by_role("dialog").get_by_role("button", name="Take out").click()
    page.get_by_text("Stopped at step").wait_for()
    in_order(page, "Apples")
    assert json.loads((Path(own_window.home) / "runs" / following / "process.json").read_text())["project"] == pears
    page.get_by_role("button", name="Hold the queue").click()
    page.get_by_text("You hold the queue.").wait_for()
    ask(page, "POST", f"/runs/{following}/stop")
    page.evaluate("address => { location.hash = address; }", f"#/{pears}/train/{following}")
    page.get_by_text("Stopped at step").wait_for()
    runs = page.get_by_label("Run", exact=True)
    expect(runs).to_be_hidden()
    ask(page, "POST", f"/projects/{pears}/queue", {})
    runs.select_option(index=0)  # the menu follows the queue
    page.locator("#screen-train").get_by_role("heading", name="Waits its turn").wait_for()
    page.get_by_role("button", name="Take out: Pears, number 2").click()
    page.get_by_role("dialog").get_by_role("button", name="Take out").click()
    page.get_by_text("Stopped at step").wait_for()
    expect(runs).to_be_hidden()
    page.get_by_role("button", name="Take out: Apples, number 1").click()
    shot(page, "queue-held")
    page.get_by_role("dialog").get_by_role("button", name="Take out").click()
    page.locator(".queue").wait_for(state="hidden")
    eventually(page, lambda: len(list((Path(own_window.home) / "runs").iterdir())), 2)  # what never began leaves no folder
