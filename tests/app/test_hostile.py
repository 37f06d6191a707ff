"""Hostile requests to a running window: each is refused with the right status, and nothing outside its folders is touched."""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.server import make_app
from tests.app_client import make_run
from tests.bad_pictures import make_picture
from tests.command_line import contents
from tests.window_process import Window, free_port, raw

SECRET = b"the-secret-of-another-program"
JSON = {"Content_Type": "application/json"}
FORM = {"Content_Type": "multipart/form-data; boundary=b"}


@dataclass
class Attacked:
    """A window with a project, a run that has a sample and a LoRA, links planted in it, and a secret beside its home."""

    window: Window
    outside: Path
    project: str = ""
    run: str = "r"
    before: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    top = tmp_path_factory.mktemp("attacked")
    outside, home = top / "outside", top / "home"
    outside.mkdir()
    home.mkdir()
    (outside / "secret.txt").write_bytes(SECRET)
    (outside / "secret.toml").write_text(f'secret = "{SECRET.decode()}"\n', encoding="utf-8")
    make_picture().save(outside / "secret.png")
    run = make_run(home, "r", ['{"type": "stage", "time": 1.0, "name": "scan"}'])
    run.samples.mkdir()
    make_picture(number=1).save(run.samples / "00000001_00.png")
    (run.samples / "planted.png").symlink_to(outside / "secret.png")
    (run.path / "notes.txt").write_bytes(SECRET)
    window = Window(home, str(free_port()), "127.0.0.1", "")
    found = Attacked(window, outside)
    made = window.ask("/api/projects", "POST", b'{"name": "cats"}', **JSON)
    found.project = json.loads(made[2])["id"]
    found.before = contents(outside)
    yield found
    assert "Traceback" not in window.end()


def fill(path: str, attacked: Attacked) -> str:
    return path.replace("PROJECT", attacked.project).replace("RUN", attacked.run).replace("OUTSIDE", str(attacked.outside))


CLIMBS = (
    "..%2f..%2foutside%2fsecret.txt",
    "%2e%2e%2f%2e%2e%2foutside%2fsecret.txt",
    "..%252f..%252foutside%252fsecret.txt",
    "..%5c..%5coutside%5csecret.txt",
    "%c0%ae%c0%ae/%c0%ae%c0%ae/outside/secret.txt",
    "....//....//outside/secret.txt",
    "..%00/secret.txt",
    "%2fetc%2fpasswd",
    "C:%5cwindows%5cwin.ini",
    "%5c%5cserver%5cshare%5cx.png",
)
READS: tuple[tuple[str, int], ...] = (
    *((f"/api/runs/{climb}/status", 404) for climb in CLIMBS),
    *((f"/api/runs/RUN/samples/{climb}", 404) for climb in CLIMBS),
    *((f"/api/projects/PROJECT/thumb/{climb}", 404) for climb in CLIMBS),
    ("/api/runs/RUN/samples/planted.png", 404),
    ("/api/runs/RUN/samples/..%2fnotes.txt", 404),
    ("/api/runs/RUN/samples/.", 404),
    ("/api/runs/RUN/download?step=../../x", 422),
    ("/api/runs/RUN/download?step=-1", 404),
    ("/api/runs/RUN/status?since=-5", 422),
    ("/api/runs/RUN/status?since=1e3x", 422),
    ("/api/projects/%2e%2e", 404),
    ("/api/projects/..%2f..%2foutside/images", 404),
    ("/api/studio/pictures/..%2f..%2fsecret.png", 404),
    ("/api/studio/../../etc/passwd", 404),
    ("/api/studio/1e9", 422),
    ("/web/../app/server.py", 404),
    ("/web/%2e%2e/server.py", 404),
    ("/web/..%2fserver.py", 404),
    ("/web//etc/passwd", 404),
    # What has been found in Gradio over the years, and all else that it brings.
    ("/file=/etc/passwd", 404),
    ("/file=OUTSIDE/secret.txt", 404),
    ("/gradio_api/file=OUTSIDE/secret.txt", 404),
    ("/gradio_api/file/OUTSIDE/secret.txt", 404),
    ("/gradio_api/file=http://169.254.169.254/latest/meta-data/", 404),
    ("/gradio_api/proxy=http://169.254.169.254/latest/meta-data/", 404),
    ("/proxy=http://127.0.0.1:22/", 404),
    ("/static/..%2f..%2f..%2fetc%2fpasswd", 404),
    ("/static/%2fetc%2fpasswd", 404),
    ("/assets/..%2f..%2fconfig.json", 404),
    ("/custom_component/x/client/component/..%2f..%2fx", 404),
    ("/gradio_api/custom_component/x/client/component/index.js", 404),
    ("/svelte/..%2f..%2fetc%2fpasswd", 404),
    ("/gradio_api/info", 404),
    ("/gradio_api/deep_link?session_hash=x", 404),
    ("/gradio_api/stream/x/1/2/playlist.m3u8", 404),
    ("/gradio_api/queue/data?session_hash=x", 404),
    ("/gradio_api/heartbeat/x", 404),
    ("/config", 404),
    ("/monitoring", 404),
    ("/openapi.json", 404),
    ("/docs", 404),
    ("/dev/reload", 404),
)
CALL = {"data": [{"path": "http://169.254.169.254/", "url": "file:///etc/passwd", "meta": {"_type": "gradio.FileData"}}]}
WRITES: tuple[tuple[str, str, Any, int], ...] = (
    ("POST", "/gradio_api/upload", b"--b\r\n", 404),
    ("POST", "/upload", b"--b\r\n", 404),
    ("POST", "/gradio_api/queue/join", {**CALL, "fn_index": 0, "session_hash": "x"}, 404),
    ("POST", "/gradio_api/run/predict", CALL, 404),
    ("POST", "/gradio_api/call/predict", CALL, 404),
    (
        "POST",
        "/gradio_api/component_server",
        {"data": "OUTSIDE/secret.txt", "component_id": "1", "fn_name": "ls"},
        404,
    ),
    ("POST", "/login", {"username": "x", "password": "y"}, 404),
    ("POST", "/", {}, 404),
    ("DELETE", "/api/projects/..", None, 404),
    ("DELETE", "/api/projects/%2e%2e%2f%2e%2e%2foutside", None, 404),
    ("DELETE", "/api/runs/..", None, 404),
    ("DELETE", "/api/runs/..%2f..%2foutside", None, 404),
    ("DELETE", "/api/runs/RUN/samples/00000001_00.png", None, 404),
    ("POST", "/api/runs/..%2f..%2foutside/resume", None, 404),
    ("POST", "/api/runs/RUN/shell", None, 404),
    ("PUT", "/api/projects/PROJECT/source", {"folder": "http://169.254.169.254/"}, 422),
    ("PUT", "/api/projects/PROJECT/source", {"folder": "\\\\server\\share"}, 422),
    ("PUT", "/api/projects/PROJECT/source", {"folder": "OUTSIDE/secret.txt"}, 400),
    ("PUT", "/api/projects/PROJECT/source", {"folder": ["a"]}, 422),
    ("PATCH", "/api/projects/PROJECT", {"preset": "OUTSIDE/secret.toml"}, 422),
    ("PATCH", "/api/projects/PROJECT", {"preset": "../../outside/secret"}, 422),
    ("POST", "/api/projects/PROJECT/runs", {"preset": "OUTSIDE/secret.toml"}, 422),
    ("POST", "/api/projects/PROJECT/runs", {"settings": {"output": {"name": "../../../outside/x"}}}, 422),
    ("POST", "/api/projects/PROJECT/runs", {"settings": {"output": "x"}}, 422),
    ("PUT", "/api/projects/PROJECT/captions", {"../../../outside/secret.txt": "gone"}, 404),
    ("PUT", "/api/projects/PROJECT/excluded", {"excluded": "all"}, 422),
    ("POST", "/api/projects", {"name": ""}, 422),
    ("POST", "/api/projects", {"name": "x" * 100_000}, 422),
    ("POST", "/api/projects", {"name": 10**400}, 422),
    ("POST", "/api/projects", b"[" * 100_000, 400),
    ("POST", "/api/projects", b"\xff\xfe{}", 422),
    ("POST", "/api/projects", b'{"name": NaN}', 422),
    ("POST", "/api/studio", {"run": "../../outside", "prompt": "x"}, 422),
    ("POST", "/api/sample", b"", 403),  # with a foreign origin, below
)


@pytest.mark.parametrize(("path", "status"), READS)
def test_nothing_else_is_read(path: str, status: int, attacked: Attacked) -> None:
    found, _, body = attacked.window.ask(fill(path, attacked))
    assert found == status, body[:300]
    assert SECRET not in body and b"root:" not in body and b"Traceback" not in body


@pytest.mark.parametrize(("method", "path", "body", "status"), WRITES)
def test_nothing_else_is_changed(method: str, path: str, body: Any, status: int, attacked: Attacked) -> None:
    data = body if isinstance(body, bytes) else b"" if body is None else fill(json.dumps(body), attacked).encode()
    headers = {**JSON, "Origin": "https://evil.example"} if status == 403 else FORM if data.startswith(b"--b") else JSON
    found, _, answer = attacked.window.ask(fill(path, attacked), method, data, **headers)
    assert found == status, answer[:300]
    assert SECRET not in answer and b"Traceback" not in answer
    assert contents(attacked.outside) == attacked.before


HEADERS: tuple[tuple[dict[str, str], int], ...] = (
    ({"Host": "evil.example"}, 421),
    ({"Host": "127.0.0.1"}, 421),
    ({"Host": "127.0.0.1.evil.example:PORT"}, 421),
    ({"Host": "localhost.evil.example:PORT"}, 421),
    ({"Host": "127.1:PORT"}, 421),
    ({"Host": "2130706433:PORT"}, 421),
    ({"Host": "0.0.0.0:PORT"}, 421),
    ({"Host": "127.0.0.1:PORT@evil.example"}, 421),
    ({"Host": ""}, 421),
    ({"Origin": "null"}, 403),
    ({"Origin": "https://127.0.0.1:PORT"}, 403),
    ({"Origin": "http://127.0.0.1:PORT.evil.example"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "file://"}, 403),
    ({"Origin": "http://localhost:PORT/", "Host": "127.0.0.1:PORT"}, 403),
    ({"Sec_Fetch_Site": "cross-site"}, 403),
    ({"Sec_Fetch_Site": "same-site"}, 403),
    ({"X_Forwarded_Host": "127.0.0.1:PORT", "Host": "evil.example"}, 421),
)


@pytest.mark.parametrize(("headers", "status"), HEADERS)
def test_who_asks_is_looked_at_on_every_route(headers: dict[str, str], status: int, attacked: Attacked) -> None:
    sent = {name: value.replace("PORT", str(attacked.window.port)) for name, value in headers.items()}
    for method, path in (("GET", "/api/projects"), ("POST", "/api/projects"), ("GET", "/api/runs/r/samples/00000001_00.png")):
        assert attacked.window.ask(path, method, b'{"name": "evil"}' if method == "POST" else b"", **sent, **JSON)[0] == status
    listed = json.loads(attacked.window.ask("/api/projects")[2])["projects"]
    assert "evil" not in [project["name"] for project in listed]


HOST = b"Host: 127.0.0.1:%d\r\n"
RAW: tuple[tuple[bytes, tuple[int, ...]], ...] = (
    (b"GET / HTTP/1.1\r\nHost: evil.example\r\nHost: 127.0.0.1:%d\r\n\r\n", (400, 421)),
    (b"GET / HTTP/1.1\r\n\r\n", (400, 421)),
    (b"GET /api/projects HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 200_000 + b"\r\n\r\n", (400, 431)),
    (b"POST /api/projects HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", (400,)),
    (b"POST /api/projects HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\nabcde", (400,)),
    (b"POST /api/projects HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n0\r\n\r\n", (400,)),
    (b"GET /api/projects\x00/x HTTP/1.1\r\n" + HOST + b"\r\n", (400, 404)),
    (b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", (400, 404)),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
)


@pytest.mark.parametrize(("request_", "statuses"), RAW)
def test_what_is_no_proper_http_is_refused(request_: bytes, statuses: tuple[int, ...], attacked: Attacked) -> None:
    answer = raw(attacked.window.port, request_.replace(b"%d", str(attacked.window.port).encode()))
    assert int(answer.split()[1]) in statuses, answer[:200]
    assert SECRET not in answer


def test_uploads_cannot_climb_or_burst(attacked: Attacked) -> None:
    window, path = attacked.window, f"/api/projects/{attacked.project}/images"
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\nx\r\n'
    for name in (
        b"../../../outside/x.txt",
        b"/etc/x.txt",
        b"..\\..\\x.txt",
        b"C:\\x.txt",
        b"a/../../../x.txt",
        b"con.txt\x00.png",
    ):
        status, _, answer = window.ask(path, "POST", part % name + b"--b--\r\n", **FORM)
        assert status in (200, 400), answer
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../../outside/climbed.txt", b"x")
        archive.writestr("zeros.png", bytes(200_000_000))
    body = part.replace(b"x\r\n", b"") % b"bomb.zip" + bomb.getvalue() + b"\r\n--b--\r\n"
    status, _, answer = window.ask(path, "POST", body, **FORM)
    told = json.loads(answer)
    assert status == 413 or (told["saved"] == ["outside/climbed.txt"] and told["rejected"]), answer
    stored = [item for item in (window.home / "projects").rglob("*") if item.is_file()]
    assert all(item.stat().st_size < 1_000_000 for item in stored)
    assert contents(attacked.outside) == attacked.before
    assert not Path("/etc/x.txt").exists()


def test_after_all_that_the_window_answers(attacked: Attacked) -> None:
    assert attacked.window.ask("/api/projects")[0] == 200
    assert attacked.window.ask(f"/api/runs/{attacked.run}/samples/00000001_00.png")[0] == 200


ODD: tuple[Any, ...] = (
    *("", " ", "..", "../..", "/", "/etc/passwd", "a" * 5000, "%00", "\x00", "\n", "💥", "\ud800", "<script>", "${jndi:x}"),
    *(None, True, -1, 0, 1.5, 10**30, 1e308, [], {}, [[[[]]]], {"a": {"b": {"c": None}}}, [None] * 50, "NaN", "r", "cats"),
)


def test_a_fuzz_over_every_endpoint(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 950 requests of odd values from a fixed seed: never a mistake of the window's, and nothing outside its home."""
    from tests.app.test_server import flat

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_bytes(SECRET)
    monkeypatch.setattr("app.runs.start_process", lambda *given: None)
    monkeypatch.chdir(outside)
    make_run(home, "r", ['{"type": "stage", "time": 1.0, "name": "scan"}'])
    app = make_app(home, 7860)
    client = TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False)
    client.post("/api/projects", json={"name": "cats"})
    listed = [(method, route.path) for route in flat(app.routes) for method in sorted(route.methods or ())]
    dice = random.Random(5)
    wrong = []
    for number in range(1000):
        method, path = listed[number % len(listed)]
        if path in ("/api/sample",) or path.endswith("/measure"):
            continue
        known = {"project_id": "cats", "run_id": "r"}
        values = {name: known.get(name) if dice.random() < 0.6 else None for name in re.findall(r"{(\w+)", path)}
        for name, value in values.items():
            path = re.sub(rf"{{{name}(:path)?}}", lambda _, v=value: odd_text(dice) if v is None else v, path)  # type: ignore[misc]
        keys = (
            "name",
            "trigger",
            "preset",
            "recipe",
            "settings",
            "folder",
            "excluded",
            "captions",
            "force",
            "run",
            "prompt",
            "x",
        )
        body = (
            {key: dice.choice(ODD) for key in dice.sample(keys, dice.randint(0, 6))}
            if dice.random() < 0.8
            else dice.choice(ODD)
        )
        query = {key: odd_text(dice) for key in dice.sample(("since", "step", "size", "token", "x"), dice.randint(0, 2))}
        data = json.dumps(body).encode()
        answer = client.request(method, path, params=query, content=data, headers={"Content-Type": "application/json"})
        if answer.status_code >= 500 or SECRET in answer.content or b"Traceback" in answer.content:
            wrong.append((method, path[:100], query, data[:200], answer.status_code, answer.text[:200]))
        if not client.get("/api/projects/cats").is_success:
            client.post("/api/projects", json={"name": "cats"})
    assert wrong == []
    assert contents(outside).keys() == {"secret.txt"}


KEYS = ("name", "trigger", "preset", "recipe", "settings", "folder", "excluded", "captions", "force", "run", "prompt", "x")


def odd_text(dice: random.Random) -> str:
    """An odd value as it may stand in an address."""
    from urllib.parse import quote

    return quote(str(dice.choice(ODD)).encode("utf-8", "surrogatepass"), safe="/." if dice.random() < 0.3 else "")
