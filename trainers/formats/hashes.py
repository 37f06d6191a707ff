"""The hashes by which programs and galleries know a LoRA or a base model. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainers.container import open_file

_CHUNK = 1 << 20
# The oldest hash of this field looks at these bytes only; for a smaller file that is the hash of nothing, e3b0c442.
LEGACY_START, LEGACY_END = 0x100000, 0x110000


@dataclass(frozen=True)
class FileHashes:
    """sha256 in hex: `whole` over the file, `data` over what follows the header; `legacy` is 8 characters long."""

    whole: str
    data: str
    legacy: str

    @property
    def autov2(self) -> str:
        """First 10 characters of the file's hash: changes with the metadata."""
        return self.whole[:10]

    @property
    def autov3(self) -> str:
        """First 12 characters of the tensor data's hash: stays when metadata are edited."""
        return self.data[:12]


def file_hashes(path: Path, data_start: int = 0) -> FileHashes:
    """Hashes of a file whose tensor data begin at byte `data_start`. Raises AdapterFileError when it cannot be opened."""
    whole, data, position = hashlib.sha256(), hashlib.sha256(), 0
    window = bytearray()
    with open_file(path) as handle:
        while chunk := handle.read(_CHUNK):
            whole.update(chunk)
            if data_start:  # of a base all is asked for once: it is gigabytes
                data.update(chunk[max(data_start - position, 0) :])
            window += _overlap(chunk, position)
            position += len(chunk)
    return FileHashes(whole.hexdigest(), (data if data_start else whole).hexdigest(), hashlib.sha256(window).hexdigest()[:8])


def legacy_hash(pieces: Iterable[bytes]) -> str:
    """8 hex characters over bytes [0x100000, 0x110000) of the pieces laid end to end."""
    position, window = 0, bytearray()
    for piece in pieces:
        window += _overlap(piece, position)
        position += len(piece)
    return hashlib.sha256(window).hexdigest()[:8]


def base_file_hashes(path: Path) -> tuple[str, str]:
    """(ss_sd_model_hash, ss_new_sd_model_hash) of a single-file base: 8 characters and the full sha256."""
    hashes = file_hashes(path)
    return hashes.legacy, hashes.whole


def _overlap(piece: bytes, position: int) -> bytes:
    return piece[max(LEGACY_START - position, 0) : max(LEGACY_END - position, 0)]
