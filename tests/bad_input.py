"""Makes a folder with every kind of bad input a scan must survive, beside good pictures, and says what must be told."""

from __future__ import annotations

import codecs
import os
import struct
import zlib
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.bad_corners import lying_files, odd_captions, odd_names, odd_pictures
from tests.bad_pictures import make_picture, png_chunk

GOOD = tuple(f"good {name}.png" for name in ("apple", "boat", "cloud", "drum", "egg", "fish", "goat", "hat", "ink", "jar"))
"""Good pictures beside the bad ones, each with a caption."""
SILENT = ("palette.png", "grey.png", "SHOUT.PNG", "äpfel 画像 🍎.png", "jpeg inside.png")
"""Unusual pictures that are used without a word."""


def make_bad_folder(folder: Path) -> dict[str, str]:
    """Fills `folder` and returns printable name -> words that the report on that name must contain, in lower case.

    What the machine cannot make (pipes and links on Windows, unreadable files as root) is left away. A link leads to a
    picture in a new folder beside `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(GOOD):
        make_picture(number=number).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a {name[5:-4]}, plain", encoding="utf-8")
    return {
        **_broken_files(folder),
        **_bombs_and_odd_sizes(folder),
        **_converted_pictures(folder),
        **_captions(folder),
        **_folders(folder),
        **_links_and_devices(folder),
        **_hidden_and_silent(folder),
        **lying_files(folder),
        **odd_pictures(folder),
        **odd_captions(folder),
        **odd_names(folder),
    }


def unlock(folder: Path) -> None:
    """Makes what `make_bad_folder` made unreadable removable again."""
    if (folder / "locked folder").exists():
        (folder / "locked folder").chmod(0o700)


def _broken_files(folder: Path) -> dict[str, str]:
    make_picture(200, 20).save(folder / "truncated.jpg", quality=95)
    os.truncate(folder / "truncated.jpg", os.path.getsize(folder / "truncated.jpg") // 2)
    for ending in ("png", "gif", "bmp", "webp", "tif"):
        path = folder / f"cut.{ending}"
        Image.effect_noise((100, 100), 90).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\0")  # the noise must not end as the format does
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no picture\n" * 20, encoding="utf-8")
    (folder / "page.webp").write_text("<svg onload=alert(1)>", encoding="utf-8")
    (folder / "noise.jpg").write_bytes(bytes(range(256)) * 8)
    (folder / "only header.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00")
    data = bytearray(_png(40, 40, zlib.compress(b"\0" * 40 * 41)))
    data[60] ^= 0xFF
    (folder / "flipped bits.png").write_bytes(bytes(data))
    with (folder / "sparse.png").open("wb") as file:
        file.truncate((1 << 30) + 1)
    return {
        "truncated.jpg": "truncated",
        **{f"cut.{ending}": "truncated" for ending in ("png", "gif", "bmp", "webp", "tif")},
        "zero.png": "empty (0 bytes)",
        "text.png": "not a picture",
        "page.webp": "not a picture",
        "noise.jpg": "not a picture",
        "only header.jpg": "left out",
        "flipped bits.png": "damaged",
        "sparse.png": "larger than 1024 mib",
    }


def _png(width: int, height: int, body: bytes, bits: int = 8) -> bytes:
    """A grey PNG of any claimed size around compressed rows."""

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def _bombs_and_odd_sizes(folder: Path) -> dict[str, str]:
    # 20,000 x 20,000 black pixels, really there: 50 MB of rows in 50 kB.
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(2501 * 100)) for _ in range(200)) + packer.flush()
    (folder / "bomb.png").write_bytes(_png(20_000, 20_000, rows, bits=1))
    (folder / "claims.png").write_bytes(_png(2_000_000_000, 2_000_000_000, zlib.compress(b"\0\0")))
    (folder / "wide.png").write_bytes(_png(40_000, 40, zlib.compress(b"\0" * 40_001 * 40)))
    make_picture().save(folder / "bomb.gif")
    screen = bytearray((folder / "bomb.gif").read_bytes())
    screen[6:10] = b"\xff" * 4
    (folder / "bomb.gif").write_bytes(bytes(screen))
    bmp = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 90_000, 90_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "bomb.bmp").write_bytes(bmp)
    make_picture(1, 21).save(folder / "dot.png")
    Image.new("RGB", (20_000, 10), "teal").save(folder / "strip.png")
    bombs = ("bomb.png", "claims.png", "wide.png", "bomb.gif", "bomb.bmp")
    return {**dict.fromkeys(bombs, "too many pixels"), "dot.png": "1x1", "strip.png": "20000x10"}


def _converted_pictures(folder: Path) -> dict[str, str]:
    make_picture(number=22).convert("CMYK").save(folder / "print.jpg")
    ramp = Image.linear_gradient("L").resize((48, 48))
    ramp.convert("I").point(lambda value: value * 257).convert("I;16").save(folder / "deep.png")
    frames = [make_picture(number=number) for number in (23, 24)]
    for ending in ("gif", "webp"):
        frames[0].save(folder / f"moving.{ending}", save_all=True, append_images=frames[1:], duration=100)
    frames[0].resize((49, 49)).save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    info = PngInfo()
    info.add_text("Raw profile type exif", "\n\n\nno hexadecimal digits")
    make_picture(number=25).save(folder / "broken exif.png", pnginfo=info)
    make_picture(number=0).save(folder / "copy of apple.png")
    return {
        "print.jpg": "cmyk",
        "deep.png": "16 bits",
        "moving.gif": "animated",
        "moving.webp": "animated",
        "pages.tif": "several pages",
        "broken exif.png": "exif data is damaged",
        "good apple.png": "the same picture as copy of apple.png",
    }


def _captions(folder: Path) -> dict[str, str]:
    kinds: dict[str, tuple[bytes, str]] = {
        "utf16": (codecs.BOM_UTF16_LE + "a château, plain".encode("utf-16-le"), "utf-16"),
        "utf16 bare": ("a château, plain".encode("utf-16-be"), "utf-16"),
        "latin": ("a château, plain".encode("latin-1"), "latin-1"),
        "controls": (b"a \x1b[31mred\x07 boat", "control characters"),
        "blank": (b" \r\n\t ", "the caption is empty"),
        "endless": (b"word, " * 12_000, "longer than 64 kib"),
        "binary": (bytes(range(256)) * 4, "no text"),
    }
    for number, (name, (data, _)) in enumerate(kinds.items(), start=30):
        make_picture(number=number).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(data)
    (folder / "orphan.txt").write_text("nothing stands beside this", encoding="utf-8")
    make_picture(number=37).save(folder / "twice.png")
    for ending in ("txt", "caption"):
        (folder / f"twice.{ending}").write_text(f"the {ending}", encoding="utf-8")
    return {
        **{f"{name}.txt": words for name, (_, words) in kinds.items()},
        "orphan.txt": "without a picture",
        "twice.caption": "twice.txt, comes first",
    }


def _folders(folder: Path) -> dict[str, str]:
    for number, name in enumerate(("0_none", "-2_minus", "99999999_much", "3_three", "3_three/deeper"), start=40):
        (folder / name).mkdir()
        make_picture(number=number).save(folder / name / "picture.png")
    return {"0_none": "0 repeats", "-2_minus": "-2 repeats", "99999999_much": "99999999 repeats"}


def _links_and_devices(folder: Path) -> dict[str, str]:
    told: dict[str, str] = {}
    if os.name == "posix":
        outside = folder.parent / f"{folder.name} outside"
        outside.mkdir(exist_ok=True)
        make_picture(number=50).save(outside / "private.png")
        links: dict[str, tuple[Path | str, str]] = {
            "loop": (folder, "loops back"),
            "self.png": ("self.png", "cannot be followed"),
            "nowhere.png": ("gone.png", "leads nowhere"),
            "leaves.png": (outside / "private.png", "leaves the folder"),
            "leaves": (outside, "leaves the folder"),
            "zz inside.png": ("good boat.png", "not counted again"),
            "pipe link.png": ("pipe.png", "not opened"),
        }
        os.mkfifo(folder / "pipe.png")
        os.mkfifo(folder / "pipe.txt")
        for name, (target, _) in links.items():
            (folder / name).symlink_to(target)
        told.update({name: words for name, (_, words) in links.items()}, **{"pipe.png": "pipe", "pipe.txt": "pipe"})
        if os.geteuid() != 0:
            make_picture(number=51).save(folder / "locked.png")
            (folder / "locked.png").chmod(0)
            (folder / "locked folder").mkdir(mode=0)
            told.update({"locked.png": "cannot be read", "locked folder": "cannot be read"})
    return told


def _hidden_and_silent(folder: Path) -> dict[str, str]:
    for name in (".hidden.png", "._good apple.png", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"litter")
    for name in ("__MACOSX", ".cache"):
        (folder / name).mkdir()
        make_picture(number=60).save(folder / name / "litter.png")
    for name in ("notes.json", "old.npz", "phone.heic"):
        (folder / name).write_bytes(b"other")
    make_picture(number=61).quantize(16).save(folder / "palette.png", transparency=0)
    make_picture(number=62).convert("L").save(folder / "grey.png")
    make_picture(number=63).save(folder / "SHOUT.PNG")
    make_picture(number=64).save(folder / "äpfel 画像 🍎.png")
    make_picture(number=65).save(folder / "jpeg inside.png", format="JPEG")
    make_picture(number=66).save(folder / ("n" * 246 + ".png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(64, 67, height=32).save(folder / "turned.jpg", exif=exif)
    return {}


def print_table() -> None:
    """Every kind and what a real scan says of it, as Markdown."""
    import tempfile

    from trainers.dataset.folder import scan_folder

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        expected = make_bad_folder(folder)
        said = {problem.where: str(problem.what) for problem in scan_folder(folder).problems if problem.where in expected}
        print(f"| {len(expected)} kinds | what is said |\n|---|---|")
        for name in sorted(expected):
            print(f"| {name} | {said.get(name, '').replace('|', '/')} |")
        unlock(folder)


if __name__ == "__main__":
    print_table()
