"""Near-duplicates: the same drawing saved again or in another size is found, another one and another colour are not."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image, ImageDraw

from trainers.dataset.looks import find_alike, look_of


def drawing(seed: int, colour: tuple[int, int, int] = (200, 60, 40)) -> Image.Image:
    dice = random.Random(seed)
    image = Image.new("RGB", (200, 160), (240, 235, 220))
    for _ in range(12):
        x, y, size = dice.randrange(160), dice.randrange(120), dice.randrange(20, 60)
        ImageDraw.Draw(image).ellipse((x, y, x + size, y + size), fill=colour, outline="black", width=3)
    return image


def saved(image: Image.Image, kind: str = "JPEG", **how: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return Image.open(data)


@pytest.mark.parametrize(
    "other",
    [
        saved(drawing(1), quality=60),
        saved(drawing(1).resize((150, 120))),
        saved(drawing(1).resize((400, 320)), "WEBP", quality=70),
        drawing(1).quantize(32),
    ],
)
def test_the_same_picture_in_other_bytes_is_found(other: Image.Image) -> None:
    looks = [look_of(drawing(2)), look_of(drawing(1)), look_of(drawing(3)), look_of(other)]
    assert list(find_alike(looks)) == [(1, 3)]


def test_different_drawings_and_colours_are_not_taken_for_the_same() -> None:
    looks = [look_of(drawing(seed)) for seed in range(100)] + [look_of(drawing(1, (60, 140, 60)))]
    assert b"" not in looks and list(find_alike(looks)) == []


def test_pictures_that_show_next_to_nothing_are_like_none() -> None:
    looks = [look_of(Image.new("RGB", (64, 64), colour)) for colour in ("white", "white", "black")]
    assert looks == [b""] * 3 and list(find_alike(looks)) == []


def test_more_pictures_than_are_compared_at_once() -> None:
    dice = random.Random(0)
    looks = [dice.randbytes(80) for _ in range(300)]
    looks[250], looks[299], looks[10] = looks[3], looks[3], b""
    assert list(find_alike(looks)) == [(3, 250), (3, 299)]
