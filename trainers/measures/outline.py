"""How much of a drawing is dark line: the measure that tells an ink style from a coloured one without any model."""

from __future__ import annotations

import numpy as np
from PIL import Image

from trainers.measures.pixels import Mask, luma, object_mask, read_pixels

DARK_BELOW = 90.0
"""Luma (0..255) under which a pixel is dark."""
LIGHT_ABOVE = 150.0
"""Luma (0..255) over which a pixel is light."""
REACH = 2
"""How far a light neighbour may be, in pixels, diagonal steps included."""


def outline_share(image: Image.Image) -> float:
    """Share (0..1) of the object's pixels that are dark with a light neighbour within 2 px, at 64 px; 0 for an empty picture.

    Object pixels are those with a luma under 245, dark is under 90, light over 150, and the white ground counts as a light
    neighbour. The neighbourhood is the 5 x 5 square. Published for the style folders were medians only; this definition gives
    them back. Medians measured with it (24 concepts outside each folder, drawn from the icon sets; base styles on inkline's):

        blackcut 0.552 (published 0.552), inkline 0.170 (published 0.170),
        noto 0.052, twemoji 0.049, fluent 3d 0.024, fluent flat 0.019 (published 0.018 to 0.054)

    The training folders themselves: blackcut 0.622, inkline 0.142.
    """
    pixels = read_pixels(image)
    lightness = luma(pixels)
    object_pixels = object_mask(pixels)
    if not object_pixels.any():
        return 0.0
    line = (lightness < DARK_BELOW) & near(lightness > LIGHT_ABOVE, REACH) & object_pixels
    return float(line.sum() / object_pixels.sum())


def near(mask: Mask, reach: int) -> Mask:
    """True (H, W) where the mask is true at most `reach` pixels away, diagonal steps included; nothing lies past the border."""
    height, width = mask.shape
    padded = np.pad(mask, reach)
    found = np.zeros_like(mask)
    for row in range(2 * reach + 1):
        for column in range(2 * reach + 1):
            found |= padded[row : row + height, column : column + width]
    return found
