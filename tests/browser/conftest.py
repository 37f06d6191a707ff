"""A real browser on a real window: Chromium without a screen, a server on a free port, and nothing that leaves the machine.

Without a browser these tests are skipped; with CI or REQUIRE_BROWSER set a missing browser fails them, so that the suite
cannot be green because it is empty.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
PORT = 7860 + 200 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
"""Where windows look for a free port first. Each process of tests has its own range, so that a restart gets its port back."""
PATIENCE = 60_000
"""Milliseconds: a machine at work starts a browser slowly. Nothing here asserts a time unless the test says so."""


def find_chromium() -> str | None:
    """The browser: $CHROMIUM, else one on the path, else one in its usual place."""
    named = os.environ.get("CHROMIUM")
    found = [named] if named else [shutil.which(name) for name in NAMES]
    found += [place for place in PLACES if os.path.exists(place)]
    return next((path for path in found if path), None)


def expect(seen: Any) -> Any:
    """Playwright's assertion of a page or locator, which waits until it holds, with the patience of these tests."""
    from playwright.sync_api import expect as waiting

    waiting.set_options(timeout=PATIENCE)
    return waiting(seen)


def eventually(page: Any, read: Callable[[], Any], wanted: Any) -> None:
    """Waits until what is read, of a page or a file that it has written, is what is wanted; what raises is read again."""
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # a file that is not there yet, an element that is just drawn anew
            if read() == wanted:
                return
        page.wait_for_timeout(50)
    assert read() == wanted


@dataclass
class Window:
    """A window that serves `home`; `restart` ends it (like Ctrl-C, or by a kill) and opens it at the same port."""

    home: Path
    process: subprocess.Popen[str] | None = None
    url: str = ""
    started: float = 0.0

    def open(self, port: int = PORT) -> None:
        """Starts it as a person does, and waits for the line with its address."""
        self.started = time.monotonic()
        environment = {**os.environ, "IMPASTO_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app", "--no-browser", "--home", str(self.home), "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        line = ""
        for line in self.process.stdout:
            if " at http" in line:
                break
        assert " at http" in line, f"the window did not open: {line}"
        self.url = line.split(" at ")[1].split()[0]

    def close(self, *, kill: bool = False) -> None:
        """Ends it."""
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None

    def restart(self, *, kill: bool = False) -> None:
        """Ends it and opens it again at the same address."""
        port = int(self.url.rsplit(":", 1)[1].strip("/"))
        self.close(kill=kill)
        self.open(port)


@dataclass
class Watched:
    """What a page did that it should not have."""

    wrong: list[str] = field(default_factory=list)
    allowed: set[int] = field(default_factory=set)
    offline: bool = False
    """Once the window was ended on purpose, failed requests and what follows from them are no fault."""


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """One Chromium for all tests here. It ends with them: while it is there, no other event loop can run in this thread."""
    path = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        reason = "no Chromium, Chrome or Edge, or no playwright: install one, or name it in CHROMIUM"
        if os.environ.get("CI") == "true" or os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="package")
def shared_window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """One window for all tests that only add to it."""
    opened = Window(tmp_path_factory.mktemp("home"))
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def window(browser: Any, shared_window: Window) -> Window:
    """The shared window; asked for after the browser, so that without one nothing is started."""
    return shared_window


@pytest.fixture
def own_window(browser: Any, tmp_path: Path) -> Iterator[Window]:
    """A window of the test's own, with an empty home: to be killed, restarted, counted."""
    opened = Window(tmp_path / "home")
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Makes watched pages, each in a context of its own; `page.watched` may allow a status or a time without server."""
    contexts, watches = [], []

    def make(context: Any = None, **options: Any) -> Any:
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.watched = watch(page)
        watches.append(page.watched)
        return page

    yield make
    for context in contexts:
        context.close()
    assert [wrong for watched in watches for wrong in watched.wrong] == []


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    """A page on which a console error, a failed request or one that leaves the machine fails the test."""
    return new_page()


def watch(page: Any) -> Watched:
    """Collects what a page does wrong."""
    seen = Watched()

    def on_console(message: Any) -> None:
        if message.type != "error" or seen.offline:
            return
        # Chromium prints each refused request; whether that is wrong is told by its status below.
        if "Failed to load resource" not in message.text:
            seen.wrong.append(f"console: {message.text}")

    def on_error(error: Any) -> None:
        if not seen.offline:  # Gradio's own stream complains when its server goes
            seen.wrong.append(f"script: {error}")

    def on_request(request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            seen.wrong.append(f"foreign request: {request.url}")

    def on_response(response: Any) -> None:
        if response.status >= 400 and response.status not in seen.allowed and not seen.offline:
            seen.wrong.append(f"{response.status} {response.request.method} {response.url}")

    page.on("console", on_console)
    page.on("pageerror", on_error)
    page.on("request", on_request)
    page.on("response", on_response)
    return seen


@pytest.fixture
def drop() -> Callable[..., None]:
    """Drops files or folders on the middle of the page, as the system's file manager does: a true directory entry."""

    def dropped(page: Any, *paths: Path) -> None:
        size = page.viewport_size
        session = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": size["width"] / 2, "y": size["height"] / 2, "data": data}
            session.send("Input.dispatchDragEvent", event)
        session.detach()

    return dropped
