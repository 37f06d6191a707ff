"""Pictures side by side: a labelled page, and what differs between two of the same noise. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_GAP = 6
_EMPTY = "#e7e2da"
AMPLIFIED = (1, 2, 4, 8, 16, 32)
"""Factors by which a difference is shown."""


def label_grid(
    images: Sequence[Sequence[Image.Image | None]], rows: Sequence[str], columns: Sequence[str], side: int = 160
) -> Image.Image:
    """A labelled grid: `images[row][column]`, row labels above each row, column labels on top; small pictures enlarged.

    At least one picture must be there; a None is left as an empty field. All are of the first one's size.
    """
    from PIL import ImageDraw, ImageFont

    first = next(image for row in images for image in row if image is not None)
    zoom = max(1, math.ceil(side / first.width))
    width, height = first.width * zoom, first.height * zoom
    font = ImageFont.load_default(size=max(12, height // 11))
    line = max(18, height // 8)
    page = Image.new("RGB", (_GAP + len(columns) * (width + _GAP), line + len(rows) * (height + line + _GAP)), "white")
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(columns):
        fitting = _fit(label, draw, font, width)
        draw.text((_GAP + column * (width + _GAP) + width // 2, line // 2), fitting, fill="#444444", font=font, anchor="mm")
    for row, label in enumerate(rows):
        top = line + row * (height + line + _GAP)
        draw.text((_GAP, top + line // 2), _fit(label, draw, font, page.width - 2 * _GAP), fill="black", font=font, anchor="lm")
        for column, image in enumerate(images[row]):
            left = _GAP + column * (width + _GAP)
            if image is None:
                draw.rectangle((left, top + line, left + width - 1, top + line + height - 1), fill=_EMPTY)
            else:
                page.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top + line))
    return page


def _fit(text: str, draw: Any, font: Any, width: int) -> str:
    while len(text) > 2 and draw.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text


@dataclass(frozen=True)
class Difference:
    """|a - b| of two pictures: `picture` shows it `factor` times as bright; mean and largest are shares of 1."""

    picture: Image.Image
    factor: int
    mean: float
    largest: float


def difference(first: Image.Image, second: Image.Image, factor: int | None = None) -> Difference:
    """What differs, channel by channel. Without a factor the largest that cuts at most one value in a hundred is taken.

    Raises ValueError for pictures of different sizes.
    """
    if first.size != second.size:
        raise ValueError(f"pictures of {first.size} and {second.size} cannot be compared")
    apart = np.abs(np.asarray(first.convert("RGB"), np.int16) - np.asarray(second.convert("RGB"), np.int16))
    if factor is None:
        bright = float(np.percentile(apart, 99))
        factor = max(one for one in AMPLIFIED if one * bright <= 255)
    shown = Image.fromarray(np.minimum(apart * factor, 255).astype(np.uint8))
    return Difference(shown, factor, float(apart.mean()) / 255.0, float(apart.max()) / 255.0)
