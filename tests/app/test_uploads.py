"""Uploads: names made safe, pairs kept, bad files named, limits held, nothing half-written ever left behind."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.requests import ClientDisconnect, Request

from app import upload_stage, upload_zip
from app.upload_names import MAX_DEPTH, NameRefused, clean_name, is_litter
from app.uploads import Limits, Received, UploadError, receive
from tests.app_client import finish
from tests.command_line import contents
from trainers.dataset.folder import scan_folder

File = tuple[str, bytes]
BOUNDARY = b"----impasto-test"
FORM = f"multipart/form-data; boundary={BOUNDARY.decode()}"
USUAL = Limits()


def picture(colour: str = "red", ending: str = "PNG", size: tuple[int, int] = (32, 32)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, ending)
    return data.getvalue()


def body_of(files: Iterable[File], *, closed: bool = True) -> bytes:
    parts = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\nContent-Type: image/png\r\n\r\n%s\r\n'
        % (BOUNDARY, name.encode("utf-8", "surrogateescape"), data)
        for name, data in files
    )
    return parts + (b"--%s--\r\n" % BOUNDARY if closed else b"")


def send(
    folder: Path, body: bytes, limits: Limits = USUAL, *, length: bool = True, piece: int = 65_536, breaks: bool = False,
    content_type: str = FORM,
) -> Received:  # fmt: skip
    """Hands a body to `receive` in pieces, as a server would; `breaks` ends the connection before the last one."""
    return finish(receive(request_of(body, length, piece, breaks, content_type), folder, limits))


def request_of(body: bytes, length: bool, piece: int, breaks: bool, content_type: str) -> Request:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": body[i : i + piece], "more_body": i + piece < len(body)}
        for i in range(0, max(1, len(body)), piece)
    ]
    if breaks:
        messages[-1] = {"type": "http.disconnect"}

    async def arrive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return messages.pop(0)

    headers = [(b"content-type", content_type.encode())]
    headers += [(b"content-length", str(len(body)).encode())] if length else []
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, arrive)


def drop(folder: Path, *files: File, limits: Limits = USUAL) -> Received:
    return send(folder, body_of(files), limits)


def names(folder: Path) -> list[str]:
    """All files, hidden ones too: whatever is left behind shows."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def left_behind(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")] if folder.exists() else []


def zip_of(files: Iterable[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "project" / "images"


def test_a_dropped_folder_keeps_its_sub_folders_and_captions(folder: Path) -> None:
    files = [("cats/10_tom/a.png", picture("red")), ("cats/10_tom/a.txt", b"tom"), ("cats/b.JPG", picture("blue", "JPEG"))]
    received = drop(folder, *files)
    assert received == Received(saved=[name for name, _ in files])
    assert names(folder) == sorted(received.saved)
    assert all((folder / name).read_bytes() == data for name, data in files)
    scan = scan_folder(folder)
    assert [(example.name, example.caption, example.repeats) for example in scan.examples] == [
        ("cats/10_tom/a.png", "tom", 10), ("cats/b.JPG", "b", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 22])
def test_the_bytes_are_the_same_however_the_body_is_cut(folder: Path, piece: int) -> None:
    files = [("a.png", picture()), ("a.txt", b"--\r\n--%s\r-- caption\r\n" % BOUNDARY[:-1]), ("b.txt", b"")]
    send(folder, body_of(files), piece=piece)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == dict(files)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP"), ("gif", "GIF"), ("tif", "TIFF"),
     ("tiff", "TIFF")],
)  # fmt: skip
def test_all_that_the_trainer_reads_is_taken(folder: Path, ending: str, kind: str) -> None:
    assert drop(folder, (f"a.{ending}", picture(ending=kind))).saved == [f"a.{ending}"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("../../evil.png", "evil.png"),
        ("..\\..\\evil.png", "evil.png"),
        ("/etc/cron.d/evil.png", "etc/cron.d/evil.png"),
        ("C:\\Users\\me\\cat.png", "Users/me/cat.png"),
        ("c:cat.png", "cat.png"),
        ("a/./b//cat.png", "a/b/cat.png"),
        ("a/.. /cat.png", "a/cat.png"),
        ("ca\x00t\x1b[31m\r\n.png", "cat[31m.png"),
        ("\u202egnp.cat.png", "gnp.cat.png"),
        ("con.png", "_con.png"),
        ("NUL.tar.png", "_NUL.tar.png"),
        ("com1/lpt9.txt", "_com1/_lpt9.txt"),
        ("console.png", "console.png"),
        ('what? <"is">|it*.png', "what_ __is___it_.png"),
        ("a:b.png", "b.png"),
        ("aa:b.png", "aa_b.png"),
        ("folder. /cat .png", "folder/cat .png"),
        ("Ä\u0308A\u0308.png", "Ä\u0308Ä.png"),
        ("猫/ねこ.png", "猫/ねこ.png"),
        ("👩‍🎨.png", "👩‍🎨.png"),
        ("a.png.txt", "a.png.txt"),
        ("a\udcff.png", "a.png"),
    ],
)  # fmt: skip
def test_names_are_made_safe(given: str, stored: str) -> None:
    name = clean_name(given)
    assert "/".join((*name.folders, name.stem + name.tail)) == stored


@pytest.mark.parametrize(
    "given",
    [
        "",
        "..",
        "/",
        "x.exe",
        "x",
        ".png",
        "...png",
        "x.png.html",
        "x.svg",
        "x.heic",
        "a/b/c/d/e/x.png",
        "x.txt\u0301",
    ],
)
def test_names_that_cannot_be_stored_are_refused_with_a_reason(given: str) -> None:
    with pytest.raises(NameRefused, match=r"\w+ \w+"):
        clean_name(given)


def test_the_depth_limit_counts_folders() -> None:
    assert len(clean_name("/".join("abcd") + "/x.png").folders) == MAX_DEPTH


def test_long_names_are_cut_alike_for_a_picture_and_its_caption_and_stay_apart() -> None:
    long = "猫 in a garden, " * 40
    image, caption, other = (clean_name(long + ending) for ending in ("1.png", "1.txt", "2.png"))
    assert image.stem == caption.stem != other.stem
    assert len(image.stem.encode()) <= 200 and image.stem.startswith("猫 in a garden")


@pytest.mark.parametrize(
    "given", [".DS_Store", "a/Thumbs.db", "__MACOSX/a/._1.png", "a/.hidden/1.png", "desktop.ini", "@eaDir/1.png"]
)
def test_litter_is_counted_and_nothing_else(folder: Path, given: str) -> None:
    assert is_litter(given)
    assert drop(folder, (given, b"x"), ("a.png", picture())) == Received(saved=["a.png"], ignored=1)
    assert names(folder) == ["a.png"]


def damaged_png() -> bytes:
    data = bytearray(picture(size=(64, 64)))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    return bytes(data)


def huge_png() -> bytes:
    """A header that claims 60,000 x 60,000 pixels, and no pixels to speak of."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("page.png", b"<html><script>alert(1)</script></html>", "not a picture"),
        ("empty.png", b"", "empty"),
        ("short.jpg", picture(ending="JPEG", size=(64, 64))[:400], "truncated"),
        ("broken.png", damaged_png(), "damaged"),
        ("huge.png", huge_png(), "Too many pixels"),
        ("film.mp4", b"x", ".mp4 files are not read"),
        ("phone.heic", b"x", ".heic files are not read"),
        ("run.exe", b"MZ", ".exe files are not read"),
        ("noending", b"x", "without an ending"),
        ("binary.txt", bytes(range(1, 32)) * 20, "no text"),
        ("vector.png", b"<svg xmlns='x'></svg>", "not a picture"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_the_reason_and_the_others_are_kept(folder: Path, name: str, data: bytes, why: str) -> None:
    received = drop(folder, (f"sub/{name}", data), ("good.png", picture()))
    ((given, reason),) = received.rejected
    assert given == f"sub/{name}" and why in reason and str(folder) not in reason
    assert received.saved == ["good.png"] and names(folder) == ["good.png"] and not (folder / "sub").exists()


def test_two_pictures_of_one_name_are_kept_apart_each_with_its_caption(folder: Path) -> None:
    red, blue, green = picture("red"), picture("blue"), picture("green")
    drop(folder, ("cat.png", red), ("cat.png", blue), ("cat.txt", b"red one"), ("cat.txt", b"blue one"))
    received = drop(folder, ("cat.png", green), ("cat.txt", b"green one"))
    assert received.saved == ["cat (3).png", "cat (3).txt"]
    captions = {example.path.read_bytes(): example.caption for example in scan_folder(folder).examples}
    assert captions == {red: "red one", blue: "blue one", green: "green one"}


def test_a_caption_that_comes_in_a_later_request_finds_its_picture(folder: Path) -> None:
    red, blue = picture("red"), picture("blue")
    drop(folder, ("cat.png", red), ("cat.txt", b"red one"), ("cat.png", blue))
    assert drop(folder, ("cat.txt", b"blue one")).saved == ["cat (2).txt"]
    drop(folder, ("late.txt", b"late one"))
    drop(folder, ("late.png", picture("lime")))
    assert sorted(example.caption for example in scan_folder(folder).examples) == ["blue one", "late one", "red one"]


def test_a_caption_named_after_the_whole_file_stays_with_it(folder: Path) -> None:
    drop(folder, ("cat.png", picture("red")), ("cat.png.txt", b"red one"))
    drop(folder, ("cat.png", picture("blue")), ("cat.png.txt", b"blue one"))
    assert names(folder) == ["cat (2).png", "cat (2).png.txt", "cat.png", "cat.png.txt"]


def test_two_kinds_of_picture_with_one_name_are_no_clash(folder: Path) -> None:
    drop(folder, ("cat.png", picture()), ("cat.jpg", picture(ending="JPEG")), ("cat.txt", b"both"))
    assert names(folder) == ["cat.jpg", "cat.png", "cat.txt"]


def test_names_that_differ_only_in_case_or_composition_are_kept_apart_on_every_disk(folder: Path) -> None:
    drop(folder, ("Cat.png", picture("red")), ("cat.PNG", picture("blue")), ("ä.png", picture("red")))
    received = drop(folder, ("a\u0308.png", picture("blue")))
    assert names(folder) == ["Cat.png", "cat (2).PNG", "ä (2).png", "ä.png"] and received.saved == ["ä (2).png"]


def test_the_same_folder_dropped_again_changes_nothing(folder: Path) -> None:
    files = [("a/cat.png", picture("red")), ("a/cat.txt", b"one"), ("a/cat.png", picture("blue")), ("a/cat.txt", b"two")]
    first = drop(folder, *files)
    before = contents(folder)
    assert sorted(drop(folder, *files).saved) == sorted(first.saved)
    assert contents(folder) == before


def test_a_caption_that_was_edited_here_is_not_overwritten_by_the_old_one(folder: Path) -> None:
    files = [("cat.png", picture()), ("cat.txt", b"old")]
    drop(folder, *files)
    (folder / "cat.txt").write_text("edited here")
    received = drop(folder, *files)
    assert received.saved == ["cat.png"] and received.rejected[0][0] == "cat.txt" and "stays" in received.rejected[0][1]
    assert names(folder) == ["cat.png", "cat.txt"] and (folder / "cat.txt").read_text() == "edited here"


def test_requests_that_arrive_together_lose_nothing(folder: Path) -> None:
    colours = ["red", "blue", "green", "lime", "navy", "gold", "plum", "teal"]
    bodies = [body_of([("cat.png", picture(colour)), ("cat.txt", colour.encode())]) for colour in colours]
    threads = [threading.Thread(target=send, args=(folder, body)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    examples = scan_folder(folder).examples
    assert sorted(example.caption for example in examples) == sorted(colours)
    assert {example.path.read_bytes(): example.caption for example in examples} == {picture(c): c for c in colours}


def test_a_name_that_is_a_file_here_is_no_folder(folder: Path) -> None:
    drop(folder, ("cat.png", picture()))
    assert "not a folder" in drop(folder, ("cat.png/x.png", picture("blue"))).rejected[0][1]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_inside_the_folder_leads_nowhere_else(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    (folder / "dangling").symlink_to(tmp_path / "made")
    received = drop(folder, ("link/x.png", picture()), ("link/deep/x.png", picture()), ("dangling/x.png", picture()))
    assert received.saved == [] and len(received.rejected) == 3
    assert names(outside) == [] and not (outside / "deep").exists() and not (tmp_path / "made").exists()


def test_a_zip_is_unpacked_as_if_it_had_been_dropped(folder: Path) -> None:
    inner = [
        ("cats/a.png", picture()),
        ("cats/a.txt", b"tom"),
        ("cats/", b""),
        ("__MACOSX/cats/._a.png", b"x"),
        ("readme.pdf", b"x"),
    ]
    received = drop(folder, ("cats.zip", zip_of(inner)))
    assert received.saved == ["cats/a.png", "cats/a.txt"] and received.ignored == 1
    assert [name for name, _ in received.rejected] == ["readme.pdf"]
    assert names(folder) == ["cats/a.png", "cats/a.txt"]


def test_a_zip_cannot_climb_out(folder: Path, tmp_path: Path) -> None:
    evil = [("../../../evil.png", picture("red")), ("/abs/evil.png", picture("blue")), ("C:\\evil2.png", picture("lime"))]
    received = drop(folder, ("x.zip", zip_of(evil)))
    assert received.saved == ["evil.png", "abs/evil.png", "evil2.png"]
    assert all(name.startswith("project/images/") for name in names(tmp_path))


def test_links_and_inner_zips_in_a_zip_are_left_out(folder: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    received = drop(folder, ("x.zip", zip_of([(link, b"/etc/passwd"), ("in.zip", zip_of([("a.png", picture())]))])))
    assert received.saved == [] and names(folder) == []
    assert {name: why.split(";")[0] for name, why in received.rejected} == {
        "x.zip/link.png": "A link or device in the zip", "in.zip": "A zip inside a zip",
    }  # fmt: skip


def test_names_in_a_zip_of_macos_are_read_as_utf8(folder: Path) -> None:
    data = zip_of([("X" * 5 + ".png", picture())]).replace(b"X" * 5, "ä猫".encode())
    assert drop(folder, ("x.zip", data)).saved == ["ä猫.png"]


@pytest.mark.parametrize(
    ("limits", "files", "why"),
    [
        (Limits(unpacked_bytes=1_000_000), [("a.bmp", b"BM" + b"\0" * 2_000_000)], "would unpack to"),
        (Limits(folder_files=5), [(f"{number}.txt", b"x") for number in range(6)], "holds 6 files; the limit is 5"),
    ],
)
def test_a_zip_over_a_limit_is_refused_before_it_is_unpacked(
    folder: Path, limits: Limits, files: list[tuple[str, bytes]], why: str
) -> None:
    received = drop(folder, ("x.zip", zip_of(files)), ("a.png", picture()), limits=limits)
    assert received.saved == ["a.png"] and names(folder) == ["a.png"]
    assert received.rejected[0][0] == "x.zip" and why in received.rejected[0][1]


def test_a_bomb_is_refused_even_below_the_size_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_zip, "_BOMB_BYTES", 5_000_000)
    received = drop(folder, ("bomb.zip", zip_of([("a.bmp", bytes(6_000_000))])), ("plain.zip", zip_of([("b.txt", bytes(900))])))
    assert received.saved == [] and names(folder) == []
    assert [name for name, why in received.rejected if "far more than pictures do" in why] == ["bomb.zip"]


def test_a_zip_that_lies_about_its_sizes_gives_no_more_than_it_declared(folder: Path) -> None:
    honest = zip_of([("a.txt", b"y" * 500_000)])
    lying = honest.replace(struct.pack("<I", 500_000), struct.pack("<I", 10))
    received = drop(folder, ("x.zip", lying), limits=Limits(unpacked_bytes=1000))
    assert received.saved == [] and "damaged" in received.rejected[0][1] and names(folder) == []


def test_damaged_and_locked_zips_are_named(folder: Path) -> None:
    whole = zip_of([("a.png", picture(size=(64, 64)))], zipfile.ZIP_STORED)
    locked = bytearray(whole)
    locked[6] |= 1
    locked[whole.index(b"PK\x01\x02") + 8] |= 1
    flipped = bytearray(whole)
    flipped[60] ^= 0xFF
    files = [("cut.zip", whole[:-30]), ("locked.zip", bytes(locked)), ("flipped.zip", bytes(flipped)), ("no.zip", b"hello")]
    received = drop(folder, *files)
    assert received.saved == [] and names(folder) == []
    reasons = dict(received.rejected)
    assert "password" in reasons["locked.zip"] and "damaged" in reasons["a.png"]
    assert "damaged" in reasons["cut.zip"] and "damaged" in reasons["no.zip"]


def test_a_file_over_its_limit_is_rejected_and_the_others_are_kept(folder: Path) -> None:
    limits = Limits(picture_bytes=20_000, caption_bytes=100)
    received = drop(folder, ("big.png", b"\0" * 300_000), ("long.txt", b"x" * 101), ("a.png", picture()), limits=limits)
    assert received.saved == ["a.png"] and names(folder) == ["a.png"]
    assert [(name, why.startswith("It is larger than")) for name, why in received.rejected] == [
        ("big.png", True),
        ("long.txt", True),
    ]


@pytest.mark.parametrize("length", [True, False])
def test_a_request_over_its_limit_is_refused_whole(folder: Path, length: bool) -> None:
    body = body_of([("a.png", picture()), ("b.bmp", b"\0" * 3_000_000)])
    with pytest.raises(UploadError, match=r"larger than 2\.0 MB") as caught:
        send(folder, body, Limits(request_bytes=2_000_000), length=length)
    assert caught.value.status == 413 and caught.value.hint
    assert not folder.exists() or names(folder) == left_behind(folder) == []


def test_too_many_files_are_refused_whole(folder: Path) -> None:
    files = [(f"{number}.txt", b"x") for number in range(4)]
    with pytest.raises(UploadError, match="More than 3 files"):
        drop(folder, *files, limits=Limits(files=3))
    drop(folder, *files[:2])
    with pytest.raises(UploadError, match="would hold 4 files; the limit is 3"):
        drop(folder, *files[2:], limits=Limits(folder_files=3))
    assert names(folder) == ["0.txt", "1.txt"] and left_behind(folder) == []


def test_a_full_disk_is_one_sentence_with_the_bytes_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_stage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 500_000}))
    body = body_of([("a.bmp", b"\0" * 3_000_000)])
    with pytest.raises(UploadError) as caught:
        send(folder, body)
    assert caught.value.status == 507
    assert str(caught.value).startswith("The disk is full: this upload needs 3.0 MB, 0.5 MB are free.")
    assert names(folder) == left_behind(folder) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fdopen
    opened = []

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(handle: int, mode: str) -> Any:
        opened.append(handle)
        if len(opened) < 3:
            return real(handle, mode)
        os.close(handle)
        return Full()

    monkeypatch.setattr(upload_stage.os, "fdopen", open_full)
    files = [("a.png", picture()), ("a.txt", b"x" * 400_000), ("b.png", picture("blue"))]
    with pytest.raises(UploadError, match=r"The disk is full: this upload needs more than 0\.4 MB") as caught:
        send(folder, body_of(files), length=False)
    assert caught.value.status == 507 and len(opened) == 3
    assert names(folder) == left_behind(folder) == []


def test_a_zip_that_does_not_fit_unpacked_is_refused_with_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_stage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(UploadError, match=r"needs 5\.0 MB"):
        drop(folder, ("x.zip", zip_of([("a.bmp", b"\0" * 5_000_000)])))
    assert names(folder) == left_behind(folder) == []


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_sentence(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    with pytest.raises(UploadError, match="cannot be stored"):
        drop(folder, ("a.png", picture()))


def test_a_sender_that_goes_away_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ClientDisconnect):
        send(folder, body_of([("a.png", picture()), ("b.bmp", b"\0" * 3_000_000)]), breaks=True)
    assert names(folder) == left_behind(folder) == []


@pytest.mark.parametrize(
    "body", [body_of([("a.png", picture())], closed=False), body_of([("a.png", picture())])[:-60], b"hello", b"", b"\0" * 5000]
)
def test_a_body_that_is_damaged_or_cut_is_refused_whole(folder: Path, body: bytes) -> None:
    with pytest.raises(UploadError):
        send(folder, body)
    assert not folder.exists() or names(folder) == left_behind(folder) == []


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=", f"{FORM}{'x' * 999}"],
)  # fmt: skip
def test_what_is_no_form_is_refused(folder: Path, content_type: str) -> None:
    with pytest.raises(UploadError, match="no form with files"):
        send(folder, body_of([("a.png", picture())]), content_type=content_type)


def test_fields_beside_the_files_and_empty_choices_are_passed_over(folder: Path) -> None:
    extra = b'--%s\r\nContent-Disposition: form-data; name="note"\r\n\r\n%s\r\n' % (BOUNDARY, b"n" * 100_000)
    empty = b'--%s\r\nContent-Disposition: form-data; name="files"; filename=""\r\n\r\n\r\n' % BOUNDARY
    assert send(folder, extra + empty + body_of([("a.png", picture())])) == Received(saved=["a.png"])


def test_a_name_that_is_no_utf8_is_taken_as_latin1(folder: Path) -> None:
    assert drop(folder, ("caf\udce9.png", picture())).saved == ["café.png"]


def test_what_a_killed_process_left_is_swept_and_of_a_living_one_stays(folder: Path) -> None:
    drop(folder, ("a.png", picture()))
    (folder / ".upload-999999999-abc").mkdir()
    (folder / ".upload-999999999-abc" / "half").write_bytes(b"x")
    (folder / f".upload-{os.getpid()}-abc").mkdir()
    drop(folder, ("b.png", picture("blue")))
    assert left_behind(folder) == [f".upload-{os.getpid()}-abc"]


def test_a_scan_never_meets_a_file_that_is_not_finished(folder: Path) -> None:
    drop(folder, ("a.png", picture()))
    seen: list[list[str]] = []
    body = body_of([("b.png", picture("blue")), ("c.bmp", b"\0" * 3_000_000)])
    request = request_of(body, True, 65_536, False, FORM)
    stream = request.stream

    async def watched() -> AsyncIterator[bytes]:
        async for chunk in stream():
            seen.append([example.name for example in scan_folder(folder).examples])
            yield chunk

    request.stream = watched  # type: ignore[method-assign, assignment]
    finish(receive(request, folder))
    assert len(seen) > 10 and all(found == ["a.png"] for found in seen)


def test_a_large_upload_takes_little_memory(folder: Path) -> None:
    import tracemalloc

    pixels = os.urandom(3 * 1000 * 1000)
    data = io.BytesIO()
    Image.frombytes("RGB", (1000, 1000), pixels).save(data, "BMP")
    files = [(f"{number}.bmp", data.getvalue()) for number in range(12)]
    body = body_of(files)
    request = request_of(body, True, 65_536, False, FORM)
    tracemalloc.start()
    received = finish(receive(request, folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(received.saved) == 12 and peak < 12_000_000 < len(body)
