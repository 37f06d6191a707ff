"""Small copies of pictures for the grid: made once for each size, kept in the project's cache, never larger than asked."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path

from trainers.dataset.pictures import load_small
from trainers.files import write_atomically

WIDTHS = (96, 192, 384, 768)
"""Longest sides in pixels; others would only fill the cache."""
# A picture of the largest size that is read takes hundreds of megabytes while it is decoded.
_decoding = threading.Semaphore(2)


def make_thumbnail(picture: Path, cache: Path, width: int = 192) -> Path:
    """The thumbnail's WebP file, upright, its longest side the next of WIDTHS from `width`, but not above the picture's.

    Raises DatasetError when the picture cannot be read, OSError when the disk refuses.
    """
    side = next((known for known in WIDTHS if known >= width), WIDTHS[-1])
    status = picture.stat()
    key = f"{picture}\0{status.st_size}\0{status.st_mtime_ns}\0{side}"
    path = cache / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.webp"
    if path.is_file():
        return path
    with _decoding:
        if not path.is_file():  # another request may have made it meanwhile
            data = io.BytesIO()
            load_small(picture, side).save(data, "WEBP", quality=75, method=2)
            write_atomically(path, data.getvalue(), fsync=False)
    return path
