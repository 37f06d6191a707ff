"""Captions: encodings, cleaning, trigger word, file names, and what varies per step."""

from __future__ import annotations

import codecs
import os
import random
from pathlib import Path

import pytest

from trainers.dataset.captions import MAX_BYTES, caption_from_name, read_caption_file, vary_caption, with_trigger
from trainers.errors import DatasetError

TEXT = "a château, in “winter”"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF8 + TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "utf-16-le"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "utf-16-be"),
        (TEXT.encode("utf-16-le"), "utf-16-le"),
        (TEXT.encode("utf-16-be"), "utf-16-be"),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "utf-32-le"),
        (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "utf-32-be"),
        (TEXT.encode("cp1252"), "cp1252"),
    ],
)
def test_the_same_caption_is_read_from_every_encoding(tmp_path: Path, data: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert read_caption_file(path).text == TEXT
    assert read_caption_file(path).encoding == encoding


def test_bytes_that_are_no_text_in_any_encoding_are_read_as_latin_1(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \x81")
    assert read_caption_file(tmp_path / "a.txt").text == "café"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a cat,\r\nin a  hat\r\n", "a cat, in a hat"),
        (b"\ta\x00b\x07c\x1bd ", "a b c d"),
        ("a\u200b cat\u00a0\u2003on\u202e a mat".encode(), "a cat on a mat"),
        ("e\u0301clair".encode(), "éclair"),
        (b" \r\n", ""),
        (b"", ""),
    ],
)
def test_line_ends_control_and_invisible_characters_are_cleaned(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read_caption_file(tmp_path / "a.txt").text == expected


def test_emoji_and_scripts_written_with_joiners_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("👩‍🚀 می‌خواهم", encoding="utf-8")
    assert read_caption_file(tmp_path / "a.txt").text == "👩‍🚀 می‌خواهم"


def test_a_caption_without_end_is_cut_even_within_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" + "é".encode() * MAX_BYTES)
    caption = read_caption_file(tmp_path / "a.txt")
    assert caption.text == "x" + "é" * (MAX_BYTES // 2 - 1)
    assert caption.encoding == "utf-8"
    assert "longer than 64 KiB" in caption.remarks[0]


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(DatasetError, match=r"no text.*a\.txt"):
        read_caption_file(tmp_path / "a.txt")


def test_a_missing_caption_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot be read.*gone\.txt"):
        read_caption_file(tmp_path / "gone.txt")


def test_a_pipe_as_caption_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    target = tmp_path / "pipe.txt"
    # Where there are no named pipes a folder stands in: it is no regular file either.
    os.mkfifo(target) if hasattr(os, "mkfifo") else target.mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        read_caption_file(target)


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "sks", "sks, a cat"),
        ("a SKS cat", "sks", "a SKS cat"),
        ("a sks-cat", "sks", "a sks-cat"),
        ("asks a cat", "sks", "sks, asks a cat"),
        ("bluebots", "bluebot", "bluebot, bluebots"),
        ("", "sks", "sks"),
        ("a cat", "", "a cat"),
        ("a cat", "  ", "a cat"),
        ("in my  style", "my style", "my style, in my  style"),
        ("a c++ book", "c++", "a c++ book"),
        ("", "", ""),
    ],
)
def test_the_trigger_word_is_put_in_front_unless_it_is_there_as_a_word(caption: str, trigger: str, expected: str) -> None:
    assert with_trigger(caption, trigger) == expected


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("red-apple_01 (2)", "red apple"),
        ("001_red_apple", "red apple"),
        ("red apple - Copy (3)", "red apple"),
        ("r2d2 on 3 wheels", "r2d2 on 3 wheels"),
        ("Äpfel.und.Birnen", "Äpfel und Birnen"),
        ("🍎", "🍎"),
        ("IMG_20240131_1234", ""),
        ("DSC00012", "DSC00012"),
        ("0001", ""),
        ("3f2b8c1d9e0a4b6c", ""),
        ("123e4567-e89b-12d3-a456-426614174000", ""),
        ("", ""),
    ],
)
def test_a_file_name_becomes_a_caption_or_nothing(stem: str, expected: str) -> None:
    assert caption_from_name(stem) == expected


def test_without_choices_a_caption_does_not_vary() -> None:
    assert vary_caption("b, a,  c", random.Random(1), shuffle=False, keep=1, dropout=0.0) == "b, a,  c"


def test_shuffling_keeps_the_leading_parts_and_every_other_part() -> None:
    caption = "sks, a, b, c, d, e"
    varied = {vary_caption(caption, random.Random(seed), shuffle=True, keep=2, dropout=0.0) for seed in range(20)}
    assert len(varied) > 5
    assert all(text.startswith("sks, a, ") and sorted(text.split(", ")) == sorted(caption.split(", ")) for text in varied)


def test_the_same_random_state_gives_the_same_caption() -> None:
    first, second = (vary_caption("a, b, c, d, e", random.Random(7), shuffle=True, keep=0, dropout=0.5) for _ in range(2))
    assert first == second


def test_dropout_empties_its_share_of_captions() -> None:
    generator = random.Random(3)
    empty = sum(vary_caption("a", generator, shuffle=False, keep=1, dropout=0.3) == "" for _ in range(2000))
    assert 500 < empty < 700
    assert vary_caption("a", generator, shuffle=False, keep=1, dropout=1.0) == ""
