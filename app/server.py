"""The window's server: FastAPI with the guard in front, our own routes, and uvicorn on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pydantic import BaseModel

from app.guard import MIN_PASSWORD, Guard, local_hosts
from app.instance import FIRST_PORT, Browser, Instance, Running, WindowError, bind, claim, open_page
from trainers.errors import Problem, TrainingError
from trainers.run_folder import absolute

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

LOOPBACK = "127.0.0.1"
_log = logging.getLogger(__name__)


class ErrorAnswer(BaseModel):
    """What every refused or failed request is answered with."""

    what: str
    """What happened, as one plain sentence."""
    where: str = ""
    """The field, file or folder it is about."""
    hint: str = ""
    """What to do about it."""
    problems: list[dict[str, str]] = []
    """The same for each field, where several are wrong: severity, what, where, hint."""


class InstanceAnswer(BaseModel):
    """Tells a second start that this is the window it looks for."""

    id: str


def make_app(
    home: Path, port: int, password: str | None = None, *, hosts: frozenset[str] | None = None, instance: str = ""
) -> FastAPI:
    """All routes for a home folder, without the page, answering as `hosts` (by default the loopback names at `port`).

    `instance` is the id that GET /api/instance tells. Nothing is started and no port opened.
    """
    from fastapi import FastAPI

    from app.routes import router

    _set_environment(home)
    app = FastAPI(title="Impasto", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts or local_hosts(port), password=password)
    _answer_errors(app)

    @app.get("/api/instance")
    def show_instance() -> InstanceAnswer:
        """Which window this is."""
        return InstanceAnswer(id=instance)

    app.include_router(router(home))
    return app


def _set_environment(home: Path) -> None:
    """Before Gradio is imported: it asks its makers for a newer version, and keeps uploads where every program reads."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(home / "window" / "gradio")


def _answer_errors(app: FastAPI) -> None:
    """Every error leaves as ErrorAnswer, never as a traceback or in a framework's own words."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(status: int, what: str, where: str = "", hint: str = "", problems: Iterable[Problem] = ()) -> JSONResponse:
        listed = [asdict(problem) for problem in problems]
        told = ErrorAnswer(what=what, where=where, hint=hint, problems=listed)
        return JSONResponse(told.model_dump(), status_code=status)

    @app.exception_handler(TrainingError)
    def told(_request: Request, error: TrainingError) -> JSONResponse:
        status, problems = int(getattr(error, "status", 400)), getattr(error, "problems", ())
        return answer(status, error.what, error.where, error.hint, problems)

    @app.exception_handler(HTTPException)
    def refused(_request: Request, error: HTTPException) -> JSONResponse:
        response = answer(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        fields = [(str(found["msg"]), ".".join(str(part) for part in found["loc"][1:])) for found in error.errors()]
        problems = [Problem("error", what, where) for what, where in fields]
        return answer(422, problems[0].what, problems[0].where, problems=problems)

    @app.exception_handler(Exception)
    def broken(_request: Request, error: Exception) -> JSONResponse:
        hint = "This is a fault of the program: please report it with what the terminal shows."
        response = answer(500, f"The window made a mistake: {error or type(error).__name__}", type(error).__name__, hint)
        response.headers["X-Content-Type-Options"] = "nosniff"  # this one answer is made outside the guard
        return response


def serve(
    home: Path,
    port: int = FIRST_PORT,
    listen: str = LOOPBACK,
    browser: Browser = "tab",
    password: str | None = None,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Opens the window for `home` and serves it until Ctrl-C; where it is open already, shows that one and returns.

    Listens at the first free port from `port` on. Raises WindowError when another address than this machine's own is
    asked for without a password, and for all that `claim` and `bind` raise it.
    """
    home = absolute(home)
    check_listen(listen, password)
    claimed = claim(home)
    if isinstance(claimed, Running):
        shown = open_page(claimed.url, browser, home)
        say(f"Impasto is open already, at {claimed.url}" + ("" if shown or browser == "none" else ". Open it in a browser."))
        return
    try:
        _serve_claimed(claimed, home, port, listen, browser, password, say)
    finally:
        claimed.release()


def _serve_claimed(
    claimed: Instance,
    home: Path,
    wanted: int,
    listen: str,
    browser: Browser,
    password: str | None,
    say: Callable[[str], None],
) -> None:
    import uvicorn

    from app.ui import mount_screens

    with bind(listen, wanted) as sock:
        port = int(sock.getsockname()[1])
        hosts = local_hosts(port, own_names(listen))
        url = _url(listen, port)
        app = make_app(home, port, password, hosts=hosts, instance=claimed.id)
        mount_screens(app)
        config = uvicorn.Config(
            app,
            proxy_headers=False,  # there is no proxy: what such headers tell is made up
            server_header=False,
            access_log=False,  # it would write the password's token down
            log_level="warning",
            timeout_graceful_shutdown=3,  # event streams of open pages never end by themselves
        )

        def opened() -> None:
            try:
                claimed.publish(url)
            except OSError as error:  # the window works all the same; only a second start will not find it
                _log.warning("The window's address cannot be written down: %s", error)
            token = f"?token={quote(password, safe='')}" if password is not None else ""
            moved = f" Port {wanted} is taken." if port != wanted else ""
            say(f"Impasto is at {url}{token} (Ctrl-C closes it; a training goes on).{moved}")
            open_page(url + token, browser, home)

        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean end
            asyncio.run(_run(uvicorn.Server(config), sock, opened))


async def _run(server: uvicorn.Server, sock: socket.socket, opened: Callable[[], None]) -> None:
    """Serves, and calls `opened` once requests are answered."""
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        await asyncio.to_thread(opened)
    await serving


def check_listen(listen: str, password: str | None) -> None:
    """Raises WindowError when others could reach the window without a good password."""
    if not _is_loopback(listen) and password is None:
        hint = "Add --password, and give it to those who may use this window."
        raise WindowError("Others in the network could use this window", f"--listen {listen}", hint)
    if password is not None and len(password) < MIN_PASSWORD:
        raise WindowError("The password is too short", "--password", f"Use {MIN_PASSWORD} characters or more.")


def _is_loopback(listen: str) -> bool:
    if listen == "localhost":
        return True
    try:
        return ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return False


def own_names(listen: str) -> list[str]:
    """Names and addresses under which this machine is reached at `listen`; 0.0.0.0 and :: mean all that it has."""
    if _is_loopback(listen):
        return [listen]
    host = socket.gethostname().lower()
    names = {host, f"{host.removesuffix('.local')}.local"}
    if listen not in ("0.0.0.0", "::"):
        return sorted({*names, listen})
    import psutil

    for entry in (entry for entries in psutil.net_if_addrs().values() for entry in entries):
        # A scope ("%eth0") is no part of a Host header; hardware addresses stand in the same list.
        with contextlib.suppress(ValueError):
            names.add(str(ipaddress.ip_address(entry.address.split("%")[0])))
    return sorted(names)


def _url(listen: str, port: int) -> str:
    """The address to open on this machine."""
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(listen, listen)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
