"""Refuses what does not come from our own page: foreign Host, foreign Origin, other sites, and, with a password, strangers.

A program on a loopback address can be reached by every web page that the person has open: by its name made to point
here (DNS rebinding), by a form that posts across sites, by a picture address. Gradio refuses none of these, so this
stands in front of every route, its own too. Pure ASGI: nothing is buffered, uploads and event streams pass through.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "impasto_session"
MIN_PASSWORD = 8
"""Characters that a password must have at least."""
_COOKIE_SECONDS = 30 * 24 * 3600
# A guesser in the local network gets two tries a second, however many connections are opened.
_SECONDS_A_GUESS = 0.5
_ADDED = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
# What a proxy would tell; there is none, so whoever sends it lies, and Gradio believes it.
_STRIPPED = (b"forwarded", b"x-real-ip", b"x-original-url", b"x-rewrite-url")
# Routes that answer a program, not a person: no link elsewhere has a reason to lead to them.
_DATA_ROUTES = ("/api", "/gradio_api")


def local_hosts(port: int, names: Iterable[str] = ()) -> frozenset[str]:
    """What a Host header may say: this machine's loopback names at `port`, and further `names` (no port, IPv6 bare)."""
    written = [f"[{name}]" if ":" in name else name.lower() for name in ("127.0.0.1", "localhost", "::1", *names)]
    # Browsers leave http's own port away.
    return frozenset([f"{name}:{port}" for name in written] + (written if port == 80 else []))


class Guard:
    """ASGI middleware that lets through only requests of our own page, of the person, and of local scripts.

    Answers 421 to a Host not in `hosts` ("name:port", lower case), 403 to an Origin that is none of them and to what
    other sites start, except following a link to a page. With a `password` everything else is 401 until `?token=` with
    it came once: that is answered by a cookie and the same address without the token. The cookie outlives a restart.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], password: str | None = None) -> None:
        self.app = app
        self.hosts = hosts
        self.password = password
        self.session = _session_of(password) if password is not None else ""
        self._guesses = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on without proxy headers, or answers it. Start-up and shut-down messages pass as they are."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused:
            await _answer(scope, send, refused[0], refused[1])
        elif self.password is None or _same(_cookie(scope), self.session):
            await self.app(_without_proxy_headers(scope), receive, _with_headers(send))
        else:
            await self._admit(scope, send)

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for a request of another name or site; None when it is ours."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421, "This address is not one of the window's own"
        origins = _values(scope, b"origin")
        if any(not self._is_ours(origin) for origin in origins) or len(origins) > 1:
            return 403, "Another web page tried to use the window"
        if _values(scope, b"sec-fetch-site") not in ([], ["same-origin"], ["none"]) and not _follows_link(scope):
            return 403, "Another web page tried to use the window"
        return None

    def _is_ours(self, origin: str) -> bool:
        scheme, _, host = origin.lower().partition("://")
        return scheme == "http" and host in self.hosts

    async def _admit(self, scope: Scope, send: Send) -> None:
        """Exchanges the right token for a cookie; anything else is answered by 401."""
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in query if name == "token"]
        if scope["type"] == "http" and scope["method"] == "GET" and tokens and self.password is not None:
            async with self._guesses:
                right = len(tokens) == 1 and _same(tokens[0], self.password)
                if not right:
                    await asyncio.sleep(_SECONDS_A_GUESS)
            if right:
                await _welcome(scope, send, [pair for pair in query if pair[0] != "token"], self.session)
                return
        await _answer(scope, send, 401, "This window asks for its password", form=True)


def _session_of(password: str) -> str:
    """The cookie's value: follows from the password, so that it outlives a restart, and is slow to guess back (0.1 s)."""
    return hashlib.scrypt(password.encode(), salt=b"impasto session", n=1 << 14, r=8, p=1, dklen=32).hex()


def _same(given: str, wanted: str) -> bool:
    """Equal, in a time that tells nothing about how much of it is."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode("utf-8", "surrogatepass"))


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key.lower() == name]


def _cookie(scope: Scope) -> str:
    """The session cookie's value, empty when there is none."""
    pairs = (part.strip().partition("=") for line in _values(scope, b"cookie") for part in line.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")


def _follows_link(scope: Scope) -> bool:
    """Whether another site only leads the person here: a GET that fills a whole tab with one of our pages."""
    path = scope["path"]
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and not any(path == route or path.startswith(f"{route}/") for route in _DATA_ROUTES)
        # Older browsers send the site without mode and destination.
        and all(mode == "navigate" for mode in _values(scope, b"sec-fetch-mode"))
        and all(goal == "document" for goal in _values(scope, b"sec-fetch-dest"))
    )


def _without_proxy_headers(scope: Scope) -> Scope:
    headers = [(k, v) for k, v in scope["headers"] if not k.lower().startswith(b"x-forwarded-") and k.lower() not in _STRIPPED]
    return {**scope, "headers": headers}


def _with_headers(send: Send) -> Send:
    """`send` that puts the protecting headers on every answer, in place of others of the same name."""
    names = {name for name, _ in _ADDED}

    async def guarded(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
            message = {**message, "headers": [*kept, *_ADDED]}
        await send(message)

    return guarded


async def _welcome(scope: Scope, send: Send, query: list[tuple[str, str]], session: str) -> None:
    """Sets the cookie and leads to the same address without the token."""
    # One slash in front: two would name another server.
    target = "/" + quote(scope["path"].lstrip("/\\"), safe="/-._~") + ("?" + urlencode(query) if query else "")
    cookie = f"{COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={_COOKIE_SECONDS}"
    headers = [(b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
    if _values(scope, b"sec-fetch-site") in ([], ["same-origin"], ["none"]):
        await _send_whole(send, 303, [*headers, (b"location", target.encode())], b"")
        return
    # After a link on another site a redirect still counts as that site's, and would come without the strict cookie.
    page = f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(target)}">'
    await _send_whole(send, 200, [*headers, (b"content-type", b"text/html; charset=utf-8")], page.encode())


_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Impasto</title><meta name="color-scheme" content="light dark">
<body style="font: 1.1rem sans-serif; max-width: 24rem; margin: 4rem auto; padding: 0 1rem">
<h1 style="font-size: 1.4rem">Impasto</h1><form method="get" action="/"><p><label for="token">Password</label></p>
<p><input id="token" name="token" type="password" autocomplete="current-password" autofocus required style="font: inherit">
<button style="font: inherit">Open</button></p></form></body></html>"""


async def _answer(scope: Scope, send: Send, status: int, what: str, *, form: bool = False) -> None:
    """Refuses: a form to a person's browser when `form`, else {what, where, hint} as JSON; a web socket is not opened."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": what})
        return
    headers = [(b"cache-control", b"no-store")]
    if form and scope["method"] == "GET" and any("text/html" in value for value in _values(scope, b"accept")):
        await _send_whole(send, status, [*headers, (b"content-type", b"text/html; charset=utf-8")], _FORM.encode())
        return
    hint = "Open the address that the program printed at its start."
    body = json.dumps({"what": what, "where": "", "hint": hint}).encode()
    await _send_whole(send, status, [*headers, (b"content-type", b"application/json")], body)


async def _send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    guarded = _with_headers(send)
    length = (b"content-length", str(len(body)).encode())
    await guarded({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await guarded({"type": "http.response.body", "body": body})
