"""Opens only regular files, and writes a file so that it appears whole or not at all. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

from trainers.errors import NoSpaceError

# What a full disk, a quota and a limit on the size of files say; Windows has numbers of its own for the first.
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
ASIDE = ".tmp"
"""Ending of a file that is being written; one that is left over belongs to a process that was killed."""


class NotRegularError(OSError):
    """What was to be opened is a folder, pipe, socket or device."""

    def __init__(self) -> None:
        super().__init__(errno.EINVAL, "not a regular file")


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; a pipe, socket, device or folder is refused without waiting.

    The check is made on the opened file, so that nothing can be put in its place between check and use. Raises
    NotRegularError, or another OSError.
    """
    # Without O_NONBLOCK the opening itself would wait for a pipe's writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except PermissionError as error:
        if os.path.isdir(path):  # Windows opens no folders
            raise NotRegularError from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularError
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def write_atomically(path: Path, pieces: Iterable[bytes] | bytes, *, fsync: bool = True) -> None:
    """Writes aside, flushes to the disk and renames: `path` is the old file or the whole new one, also after a power cut.

    Missing folders are made. Without `fsync` a power cut may leave a damaged file, which is enough for a cache that
    checks what it reads, and faster. Raises OSError (NoSpaceError when it does not fit), with nothing left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not made from the name, which may be as long as a name can be.
    aside = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}{ASIDE}"
    try:
        with aside.open("xb") as file:
            file.writelines([pieces] if isinstance(pieces, bytes) else pieces)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        needed = len(pieces) if isinstance(pieces, bytes) else 0
        raise NoSpaceError(error.errno, str(path), needed, shutil.disk_usage(path.parent).free) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    if fsync:
        _sync_folder(path.parent)


def sweep_aside(folder: Path) -> None:
    """Deletes what killed processes left half-written in `folder` and in the folders right in it."""
    import psutil

    for path in [*folder.glob(f".*-*{ASIDE}"), *folder.glob(f"*/.*-*{ASIDE}")]:
        number = path.name[1:].partition("-")[0]
        if number.isdigit() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            with contextlib.suppress(OSError):
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last. Windows opens no folders; its rename is journalled."""
    if os.name == "nt":
        return
    # The file is in place: a file system that cannot flush a folder, as some on the network, is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
