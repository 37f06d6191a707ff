"""Tensors out of a base's files, in diffusers' layout whatever the files'."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from trainers.container import Header, open_file, read_header
from trainers.families.ckpt import is_ckpt, load_ckpt
from trainers.families.stored import Stored, as_base_error
from trainers.tensors import NUMBERS, all_finite, bytes_of, read_pieces, read_tensor

PIECE = 1 << 21
"""Bytes that are read, looked at, cast and hashed before the next are: few enough to stay in a processor's cache."""


class TensorFiles:
    """The files of a base, each opened once; tensors are copied out of them and never mapped."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[Path, tuple[BinaryIO, Header]] = {}
        self._loaded: dict[Path, Mapping[str, torch.Tensor]] = {}
        self._last: tuple[Path, str, torch.Tensor] | None = None
        self._room = bytearray(PIECE)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, stored: Stored) -> torch.Tensor:
        """One tensor in diffusers' layout. Raises BaseModelError."""
        place = stored.place
        if self._last is None or self._last[:2] != (stored.file, place.key):  # q, k and v come out of one, one after the other
            self._last = (stored.file, place.key, self.read_key(stored.file, place.key))
        tensor = self._last[2]
        if place.third >= 0:
            tensor = tensor.chunk(3)[place.third]
        return tensor.T.contiguous() if place.transposed else tensor

    def read_key(self, file: Path, key: str) -> torch.Tensor:
        """One tensor as it is stored. Raises BaseModelError."""
        if is_ckpt(file):
            if file not in self._loaded:
                self._loaded[file] = load_ckpt(file)
            return self._loaded[file][key].clone()
        with as_base_error():
            return read_tensor(*self._opened(file), key, NUMBERS)

    def read_as(self, stored: Stored, dtype: torch.dtype) -> tuple[torch.Tensor, str, bool]:
        """(one tensor in diffusers' layout and in `dtype`, SHA-256 of its bytes then, whether all numbers are finite).

        New memory costs more than the work done on it, so none is taken but the tensor's own. Raises BaseModelError.
        """
        place, entry = stored.place, stored.entry
        if place.third >= 0 or place.transposed or is_ckpt(stored.file):
            tensor = self.read(stored)
            cast = tensor.to(dtype)
            return cast, _digest(cast), all_finite(tensor)
        with as_base_error():
            handle, header = self._opened(stored.file)
            tensor = torch.empty(entry.shape, dtype=dtype)
            flat, whole, finite, done = tensor.view(-1), hashlib.sha256(), True, 0
            for raw in read_pieces(handle, header, place.key, NUMBERS, self._room):
                piece = flat[done : done + raw.numel()].copy_(raw)
                whole.update(bytes_of(piece))
                finite, done = finite and all_finite(raw), done + raw.numel()
        return tensor, whole.hexdigest(), finite

    def _opened(self, file: Path) -> tuple[BinaryIO, Header]:
        if file not in self._open:
            handle = self._stack.enter_context(open_file(file))
            self._open[file] = (handle, read_header(handle, file))
        return self._open[file]


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor.contiguous())).hexdigest()
