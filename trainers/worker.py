"""The render worker: JSON lines in, pictures and JSON lines out, one base model kept warm, LoRA files swapped beside it.

`python -P -m trainers.worker` reads requests from stdin and writes events to stdout; all else that prints goes to stderr.

`{"do": "render", "id": 1, ...}` with the fields of RenderRequest draws; `{"do": "cancel", "id": 1}` abandons that again.
A render that says `"replaces": true` cancels all unfinished ones before it. The events of a request are `loading` (only
when something must be read), `step` with done and total, `picture` with strength and path, and one last of `done`,
`cancelled`, or `failed` with what, where and hint. The end of stdin ends the worker and abandons what it draws.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainers.draw import LIMIT
from trainers.errors import SettingError, TrainingError
from trainers.families import check_size, recognise_base
from trainers.families.settings import BaseSettings
from trainers.files import write_atomically
from trainers.generate import Picture, RenderSettings, png_bytes, render
from trainers.samplers import check_sampler
from trainers.warm import Mark, Tell, Warm, base_marks, lora_mark

_DRAWN_BY = 1  # to be raised when the same request draws another picture, so that old files no longer answer for it


class _Cancelled(Exception):
    """The request is no longer wanted. Raised inside of the renderer, between two sampling steps."""


class RenderRequest(BaseModel):
    """What to draw. Sizes in pixels; each strength multiplies the LoRA's own; PNG files are written into `folder`."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    id: int
    base: BaseSettings
    lora: str | None = None
    prompt: str
    negative: str = ""
    seed: int = Field(ge=0, lt=2**63)
    width: int
    height: int
    steps: int = Field(20, ge=1, le=500)
    guidance: float = Field(5.0, ge=0, le=100)
    scheduler: str = "dpm++"
    strengths: list[Annotated[float, Field(ge=-LIMIT, le=LIMIT)]] = Field(min_length=1, max_length=32)
    folder: str
    replaces: bool = False

    @field_validator("base", mode="before")
    @classmethod
    def _a_base_by_name(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


def parse_request(message: Any) -> RenderRequest | int:
    """One line's JSON -> what to draw, or the id to cancel. Raises SettingError naming the field that is wrong."""
    do = message.get("do") if isinstance(message, dict) else None
    try:
        if do == "render":
            return RenderRequest.model_validate(message)
        if do == "cancel" and type(message.get("id")) is int:
            return int(message["id"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(piece) for piece in first["loc"])
        raise SettingError(f"The renderer was asked wrongly: {first['msg']}", where=field) from error
    raise SettingError("The renderer was asked for what it does not know", hint="`do` is render or cancel, with an id.")


Waiting = queue.SimpleQueue[tuple[RenderRequest, threading.Event] | None]
"""Requests in the order they came, each with an event that is set when it has ended or nobody wants it; None at the end."""


def picture_file(request: RenderRequest, base: tuple[Mark, ...], lora: Mark | None, strength: float) -> Path:
    """Where a picture lies: named by a hash of all that it depends on. At strength 0 that is not the LoRA."""
    negative = request.negative if request.guidance > 1 else ""
    how = [request.prompt, negative, request.seed, request.width, request.height, request.steps, request.guidance]
    whole = json.dumps([_DRAWN_BY, base, lora if strength else None, strength if lora else 0.0, how, request.scheduler])
    return Path(request.folder) / f"{hashlib.sha256(whole.encode()).hexdigest()[:40]}.png"


def answer(request: RenderRequest, warm: Warm, tell: Tell, check: Callable[[], None]) -> None:
    """Draws the pictures of one request that are not on the disk yet, and tells of each and of each sampling step.

    All strengths are rows of one batch, but 0 is drawn alone, so that it is the base's picture bit for bit. A row of a
    batch agrees with the same picture drawn alone within 1/255 in float32: the products' sums run in another order. On
    bfloat16 and on a GPU it may be more, which was not measured. `check` is called at each step and may raise.
    Raises TrainingError, OSError.
    """
    check_sampler(request.scheduler)
    warm.tidy(Path(request.folder))
    base = recognise_base(request.base.model, request.base.options)
    check_size(base, request.height, request.width)
    lora = lora_mark(request.lora)
    marks = base_marks(base)
    shown: dict[Path, list[float]] = {}
    for strength in dict.fromkeys(request.strengths):
        shown.setdefault(picture_file(request, marks, lora, strength), []).append(strength)
    missing: dict[Path, float] = {}
    for path, strengths in shown.items():
        if path.is_file():
            for strength in strengths:
                tell({"event": "picture", "strength": strength, "path": str(path)})
        else:
            missing[path] = strengths[0] if lora else 0.0
    if not missing:
        return
    model = warm.model(base, tell)
    adapter = warm.adapter(model, lora, tell) if lora and any(missing.values()) else ""
    how = RenderSettings(request.height, request.width, request.steps, request.guidance, request.negative, request.scheduler)
    zeros = [path for path, strength in missing.items() if strength == 0.0]
    passes = [paths for paths in (zeros, [path for path in missing if path not in zeros]) if paths]
    done = 0

    def one_more() -> None:
        nonlocal done
        check()
        done = min(done + 1, request.steps * len(passes))  # some samplers look twice
        tell({"event": "step", "done": done, "total": request.steps * len(passes)})

    for paths in passes:
        pictures = [Picture(request.prompt, request.seed, {adapter: missing[path]} if missing[path] else {}) for path in paths]
        check()
        images = render(model, pictures, how, one_more)
        for path, image, picture in zip(paths, images, pictures, strict=True):
            write_atomically(path, png_bytes(image, picture, how, {adapter: Path(request.lora or "").stem}))
            for strength in shown[path]:
                tell({"event": "picture", "strength": strength, "path": str(path)})


def read_requests(lines: Iterable[bytes], waiting: Waiting, tell: Tell) -> None:
    """Takes every line in, while pictures are drawn, until there are no more; then abandons all. A bad one is told."""
    unfinished: dict[int, threading.Event] = {}
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
                if number == request or (isinstance(request, RenderRequest) and request.replaces):
                    over.set()
            if isinstance(request, RenderRequest):
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
        what, where, hint = f"The picture could not be drawn: {error or type(error).__name__}", "", "See the renderer's log."
    return {"event": "failed", "what": what, "where": where, "hint": hint}


def serve(lines: Iterable[bytes], tell: Tell, warm: Warm) -> None:
    """Answers requests, one after the other, until `lines` end. `tell` is called from two threads."""
    waiting: Waiting = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(lines, waiting, tell), daemon=True, name="read requests").start()
    while (one := waiting.get()) is not None:
        _answer_or_say_why(*one, warm, tell)


def _answer_or_say_why(request: RenderRequest, over: threading.Event, warm: Warm, tell: Tell) -> None:
    def check() -> None:
        if over.is_set():
            raise _Cancelled

    last: dict[str, Any] = {"event": "done"}
    try:
        check()
        answer(request, warm, lambda event: tell({"id": request.id, **event}), check)
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
