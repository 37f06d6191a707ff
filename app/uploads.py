"""Saves dropped files and zips: streamed to the disk, checked, then put into the project's folder whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from app.upload_names import Places
from app.upload_parts import PartReader
from app.upload_stage import Limits, Received, Stage, UploadError, too_large

if TYPE_CHECKING:
    from fastapi import Request

__all__ = ["Limits", "Received", "UploadError", "receive"]

DEFAULT_LIMITS = Limits()
_PIECE = 1 << 20
_DRAIN_SECONDS = 20.0
# Two requests of one drop arrive together; the names they take must not cross.
_placing = threading.Lock()


async def receive(request: Request, folder: Path, limits: Limits = DEFAULT_LIMITS, more: tuple[str, ...] = ()) -> Received:
    """Stores the files of a multipart request under `folder`, which is made when missing; zips are unpacked.

    Pictures and captions are taken, and what ends with one of `more`.

    The file name of a part may be a relative path ("cats/1.png") and is cleaned. Memory stays at a few MB whatever
    arrives, and disk work happens in threads. Raises UploadError when the request is damaged, too large, or the disk is
    full; then, and when the sender goes away, nothing of the request is left behind.
    """
    from starlette.concurrency import run_in_threadpool

    length = request.headers.get("content-length", "")
    stage = Stage(folder, limits, int(length) if length.isdecimal() else 0, more)
    stream = request.stream()
    try:
        with stage:
            await _read_parts(stream, request.headers.get("content-type", ""), stage)
            return await run_in_threadpool(_finish, stage)
    except UploadError:
        await _drain(stream)
        raise
    except OSError as error:
        await _drain(stream)
        raise stage.told(error) from error


async def _read_parts(stream: AsyncIterator[bytes], content_type: str, stage: Stage) -> None:
    """Feeds the body to the stage, a megabyte for each hop into a thread."""
    from python_multipart.exceptions import FormParserError
    from starlette.concurrency import run_in_threadpool

    try:
        reader = PartReader(content_type, stage)
        waiting = bytearray()
        arrived = 0
        async for chunk in stream:
            arrived += len(chunk)
            if arrived > stage.limits.request_bytes:
                raise too_large(stage.limits)
            waiting += chunk
            if len(waiting) >= _PIECE:
                await run_in_threadpool(reader.feed, bytes(waiting))
                waiting.clear()
        await run_in_threadpool(reader.feed, bytes(waiting))
    except (FormParserError, ValueError) as error:
        raise UploadError("The upload is no form with files", hint="Drop the files again.") from error
    if not reader.finished:
        raise UploadError("The upload ended before it was complete", hint="Drop the files again.")


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Reads what is still coming: a browser that is cut off while it sends shows a broken connection, not our sentence."""
    end = time.monotonic() + _DRAIN_SECONDS
    with contextlib.suppress(Exception):  # whatever ends it, the first error is the one to tell
        async for _ in stream:
            if time.monotonic() > end:
                break


def _finish(stage: Stage) -> Received:
    """Unpacks zips and moves all into place. Raises UploadError when the folder would hold too much, OSError."""
    for given, path in stage.zips:
        stage.unpack(given, path)
    with _placing:
        there = _count_files(stage.target)
        total = there + len(stage.arrived)
        if total > stage.limits.folder_files:
            hint = "Use fewer pictures, or type the folder's path instead of copying it."
            raise UploadError(
                f"The project would hold {total} files; the limit is {stage.limits.folder_files}", hint=hint, status=413
            )
        for file, name, why in Places(stage.target).put(stage.arrived):
            if why:
                stage.reject(file.given, why)
            else:
                stage.received.saved.append(name)
    return stage.received


def _count_files(folder: Path) -> int:
    """Files in the folder, without those that wait in hidden folders."""
    count = 0
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += len(files)
    return count
