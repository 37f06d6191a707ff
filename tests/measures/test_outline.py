"""The outline share tells lines from areas, and the lists it is applied to are honest."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trainers.measures.outline import near, outline_share
from trainers.measures.pixels import read_pixels

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "assets" / "samples"
HELD_OUT = (ROOT / "tests" / "blackcut_heldout.txt").read_text(encoding="utf-8").splitlines()
CONCEPTS = (ROOT / "assets" / "pocket" / "build" / "concepts.txt").read_text(encoding="utf-8").splitlines()


def drawing(fill: str, outline: str | None = None, width: int = 2, side: int = 64) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    unit = side // 64
    ImageDraw.Draw(image).rectangle((10 * unit, 10 * unit, 54 * unit - 1, 54 * unit - 1), fill, outline, width * unit)
    return image


def trained_labels() -> set[str]:
    captions = [path.read_text(encoding="utf-8").strip() for path in (SAMPLES / "blackcut").glob("*.txt")]
    return {caption.removesuffix(", blackcut style").split(" ", 1)[1] for caption in captions}


def median_share(folder: Path) -> float:
    return median(outline_share(Image.open(path)) for path in folder.glob("*.png"))


def test_a_coloured_square_without_a_line_has_no_outline() -> None:
    assert outline_share(drawing("orange")) == 0.0


def test_a_thin_dark_frame_round_a_light_square_counts_every_pixel_of_the_frame() -> None:
    frame = 44**2 - 40**2
    assert outline_share(drawing("yellow", "black")) == pytest.approx(frame / 44**2)


def test_a_solid_black_square_counts_only_its_rim_of_two_pixels() -> None:
    assert outline_share(drawing("black")) == pytest.approx((44**2 - 40**2) / 44**2)


def test_a_dark_line_between_dark_areas_is_no_outline() -> None:
    assert outline_share(Image.new("RGB", (64, 64), (40, 40, 40))) == 0.0


def test_an_empty_picture_has_share_zero() -> None:
    assert outline_share(Image.new("RGB", (64, 64), "white")) == 0.0


def test_the_share_hardly_depends_on_the_size_of_the_picture() -> None:
    small, large = (outline_share(drawing("yellow", "black", side=side)) for side in (64, 128))
    assert large == pytest.approx(small, abs=0.06)


def test_transparent_ground_is_white_ground() -> None:
    opaque = drawing("yellow", "black")
    cut_out = opaque.convert("RGBA")
    cut_out.putalpha(Image.fromarray(np.where(np.asarray(opaque).min(-1) == 255, 0, 255).astype(np.uint8)))
    assert np.array_equal(read_pixels(cut_out), read_pixels(opaque))


def test_near_reaches_diagonally_but_not_further_than_asked() -> None:
    mask = np.zeros((7, 7), dtype=bool)
    mask[0, 0] = True
    found = near(mask, 2)
    assert found[2, 2] and found.sum() == 9


def test_the_measured_median_of_the_blackcut_folder_stands() -> None:
    assert median_share(SAMPLES / "blackcut") == pytest.approx(0.622, abs=0.01)


def test_the_measured_median_of_the_inkline_folder_stands() -> None:
    assert median_share(SAMPLES / "inkline") == pytest.approx(0.142, abs=0.01)


def test_the_held_out_labels_are_none_of_the_24_trained_ones() -> None:
    trained = trained_labels()
    assert len(trained) == 24
    assert not trained & set(HELD_OUT)


def test_the_held_out_list_names_at_least_40_different_labels() -> None:
    assert len(set(HELD_OUT)) == len(HELD_OUT) >= 40


def test_the_concepts_to_choose_among_hold_every_trained_and_held_out_label_once() -> None:
    assert len(set(CONCEPTS)) == len(CONCEPTS) == 203
    assert trained_labels() | set(HELD_OUT) <= set(CONCEPTS)


def test_the_labels_that_stay_coloured_are_20_of_the_concepts() -> None:
    coloured = (ROOT / "tests" / "coloured_without_trigger.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(coloured)) == 20
    assert set(coloured) <= set(CONCEPTS)
