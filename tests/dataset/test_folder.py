"""The scan: what becomes an example, what is left out, and that everything is named."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.bad_input import GOOD, SILENT, make_bad_folder, make_picture, unlock
from trainers.dataset import folder as folder_module
from trainers.dataset.folder import Example, Scan, scan_folder
from trainers.dataset.pictures import hash_file, load_pixels, read_picture
from trainers.errors import DatasetError


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("pictures") / "bad"
    yield folder, make_bad_folder(folder)
    unlock(folder)


@pytest.fixture(scope="module")
def scanned(bad: tuple[Path, dict[str, str]]) -> Scan:
    return scan_folder(bad[0], trigger="sks")


def one(folder: Path, trigger: str = "") -> Example:
    (example,) = scan_folder(folder, trigger=trigger).examples
    return example


def told(scan: Scan, name: str) -> str:
    return " ".join(str(problem) for problem in scan.problems if problem.where == name)


def test_every_bad_thing_is_named_with_what_was_done(bad: tuple[Path, dict[str, str]], scanned: Scan) -> None:
    silent = {name: told(scanned, name) for name, words in bad[1].items() if words not in told(scanned, name).lower()}
    assert silent == {}


def test_nothing_else_is_named(bad: tuple[Path, dict[str, str]], scanned: Scan) -> None:
    assert {problem.where for problem in scanned.problems} - {""} == set(bad[1])


def test_one_bad_file_is_told_once(scanned: Scan) -> None:
    named = [problem.where for problem in scanned.problems if problem.where]
    assert len(named) == len(set(named))


def test_good_and_unusual_pictures_beside_bad_ones_are_used(scanned: Scan) -> None:
    assert {*GOOD, *SILENT} <= {example.name for example in scanned.examples}


def test_every_example_of_a_bad_folder_gives_its_pixels(scanned: Scan) -> None:
    for example in scanned.examples:
        image = load_pixels(example.path, example.sha256)
        assert (image.mode, image.size) == ("RGB", (example.width, example.height)), example.name


def test_a_scan_never_ends_a_run_by_an_error(scanned: Scan) -> None:
    assert {problem.severity for problem in scanned.problems} <= {"note", "warning"}


def test_pictures_left_out_are_notes_so_that_the_run_goes_on(scanned: Scan) -> None:
    assert all(problem.severity == "note" for problem in scanned.problems if "left out" in problem.what)


def test_a_scan_is_sorted_and_repeatable(bad: tuple[Path, dict[str, str]], scanned: Scan) -> None:
    assert [example.name for example in scanned.examples] == sorted(example.name for example in scanned.examples)
    assert scan_folder(bad[0], trigger="sks") == scanned


def test_the_quick_scan_finds_the_same_but_for_damage_amid_the_pixels(bad: tuple[Path, dict[str, str]], scanned: Scan) -> None:
    quick = scan_folder(bad[0], trigger="sks", read=lambda path: read_picture(path, decode=False))
    plain = {replace(example, look=b"") for example in scanned.examples}
    extra = {replace(example, look=b"") for example in quick.examples} - plain
    assert [example.name for example in extra] == ["flipped bits.png"]
    assert plain < {replace(example, look=b"") for example in quick.examples}


def test_a_scan_writes_nothing_into_the_folder(tmp_path: Path) -> None:
    make_bad_folder(tmp_path / "in")
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path / "in").rglob("*")}
    scan_folder(tmp_path / "in")
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "in").rglob("*")} == before
    unlock(tmp_path / "in")


def test_other_and_hidden_files_are_counted(scanned: Scan) -> None:
    assert "Files of other kinds are ignored: 3 (.heic: 1, .json: 1, .npz: 1)" in told(scanned, "")
    assert "Hidden and system files and folders are passed over: 6" in told(scanned, "")


def test_repeats_come_from_the_innermost_folder_that_asks_for_them(scanned: Scan) -> None:
    repeats = {example.name: example.repeats for example in scanned.examples if example.name.endswith("/picture.png")}
    assert repeats == {
        "-2_minus/picture.png": 1,
        "3_three/deeper/picture.png": 3,
        "3_three/picture.png": 3,
        "99999999_much/picture.png": 1,
    }


def test_given_repeats_multiply_those_of_folders(tmp_path: Path) -> None:
    (tmp_path / "10_outer" / "4_inner").mkdir(parents=True)
    make_picture().save(tmp_path / "10_outer" / "4_inner" / "a.png")
    assert scan_folder(tmp_path, repeats=3).examples[0].repeats == 12


def test_an_example_tells_upright_size_hash_and_place(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a.jpg"
    make_picture(64, height=32).save(path, exif=exif)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert one(tmp_path) == Example(path, "sub/a.jpg", "a", "name", 32, 64, 1, digest)
    assert hash_file(path) == digest


@pytest.mark.parametrize("name", ["cat.txt", "cat.caption", "cat.png.txt", "CAT.TXT", "cat.TXT"])
def test_a_caption_is_found_beside_its_picture(tmp_path: Path, name: str) -> None:
    make_picture().save(tmp_path / "cat.png")
    (tmp_path / name).write_text("a tabby", encoding="utf-8")
    scan = scan_folder(tmp_path, trigger="sks")
    assert (scan.examples[0].caption, scan.examples[0].caption_source) == ("sks, a tabby", "file")
    assert scan.problems == ()


def test_a_composed_caption_name_finds_its_decomposed_picture(tmp_path: Path) -> None:
    make_picture().save(tmp_path / "e\u0301clair.png")
    (tmp_path / "\u00e9clair.txt").write_text("a pastry", encoding="utf-8")
    assert one(tmp_path).caption == "a pastry"


def test_names_that_differ_in_case_keep_their_own_captions(tmp_path: Path) -> None:
    for name in ("Cat", "dog"):
        make_picture().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    assert [example.caption for example in scan_folder(tmp_path).examples] == ["Cat", "dog"]


@pytest.mark.parametrize(
    ("name", "trigger", "caption", "source"),
    [
        ("red-apple_01.png", "", "red apple", "name"),
        ("red-apple_01.png", "sks", "sks, red apple", "name"),
        ("IMG_0001.png", "sks", "sks", "trigger"),
        ("IMG_0001.png", "", "", "name"),
    ],
)
def test_without_a_caption_the_name_and_the_trigger_speak(
    tmp_path: Path, name: str, trigger: str, caption: str, source: str
) -> None:
    make_picture().save(tmp_path / name)
    example = one(tmp_path, trigger=trigger)
    assert (example.caption, example.caption_source) == (caption, source)


def test_missing_captions_are_counted_with_what_to_do(tmp_path: Path) -> None:
    for name in ("red hat.png", "IMG_1.png", "told.png"):
        make_picture().save(tmp_path / name)
    (tmp_path / "told.txt").write_text("told", encoding="utf-8")
    said = told(scan_folder(tmp_path), "")
    assert "No caption for 1 of 3 pictures (red hat.png); the file name or trigger word is used. Write red hat.txt" in said
    assert "for 1 of 3 pictures (IMG_1.png); they are learnt with an empty caption. Write IMG_1.txt beside it, or set" in said


@pytest.mark.parametrize("sign", ["events.jsonl", "state"])
def test_a_run_folder_among_the_pictures_is_passed_over_and_named(tmp_path: Path, sign: str) -> None:
    make_picture().save(tmp_path / "a.png")
    for folder in ("runs/first/samples", "runs/first/prior", "runs/notes"):
        (tmp_path / folder).mkdir(parents=True)
        make_picture(number=1).save(tmp_path / folder / "b.png")
    (tmp_path / "runs" / "first" / "config.toml").touch()
    (tmp_path / "runs" / "notes" / "config.toml").touch()  # this alone makes no run
    (tmp_path / "runs" / "first" / sign).touch()
    scan = scan_folder(tmp_path)
    assert [example.name for example in scan.examples] == ["a.png", "runs/notes/b.png"]
    assert told(scan, "runs/first") == "A run folder of this program; passed over (runs/first)."


def test_a_run_folder_itself_holds_no_pictures_to_train_on(tmp_path: Path) -> None:
    for name in ("config.toml", "events.jsonl"):
        (tmp_path / name).touch()
    make_picture().save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="run folder of this program"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: (folder.rmdir(), folder.write_text("x")), "not a folder"),
        (lambda folder: None, "is empty"),
        (lambda folder: (folder / ".a.png").write_bytes(b"x"), "hidden files only"),
        (
            lambda folder: (folder / "a.json").write_bytes(b"x"),
            r"no picture: Files of other kinds are ignored: 1 \(\.json: 1\)",
        ),
        (lambda folder: (folder / "a.png").write_bytes(b""), r"can be used\. a\.png: The file is empty"),
    ],
)
def test_a_folder_without_a_usable_picture_says_why(tmp_path: Path, make: object, what: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder)  # type: ignore[operator]
    with pytest.raises(DatasetError, match=what) as caught:
        scan_folder(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.hint


def test_only_bad_pictures_are_told_by_the_first_reasons_and_a_count(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"0\.png: .*2\.png: .*; and 2 more"):
        scan_folder(tmp_path)


def test_a_path_with_a_zero_byte_is_refused_in_words() -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        scan_folder(Path("a\0b"))


def test_links_inside_count_once_and_may_lead_into_hidden_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / ".store").mkdir(parents=True)
    make_picture().save(folder / ".store" / "1", "PNG")
    for name in ("a.png", "b.png"):
        try:
            (folder / name).symlink_to(folder / ".store" / "1")
        except OSError:  # Windows without the right to make links: a copy is what a person has there
            (folder / "a.png").write_bytes((folder / ".store" / "1").read_bytes())
    scan = scan_folder(folder)
    assert [example.name for example in scan.examples] == ["a.png"]


def test_a_name_that_is_no_text_is_shown_escaped_and_used(tmp_path: Path) -> None:
    # Only Linux keeps such names; elsewhere a control-free plain name takes its place.
    name = b"caf\xe9\n.png" if sys.platform == "linux" else b"cafe.png"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        make_picture().save(file, "PNG")
    example = one(tmp_path)
    assert example.name == (r"caf\udce9\n.png" if sys.platform == "linux" else "cafe.png")
    assert example.name.encode()
    assert load_pixels(example.path).size == (48, 48)


@pytest.mark.parametrize("name", ["bomb.png", "claims.png", "wide.png", "bomb.gif", "bomb.bmp", "truncated.jpg", "zero.png"])
def test_loading_a_bad_picture_is_refused_by_name(bad: tuple[Path, dict[str, str]], name: str) -> None:
    with pytest.raises(DatasetError, match=name.replace(".", r"\.")):
        load_pixels(bad[0] / name)


def test_a_deleted_picture_is_refused_by_name(tmp_path: Path) -> None:
    for read in (load_pixels, hash_file):
        with pytest.raises(DatasetError, match=r"cannot be read: .*gone\.png"):
            read(tmp_path / "gone.png")


def _damage_in_the_middle(path: Path) -> None:
    """The header and the end stay whole; pixels are gone."""
    data = bytearray(path.read_bytes())
    middle = data.index(b"IDAT") + 8
    data[middle : middle + 20] = bytes(20)
    path.write_bytes(data)


def test_a_large_folder_is_not_decoded_and_a_damaged_picture_is_left_out_when_its_turn_comes(
    pictures: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _damage_in_the_middle(pictures / "03.png")
    monkeypatch.setattr(folder_module, "MOST_DECODED", 5)
    assert len(scan_folder(pictures).examples) == 6
    thorough = scan_folder(pictures, read=folder_module.decode_picture)
    assert [problem.where for problem in thorough.problems if "damaged" in problem.what] == ["03.png"]
    training = start("train.batch_size=2")
    told: list[str] = []
    training.batches._warn = told.append
    for step in range(training.data.plan.steps_per_epoch):
        assert list(training.batches.step(step))
    assert len(told) == 1 and "(03.png). It is left out" in told[0] and "damaged" in told[0]
    monkeypatch.setattr(folder_module, "MOST_DECODED", 6)
    assert len(scan_folder(pictures).examples) == 5


def test_a_second_scan_reads_only_what_has_changed(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, read = scan_folder(pictures), []
    real = folder_module.read_picture
    monkeypatch.setattr(
        folder_module, "read_picture", lambda path, decode: (read.append(path.name), real(path, decode=decode))[1]
    )
    assert scan_folder(pictures) == first and read == []
    with Image.open(pictures / "02.png") as image:
        changed = image.transpose(Image.Transpose.ROTATE_90)
    changed.save(pictures / "02.png")
    assert scan_folder(pictures) != first and read == ["02.png"]
