"""One window per home folder: a lock that dies with the process, where the running one answers, and opening its page."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from trainers.errors import TrainingError
from trainers.files import write_atomically

if TYPE_CHECKING:
    from filelock import BaseFileLock

Browser = Literal["tab", "window", "none"]
FIRST_PORT = 7860
_PORTS_TRIED = 100
_START_SECONDS = 30.0
"""How long a second start waits for the first to answer: a slow disk reads Gradio for long."""


class WindowError(TrainingError):
    """The window cannot be opened: no free port, no right to write, or one that hangs."""


@dataclass(frozen=True)
class Running:
    """A window that another process has open for this home."""

    url: str
    process: int


@dataclass
class Instance:
    """This process's claim on a home. `id` is random and tells a second start that it found the right window."""

    folder: Path
    lock: BaseFileLock = field(repr=False)
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    def publish(self, url: str) -> None:
        """Writes down where this window answers, readable by its person alone. Raises OSError."""
        text = json.dumps({"id": self.id, "url": url, "process": os.getpid()})
        write_atomically(_note(self.folder), text.encode(), fsync=False)
        with contextlib.suppress(OSError):
            _note(self.folder).chmod(0o600)

    def release(self) -> None:
        """Gives the home free. What a killed process leaves is told apart by the lock, which the system frees."""
        with contextlib.suppress(OSError):
            _note(self.folder).unlink(missing_ok=True)
        self.lock.release()


def claim(home: Path, seconds: float = _START_SECONDS) -> Instance | Running:
    """Takes the home for this process, or finds the window that has it and answers within `seconds`.

    Raises WindowError when the folder cannot be written, or when another process has it and does not answer.
    """
    from filelock import FileLock, Timeout

    folder = home / "window"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.name != "nt":
            folder.chmod(0o700)
        lock = FileLock(folder / "instance.lock", mode=0o600)
        end = time.monotonic() + seconds
        while True:
            try:
                lock.acquire(timeout=0)
                _note(folder).unlink(missing_ok=True)
                return Instance(folder, lock)
            except Timeout:
                running = find(home)
            if running:
                return running
            if time.monotonic() >= end:
                break
            time.sleep(0.1)
    except OSError as error:
        hint = "Check its permissions, or choose another folder with --home."
        raise WindowError(f"The home folder cannot be written: {error.strerror or error}", str(home), hint) from error
    process = _read_note(folder).get("process")
    what = f"Impasto is open already{f' (process {process})' if process else ''}, but it does not answer"
    raise WindowError(what, str(home), "Wait a moment and try again, or end that process; a training goes on without it.")


def find(home: Path) -> Running | None:
    """The window that says it has this home, when it answers with the id that was written down."""
    note = _read_note(home / "window")
    url, id_, process = note.get("url"), note.get("id"), note.get("process")
    if not (isinstance(url, str) and isinstance(id_, str) and isinstance(process, int)):
        return None
    return Running(url, process) if _answers(url, id_) else None


def _note(folder: Path) -> Path:
    return folder / "instance.json"


def _read_note(folder: Path) -> dict[str, object]:
    """What the running window wrote down; empty when there is none or it cannot be read."""
    try:
        note = json.loads(_note(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _answers(url: str, id_: str) -> bool:
    """Whether the window at `url` is the one with this id. http.client, since a set HTTP_PROXY must not be asked."""
    try:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    except ValueError:
        return False
    try:
        connection.request("GET", "/api/instance")
        answer = connection.getresponse()
        body = answer.read(1000)
        # One with a password says nothing to strangers; the lock has told already that a process is there.
        return answer.status == 401 or (answer.status == 200 and json.loads(body).get("id") == id_)
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return False
    finally:
        connection.close()


def bind(address: str, first: int = FIRST_PORT) -> socket.socket:
    """A bound socket at the first free port from `first` on. Bound here, so that nobody takes the port in between.

    Raises WindowError when the address is none of this machine or no port is free.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, first, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise WindowError("There is no such address", address, "Give an address of this machine to --listen.") from error
    for port in range(first, min(first + _PORTS_TRIED, 65536)):
        sock = socket.socket(family, kind, protocol)
        try:
            if os.name == "nt":  # There SO_REUSEADDR would share the port with whoever has it.
                sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", ~socket.SO_REUSEADDR), 1)
            else:  # Else the port of a window that was just closed counts as taken for a minute.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((target[0], port, *target[2:]))
            sock.listen(128)
            return sock
        except OSError as error:
            sock.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                what = f"The window cannot listen there: {error.strerror or error}"
                raise WindowError(what, address, "Give an address of this machine to --listen.") from error
    raise WindowError(f"No port from {first} to {port} is free", address, "Choose another with --port.")


def open_page(url: str, browser: Browser, home: Path) -> bool:
    """Shows the page to the person: in the default browser, or as a window of its own. Returns whether one was started.

    Where no Chrome, Edge or Chromium is found, or it fails, "window" is a tab. Without a screen nothing is started: a
    text browser would take the terminal over.
    """
    if browser == "none" or not _has_screen():
        return False
    if browser == "window" and _open_window(url, home / "window" / "browser"):
        return True
    try:
        return webbrowser.open(url)
    except (webbrowser.Error, OSError):
        return False


def _has_screen() -> bool:
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open_window(url: str, profile: Path) -> bool:
    """Starts a browser with nothing but the page, in a profile of its own so that it is a window of its own."""
    program = find_app_browser()
    if program is None:
        return False
    command = [program, f"--app={url}", "--no-first-run", "--no-default-browser-check"]
    # A browser from a snap may not write into hidden folders; it shows the page in its usual profile.
    if not os.path.realpath(program).startswith(("/snap/", "/usr/bin/snap")):
        command.insert(2, f"--user-data-dir={profile}")
    quiet = subprocess.DEVNULL
    try:
        # In a session of its own: Ctrl-C in the terminal is meant for the program alone.
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        return process.wait(timeout=1.5) == 0  # one that hands over to its running self ends at once
    except subprocess.TimeoutExpired:
        return True
    except OSError:
        return False


def find_app_browser() -> str | None:
    """Chrome, Edge or Chromium: what can show a page as an app window. None when there is none."""
    names = ["google-chrome", "google-chrome-stable", "microsoft-edge", "microsoft-edge-stable", "chromium", "chromium-browser"]
    found = [path for path in map(shutil.which, names) if path]
    if sys.platform == "win32":
        roots = [os.environ.get(name) for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")]
        parts = (
            "Google/Chrome/Application/chrome.exe",
            "Microsoft/Edge/Application/msedge.exe",
            "Chromium/Application/chrome.exe",
        )
        found += [str(Path(root, part)) for part in parts for root in roots if root]
    elif sys.platform == "darwin":
        for folder in (Path("/Applications"), Path.home() / "Applications"):
            for name in ("Google Chrome", "Microsoft Edge", "Chromium"):
                found.append(str(folder / f"{name}.app" / "Contents" / "MacOS" / name))
    return next((path for path in found if os.path.isfile(path)), None)
