"""What a camera and a computer know about a person never travels: not into caches, samples or the LoRA."""

from __future__ import annotations

import getpass
import json
import socket
import struct
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.bad_pictures import make_picture
from tests.command_line import TINY, impasto, result_of

SECRETS = (
    b"Rue de la Paix",
    b"SERIAL-0815",
    b"XMP-SECRET",
    b"TEXT-SECRET",
    b"\x00\x00\x00\x30\x00\x00\x00\x01\x00\x00\x00\x33",
)


def make_photographs(folder: Path) -> None:
    """Four pictures with a place, a camera's number, XMP and text in them."""
    folder.mkdir()
    exif = Image.Exif()
    exif[0x010E], exif[0xA431] = "Rue de la Paix", "SERIAL-0815"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 30.0), 3: "E", 4: (2.0, 19.0, 51.0)})
    info = PngInfo()
    info.add_text("Comment", "TEXT-SECRET")
    for number, ending in enumerate(("jpg", "png", "webp", "tif")):
        image = make_picture(number=number)
        extra = {"pnginfo": info} if ending == "png" else {"xmp": b"<x>XMP-SECRET</x>"} if ending in ("jpg", "webp") else {}
        image.save(folder / f"{number}.{ending}", exif=exif, **extra)


def test_no_place_and_no_path_travels(tiny_base: Path, tmp_path: Path, home: Path) -> None:
    photographs = tmp_path / "my private folder" / "holidays"
    photographs.parent.mkdir()
    make_photographs(photographs)
    inside = b"".join(path.read_bytes() for path in photographs.iterdir())
    assert all(secret in inside for secret in SECRETS[:4]), "the pictures do hold them"
    words = ("--steps", 4, "--set", "samples.every=2", "--set", "checkpoints.every=2", "--set", "output.caption_words=true")
    run = tmp_path / "run"
    assert impasto("train", photographs, "--output", run, "--base", tiny_base, *TINY, *words) == 0
    made = [path for folder in (home, run / "samples", run / "checkpoints", run / "state") for path in folder.rglob("*")]
    files = [path for path in (*made, result_of(run)) if path.is_file()]
    assert len({path.parent.name for path in files}) > 4, "caches, samples, checkpoints, states and the LoRA"
    for path in files:
        data = path.read_bytes()
        assert [secret for secret in SECRETS if secret in data] == [], path
    for path in (result_of(run), *(run / "checkpoints").iterdir(), *(run / "samples").iterdir()):
        data = path.read_bytes()
        for told in (str(tmp_path), "my private folder", str(home), str(tiny_base.parent), f"/{getpass.getuser()}"):
            assert told.encode() not in data, (path, told)
        assert len(socket.gethostname()) < 4 or socket.gethostname().encode() not in data, path
    for path in (run / "samples").iterdir():
        with Image.open(path) as sample:
            assert not sample.getexif() and not sample.info.get("exif")
    data = result_of(run).read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    assert header["ss_sd_model_name"] and "/" not in header["ss_sd_model_name"]
