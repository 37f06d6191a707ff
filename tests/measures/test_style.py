"""The style distance: nothing between equal sets, deviations of the usual spread between shifted ones."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trainers.errors import TrainingError
from trainers.measures.recognition import load_judge
from trainers.measures.style import early_features, style_distance

RANDOM = np.random.default_rng(0)
USUAL = RANDOM.normal(size=(500, 80)).astype(np.float32) * 3


def test_equal_sets_have_no_distance() -> None:
    assert style_distance(USUAL, USUAL, USUAL) == 0


def test_a_shift_by_two_deviations_is_two_away() -> None:
    assert style_distance(USUAL + 2 * USUAL.std(0), USUAL, USUAL) == pytest.approx(2, rel=1e-4)


def test_half_the_channels_shifted_by_two_are_the_root_of_two_away() -> None:
    shift = np.where(np.arange(80) < 40, 2 * USUAL.std(0), 0).astype(np.float32)
    assert style_distance(USUAL + shift, USUAL, USUAL) == pytest.approx(2**0.5, rel=1e-4)


def discs(colour: tuple[int, int, int], line: int) -> list[Image.Image]:
    """Eight discs of growing size."""
    images = []
    for radius in range(16, 32, 2):
        image = Image.new("RGB", (64, 64), "white")
        box = (32 - radius, 32 - radius, 32 + radius, 32 + radius)
        ImageDraw.Draw(image).ellipse(box, fill=colour, outline="black" if line else None, width=line)
        images.append(image)
    return images


def test_outlined_discs_are_nearer_to_other_outlined_ones_than_plain_discs_are() -> None:
    try:
        judge = load_judge()
    except TrainingError as error:
        pytest.skip(str(error))
    plain, outlined = (early_features(discs((230, 60, 40), line), judge) for line in (0, 4))
    assert plain.shape == (8, 80)
    usual = np.concatenate([plain, outlined])
    within = style_distance(outlined[::2], outlined[1::2], usual)
    assert within < 0.5 * style_distance(plain[::2], outlined[1::2], usual)
