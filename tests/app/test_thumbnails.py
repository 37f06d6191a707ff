"""Thumbnails: right way up, never enlarged, made once, and again when the picture changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from app.thumbnails import WIDTHS, make_thumbnail
from tests.command_line import contents
from trainers.errors import DatasetError


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A JPEG stored lying on its side: left half red, turned upright by EXIF the top half is red... 800 x 400 stored."""
    image = Image.new("RGB", (800, 400), "blue")
    image.paste("red", (0, 0, 400, 400))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "photo.jpg", exif=exif, quality=95)
    return tmp_path / "in" / "photo.jpg"


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def test_it_is_upright_and_its_longest_side_is_what_was_asked(photo: Path, tmp_path: Path) -> None:
    image = opened(make_thumbnail(photo, tmp_path / "cache", 192))
    assert image.size == (96, 192) and image.format == "WEBP" and not image.info.get("exif")
    top, bottom = image.getpixel((48, 20)), image.getpixel((48, 170))
    assert isinstance(top, tuple) and isinstance(bottom, tuple)
    assert top[0] > 200 and bottom[2] > 200


@pytest.mark.parametrize(("asked", "side"), [(1, 96), (96, 96), (97, 192), (500, 768), (10**9, 768), (-5, 96)])
def test_only_a_few_sizes_are_made(photo: Path, tmp_path: Path, asked: int, side: int) -> None:
    assert max(opened(make_thumbnail(photo, tmp_path / "cache", asked)).size) == side
    assert side in WIDTHS


def test_a_small_picture_is_not_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "green").save(tmp_path / "small.png")
    assert opened(make_thumbnail(tmp_path / "small.png", tmp_path / "cache", 192)).size == (40, 30)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_pictures_of_any_mode_are_shown(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (300, 200)).save(path)
    image = opened(make_thumbnail(path, tmp_path / "cache", 96))
    assert image.size == (96, 64) and image.mode == "RGB"


def test_what_is_see_through_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (300, 200), (0, 0, 0, 0)).save(tmp_path / "a.png")
    pixel = opened(make_thumbnail(tmp_path / "a.png", tmp_path / "cache", 96)).getpixel((5, 5))
    assert isinstance(pixel, tuple) and min(pixel) > 250


def test_it_is_made_once_and_again_for_a_changed_picture(photo: Path, tmp_path: Path) -> None:
    first = make_thumbnail(photo, tmp_path / "cache", 192)
    time = first.stat().st_mtime_ns
    assert make_thumbnail(photo, tmp_path / "cache", 192) == first and first.stat().st_mtime_ns == time
    Image.new("RGB", (100, 100), "white").save(photo)
    assert make_thumbnail(photo, tmp_path / "cache", 192) != first


def test_nothing_is_written_beside_the_picture(photo: Path, tmp_path: Path) -> None:
    before = contents(photo.parent)
    make_thumbnail(photo, tmp_path / "cache", 192)
    assert contents(photo.parent) == before


def test_a_damaged_picture_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="not a picture"):
        make_thumbnail(tmp_path / "a.png", tmp_path / "cache")
