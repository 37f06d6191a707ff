"""Saturation and hue of the object: the ground and nearly black pixels do not count as colour."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.measures.colour import dominant_hue, hue, mean_saturation, share_of_hue

SAMPLES = Path(__file__).parents[2] / "assets" / "samples"
RED, BLUE, INK = (255, 0, 0), (0, 0, 255), (12, 4, 4)


def square(*colours: tuple[int, int, int]) -> Image.Image:
    """Equal vertical bands of the colours on a white ground."""
    image = Image.new("RGB", (64, 64), "white")
    for index, colour in enumerate(colours):
        image.paste(Image.new("RGB", (48 // len(colours), 48), colour), (8 + index * (48 // len(colours)), 8))
    return image


def test_a_pure_colour_is_fully_saturated_whatever_the_ground() -> None:
    assert mean_saturation(square(RED)) == 1.0


def test_ink_with_a_faint_tint_is_nearly_without_saturation() -> None:
    assert mean_saturation(square(INK)) < 0.05


def test_saturation_is_the_mean_over_the_object() -> None:
    assert mean_saturation(square(RED, (128, 128, 128))) == pytest.approx(0.5)


def test_an_empty_picture_has_no_colour_at_all() -> None:
    empty = Image.new("RGB", (64, 64), "white")
    assert (mean_saturation(empty), dominant_hue(empty), share_of_hue(empty, 0, 360)) == (0.0, None, 0.0)


def test_hue_is_that_of_the_standard_library() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.float64)
    expected = [[colorsys.rgb_to_hsv(*(pixel / 255.0))[0] * 360.0 for pixel in row] for row in pixels]
    assert np.allclose(hue(pixels), expected)


def test_the_dominant_hue_is_the_one_that_covers_most() -> None:
    found = dominant_hue(square(BLUE, BLUE, RED))
    assert found == pytest.approx(240, abs=2.5)


def test_a_grey_picture_has_no_dominant_hue() -> None:
    assert dominant_hue(square((90, 90, 90))) is None


def test_the_share_of_a_hue_is_taken_of_the_whole_object() -> None:
    assert share_of_hue(square(BLUE, RED, INK), 190, 260) == pytest.approx(1 / 3)


def test_a_range_of_hues_can_go_through_red() -> None:
    assert share_of_hue(square(RED, BLUE), 340, 20) == pytest.approx(0.5)


def test_every_picture_of_the_robot_folder_is_mostly_blue() -> None:
    assert min(share_of_hue(Image.open(path), 180, 260) for path in (SAMPLES / "bluebot").glob("*.png")) > 0.7


def test_the_blackcut_folder_is_without_colour() -> None:
    assert max(mean_saturation(Image.open(path)) for path in (SAMPLES / "blackcut").glob("*.png")) < 0.01
