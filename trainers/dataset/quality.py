"""What may be wrong with a picture among its like: there twice, blurred, dark, bright, of an odd shape, too small. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy
from PIL import Image

from trainers.dataset.buckets import Placement
from trainers.dataset.folder import Example
from trainers.dataset.looks import find_alike, look_of
from trainers.dataset.pictures import load_small

SIDE = 512
"""Longest side in pixels at which pictures are looked at: sharpness is then about what training can see."""
BLURRED = 0.1
"""Of the folder's median sharpness: a picture below that is told. A hint, no more: flat drawings have few edges too."""
CLIPPED = 0.25
"""Told when so much more of a picture is black, or white, than of the folder's middle one: white paper is no fault in all."""
ODD = 1.8
"""Told when the aspect ratio is so many times the folder's middle one, or the other way round."""
CUT = 0.3
"""Told when the crop cuts off more than this share of the area."""
ENLARGED = 1.5
"""Told when a picture is enlarged by more than this."""
_FEW = 5  # in fewer pictures there is no middle to be far from
_DARKEST, _BRIGHTEST = 4, 251  # of 255

Kind = Literal["same", "alike", "blurred", "dark", "bright", "shape", "small"]


@dataclass(frozen=True)
class Quality:
    """What is measured of one picture's pixels."""

    sharpness: float
    """Variance of the Laplacian of its brightness (0 to 255) at SIDE."""
    dark: float
    """Share of pixels that are black or next to it, in [0, 1]."""
    bright: float
    look: bytes
    """Of `look_of`."""


@dataclass(frozen=True)
class Flaw:
    """What may be wrong with these pictures; of several that are alike, one is enough."""

    kind: Kind
    pictures: tuple[str, ...]
    reason: str


def measure_picture(path: Path) -> Quality:
    """Measures a file, which takes some 10 to 50 ms. Raises DatasetError naming it when it cannot be read."""
    return measure(load_small(path, SIDE))


def measure(image: Image.Image) -> Quality:
    """Measures a picture, RGB, as it is; at SIDE, so that numbers can be compared."""
    grey = numpy.asarray(image.convert("L"), dtype=numpy.float32)
    if min(grey.shape) < 3:
        sharpness = 0.0
    else:
        # The Laplacian: how far a pixel is from the mean of its four neighbours. Its variance falls with blur
        # (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", 2000).
        around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
        sharpness = float((around - 4 * grey[1:-1, 1:-1]).var())
    return Quality(sharpness, float((grey <= _DARKEST).mean()), float((grey >= _BRIGHTEST).mean()), look_of(image))


def find_flaws(examples: Sequence[Example], qualities: Sequence[Quality | None], placements: Sequence[Placement]) -> list[Flaw]:
    """What may be wrong, the likeliest kinds first. All three in the same order; a quality of None is not known (yet).

    Without placements nothing is said about crops and enlargement.
    """
    flaws = _alike(examples, qualities)
    flaws += _small(examples, placements)
    flaws += _odd_shapes(examples, placements)
    known = [(example, quality) for example, quality in zip(examples, qualities, strict=True) if quality is not None]
    if len(known) < _FEW:
        return flaws
    sharpness = median(quality.sharpness for _, quality in known)
    dark, bright = (median(getattr(quality, name) for _, quality in known) for name in ("dark", "bright"))
    for example, quality in known:
        if quality.dark > dark + CLIPPED:
            flaws.append(Flaw("dark", (example.name,), f"{quality.dark:.0%} of it is black; of the middle one {dark:.0%}"))
        if quality.bright > bright + CLIPPED:
            flaws.append(
                Flaw("bright", (example.name,), f"{quality.bright:.0%} of it is white; of the middle one {bright:.0%}")
            )
    blurred = [(quality.sharpness, example.name) for example, quality in known if quality.sharpness < BLURRED * sharpness]
    for value, name in sorted(blurred):
        share = value / sharpness
        flaws.append(Flaw("blurred", (name,), f"{share:.0%} of the sharpness of the folder's middle picture"))
    return flaws


def _alike(examples: Sequence[Example], qualities: Sequence[Quality | None]) -> list[Flaw]:
    """Groups of pictures that are the same file, or look so: each picture in at most one of each."""
    files: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        files.setdefault(example.sha256, []).append(index)
    flaws = [
        Flaw("same", tuple(examples[index].name for index in group), "Under several names: it counts more than once")
        for group in files.values()
        if len(group) > 1
    ]
    firsts = [group[0] for group in files.values()]
    looks = [quality.look if (quality := qualities[index]) else b"" for index in firsts]
    group_of: dict[int, list[int]] = {}
    for earlier, later in find_alike(looks):
        group = group_of.setdefault(earlier, [earlier])
        group.append(later)
        group_of[later] = group
    for start, group in group_of.items():
        if group[0] == start:
            names = tuple(examples[firsts[index]].name for index in group)
            flaws.append(Flaw("alike", names, "What they show counts more than once"))
    return flaws


def _small(examples: Sequence[Example], placements: Sequence[Placement]) -> list[Flaw]:
    return [
        Flaw("small", (example.name,), f"Only {example.width} × {example.height}: enlarged {placement.enlarged:.1f} times")
        for example, placement in zip(examples, placements, strict=False)
        if placement.enlarged > ENLARGED
    ]


def _odd_shapes(examples: Sequence[Example], placements: Sequence[Placement]) -> list[Flaw]:
    flaws = []
    middle = median(math.log(example.width / example.height) for example in examples) if len(examples) >= _FEW else None
    for index, example in enumerate(examples):
        cut = placements[index].cropped if placements else 0.0
        aspect = math.log(example.width / example.height)
        if cut > CUT:
            flaws.append(Flaw("shape", (example.name,), f"{example.width} × {example.height}: {cut:.0%} of it is cut off"))
        elif middle is not None and abs(aspect - middle) > math.log(ODD):
            how = "wider" if aspect > middle else "taller"
            times = math.exp(abs(aspect - middle))
            flaws.append(Flaw("shape", (example.name,), f"{times:.1f} times {how} in shape than the folder's middle picture"))
    return flaws
