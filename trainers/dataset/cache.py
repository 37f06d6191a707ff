"""A lazy, content-addressed cache of what the VAE and a frozen text encoder answer. Every key is a hash of all that matters.

Each image and caption is encoded alone, so an entry does not depend on what else was in the batch, and the step that
fills an entry uses the value read back, so a first run and a later run compute with the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

Entry = dict[str, torch.Tensor]


def cache_key(*parts: object) -> str:
    """SHA-256 of the parts' text."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class ContentCache:
    """key -> named tensors: the newest in memory up to `memory_bytes`, all of them in `folder` (None: memory only)."""

    def __init__(self, folder: Path | None, memory_bytes: int = 512 * 2**20) -> None:
        self._folder = folder
        self._limit = memory_bytes
        self._held: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

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
            return dict(load_file(path))
        except (SafetensorError, OSError):  # cut short by a crash: computed again
            return None

    def _write(self, key: str, entry: Entry) -> None:
        path = self._path(key)
        if path is None:
            return
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(save(entry))
            os.replace(aside, path)
        except OSError:
            with contextlib.suppress(OSError):  # the folder itself may be what cannot be reached
                aside.unlink()


def _size(entry: Entry) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())
