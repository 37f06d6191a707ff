"""Tensors out of a base's files, in diffusers' layout whatever the files'."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from trainers.container import Header, open_file, read_header
from trainers.families.ckpt import is_ckpt, load_ckpt
from trainers.families.stored import Stored, as_base_error
from trainers.tensors import NUMBERS, read_tensor


class TensorFiles:
    """The files of a base, each opened once; tensors are copied out of them and never mapped."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[Path, tuple[BinaryIO, Header]] = {}
        self._loaded: dict[Path, Mapping[str, torch.Tensor]] = {}
        self._last: tuple[Path, str, torch.Tensor] | None = None

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
            if file not in self._open:
                handle = self._stack.enter_context(open_file(file))
                self._open[file] = (handle, read_header(handle, file))
            return read_tensor(*self._open[file], key, NUMBERS)
