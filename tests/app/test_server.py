"""The whole server: guarded on every route, on real sockets, found by a second start, light to load, plain in its errors."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.testclient import TestClient

from app.instance import WindowError
from app.server import check_listen, make_app, own_names
from tests.command_line import run_fresh
from tests.window_process import Window, free_port
from trainers.errors import TrainingError

PORT = 7860
OWN = f"http://127.0.0.1:{PORT}"
PASSWORD = "quiet brown fox"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    running = Window(tmp_path_factory.mktemp("window-home"), str(free_port()), "127.0.0.1", "")
    yield running
    running.end()


@pytest.fixture
def client(home: Path) -> TestClient:
    return TestClient(make_app(home, PORT), base_url=OWN, raise_server_exceptions=False)


def routes(app: Any) -> list[tuple[str, str]]:
    """(method, path with made-up values) of every route, also of those that a router of ours brought."""
    found = []
    for route in flat(app.routes):
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def flat(listed: Any) -> Iterator[APIRoute]:
    for route in listed:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):  # FastAPI keeps an included router whole since 0.16x
            yield from flat(route.original_router.routes)


def test_every_route_refuses_a_foreign_host_a_foreign_origin_and_other_sites(client: TestClient) -> None:
    listed = routes(client.app)
    assert len(listed) > 20 and ("GET", "/api/instance") in listed and ("POST", "/api/projects") in listed
    for method, path in [*listed, ("GET", "/nothing/here"), ("OPTIONS", "/api/projects")]:
        ask = lambda headers, m=method, p=path: client.request(m, p, headers=headers).status_code  # noqa: E731
        assert ask({"Host": "evil.example"}) == 421, path
        assert ask({"Host": f"evil.example:{PORT}"}) == 421, path
        assert ask({"Origin": "https://evil.example"}) == 403, path
        assert ask({"Origin": "null"}) == 403, path
        if method != "GET" or path.startswith("/api"):
            assert ask({"Sec-Fetch-Site": "cross-site"}) == 403, path


def test_with_a_password_every_route_is_closed(home: Path) -> None:
    client = TestClient(make_app(home, PORT, PASSWORD), base_url=OWN)
    assert {client.request(method, path).status_code for method, path in routes(client.app)} == {401}
    assert client.get("/api/instance", params={"token": PASSWORD}).status_code == 200  # follows the redirect with the cookie
    assert client.get("/api/projects").status_code == 200


def test_no_page_describes_the_routes_to_strangers(client: TestClient) -> None:
    assert [client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404] * 3


def test_making_the_app_writes_and_starts_nothing(home: Path) -> None:
    before, threads = sorted(home.rglob("*")), threading.active_count()
    make_app(home, PORT)
    assert sorted(home.rglob("*")) == before and threading.active_count() <= threads


class Wish(BaseModel):
    """A body for the tests on errors."""

    count: int


def test_every_error_is_what_where_and_hint(home: Path) -> None:
    app = make_app(home, PORT)

    def fail() -> None:
        raise TrainingError("It went wrong", where="here", hint="Do this.")

    def break_() -> None:
        raise KeyError("secret detail")

    def wish(wish: Wish) -> None: ...

    app.get("/api/fail")(fail)
    app.get("/api/break")(break_)
    app.post("/api/wish")(wish)
    app.router.routes.sort(key=lambda route: getattr(route, "path", "") == "/")
    client = TestClient(app, base_url=OWN, raise_server_exceptions=False)
    told = client.get("/api/fail")
    assert (told.status_code, told.json()) == (
        400, {"what": "It went wrong", "where": "here", "hint": "Do this.", "problems": []},
    )  # fmt: skip
    broken = client.get("/api/break")
    assert broken.status_code == 500 and {"what", "where", "hint"} <= set(broken.json())
    assert "Traceback" not in broken.text and broken.headers["x-content-type-options"] == "nosniff"
    missing = client.get("/api/nothing")
    assert missing.status_code == 404 and missing.json()["what"]
    wrong = client.post("/api/wish", json={"count": "many"})
    assert wrong.status_code == 422 and wrong.json()["where"] == "count" and wrong.json()["problems"][0]["where"] == "count"
    method = client.delete("/api/instance")
    assert method.status_code == 405 and method.headers["allow"] == "GET"


def test_an_error_of_an_upload_says_so_with_its_status(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    project = client.post("/api/projects", json={"name": "Cats"}).json()["id"]
    refused = client.post(f"/api/projects/{project}/images", content=b"x", headers={"Content-Type": "text/plain"})
    assert refused.status_code == 400 and refused.json()["what"] == "The upload is no form with files"
    stored = client.post(f"/api/projects/{project}/images", files=[("files", ("a/b.txt", b"a cat", "text/plain"))])
    assert stored.json() == {"saved": ["a/b.txt"], "rejected": [], "ignored": 0}


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "192.168.1.5", "myhost"])
def test_others_may_come_only_with_a_password(listen: str) -> None:
    with pytest.raises(WindowError, match="Others in the network"):
        check_listen(listen, None)
    with pytest.raises(WindowError, match="too short"):
        check_listen(listen, "short")
    check_listen(listen, PASSWORD)


@pytest.mark.parametrize("listen", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_needs_none(listen: str) -> None:
    check_listen(listen, None)
    assert own_names(listen) == [listen]


def test_listening_everywhere_answers_to_this_machine_s_own_names_only() -> None:
    names = own_names("0.0.0.0")
    assert "127.0.0.1" in names and socket.gethostname().lower() in names
    assert not {"0.0.0.0", "::", "*", ""} & set(names)
    assert own_names("192.168.1.5").count("192.168.1.5") == 1


def test_the_app_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from app.server import make_app; import app.uploads;"
        "make_app(Path(sys.argv[1]), 7860); print(json.dumps(list(sys.modules)))"
    )
    loaded = run_fresh(code, tmp_path)
    heavy = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors.torch")
    assert "app.routes" in loaded and [name for name in heavy if name in loaded] == []


# From here on over real sockets.


def test_the_window_answers_on_loopback_with_the_protecting_headers(window: Window) -> None:
    status, headers, body = window.ask("/")
    assert status == 200 and b"Impasto" in body
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers and "access-control-allow-origin" not in headers
    assert window.said.startswith(f"Impasto is at http://127.0.0.1:{window.port}/")


def test_rebinding_and_other_sites_are_refused_on_the_socket(window: Window) -> None:
    own = f"http://127.0.0.1:{window.port}"
    assert window.ask("/", Host="evil.example")[0] == 421
    assert window.ask("/", Host=f"evil.example:{window.port}")[0] == 421
    assert window.ask("/", Host=f"127.0.0.1:{window.port + 1}")[0] == 421
    assert window.ask("/", Host=f"localhost:{window.port}")[0] == 200
    assert window.ask("/", Host=f"[::1]:{window.port}")[0] == 200
    assert window.ask("http://evil.example/")[0] in (200, 404)  # the Host header decides, whatever the target says
    assert window.ask("http://evil.example/", Host="evil.example")[0] == 421
    body = b'{"name": "x"}'
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}):
        assert window.ask("/api/projects", "POST", body, Content_Type="application/json", **headers)[0] == 403
    assert json.loads(window.ask("/api/projects")[2])["projects"] == []
    assert window.ask("/api/projects", "POST", body, Content_Type="application/json", Origin=own)[0] in (200, 201)


def test_what_a_proxy_would_say_changes_no_address(window: Window) -> None:
    lies = {"X_Forwarded_Host": "evil.example", "X_Forwarded_Proto": "https", "X_Forwarded_Prefix": "/evil"}
    for path in ("/", "/api/projects", "/api/projects/"):
        status, headers, body = window.ask(path, **lies)
        assert b"evil" not in body and "evil" not in headers.get("location", ""), status


def test_a_web_socket_of_another_page_is_refused_on_the_socket(window: Window) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13",
               "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    assert window.ask("/ws", Origin="https://evil.example", **upgrade)[0] == 403


def test_a_real_upload_over_the_limit_ends_in_a_sentence_not_in_a_broken_connection(window: Window) -> None:
    kind = {"Content_Type": "multipart/form-data; boundary=b"}
    _, _, made = window.ask("/api/projects", "POST", b'{"name": "limit"}', Content_Type="application/json")
    path = f"/api/projects/{json.loads(made)['id']}/images"
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="%d.txt"\r\n\r\nx\r\n'
    body = b"".join(part % number for number in range(2001)) + part % 0 + b"y" * 4_000_000 + b"\r\n--b--\r\n"
    status, _, answer = window.ask(path, "POST", body, **kind)
    assert status == 413 and "More than 2000 files" in json.loads(answer)["what"]
    status, _, answer = window.ask(path, "POST", part % 1 + b"--b--\r\n", **kind)
    assert status == 200 and json.loads(answer)["saved"] == ["1.txt"]


def test_a_second_start_finds_the_first_and_says_where(window: Window) -> None:
    second = Window(window.home, str(free_port()), "127.0.0.1", "")
    assert second.said == f"Impasto is open already, at {window.url}\n"
    assert second.process.wait(timeout=60) == 0
    assert window.ask("/api/instance")[0] == 200


def test_it_takes_the_next_port_and_closes_cleanly_whoever_is_connected(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = Window(tmp_path, str(port), "127.0.0.1", "")
        assert port < running.port < port + 100 and running.ask("/api/instance")[0] == 200
        assert f"Port {port} is taken" in running.said
    with socket.create_connection(("127.0.0.1", running.port)) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\nHost: ")
        begin = time.monotonic()
        errors = running.end()
        assert time.monotonic() - begin < 30
    assert errors == "" and running.process.returncode == 0
    assert not (tmp_path / "window" / "instance.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_for_others_the_password_is_exchanged_once_for_a_cookie_that_outlives_a_kill(tmp_path: Path) -> None:
    first = Window(tmp_path, str(free_port()), "0.0.0.0", PASSWORD)
    try:
        assert "/?token=quiet%20brown%20fox " in first.said
        assert [first.ask(path)[0] for path in ("/", "/api/instance", "/api/projects")] == [401] * 3
        assert first.ask("/?token=wrong+guess")[0] == 401
        assert first.ask("/?token=quiet%20brown%20fox", Host=f"evil.example:{first.port}")[0] == 421
        status, headers, _ = first.ask("/?token=quiet%20brown%20fox", Host=f"{socket.gethostname()}:{first.port}")
        assert status == 303 and headers["location"] == "/"
        cookie = headers["set-cookie"].split(";")[0]
        assert first.ask("/api/projects", Cookie=cookie)[0] == 200
        assert first.ask("/", "POST", Cookie=cookie, Origin="https://evil.example")[0] == 403
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert PASSWORD.encode() not in written
    finally:
        first.process.kill()
        errors = first.process.communicate(timeout=60)[1]
    assert PASSWORD not in errors and "quiet%20" not in errors
    second = Window(tmp_path, str(first.port), "0.0.0.0", PASSWORD)
    try:
        assert second.port == first.port and second.said.startswith("Impasto is at")
        assert second.ask("/api/projects", Cookie=cookie)[0] == 200
    finally:
        second.end()
