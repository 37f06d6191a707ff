"""Unpacks a zip as if its files had been dropped one by one: names are cleaned, links are left, bombs are refused."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from pathlib import Path

from app.upload_parts import Sink

_PIECE = 1 << 20
# Pictures hardly shrink in a zip. Plain BMPs do, so only what is also large is taken for a bomb.
_BOMB_RATIO = 100
_BOMB_BYTES = 1 << 30
_ENCRYPTED = 0x1
_UTF8 = 0x800
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)


class ZipRefused(ValueError):
    """A zip is not unpacked; the text says why."""


def open_zip(path: Path, *, files: int, unpacked_bytes: int) -> tuple[zipfile.ZipFile, int]:
    """The open zip and the bytes that its files need unpacked; zipfile never gives more than was declared.

    Raises ZipRefused when it is damaged, has a password, or holds more than so many files or bytes.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise ZipRefused("The zip is damaged or incomplete") from error
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    why = ""
    if len(entries) > files:
        why = f"The zip holds {len(entries)} files; the limit is {files}"
    elif total > unpacked_bytes:
        why = f"The zip would unpack to {total / 1e9:.1f} GB; the limit is {unpacked_bytes / 1e9:.1f} GB"
    elif total > _BOMB_BYTES and total > _BOMB_RATIO * path.stat().st_size:
        why = f"The zip would unpack to {total / 1e9:.1f} GB, far more than pictures do"
    elif any(entry.flag_bits & _ENCRYPTED for entry in entries):
        why = "The zip has a password; unpack it first"
    if why:
        archive.close()
        raise ZipRefused(why)
    return archive, total


def unpack(archive: zipfile.ZipFile, sink: Sink) -> list[tuple[str, str]]:
    """Hands every regular file to the sink; returns (name, why not) of those that are links or damaged. Raises OSError."""
    left_out: list[tuple[str, str]] = []
    for entry in archive.infolist():
        name = _name_of(entry)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir():
            continue
        if kind not in (0, stat.S_IFREG):
            left_out.append((name, "A link or device in the zip; not followed"))
            continue
        try:
            file = archive.open(entry)
        except _DAMAGED as error:
            left_out.append((name, f"The zip is damaged there ({error or type(error).__name__})"))
            continue
        with file:
            sink.begin(name)
            try:
                while piece := file.read(_PIECE):
                    sink.write(piece)
            except _DAMAGED as error:
                sink.drop(f"The zip is damaged there ({error or type(error).__name__})")
                continue
            sink.end()
    return left_out


def _name_of(entry: zipfile.ZipInfo) -> str:
    """The entry's name; macOS and others write UTF-8 without saying so."""
    if entry.flag_bits & _UTF8:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename
