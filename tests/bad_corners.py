"""More kinds of bad input for `make_bad_folder`: lying headers, odd names, odd captions, near-duplicates."""

from __future__ import annotations

import codecs
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy
from PIL import Image

from tests.bad_pictures import make_picture, png_chunk

NOISE = Image.effect_noise((96, 96), 80).convert("RGB")


def lying_files(folder: Path) -> dict[str, str]:
    """Files whose headers promise what is not there."""
    (folder / "svg.png").write_bytes(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    make_picture(number=70).save(folder / "huge claim.jpg")
    data = bytearray((folder / "huge claim.jpg").read_bytes())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
    (folder / "huge claim.jpg").write_bytes(bytes(data))
    NOISE.save(folder / "loop.tif")
    tiff = bytearray((folder / "loop.tif").read_bytes())
    tiff[4:8] = struct.pack("<I", len(tiff) + 1000)  # the first directory lies behind the end
    (folder / "loop.tif").write_bytes(bytes(tiff))
    NOISE.save(folder / "lying.webp", lossless=True)
    webp = bytearray((folder / "lying.webp").read_bytes())
    webp[16:20] = b"\xff\xff\xff\x7f"
    (folder / "lying.webp").write_bytes(bytes(webp))
    (folder / "no frames.gif").write_bytes(b"GIF89a\x10\x00\x10\x00\x00\x00\x00\x3b")
    NOISE.save(folder / "progressive.jpg", progressive=True, quality=95)
    os.truncate(folder / "progressive.jpg", os.path.getsize(folder / "progressive.jpg") // 3)
    header = struct.pack(">IIBBBBB", 40, 40, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 41 * 20)  # half of them
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    (folder / "half rows.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    (folder / "zip.jpg").write_bytes(b"PK\x03\x04" + bytes(400))
    (folder / "pickle.png").write_bytes(b"\x80\x04\x95cposix\nsystem\n.")
    (folder / "endless text.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))
        + body[25:]
    )
    return {
        "svg.png": "not a picture",
        "huge claim.jpg": "too many pixels",
        "loop.tif": "left out",
        "lying.webp": "left out",
        "no frames.gif": "left out",
        "progressive.jpg": "truncated",
        "zip.jpg": "not a picture",
        "pickle.png": "not a picture",
        "endless text.png": "left out",
    }


def odd_pictures(folder: Path) -> dict[str, str]:
    """Pictures that are used, with a word on them: nearly the same ones, odd number formats."""
    drawing = Image.merge(
        "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90)]
    )
    drawing.paste(make_picture(90, 69), (30, 120))
    drawing.save(folder / "a original.png")
    drawing.save(folder / "b resaved.jpg", quality=70)
    drawing.resize((180, 180)).save(folder / "c smaller.png")
    deep = Image.fromarray((numpy.indices((48, 48)).sum(axis=0) * 600).astype(numpy.uint16))
    deep.save(folder / "deep.tif")
    strange = numpy.linspace(0, 1, 48 * 48, dtype=numpy.float32).reshape(48, 48)
    Image.fromarray(strange).save(folder / "float.tif")
    strange = strange.copy()
    strange[3, 3], strange[5, 5] = numpy.nan, numpy.inf
    Image.fromarray(strange).save(folder / "nan.tif")
    frames = [make_picture(number=number) for number in (71, 72)]
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    return {
        "b resaved.jpg": "nearly the same as a original.png",
        "c smaller.png": "nearly the same as a original.png",
        "deep.tif": "16 bits",
        "float.tif": "32 bits",
        "nan.tif": "32 bits",
        "moving.png": "animated",
    }


def odd_captions(folder: Path) -> dict[str, str]:
    """Captions in encodings and sizes that people have."""
    kinds: dict[str, tuple[bytes, str]] = {
        "utf32": (codecs.BOM_UTF32_LE + "a château".encode("utf-32-le"), "utf-32"),
        "many words": (b"word " * 5000, "5000 words"),
        "nul": (b"a cat\0 on a mat", "control characters"),
        "escape": (b"a \x1b]0;title\x07 cat", "control characters"),
        "bidi": ("a \u202egnp.exe cat".encode(), ""),
        "picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "no text"),
    }
    for number, (name, (data, _)) in enumerate(kinds.items(), start=80):
        make_picture(number=number).save(folder / f"caption {name}.png")
        (folder / f"caption {name}.txt").write_bytes(data)
    make_picture(number=90).save(folder / "caption folder.png")
    (folder / "caption folder.txt").mkdir()
    return {f"caption {name}.txt": words for name, (_, words) in kinds.items() if words}


def odd_names(folder: Path) -> dict[str, str]:
    """Names and places."""
    told: dict[str, str] = {}
    (folder / "folder.png").mkdir()
    make_picture(number=91).save(folder / "folder.png" / "inside.png")
    deep = folder
    for _ in range(40):
        deep = deep / "deep"
    deep.mkdir(parents=True)
    make_picture(number=92).save(deep / "bottom.png")
    (folder / "1.5_half").mkdir()
    make_picture(number=93).save(folder / "1.5_half" / "x.png")
    if os.name == "posix":
        for number, name in enumerate(("line\nbreak.png", "escape\x1b[31m.png", "right\u202egnp.png"), start=94):
            make_picture(number=number).save(folder / name)
        (folder / "empty\nname.png").write_bytes(b"")
        told["empty\\nname.png"] = "empty (0 bytes)"
        bytes_name = os.fsencode(folder) + b"/\xff\xfe.png"
        with open(bytes_name, "wb"):
            pass
        told["\\udcff\\udcfe.png"] = "empty (0 bytes)"
        with socket.socket(socket.AF_UNIX) as sock:
            before = os.getcwd()
            os.chdir(folder)  # its whole path may be longer than a socket's can be
            sock.bind("socket.png")
            os.chdir(before)
        told["socket.png"] = "a socket"
        try:
            os.mknod(folder / "device.png", 0o600 | 0o020000, os.makedev(1, 3))
            told["device.png"] = "a device"
        except OSError:  # not for everyone
            pass
    return told
