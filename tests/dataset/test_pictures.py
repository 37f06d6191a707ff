"""Pixels of every kind of picture file as plain, upright RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from tests.bad_input import make_picture
from trainers.dataset.folder import scan_folder
from trainers.dataset.pictures import load_pixels, read_picture
from trainers.errors import DatasetError

WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_every_exif_orientation_comes_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    upright = Image.new("RGB", (32, 64), WHITE)
    upright.paste(RED, (0, 0, 16, 32))
    # The inverse of each turn: 6 and 8 undo each other, the others undo themselves.
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if ending == "webp" else {"quality": 95, "subsampling": 0} if ending == "jpg" else {}
    stored.save(tmp_path / f"a.{ending}", exif=exif, **options)
    image = load_pixels(tmp_path / f"a.{ending}")
    for decode in (True, False):
        facts = read_picture(tmp_path / f"a.{ending}", decode=decode)
        assert (facts.width, facts.height) == image.size == (32, 64)
    green = image.getchannel("G")
    assert max(green.crop((0, 0, 14, 30)).tobytes()) < 30
    assert min(green.crop((18, 34, 32, 64)).tobytes()) > 225


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 16, 32))
    if mode == "P":
        palette = Image.new("P", (32, 32), 1)
        palette.putpalette([0, 0, 0, 255, 0, 0])
        palette.paste(0, (0, 0, 16, 32))
        palette.save(tmp_path / "a.png", transparency=1)
    elif mode == "PA":
        picture.save(tmp_path / "a.gif")
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    image = load_pixels(scan_folder(tmp_path).examples[0].path)
    assert (image.getpixel((2, 2)), image.getpixel((30, 2))) == ((0, 0, 0), WHITE)


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert load_pixels(tmp_path / "a.png").getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, ending: str) -> None:
    deep = Image.new("I;16", (256, 16))
    deep.putdata([value * 257 for value in range(256)] * 16)
    deep.save(tmp_path / f"a.{ending}")
    image = load_pixels(tmp_path / f"a.{ending}")
    assert [image.getpixel((x, 0)) for x in range(256)] == [(x, x, x) for x in range(256)]


@pytest.mark.parametrize(("mode", "top"), [("F", 1.0), ("F", 255.0), ("I", 255), ("I", 65535), ("F", 1e6)])
def test_deep_grey_fills_the_range_of_its_kind(tmp_path: Path, mode: str, top: float) -> None:
    deep = Image.new(mode, (32, 32), 0)
    deep.paste(int(top) if mode == "I" else top, (0, 0, 16, 32))
    deep.save(tmp_path / "a.tif")
    image = load_pixels(tmp_path / "a.tif")
    assert (image.getpixel((0, 0)), image.getpixel((31, 0))) == (WHITE, (0, 0, 0))


def test_cmyk_keeps_its_colour(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = load_pixels(tmp_path / "a.jpg").split()
    assert min(red.tobytes()) > 245
    assert max(green.tobytes() + blue.tobytes()) < 10


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_pixels(tmp_path / "a.gif").getpixel((0, 0)) == RED


def test_pixels_carry_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "my house"
    exif.get_ifd(0x8825)[1] = "N"
    make_picture().save(tmp_path / "a.jpg", exif=exif, comment=b"secret")
    image = load_pixels(tmp_path / "a.jpg")
    saved = io.BytesIO()
    image.save(saved, "JPEG")
    assert image.info == {}
    assert dict(image.getexif()) == {}
    assert b"my house" not in saved.getvalue()
    assert b"secret" not in saved.getvalue()


def test_a_picture_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    make_picture(number=1).save(tmp_path / "a.png")
    (example,) = scan_folder(tmp_path).examples
    make_picture(number=2).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"was changed since the folder was scanned.*a\.png"):
        load_pixels(example.path, example.sha256)


def test_truncated_pictures_are_never_filled_up_with_grey(tmp_path: Path) -> None:
    make_picture(200).save(tmp_path / "a.jpg", quality=95)
    os.truncate(tmp_path / "a.jpg", os.path.getsize(tmp_path / "a.jpg") // 2)
    with pytest.raises(DatasetError, match=r"truncated.*a\.jpg"):
        load_pixels(tmp_path / "a.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
