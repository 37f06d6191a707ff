"""Small pictures for tests, and pieces of damaged ones."""

from __future__ import annotations

import struct
import zlib

from PIL import Image, ImageDraw


def make_picture(side: int = 48, number: int = 0, height: int = 0) -> Image.Image:
    """An RGB picture of side x (height or side) pixels that differs for each number."""
    image = Image.new("RGB", (side, height or side), (40 + number * 37 % 180, 200 - number * 53 % 180, number * 91 % 256))
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill=(250, number * 17 % 256, 30))
    return image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file: length, kind, data, checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
