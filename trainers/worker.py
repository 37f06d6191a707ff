"""The render worker: JSON lines in, pictures and JSON lines out, one base model kept warm, LoRA files swapped beside it.

`python -P -m trainers.worker` reads requests from stdin and writes events to stdout; all else that prints goes to stderr.

`{"do": "render", "id": 1, ...}` with the fields of RenderRequest draws; `{"do": "cancel", "id": 1}` abandons that again.
A render that says `"replaces": true` cancels all unfinished renders before it. The events of a request are `loading` (only
when something must be read), `step` with done and total (sampling steps of all its pictures), `picture` with cell (its
number, from 0), strength (its first LoRA's) and path, and one last of `done`, `cancelled`, or `failed` with what, where and
hint. `weigh` and `export`, with the fields of their requests, tell one `answer` before their last. The end of stdin ends the
worker and abandons what it draws.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import ValidationError

from trainers.cells import ExportRequest, RenderRequest, WeighRequest
from trainers.chores import do_chore
from trainers.draw_cells import answer
from trainers.errors import SettingError, TrainingError
from trainers.warm import Tell, Warm

Request = RenderRequest | WeighRequest | ExportRequest
_REQUESTS: dict[str, type[Request]] = {"render": RenderRequest, "weigh": WeighRequest, "export": ExportRequest}


class _Cancelled(Exception):
    """The request is no longer wanted. Raised inside of the renderer, between two sampling steps."""


def parse_request(message: Any) -> Request | int:
    """One line's JSON -> what to do, or the id to cancel. Raises SettingError naming the field that is wrong."""
    do = message.get("do") if isinstance(message, dict) else None
    try:
        if do in _REQUESTS:
            return _REQUESTS[do].model_validate(message)
        if do == "cancel" and type(message.get("id")) is int:
            return int(message["id"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(piece) for piece in first["loc"])
        raise SettingError(f"The renderer was asked wrongly: {first['msg']}", where=field) from error
    raise SettingError("The renderer was asked for what it does not know", hint="`do` is render, weigh, export or cancel.")


Waiting = queue.SimpleQueue[tuple[Request, threading.Event] | None]
"""Requests in the order they came, each with an event that is set when it has ended or nobody wants it; None at the end."""


def read_requests(lines: Iterable[bytes], waiting: Waiting, tell: Tell) -> None:
    """Takes every line in, while pictures are drawn, until there are no more; then abandons all. A bad one is told."""
    unfinished: dict[int, threading.Event] = {}
    drawings: set[int] = set()
    try:
        for line in lines:
            message: Any = None
            try:
                with contextlib.suppress(ValueError, RecursionError):
                    message = json.loads(line)
                request = parse_request(message)
            except TrainingError as error:
                number = message.get("id") if isinstance(message, dict) else None
                tell({"id": number if type(number) is int else None, **failure(error)})
                continue
            unfinished = {number: over for number, over in unfinished.items() if not over.is_set()}
            for number, over in unfinished.items():
                replaced = isinstance(request, RenderRequest) and request.replaces and number in drawings
                if number == request or replaced:
                    over.set()
            if isinstance(request, RenderRequest):
                drawings.add(request.id)
            if not isinstance(request, int):
                unfinished[request.id] = threading.Event()
                waiting.put((request, unfinished[request.id]))
    finally:
        for over in unfinished.values():
            over.set()
        waiting.put(None)


def failure(error: BaseException) -> dict[str, Any]:
    """The event for what went wrong, as what, where and hint."""
    if isinstance(error, TrainingError):
        what, where, hint = error.what, error.where, error.hint
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        what, where, hint = "There is not enough memory for these pictures", "", "Draw smaller ones, or fewer strengths."
    else:
        what, where, hint = f"This could not be done: {error or type(error).__name__}", "", "See the renderer's log."
    return {"event": "failed", "what": what, "where": where, "hint": hint}


def serve(lines: Iterable[bytes], tell: Tell, warm: Warm) -> None:
    """Answers requests, one after the other, until `lines` end. `tell` is called from two threads."""
    waiting: Waiting = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(lines, waiting, tell), daemon=True, name="read requests").start()
    while (one := waiting.get()) is not None:
        _answer_or_say_why(*one, warm, tell)


def _answer_or_say_why(request: Request, over: threading.Event, warm: Warm, tell: Tell) -> None:
    def check() -> None:
        if over.is_set():
            raise _Cancelled

    last: dict[str, Any] = {"event": "done"}
    try:
        check()
        if isinstance(request, RenderRequest):
            answer(request, warm, lambda event: tell({"id": request.id, **event}), check)
        else:
            do_chore(request, warm, lambda event: tell({"id": request.id, **event}))
    except _Cancelled:
        last = {"event": "cancelled"}
    except Exception as error:  # whatever it is, the next request is answered
        if not isinstance(error, TrainingError):
            traceback.print_exc()
        last = failure(error)
    over.set()
    tell({"id": request.id, **last})


def main() -> int:
    """Serves stdin and stdout; returns the exit code."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # so that not even a library's C code prints between the events
        sys.stdout = sys.stderr
        lock = threading.Lock()

        def tell(event: dict[str, Any]) -> None:
            with lock:
                out.write(json.dumps(event) + "\n")
                out.flush()

        with contextlib.suppress(BrokenPipeError):
            serve(iter(sys.stdin.buffer.readline, b""), tell, Warm())
    return 0


if __name__ == "__main__":
    sys.exit(main())
