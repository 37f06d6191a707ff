"""The measure of number formats: float32 against itself is exact, packed weights are near, and a refusal is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainers.measures import precision
from trainers.measures.precision import Answers, compare


def test_the_errors_are_relative_and_the_worst_is_a_single_predictions() -> None:
    reference = Answers([torch.ones(2, 1, 2, 2), torch.ones(1, 1, 2, 2)], torch.tensor([3.0, 4.0]), 1.0)
    moved = torch.ones(2, 1, 2, 2)
    moved[1] *= 1.3
    row = compare("x", Answers([moved, torch.ones(1, 1, 2, 2)], torch.tensor([3.0, 4.5]), 1.0), reference)
    assert (row.prediction, row.worst, row.gradient) == pytest.approx((0.1, 0.3, 0.1), rel=1e-6)


def test_a_line_for_each_format(
    tiny_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "FORMATS", (("fp32", "full"), ("fp32", "int8")))
    assert precision.main([str(pictures), "--base", str(tiny_base), "--resolution", "32", "--batch-size", "2"]) == 0
    heading, exact, packed = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["relative", "error", "of"]
    assert exact.split()[:4] == ["fp32", "0.0e+00", "0.0e+00", "0.0e+00"]
    assert packed.startswith("fp32, int8 weights")
    assert all(1e-4 < float(word) < 0.1 for word in packed.split()[3:6])


def test_a_folder_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert precision.main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
