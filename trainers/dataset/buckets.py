"""Aspect-ratio buckets: which size each picture is trained at, and how it is scaled and cropped to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

CENTRE = (0.5, 0.5)
"""A crop in the middle: from left and from top, in parts of what the crop can move."""
MAX_ASPECT = 4.0
"""Long side over short side of the longest bucket: sides go from half to twice the resolution."""


@dataclass(frozen=True)
class Placement:
    """How a picture comes into its bucket. All sizes in pixels."""

    bucket: tuple[int, int]
    """(height, width) of the training picture, multiples of the step."""
    resized: tuple[int, int]
    """(height, width) the picture is scaled to; covers the bucket, one side equal to it."""
    crop: tuple[int, int, int, int]
    """(left, top, right, bottom) of the bucket within the resized picture."""
    enlarged: float
    """Factor by which the picture is scaled up, 1.0 when it is not."""

    @property
    def cropped(self) -> float:
        """Share of the picture's area that the crop cuts off, in [0, 1)."""
        return 1.0 - self.bucket[0] * self.bucket[1] / (self.resized[0] * self.resized[1])


def make_buckets(resolution: int, step: int, max_aspect: float = MAX_ASPECT) -> list[tuple[int, int]]:
    """All buckets (height, width), sorted: for each width the tallest height, and the other way round.

    Both are multiples of `step` between half and twice `resolution`, of at most resolution^2 pixels and an aspect of at
    most `max_aspect`. A square is always among them, of one step where the resolution is smaller than that.
    Raises ValueError when resolution or step is below 1, or max_aspect below 1.
    """
    if resolution < 1 or step < 1 or max_aspect < 1:
        raise ValueError(f"resolution {resolution}, step {step} and max_aspect {max_aspect} must be at least 1")
    square = max(step, resolution // step * step)
    buckets = {(square, square)}
    smallest, largest = math.ceil(resolution / 2), resolution * 2
    for side in range(math.ceil(smallest / step) * step, largest + 1, step):
        other = min(resolution * resolution // side, largest) // step * step
        if other >= smallest and max(side, other) <= max_aspect * min(side, other):
            buckets |= {(side, other), (other, side)}
    return sorted(buckets)


def assign_buckets(
    sizes: Sequence[tuple[int, int]],
    resolution: int,
    step: int,
    *,
    enabled: bool = True,
    max_aspect: float = MAX_ASPECT,
    crops: Sequence[tuple[float, float]] = (),
) -> list[Placement]:
    """The placement of each picture of `sizes` (height, width), in the same order.

    `crops`: where the crop of each lies, from left and from top, in [0, 1] of what it can move; left out, in the middle.

    Each goes to the bucket nearest in log aspect ratio, which is the one that crops least; the larger of two equally
    near. With `enabled` off all go to the square. Raises ValueError for a size, resolution or step below 1, and for
    crops outside of [0, 1] or of another number than the sizes.
    """
    buckets = make_buckets(resolution, step, max_aspect if enabled else 1.0)
    known: dict[tuple[int, int], Placement] = {}
    for size in sizes:
        if size not in known:
            known[size] = _place_size(size, buckets)
    if not crops:
        return [known[size] for size in sizes]
    return [move_crop(known[size], crop) for size, crop in zip(sizes, crops, strict=True)]


def move_crop(placement: Placement, crop: tuple[float, float]) -> Placement:
    """The same with its crop at (x, y) of what it can move: 0 is left or top, 0.5 the middle, 1 right or bottom.

    Raises ValueError for a number outside of that.
    """
    if not all(0 <= part <= 1 for part in crop):
        raise ValueError(f"a crop at {crop}")
    (height, width), (resized_height, resized_width) = placement.bucket, placement.resized
    left, top = int(crop[0] * (resized_width - width)), int(crop[1] * (resized_height - height))
    return replace(placement, crop=(left, top, left + width, top + height))


def crop_share(placement: Placement) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what is trained on, each in [0, 1] of the picture's width or height."""
    height, width = placement.resized
    left, top, right, bottom = placement.crop
    return left / width, top / height, right / width, bottom / height


def _place_size(size: tuple[int, int], buckets: list[tuple[int, int]]) -> Placement:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {width}x{height} pixels")
    wanted = math.log(height / width)
    # Rounded, so that equally near buckets are equal on every machine.
    bucket = min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - wanted), 9), -b[0] * b[1], b))
    scale = max(bucket[0] / height, bucket[1] / width)
    resized = max(bucket[0], round(height * scale)), max(bucket[1], round(width * scale))
    return move_crop(Placement(bucket, resized, (0, 0, 0, 0), max(1.0, scale)), CENTRE)


def place(image: Image.Image, placement: Placement, flip: bool) -> Image.Image:
    """The picture scaled (Lanczos) and cropped to exactly its bucket's size, mirrored left to right with `flip`."""
    resized_height, resized_width = placement.resized
    left, top, right, bottom = placement.crop
    # Only the cropped part is scaled: a long strip scaled whole could need gigabytes.
    x, y = image.width / resized_width, image.height / resized_height
    size = placement.bucket[1], placement.bucket[0]
    placed = image.resize(size, Image.Resampling.LANCZOS, box=(left * x, top * y, right * x, bottom * y))
    return placed.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else placed
