"""A lazy, content-addressed cache of what the VAE and a frozen text encoder answer. Every key is a hash of all that matters.

Each image and caption is encoded alone, so an entry does not depend on what else was in the batch, and the step that
fills an entry uses the value read back, so a first run and a later run compute with the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from trainers.files import ASIDE, write_atomically

Entry = dict[str, torch.Tensor]
_DAY = 24 * 3600.0
HELD_ALONE = 512 * 2**20
"""Bytes of entries that are held in memory, at most, where they are nowhere else."""
HELD_BESIDE = 64 * 2**20
"""And where they lie in a folder, too."""


def cache_key(*parts: object) -> str:
    """SHA-256 of the parts' text."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def prune(folder: Path, limit_bytes: int = 20 * 2**30) -> int:
    """Removes the entries unused for longest until `folder` holds `limit_bytes` at most; returns how many went.

    One look at each file, so once in a run is cheap. What cannot be listed or removed stays.
    """
    now, total, removed = time.time(), 0, 0
    found: list[tuple[float, int, str]] = []
    for file in _files_below(folder):
        with contextlib.suppress(OSError):  # another run may be pruning too
            status = file.stat(follow_symlinks=False)
            if not file.name.endswith(ASIDE):
                found.append((status.st_mtime, status.st_size, file.path))
                total += status.st_size
            elif now - status.st_mtime > _DAY:  # of a process that was killed
                os.unlink(file.path)
    for _, size, path in sorted(found):
        if total <= limit_bytes:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
            total, removed = total - size, removed + 1
    return removed


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The files in the folders, named after the first two letters of keys, that the cache is made of."""
    with contextlib.suppress(OSError), os.scandir(folder) as shelves:
        for shelf in shelves:
            with contextlib.suppress(OSError), os.scandir(shelf.path) as files:
                yield from files


class ContentCache:
    """key -> named tensors: the newest in memory up to `memory_bytes`, all of them in `folder` (None: memory only).

    What is in the folder is soon read again, so that little is held then: memory does not grow with a large set of pictures.
    """

    def __init__(self, folder: Path | None, memory_bytes: int = 0) -> None:
        self._folder = folder
        self._limit = memory_bytes or (HELD_ALONE if folder is None else HELD_BESIDE)
        self._held: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

    def knows(self, key: str) -> bool:
        """Whether `get` would find it without computing, unless it proves to be damaged."""
        path = self._path(key)
        return key in self._held or (path is not None and path.is_file())

    def get(self, key: str, compute: Callable[[], Entry]) -> Entry:
        """The entry of `key`, computed and written when it is nowhere. A full disk costs the file, not the run."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        entry = self._read(key)
        if entry is None:
            entry = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
            self._write(key, entry)
            entry = self._read(key) or entry
        self._hold(key, entry)
        return entry

    def _hold(self, key: str, entry: Entry) -> None:
        self._held[key] = entry
        self._bytes += _size(entry)
        while self._bytes > self._limit and len(self._held) > 1:
            self._bytes -= _size(self._held.popitem(last=False)[1])

    def _path(self, key: str) -> Path | None:
        return self._folder / key[:2] / f"{key}.safetensors" if self._folder else None

    def _read(self, key: str) -> Entry | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            entry = dict(load_file(path))
        except (SafetensorError, OSError):  # cut short by a crash: computed again
            return None
        _mark_used(path)
        return entry

    def _write(self, key: str, entry: Entry) -> None:
        path = self._path(key)
        if path is None:
            return
        try:
            write_atomically(path, save(entry), fsync=False)
        except OSError:
            self._limit = max(self._limit, HELD_ALONE)


def _mark_used(path: Path) -> None:
    """Lets `prune` know, by the time of change. A day is exact enough, and spares a write for each read."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)


def _size(entry: Entry) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())
