"""What the pixel measures share: a picture as an array at one size, and which of its pixels belong to the object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MEASURED_SIDE = 64
"""Side in pixels that pictures are brought to before anything is counted."""
GROUND_LUMA = 245.0
"""A pixel at least this light is the white ground (0..255)."""
LUMA_WEIGHTS = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luma (ITU-R BT.601)."""

Pixels = NDArray[np.float64]
Mask = NDArray[np.bool_]


def read_pixels(image: Image.Image, side: int = MEASURED_SIDE) -> Pixels:
    """RGB values (side, side, 3) in 0..255. Alpha goes on white; another size is resampled with Lanczos."""
    if image.has_transparency_data:
        cut_out = image.convert("RGBA")
        image = Image.new("RGBA", cut_out.size, "white")
        image.alpha_composite(cut_out)
    plain = image.convert("RGB")
    if plain.size != (side, side):
        plain = plain.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(plain, dtype=np.float64)


def luma(pixels: Pixels) -> Pixels:
    """Lightness (H, W) in 0..255 of RGB values (H, W, 3)."""
    lightness: Pixels = pixels @ np.asarray(LUMA_WEIGHTS)
    return lightness


def object_mask(pixels: Pixels) -> Mask:
    """True (H, W) where a pixel is darker than the white ground. White parts inside an object count as ground."""
    mask: Mask = luma(pixels) < GROUND_LUMA
    return mask
