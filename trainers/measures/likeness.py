"""How near drawn pictures come to a folder's: a few numbers for each picture, without any network, and their distance.

For a style and for a subject alike it is asked whether light, colour, lines and texture are those of the folder, for the same
captions. What is drawn, and whether it is drawn well, these numbers do not say.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from trainers.measures.colour import saturation
from trainers.measures.outline import outline_share
from trainers.measures.pixels import Pixels, luma, object_mask, read_pixels

LEVELS = 8
"""Quantiles of light and of colour: unlike a histogram's bins they move as smoothly as the picture."""
SCALES = (1, 2, 4)
"""Distances in pixels, at 64 px, at which texture is looked at."""
_LEAST_SPREAD = 0.02
"""A channel that hardly varies at all (0..1) counts as if it varied by this much."""


def describe(image: Image.Image) -> Pixels:
    """(D,) numbers of a picture of any size, about 0..1 each: light and colour from least to most, hue, texture, lines."""
    pixels = read_pixels(image)
    light, unit = luma(pixels) / 255.0, pixels / 255.0
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    # Opponent colours: red against green, yellow against blue.
    opposed = np.stack([unit[..., 0] - unit[..., 1], (unit[..., 0] + unit[..., 1]) / 2.0 - unit[..., 2]])
    return np.concatenate(
        [
            np.quantile(light, levels),
            np.quantile(saturation(pixels), levels),
            opposed.mean((1, 2)),
            opposed.std((1, 2)),
            [_contrast(light, scale) for scale in SCALES],
            [outline_share(image), float(object_mask(pixels).mean())],
        ]
    )


def _contrast(light: Pixels, distance: int) -> float:
    across, down = light[:, distance:] - light[:, :-distance], light[distance:] - light[:-distance]
    return float((np.abs(across).mean() + np.abs(down).mean()) / 2.0)


def describe_all(images: Sequence[Image.Image]) -> Pixels:
    """(N, D) of some pictures."""
    return np.stack([describe(image) for image in images])


def spread_of(*sets: Pixels) -> Pixels:
    """(D,): how much each number varies over all pictures of the sets, for `set_distance`."""
    spread: Pixels = np.maximum(np.concatenate(sets).std(0), _LEAST_SPREAD)
    return spread


def set_distance(drawn: Pixels, wanted: Pixels, spread: Pixels) -> float:
    """Distance of the means of two sets (N, D) and (M, D): the root mean square over numbers, in units of their spread."""
    shift = (drawn.mean(0) - wanted.mean(0)) / spread
    return float(np.sqrt((shift**2).mean()))


def drift_of(drawn: Sequence[Image.Image], base: Sequence[Image.Image]) -> float:
    """Drift of pictures without the trigger from the base's own on the same noise, as of a calibration; at least two."""
    mine, own = (np.stack([read_pixels(image) for image in images]) for images in (drawn, base))
    usual = float(np.mean([pixels_apart(first, second) for first, second in itertools.combinations(own, 2)]))
    return float(np.mean([pixels_apart(one, other) for one, other in zip(mine, own, strict=True)])) / max(usual, 1e-9)


def pixels_apart(first: Pixels, second: Pixels) -> float:
    """Root mean square difference of two pictures of one shape, 0..255."""
    return float(np.sqrt(((first - second) ** 2).mean()))
