"""What every route does: reads no endless body, and answers a refusal or an error of the disk in words."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from app.answers import SettingsAnswer
from app.image_list import answer_problem
from app.refusals import Refusal, disk_refusal

BODY_BYTES = 16 << 20
"""The largest body that is read into memory: captions of a thousand pictures are 1 MB. Uploads have their own limits."""


class Route(APIRoute):
    """A route as above."""

    is_limited = True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request to this route."""
        handle = super().get_route_handler()

        async def handle_in_words(request: Request) -> Response:
            if self.is_limited:
                request = Request(request.scope, _limited(request))
            try:
                return await handle(request)
            except Refusal as error:
                return _refused(error)
            except OSError as error:
                return _refused(disk_refusal(error))

        return handle_in_words


class UploadRoute(Route):
    """A route whose endpoint reads its body as it comes, within limits of its own."""

    is_limited = False


def _limited(request: Request) -> Receive:
    """The request's `receive`, which raises HTTPException 413 as soon as more than BODY_BYTES are announced or have come."""
    length, arrived = request.headers.get("content-length", ""), 0

    async def receive() -> Message:
        nonlocal arrived
        if length.isdecimal() and int(length) > BODY_BYTES:
            raise _too_large()
        message = await request.receive()
        arrived += len(message.get("body", b""))
        if arrived > BODY_BYTES:
            raise _too_large()
        return message

    return receive


def _too_large() -> HTTPException:
    return HTTPException(413, f"More than {BODY_BYTES >> 20} MiB in one request: send it in parts")


def _refused(error: Refusal) -> Response:
    listed = [answer_problem(problem) for problem in error.problems]
    answer = SettingsAnswer(what=error.what, where=error.where, hint=error.hint, problems=listed)
    return JSONResponse(answer.model_dump(), status_code=error.status)
