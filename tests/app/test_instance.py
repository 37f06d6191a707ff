"""One window for a home: found by a second start, not mistaken for another, and gone with its process."""

from __future__ import annotations

import http.server
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import instance
from app.instance import Instance, Running, WindowError, bind, claim, find, find_app_browser, open_page
from tests.command_line import environment

POSIX = pytest.mark.skipif(os.name == "nt", reason="scripts and permissions of POSIX")


@pytest.fixture
def answering() -> Iterator[Callable[[int, Any], str]]:
    """answering(status, body) -> the address of a server that answers everything so."""
    servers: list[http.server.HTTPServer] = []

    def start(status: int, body: Any) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *_: Any) -> None: ...

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def hold(home: Path) -> subprocess.Popen[str]:
    """Another process that has the home, and dies only when it is killed."""
    code = "import sys, time; from pathlib import Path; from app.instance import claim; held = claim(Path(sys.argv[1]))"
    command = [sys.executable, "-P", "-c", f"{code}; print('held', flush=True); time.sleep(100)", str(home)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def write_note(home: Path, **note: Any) -> None:
    (home / "window" / "instance.json").write_text(json.dumps(note))


def test_the_first_start_gets_the_home_and_each_an_id_of_its_own(home: Path) -> None:
    first = claim(home)
    assert isinstance(first, Instance) and len(first.id) >= 32
    first.release()
    second = claim(home)
    assert isinstance(second, Instance) and second.id != first.id
    second.release()


@POSIX
def test_what_is_written_down_is_readable_by_its_person_alone(home: Path) -> None:
    claimed = claim(home)
    assert isinstance(claimed, Instance)
    claimed.publish("http://127.0.0.1:1/")
    assert stat.S_IMODE((home / "window").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "window" / "instance.json").stat().st_mode) == 0o600
    claimed.release()
    assert not (home / "window" / "instance.json").exists()


def test_a_second_start_finds_the_window_that_answers_with_its_id(home: Path, answering: Callable[[int, Any], str]) -> None:
    process = hold(home)
    try:
        url = answering(200, {"id": "abc"})
        write_note(home, id="abc", url=url, process=process.pid)
        assert claim(home, seconds=5) == Running(url, process.pid)
    finally:
        process.kill()
        process.wait()


def test_one_with_a_password_is_found_too(home: Path, answering: Callable[[int, Any], str]) -> None:
    (home / "window").mkdir()
    url = answering(401, {"what": "password"})
    write_note(home, id="abc", url=url, process=1)
    assert find(home) == Running(url, 1)


def test_another_program_on_the_same_port_is_not_taken_for_the_window(home: Path, answering: Callable[[int, Any], str]) -> None:
    (home / "window").mkdir()
    for status, body in ((200, {"id": "other"}), (200, b"<html>"), (404, {"id": "abc"}), (200, ["abc"]), (200, b"")):
        write_note(home, id="abc", url=answering(status, body), process=1)
        assert find(home) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"id": 1, "url": 2}', '{"id": "a", "url": "http://[", "process": 1}', "\0"]
)
def test_a_damaged_note_is_no_window(home: Path, text: str) -> None:
    (home / "window").mkdir()
    (home / "window" / "instance.json").write_text(text)
    assert find(home) is None


def test_a_proxy_of_the_environment_is_not_asked(
    home: Path, answering: Callable[[int, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (home / "window").mkdir()
    url = answering(200, {"id": "abc"})
    write_note(home, id="abc", url=url, process=1)
    assert find(home) == Running(url, 1)


def test_a_killed_window_leaves_the_home_free_whatever_it_wrote(home: Path, answering: Callable[[int, Any], str]) -> None:
    process = hold(home)
    write_note(home, id="abc", url=answering(200, {"id": "abc"}), process=process.pid)
    process.kill()
    process.wait()
    claimed = claim(home, seconds=5)
    assert isinstance(claimed, Instance)
    assert find(home) is None
    claimed.release()


def test_one_that_hangs_is_named_with_its_process(home: Path) -> None:
    process = hold(home)
    try:
        write_note(home, id="abc", url="http://127.0.0.1:9/", process=process.pid)
        begin = time.monotonic()
        with pytest.raises(WindowError, match=f"process {process.pid}.*does not answer") as caught:
            claim(home, seconds=0.3)
        assert caught.value.hint and time.monotonic() - begin < 10
    finally:
        process.kill()
        process.wait()


def test_a_start_waits_for_one_that_is_just_starting(home: Path, answering: Callable[[int, Any], str]) -> None:
    process = hold(home)
    try:
        url = answering(200, {"id": "abc"})
        timer = threading.Timer(0.5, write_note, args=(home,), kwargs={"id": "abc", "url": url, "process": process.pid})
        timer.start()
        assert claim(home, seconds=20) == Running(url, process.pid)
        timer.join()
    finally:
        process.kill()
        process.wait()


def test_a_home_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WindowError, match="home folder cannot be written"):
        claim(tmp_path / "file")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_taken_port_is_passed_over(home: Path) -> None:
    port = free_port()
    with bind("127.0.0.1", port) as first, bind("127.0.0.1", port) as second:
        assert first.getsockname() == ("127.0.0.1", port)
        assert port < second.getsockname()[1] < port + 100


def test_a_port_is_ours_at_once_and_only_on_this_machine() -> None:
    with bind("127.0.0.1", free_port()) as sock:
        address, port = sock.getsockname()
        assert address == "127.0.0.1", "an address of this machine alone"
        with socket.create_connection((address, port), timeout=5) as connection:
            assert connection.getpeername() == (address, port), "it listens before the server runs"


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(WindowError, match="cannot listen there"):
        bind("192.0.2.1", 7860)
    with pytest.raises(WindowError, match="no such address"):
        bind("no such name.invalid", 7860)


def test_no_free_port_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "_PORTS_TRIED", 1)
    with bind("127.0.0.1", free_port()) as taken, pytest.raises(WindowError, match="No port from"):
        bind("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def tabs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were opened in the default browser, on a machine with a screen and no app browser."""
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(instance, "find_app_browser", lambda: None)
    return opened


def app_browser(tmp_path: Path, code: int, seconds: float = 0) -> str:
    """A program in place of Chrome that writes its arguments down."""
    program = tmp_path / "bin" / "google-chrome"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/asked"\nsleep {seconds}\nexit {code}\n')
    program.chmod(0o755)
    return str(program)


def test_the_default_is_a_tab_and_none_is_none(tabs: list[str], home: Path) -> None:
    assert open_page("http://127.0.0.1:1/", "tab", home) and tabs == ["http://127.0.0.1:1/"]
    assert not open_page("http://127.0.0.1:1/", "none", home) and len(tabs) == 1


def test_without_an_app_browser_a_window_is_a_tab(tabs: list[str], home: Path) -> None:
    assert open_page("http://127.0.0.1:1/", "window", home) and tabs == ["http://127.0.0.1:1/"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these always have a screen")
def test_without_a_screen_no_text_browser_takes_the_terminal(
    tabs: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not open_page("http://127.0.0.1:1/", "tab", home) and tabs == []


def test_a_browser_that_cannot_be_started_is_told_not_raised(
    tabs: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_url: str) -> bool:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "open", fail)
    assert not open_page("http://127.0.0.1:1/", "tab", home)


@POSIX
@pytest.mark.parametrize("seconds", [0, 4])
def test_a_window_has_a_profile_of_its_own(
    seconds: float, tabs: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = app_browser(tmp_path, 0, seconds)
    monkeypatch.setattr(instance, "find_app_browser", lambda: program)
    assert open_page("http://127.0.0.1:1/", "window", home) and tabs == []
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "--app=http://127.0.0.1:1/"
    assert f"--user-data-dir={home}/window/browser" in asked


@POSIX
def test_an_app_browser_that_fails_gives_way_to_a_tab(
    tabs: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = app_browser(tmp_path, 1)
    monkeypatch.setattr(instance, "find_app_browser", lambda: program)
    assert open_page("http://127.0.0.1:1/", "window", home) and tabs == ["http://127.0.0.1:1/"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="found by PATH on Linux")
def test_app_browsers_are_found_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_app_browser() is None
    program = app_browser(tmp_path, 0)
    assert find_app_browser() == program


def test_app_browsers_of_windows_are_found_in_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance.sys, "platform", "win32")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("PROGRAMFILES", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PROGRAMFILES(X86)", str(tmp_path))
    edge = tmp_path / "Microsoft" / "Edge" / "Application" / "msedge.exe"
    edge.parent.mkdir(parents=True)
    edge.write_bytes(b"")
    assert find_app_browser() == str(edge)
