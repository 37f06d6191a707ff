"""Opens one picture file safely: refuses what could hurt from its header, and gives its pixels as plain RGB."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from trainers.dataset.looks import look_of
from trainers.errors import DatasetError
from trainers.files import open_regular

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Only these decoders are ever tried, whatever a file calls itself.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000
"""A picture with more pixels is refused from its header: decoded it would need 300 MB and more."""
MAX_SIDE = 30_000
MAX_BYTES = 1 << 30
"""A larger file is refused unread."""

_EMPTY = "The file is empty (0 bytes)"
# What Pillow's decoders raise on damaged files: each of its parsers trips in its own way.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError),
    *(AssertionError, EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)
_ORIENTATION = 0x0112
# EXIF 2.32, tag Orientation: what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """Facts about a picture file: upright size in pixels, sha256 of its bytes, and remarks on what is converted."""

    width: int
    height: int
    sha256: str
    remarks: tuple[str, ...]
    look: bytes = b""
    """What `look_of` gives; empty when the picture was not decoded, or shows next to nothing."""


def read_picture(path: Path, *, decode: bool) -> Picture:
    """Facts about a picture. `decode` proves that all pixels can be read; without it header and end are looked at.

    Raises DatasetError naming the file when it is empty, too large, damaged, no picture, or changes while it is read.
    """
    with _open_picture(path) as (file, image):
        before = os.fstat(file.fileno())
        look = b""
        if decode or not _ends_well(file, image):
            image.load()
            look = look_of(image)
        orientation, odd = _orientation(image)
        width, height = image.size[::-1] if orientation >= 5 else image.size
        remarks = _remarks(file, image)
        sha256 = _hash_open(file)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DatasetError("The file was changed while it was read", where=str(path), hint="Scan the folder again.")
        return Picture(width, height, sha256, remarks + odd, look)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal. Raises DatasetError naming the file when it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(_reason(error), str(path)) from error


def read_file(path: Path, sha256: str) -> bytes:
    """A picture's file, if it still holds the bytes of that hash. Raises DatasetError naming the file."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise DatasetError(_reason(error), str(path)) from error
    if not data:
        raise DatasetError(_EMPTY, str(path))
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DatasetError("The picture was changed since the folder was scanned", str(path), "Start the run again.")
    return data


def has_alpha(path: Path) -> bool:
    """Whether a picture has transparency, by its header. Raises DatasetError naming the file."""
    with _open_picture(path) as (_file, image):
        return image.has_transparency_data


def load_pixels(path: Path, sha256: str = "", data: bytes | None = None, alpha: bool = False) -> Image.Image:
    """A picture as 8-bit RGB without metadata: upright by EXIF, alpha on white, the first frame of several.

    16-bit, CMYK, palette and grey are converted. Peak memory is about 12 bytes per pixel of at most MAX_PIXELS.
    With `sha256`, the file must still hold the bytes of that hash, so that nothing is cached under a stale name. With
    `data`, these are the file's bytes, and it is not opened. With `alpha`, a transparent picture is RGBA. Raises
    DatasetError naming the file.
    """
    with _open_picture(path, read_file(path, sha256) if sha256 else data) as (_file, image):
        image.load()
        orientation, _odd = _orientation(image)
        picture = _to_rgb(image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image, alpha)
        # A place where a photograph was taken must not travel into caches and samples.
        picture.info = {}
        return picture


def load_small(path: Path, side: int) -> Image.Image:
    """A picture as 8-bit RGB, its sides at most `side` pixels, upright; for looking at, never for training.

    JPEGs are decoded at about the size that is wanted, which takes a tenth of the time and memory. Raises DatasetError.
    """
    with _open_picture(path) as (_file, image):
        orientation, _odd = _orientation(image)
        small = image if image.mode == "RGB" else _to_rgb(image) if image.format != "JPEG" else image
        small.thumbnail((side, side))
        upright = small.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else small
        picture = _to_rgb(upright)
        picture.info = {}
        return picture


def _hash_open(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _open_picture(path: Path, data: bytes | None = None) -> Iterator[tuple[Any, Image.Image]]:
    """Yields the open file, or its bytes as one, and its image, of which only the header is read.

    Decoder errors become DatasetError.
    """
    where = str(path)
    try:
        with open_regular(path) if data is None else BytesIO(data) as file, warnings.catch_warnings():
            # Our own limit is below Pillow's, and its remarks on odd metadata help nobody here.
            warnings.simplefilter("ignore")
            size = os.fstat(file.fileno()).st_size if data is None else len(data)
            if size == 0:
                raise DatasetError(_EMPTY, where)
            if size > MAX_BYTES:
                raise DatasetError(f"The file is larger than {MAX_BYTES >> 20} MiB", where, "Save a smaller copy.")
            with Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                    raise _too_many_pixels(f"{width}x{height}", where)
                yield file, image
    except UnidentifiedImageError as error:
        hint = "Open it in an image program and save it as PNG or JPEG."
        raise DatasetError("This is not a picture in a format that can be read", where, hint) from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(f"over {2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} million", where) from error
    except _DECODER_ERRORS as error:
        raise DatasetError(_reason(error), where) from error


def _too_many_pixels(size: str, where: str) -> DatasetError:
    limit = f"{MAX_PIXELS // 1_000_000} million, and sides up to {MAX_SIDE}"
    return DatasetError(f"Too many pixels, {size}; the limit is {limit}", where, "Save a smaller copy.")


def _reason(error: BaseException) -> str:
    """A decoder's error in words: damaged files are by far the commonest cause."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"The file cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "There is not enough memory to decode the picture"
    return f"The picture is truncated or damaged ({error or type(error).__name__})"


def _remarks(file: BufferedReader, image: Image.Image) -> tuple[str, ...]:
    """What is done to this picture that a person may not expect."""
    remarks = []
    if _has_frames(image):
        several = "has several pages" if image.format == "TIFF" else "is animated"
        remarks.append(f"the picture {several}; the first one is used")
    if image.mode == "CMYK":
        remarks.append("the picture is CMYK; converted to RGB")
    if _bits(file, image) > 8:
        remarks.append(f"the picture has {_bits(file, image)} bits per channel; converted to 8")
    return tuple(remarks)


def _has_frames(image: Image.Image) -> bool:
    """Whether there is more than one frame or page. A photograph's MPO, a picture and its preview, does not count."""
    try:
        return image.format in ("GIF", "WEBP", "PNG", "TIFF") and bool(getattr(image, "is_animated", False))
    except _DECODER_ERRORS:
        # There is a second frame, and it is damaged: only the first is used anyway.
        return True


def _bits(file: BufferedReader, image: Image.Image) -> int:
    """Bits per channel as stored; Pillow shows 16-bit colour as plain RGB."""
    if image.format == "PNG":
        return int(_read_at(file, 24, 1)[0])
    if image.format == "TIFF":
        stored = getattr(image, "tag_v2", {}).get(258, (8,))
        return int(max(stored)) if isinstance(stored, tuple) else int(stored)
    return 8


def _read_at(file: BufferedReader, offset: int, count: int) -> bytes:
    """Bytes at an offset; the position, which Pillow's lazy reading depends on, is restored."""
    position = file.tell()
    file.seek(offset)
    data = file.read(count)
    file.seek(position)
    return data


def _ends_well(file: BufferedReader, image: Image.Image) -> bool:
    """Whether the file's end is what its format asks for. False decides nothing: the picture is then decoded."""
    size = os.fstat(file.fileno()).st_size
    tail = _read_at(file, max(0, size - 12), 12)
    if image.format in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if image.format == "PNG":
        # Orientation may stand behind the pixels, where only decoding meets it.
        return tail[4:8] == b"IEND" and b"eXIf" not in _read_at(file, max(0, size - 65_536), 65_536)
    if image.format == "GIF":
        return tail.endswith(b"\x3b")
    if image.format == "WEBP":
        return int.from_bytes(_read_at(file, 4, 4), "little") + 8 <= size
    if image.format == "BMP":
        return 0 < int.from_bytes(_read_at(file, 2, 4), "little") <= size
    return False


def _orientation(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    """EXIF orientation (1 to 8) and remarks. Damaged EXIF leaves the picture as it is stored."""
    if image.format == "TIFF":
        return 1, ()  # Pillow turns it upright by itself
    try:
        # The base class's: that of PNG decodes the picture on the way.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1, ("its EXIF data is damaged; the picture is taken as it is stored",)
    return (value if isinstance(value, int) and value in _UPRIGHT else 1), ()


def _to_rgb(image: Image.Image, alpha: bool = False) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB, or RGBA; never an image that still hangs on its file."""
    if image.mode.startswith(("I", "F")):
        image = _to_grey8(image)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        if alpha:
            return rgba.copy()
        picture = Image.new("RGB", rgba.size, "white")
        picture.paste(rgba, mask=rgba.getchannel("A"))
        return picture
    return image.convert("RGB")  # a copy where it is RGB already


def _to_grey8(image: Image.Image) -> Image.Image:
    """Deep grey (16-bit, 32-bit, float) as 8-bit grey: full range of its kind -> 0..255."""
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        # 32-bit and float files have no fixed range: the smallest usual one that holds the values, else what they span.
        low, high = (float(bound) for bound in image.getextrema())  # type: ignore[arg-type]
        usual = next((top for top in (1.0, 255.0, 65535.0) if high <= top and (image.mode == "F" or top > 1)), None)
        if low >= 0 and usual is not None:
            low, high = 0.0, usual
    image.info.pop("transparency", None)  # counted in the old range
    scale = 255.0 / (high - low) if high > low else 0.0
    # Float keeps the fractions until the one rounding at the end.
    grey = image.convert("I").convert("F") if image.mode.startswith("I;16") else image.convert("F")
    return grey.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
