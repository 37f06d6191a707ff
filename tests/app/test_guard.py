"""The guard refuses foreign names, foreign pages and strangers, and lets our own page and local scripts through."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from app import guard
from app.guard import COOKIE, Guard, local_hosts
from tests.app_client import finish

PORT = 7860
OWN = f"127.0.0.1:{PORT}"
PASSWORD = "quiet brown fox"
PROTECTION = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.fixture(scope="module", autouse=True)
def _slow_once() -> Iterator[None]:
    """The cookie's value is slow to make on purpose; each password's is made once here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "_session_of", functools.cache(guard._session_of))
        yield


class Answer:
    """What came out of one request: status (0 for a web socket that was let through), headers, body, and what the app saw."""

    def __init__(self, messages: list[dict[str, Any]], seen: list[dict[str, Any]]) -> None:
        self.messages = messages
        self.seen = seen
        self.status = messages[0].get("status", 0) if messages else 0
        self.headers = {
            key.decode().lower(): value.decode() for key, value in (messages[0].get("headers", []) if messages else [])
        }
        self.body = b"".join(message.get("body", b"") for message in messages)

    @property
    def passed(self) -> bool:
        return bool(self.seen)


def ask(path: str = "/", method: str = "GET", *, kind: str = "http", password: str | None = None, **headers: str) -> Answer:
    """Sends one request straight into a Guard; header names with _ for -, Host is our own unless told."""
    pairs = {"host": OWN, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return ask_raw(path, method, [(k.encode(), v.encode()) for k, v in pairs.items()], kind=kind, password=password)


def ask_raw(
    target: str, method: str, headers: list[tuple[bytes, bytes]], *, kind: str = "http", password: str | None = None
) -> Answer:
    seen: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"ALLOWALL")]})
            await send({"type": "http.response.body", "body": b"inside"})
        else:
            await send({"type": "websocket.accept"})

    async def receive() -> dict[str, Any]:
        raise AssertionError("the guard reads no body")

    async def send(message: Any) -> None:
        messages.append(message)

    path, _, query = target.partition("?")
    scope = {"type": kind, "method": method, "path": path, "query_string": query.encode(), "headers": headers}
    if kind == "websocket":
        del scope["method"]
    finish(Guard(app, local_hosts(PORT), password)(scope, receive, send))  # type: ignore[arg-type]
    return Answer(messages, seen)


@pytest.mark.parametrize("host", [OWN, f"localhost:{PORT}", f"[::1]:{PORT}", f"LOCALHOST:{PORT}"])
def test_our_own_names_are_let_through(host: str) -> None:
    assert ask(host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:7861", f"localhost.evil.example:{PORT}", "",
     f"127.0.0.1:{PORT}@evil.example", f"localhost.:{PORT}", f"0.0.0.0:{PORT}", f"[::ffff:127.0.0.1]:{PORT}"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_another_host_is_refused(host: str, kind: str) -> None:
    answer = ask("/api/projects", host=host, kind=kind)
    assert not answer.passed
    assert answer.status == 421 if kind == "http" else answer.messages[0]["type"] == "websocket.close"


def test_no_host_and_two_hosts_are_refused() -> None:
    assert ask_raw("/", "GET", []).status == 421
    assert ask_raw("/", "GET", [(b"host", OWN.encode()), (b"host", b"evil.example")]).status == 421


def test_at_port_80_the_host_has_no_port() -> None:
    assert {"localhost", "localhost:80", "[::1]", "[::1]:80"} <= local_hosts(80)
    assert "localhost" not in local_hosts(7860)


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", f"https://{OWN}", "http://127.0.0.1:7861", f"http://{OWN}.evil.example", f"file://{OWN}",
     "http://localhost", f"http://{OWN}/", "", OWN],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_foreign_origin_is_refused(origin: str, method: str) -> None:
    answer = ask("/api/projects", method, origin=origin)
    assert not answer.passed and answer.status == 403
    assert json.loads(answer.body)["what"]


def test_our_own_origins_are_let_through_under_any_of_our_names() -> None:
    assert all(ask("/", "POST", origin=f"http://{host}").status == 200 for host in local_hosts(PORT))


def test_a_web_socket_of_another_page_is_not_opened() -> None:
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}):
        answer = ask("/ws", kind="websocket", **headers)
        assert not answer.passed and [message["type"] for message in answer.messages] == ["websocket.close"]
    assert ask("/ws", kind="websocket", origin=f"http://{OWN}", sec_fetch_site="same-origin").passed


@pytest.mark.parametrize("site", ["cross-site", "same-site", "made-up"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_another_site_changes_nothing_even_without_an_origin(site: str, method: str) -> None:
    assert ask("/", method, sec_fetch_site=site).status == 403


@pytest.mark.parametrize("path", ["/api", "/api/projects", "/gradio_api/info"])
def test_another_site_reads_no_data_route(path: str) -> None:
    assert ask(path, sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document").status == 403
    assert ask(path, sec_fetch_site="same-site", sec_fetch_mode="no-cors", sec_fetch_dest="image").status == 403
    assert ask(path, sec_fetch_site="same-origin", sec_fetch_mode="cors").status == 200


def test_a_link_on_another_site_opens_the_page_but_nothing_can_embed_it() -> None:
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert ask("/", **link, sec_fetch_dest="document").status == 200
    assert ask("/apiary", **link, sec_fetch_dest="document").status == 200
    assert ask("/", **link, sec_fetch_dest="iframe").status == 403
    assert ask("/assets/x.js", sec_fetch_site="cross-site", sec_fetch_mode="no-cors", sec_fetch_dest="script").status == 403


def test_scripts_without_browser_headers_are_let_through() -> None:
    assert ask("/api/projects", "POST").status == 200


def test_every_answer_carries_the_protecting_headers_once() -> None:
    for answer in (ask("/"), ask("/", host="evil"), ask("/", origin="null"), ask("/", password=PASSWORD)):
        names = [key.decode().lower() for key, _ in answer.messages[0]["headers"]]
        assert {name: answer.headers[name] for name in PROTECTION} == PROTECTION
        assert names.count("x-frame-options") == 1


def test_what_a_proxy_would_say_never_reaches_the_app() -> None:
    lies = {"X-Forwarded-Host": "evil", "x-forwarded-proto": "https", "X-FORWARDED-FOR": "1.2.3.4", "Forwarded": "host=evil"}
    sent = [(b"host", OWN.encode()), (b"accept", b"*/*"), *((k.encode(), v.encode()) for k, v in lies.items())]
    answer = ask_raw("/", "GET", sent)
    assert answer.seen[0]["headers"] == [(b"host", OWN.encode()), (b"accept", b"*/*")]


def test_start_up_messages_pass() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    finish(Guard(app, local_hosts(PORT), PASSWORD)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_SECONDS_A_GUESS", 0.0)


def session() -> str:
    """The cookie that the right token is exchanged for."""
    return ask(f"/?token={PASSWORD.replace(' ', '+')}", password=PASSWORD).headers["set-cookie"].split(";")[0]


def test_the_token_is_exchanged_for_a_strict_cookie_and_leaves_the_address() -> None:
    answer = ask("/studio?run=3&token=quiet%20brown%20fox", password=PASSWORD)
    assert not answer.passed and answer.status == 303
    assert answer.headers["location"] == "/studio?run=3"
    name_and_value, *attributes = answer.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert PASSWORD not in name_and_value and len(name_and_value) > 40
    assert answer.headers["cache-control"] == "no-store"


def test_the_cookie_opens_everything_and_outlives_a_restart() -> None:
    for kind in ("http", "websocket"):  # each request meets a new Guard
        assert ask("/api/projects", "POST", kind=kind, password=PASSWORD, cookie=f"theme=dark; {session()}").passed


def test_another_password_ends_the_old_cookies() -> None:
    assert ask("/", password="another password", cookie=session()).status == 401


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("target", "headers"),
    [("/", {}), ("/api/instance", {}), ("/?token=wrong", {}), ("/?token=", {}), ("/?token=quiet+brown+fo", {}),
     ("/?token=wrong&token=quiet+brown+fox", {}), ("/", {"cookie": f"{COOKIE}="}), ("/", {"cookie": f"{COOKIE}=abc"}),
     ("/", {"cookie": f"{COOKIE}={PASSWORD}"}), ("/", {"authorization": f"Bearer {PASSWORD}"}), ("/?token=%ff", {})],
)  # fmt: skip
def test_everything_else_is_401(target: str, headers: dict[str, str]) -> None:
    answer = ask(target, password=PASSWORD, **headers)
    assert not answer.passed and answer.status == 401
    assert "set-cookie" not in answer.headers


def test_without_the_cookie_no_web_socket_opens_and_nothing_is_posted() -> None:
    assert ask("/ws", kind="websocket", password=PASSWORD).messages[0]["type"] == "websocket.close"
    assert ask("/?token=quiet+brown+fox", "POST", password=PASSWORD).status == 401


def test_the_right_token_from_another_name_is_refused_all_the_same() -> None:
    assert ask("/?token=quiet+brown+fox", password=PASSWORD, host="evil.example").status == 421
    assert ask("/", password=PASSWORD, cookie=session(), origin="https://evil.example").status == 403


def test_the_exchange_leads_to_no_other_server() -> None:
    for path in ("//evil.example/", "/\\evil.example", "///evil.example"):
        location = ask(f"{path}?token=quiet+brown+fox", password=PASSWORD).headers["location"]
        assert location.startswith("/") and not location.startswith(("//", "/\\"))


def test_after_a_link_elsewhere_the_exchange_is_a_page_since_a_redirect_would_lose_the_cookie() -> None:
    answer = ask("/?token=quiet+brown+fox", password=PASSWORD, sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert answer.status == 200 and COOKIE in answer.headers["set-cookie"]
    assert b'content="0;url=/"' in answer.body


def test_a_browser_gets_a_form_and_a_script_json() -> None:
    form = ask("/", password=PASSWORD, accept="text/html,*/*")
    assert form.status == 401 and b'name="token"' in form.body
    assert "password" in json.loads(ask("/api/projects", password=PASSWORD).body)["what"]


def test_guessing_is_slow_over_any_number_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_SECONDS_A_GUESS", 0.05)
    door = Guard(lambda *_: None, local_hosts(PORT), PASSWORD)  # type: ignore[arg-type, return-value]
    headers = [(b"host", OWN.encode())]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"token=guess", "headers": headers}

    async def ignore(_message: Any) -> None: ...

    async def guess_together() -> None:
        await asyncio.gather(*(door(scope, None, ignore) for _ in range(6)))  # type: ignore[arg-type]

    begin = time.monotonic()
    finish(guess_together())
    assert time.monotonic() - begin >= 0.3


def test_passwords_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    real = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    ask("/?token=quiet+brown+fox", password=PASSWORD, cookie=f"{COOKIE}=x")
    assert len(compared) == 2
