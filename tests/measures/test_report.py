"""The report reads what `impasto generate` writes, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainers.errors import BaseModelError, DatasetError
from trainers.measures.report import Row, format_rows, main, read_labels, read_strengths, read_truth, through_vae

VAE = Path(__file__).parents[2] / "assets" / "pocket" / "vae"


def write_pictures(folder: Path, *names: str) -> None:
    for index, name in enumerate(names):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name)


def test_labels_are_one_a_line_without_the_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("blue heart\n\n spider \n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt") == ["blue heart", "spider"]


def test_pictures_are_grouped_by_strength_in_the_order_of_the_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path, "001_s1.00.png", "000_s1.00.png", "000_s-0.50.png", "001_s-0.50.png", "grid.png")
    found = read_strengths(tmp_path, ["a", "b"])
    assert list(found) == [-0.5, 1.0]
    assert [image.getpixel((0, 0)) for image in found[1.0]] == [(1, 0, 0), (0, 0, 0)]


def test_a_strength_that_lacks_a_picture_names_the_label(tmp_path: Path) -> None:
    write_pictures(tmp_path, "000_s0.00.png", "001_s0.00.png", "000_s1.00.png")
    with pytest.raises(DatasetError, match=r"Strength 1\.00 lacks 1 of 2 pictures \(first: spider\)"):
        read_strengths(tmp_path, ["blue heart", "spider"])


def test_a_folder_without_rendered_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No picture named like"):
        read_strengths(tmp_path, ["a"])


def test_the_truth_is_found_by_the_label_with_dashes(tmp_path: Path) -> None:
    write_pictures(tmp_path, "blue-heart.png")
    assert len(read_truth(tmp_path, ["blue heart"])) == 1


def test_a_folder_without_a_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="There is no VAE"):
        through_vae([], tmp_path)


def test_the_vae_of_the_pocket_base_keeps_a_flat_colour_at_its_native_size() -> None:
    (seen,) = through_vae([Image.new("RGB", (128, 128), (230, 40, 40))], VAE)
    red, green, blue = seen.getpixel((32, 32))  # type: ignore[misc]
    assert seen.size == (64, 64)
    assert red > 180 and max(green, blue) < 90


def test_the_command_ends_with_the_error_as_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").write_text("spider\n", encoding="utf-8")
    names = ["--labels", str(tmp_path / "labels.txt"), "--base-set", str(tmp_path), "--truth", str(tmp_path)]
    assert main(names) == 2
    assert "A picture is missing" in capsys.readouterr().err


def test_the_table_has_one_line_a_row_under_a_heading() -> None:
    row = Row("strength 1.00", 56, 0.34, 0.33, 0.05, 0.25, 0.5, 0.3, 0.9)
    heading, line = format_rows([row]).splitlines()
    assert "top1" in heading
    assert line.split() == ["strength", "1.00", "56", "0.340", "0.330", "0.050", "0.25", "0.50", "0.30", "0.90"]
