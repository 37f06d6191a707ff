"""The safetensors container: a header that is checked before it is believed, and headers in a fixed order. No torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainers.errors import AdapterFileError
from trainers.files import NotRegularError, open_regular
from trainers.text import printable

HEADER_LIMIT = 100_000_000
"""Longest header in bytes that the format's own library reads."""
TENSOR_LIMIT = 200_000
SIDE_LIMIT = 2**40

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
_FIRST = '{"__metadata__":'
_AGAIN = "Download or export it again."


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype as the format spells it, its shape, and its bytes [start, end) counted from the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors tile [data_start, size) of the file without gap or overlap.

    `listing` is its text, without the metadata where they stand first: what two files with the same tensors have in common.
    """

    path: Path
    size: int
    data_start: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    listing: str


def open_file(path: Path) -> BinaryIO:
    """Opens a plain file for reading. Raises AdapterFileError for what is missing, forbidden, a folder or a pipe."""
    try:
        return open_regular(path)
    except NotRegularError as error:
        raise AdapterFileError("This is not a file", str(path), "Name the .safetensors file itself.") from error
    except FileNotFoundError as error:
        raise AdapterFileError("There is no such file", str(path), "Check the name.") from error
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"The file cannot be opened: {error}", printable(str(path), 300)) from error


def read_header(handle: BinaryIO, path: Path, like: Mapping[str, Header] | None = None) -> Header:
    """Reads and checks the header of an open safetensors file. Raises AdapterFileError that names the first fault.

    like: checked headers by their `listing`; a file that lists the very tensors of one gets its entries, the same object.
    """
    size = os.fstat(handle.fileno()).st_size
    start = handle.read(16)
    _refuse_other_kinds(start, size, path)
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, HEADER_LIMIT):
        what = f"Not a whole safetensors file: its header claims {length:,} bytes and the file has {size:,}"
        raise AdapterFileError(what, str(path), _AGAIN)
    handle.seek(8)
    raw = handle.read(length)
    again = _read_like(raw, size, path, like) if like else None
    if again is not None:
        return again
    values = _parse(raw, path)
    metadata = _check_metadata(values.pop("__metadata__", {}), path)
    if len(values) > TENSOR_LIMIT:
        raise AdapterFileError(f"The header lists {len(values):,} tensors, more than any model has", str(path), _AGAIN)
    entries = {name: _check_entry(name, value, path) for name, value in values.items()}
    _check_tiling(entries, size - 8 - length, path)
    return Header(path, size, 8 + length, entries, metadata, _split(raw.decode("utf-8"))[1])


def serialise_header(entries: Iterable[tuple[str, Entry]], metadata: Mapping[str, str]) -> bytes:
    """Length and header bytes in the given order, metadata first, padded with blanks to a multiple of 8.

    The order is fixed because the usual library shuffles metadata, and one reader asserts that a header begins '{"'.
    Characters that UTF-8 cannot hold become '?'. Raises AdapterFileError above the format's header limit.
    """
    values: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries:
        values[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.end]}
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise AdapterFileError(
            f"The metadata makes a header of {len(text):,} bytes, and readers stop at {HEADER_LIMIT:,}",
            hint="Leave the caption frequencies out.",
        )
    return len(text).to_bytes(8, "little") + text


def _refuse_other_kinds(start: bytes, size: int, path: Path) -> None:
    what = ""
    if start[8:9] == b"{":
        return  # A header's length may begin with any byte, a pickle's first one included.
    if size == 0:
        what = "The file is empty"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise AdapterFileError(
            "This is a pickle (.pt, .ckpt) and not a safetensors file, whatever its name says; a pickle can run programs",
            str(path),
            "Ask for the .safetensors version.",
        )
    elif start.startswith(b"version https:/"):
        what = "This is a Git LFS pointer of a few lines, not the file itself"
    elif start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")):
        what = "This is a picture, not a safetensors file"
    elif start.lstrip()[:1] == b"<":
        what = "This is a web page, not a safetensors file"
    elif size < 10:
        what = f"Not a safetensors file: {size} bytes are too few for a header"
    elif int.from_bytes(start[:8], "little") > HEADER_LIMIT:  # no "{" either: a text, a picture of another kind
        what = "Not a safetensors file: it does not begin with a header"
    if what:
        raise AdapterFileError(what, str(path), _AGAIN)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        reason = printable(str(error) or type(error).__name__)
        raise AdapterFileError(f"Not a safetensors file: the header is not JSON ({reason})", str(path), _AGAIN) from error
    if not isinstance(values, dict):
        raise AdapterFileError("Not a safetensors file: the header is not a JSON object", str(path), _AGAIN)
    return values


def _read_like(raw: bytes, size: int, path: Path, known: Mapping[str, Header]) -> Header | None:
    """The header where it lists what a known one lists, else None: then it has to be looked at as a whole."""
    try:
        metadata, listing = _split(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return None
    like = known.get(listing)
    if like is None or not raw.startswith(b"{") or size - 8 - len(raw) != like.size - like.data_start:
        return None
    told = like.metadata if metadata is None else _check_metadata(metadata, path)
    return Header(path, size, 8 + len(raw), like.entries, told, listing)


def _split(text: str) -> tuple[Any, str]:
    """(the metadata, the text behind them) of a header that begins with them, else (None, all of it)."""
    if text.startswith(_FIRST):
        with contextlib.suppress(ValueError, RecursionError):
            metadata, end = json.JSONDecoder(object_pairs_hook=_no_twins).raw_decode(text, len(_FIRST))
            return metadata, text[end:]
    return None, text


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands there twice")
    return result


def _check_metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise AdapterFileError("The header's metadata is not text by name", str(path), _AGAIN)
    return value


def _check_entry(name: str, value: Any, path: Path) -> Entry:
    """One tensor's entry: known dtype, sizes that are whole numbers, and as many bytes as they need."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise AdapterFileError(f"The header's entry {printable(name)!r} lacks dtype, shape or data_offsets", str(path), _AGAIN)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        shown = printable(str(dtype), 20)
        raise AdapterFileError(f"Tensor {printable(name)!r} has the unknown dtype {shown!r}", str(path), _AGAIN)
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise AdapterFileError(f"Tensor {printable(name)!r} has a shape or offsets that are no sizes", str(path), _AGAIN)
    need = math.prod(shape) * BITS[dtype] // 8
    if offsets[1] - offsets[0] != need:
        has = f"needs {need:,} bytes and has {offsets[1] - offsets[0]:,}"
        what = f"Tensor {printable(name)!r} of shape {tuple(shape)} in {dtype} {has}"
        raise AdapterFileError(what, str(path), _AGAIN)
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < SIDE_LIMIT for number in value)


def _check_tiling(entries: Mapping[str, Entry], length: int, path: Path) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            fault = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise AdapterFileError(f"Tensor {printable(name)!r} {fault}: the header is wrong", str(path), _AGAIN)
        position = entry.end
    if position > length:
        what = f"The file is cut short: its tensors need {position:,} bytes and {length:,} are there"
        raise AdapterFileError(what, str(path), _AGAIN)
    if position < length:
        raise AdapterFileError(f"{length - position:,} bytes behind the last tensor belong to nothing", str(path), _AGAIN)
