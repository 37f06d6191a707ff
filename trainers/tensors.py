"""Reads single tensors out of a safetensors file whose header was checked; never mapped, so that a cut file cannot kill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch

from trainers.container import Header
from trainers.errors import AdapterFileError
from trainers.text import printable

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
# A scalar alpha is also found as a whole number.
NUMBERS = FLOATS | {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def read_tensor(handle: BinaryIO, header: Header, key: str, dtypes: Mapping[str, torch.dtype]) -> torch.Tensor:
    """One tensor as it is stored. Raises AdapterFileError for a dtype outside `dtypes` or a file that got shorter."""
    entry = header.entries[key]
    room = bytearray(entry.end - entry.start)
    pieces = list(read_pieces(handle, header, key, dtypes, room))  # one, in `room`
    return pieces[0].reshape(entry.shape) if pieces else torch.empty(entry.shape, dtype=dtypes[entry.dtype])


def read_pieces(
    handle: BinaryIO, header: Header, key: str, dtypes: Mapping[str, torch.dtype], room: bytearray
) -> Iterator[torch.Tensor]:
    """One tensor's numbers as they are stored, in pieces (n,) that lie in `room` until the next is asked for.

    `room` holds a whole count of any numbers. Raises AdapterFileError for a dtype outside `dtypes` or a file that got shorter.
    """
    entry = header.entries[key]
    if entry.dtype not in dtypes:
        raise AdapterFileError(f"{printable(key, 120)} has dtype {entry.dtype}, which is not read here", str(header.path))
    handle.seek(header.data_start + entry.start)
    left = entry.end - entry.start
    while left:
        size = min(left, len(room))
        if handle.readinto(memoryview(room)[:size]) != size:  # type: ignore[attr-defined]
            raise AdapterFileError("The file got shorter while it was read", str(header.path), "Try again.")
        left -= size
        dtype = dtypes[entry.dtype]
        yield torch.frombuffer(room, dtype=dtype, count=size // dtype.itemsize)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return view


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite, by the smallest and the largest: `isfinite` takes thirty times as long.

    The smallest of numbers with a NaN among them is NaN.
    """
    if not tensor.numel():
        return True
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.half()
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
