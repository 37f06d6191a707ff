"""Finds pictures that look the same although their bytes differ: saved again, or in another size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
from PIL import Image

SIDE = 16
ALIKE = 10
"""Pictures are taken for the same when so many of the 256 signs differ at most."""
COLOURS = 4
NEAR = 24
"""And when no part of a grid of 4 x 4 differs by more in red, green or blue, of 255: an apple, red and green, is two."""
_STEP = 4  # of 255: a smaller difference between neighbours is noise of the format
_LEAST = 24  # signs: a picture with fewer shows too little to be told from others
_BLOCK = 64  # rows compared at once: 20 MB for 10,000 pictures


def look_of(image: Image.Image) -> bytes:
    """Of a decoded picture 256 signs, where its brightness rises to the right in a grid of 16 x 16, and 48 bytes of colour.

    Empty when it rises next to nowhere.

    The difference hash of N. Krawetz ("Kind of Like That", 2013), with a threshold against the noise of flat areas.
    """
    try:
        small = image.convert("RGB").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    except (OSError, ValueError):  # a mode that Pillow cannot turn into colours
        return b""
    grey, colours = small.convert("L"), small.resize((COLOURS, COLOURS), Image.Resampling.BOX)
    values = numpy.asarray(grey, dtype=numpy.int16)
    signs = values[:, 1:] > values[:, :-1] + _STEP
    if signs.sum() < _LEAST:
        return b""
    return numpy.packbits(signs).tobytes() + colours.tobytes()


def find_alike(looks: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """(earlier, later) for every picture that looks like an earlier one, the first such. Empty looks are like none."""
    known = numpy.array([index for index, look in enumerate(looks) if look], dtype=numpy.int64)
    if len(known) < 2:
        return
    data = numpy.frombuffer(b"".join(looks[index] for index in known), dtype=numpy.uint8).reshape(len(known), -1)
    signs = numpy.ascontiguousarray(data[:, : SIDE * SIDE // 8]).view(numpy.uint64)
    colours = data[:, SIDE * SIDE // 8 :].astype(numpy.int16)
    for start in range(0, len(known), _BLOCK):
        rows = signs[start : start + _BLOCK]
        others = signs[: start + len(rows)]
        differ = numpy.bitwise_count(rows[:, None] ^ others[None]).sum(axis=2, dtype=numpy.int16)
        for row in range(len(rows)):
            earlier = numpy.flatnonzero(differ[row, : start + row] <= ALIKE)
            if len(earlier):
                earlier = earlier[numpy.abs(colours[earlier] - colours[start + row]).max(axis=1) <= NEAR]
            if len(earlier):
                yield int(known[earlier[0]]), int(known[start + row])
