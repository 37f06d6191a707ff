"""Lets only the page's own files through to Gradio, which brings some sixty routes of its own with every page.

Its past holes lay in those: files read through /file= (CVE-2023-51449), through /component_server (CVE-2024-1561) and by
a path put into a call's data (CVE-2024-1728), other sites asked in the server's name by an address put there
(CVE-2024-4325). Our screens speak to our own routes alone, so all of these are closed, and what a later Gradio adds too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_FILES = frozenset(("/", "/theme.css", "/favicon.ico", "/manifest.json", "/pwa_icon"))
_FOLDERS = ("/assets/", "/static/")


class PageDoor:
    """ASGI application in front of Gradio's: reads of the page's files pass, everything else is 404."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on or answers it; start-up and shut-down messages pass as they are."""
        if scope["type"] == "lifespan" or _is_file_of_page(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "There is nothing here"})
            return
        body = json.dumps({"what": "There is nothing here", "where": scope["path"][:200], "hint": "", "problems": []}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _is_file_of_page(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    path: str = scope["path"]
    plain = ".." not in path and "\\" not in path and "//" not in path and "\0" not in path and ":" not in path
    return plain and (path in _FILES or path.startswith(_FOLDERS))
