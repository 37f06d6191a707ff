"""`impasto bench` from end to end on the smallest case: exit 0, a table, everything as JSON; wrong options are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.command_line import impasto
from trainers.bench.apart import middle, peak_of, script_command, start, train_command
from trainers.bench.cases import find_case
from trainers.bench.synthetic import synthetic_base, synthetic_pictures
from trainers.errors import TrainingError


def test_the_smallest_case_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("--part", "rounds", "--part", "preview")
    assert impasto("bench", "--case", "smallest", "--rounds", 2, *parts, "--json", tmp_path / "bench.json") == 0
    told = capsys.readouterr()
    assert "rounds: 4 of 4" in told.err
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert {"hardware", "versions", "groups", "ratios", "counts", "agreement", "preview", "verdict"} <= facts.keys()
    for name in ("reference fp32 / project fp32", "project fp32 / limit fp32", "swap, project / load_lora_adapter"):
        assert f"\n{name} " in told.out
        assert facts["ratios"][name]["ratio"] > 0
    assert facts["agreement"]["fp32"]["holds"]
    assert facts["preview"]["exact_at_zero"]
    assert len(facts["groups"]["fp32"]["seconds"]["project fp32"]["rounds"]) == 2
    assert told.out.splitlines()[-1].startswith("verdict: ")


@pytest.mark.parametrize("words", [("--case", "sd3"), ("--part", "all"), ("--precision", "fp8")])
def test_what_does_not_exist_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert impasto("bench", *words) == 2
    assert "There is no" in capsys.readouterr().err


def test_no_place_for_the_figures_is_told_before_minutes_of_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "no folder" / "x.json", tmp_path):
        assert impasto("bench", "--case", "smallest", "--json", file) == 2
        told = capsys.readouterr().err
        assert "--json" in told and "16 pictures" not in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [train_command, script_command])
def test_a_start_is_split_into_its_parts_and_its_memory_seen(make: type, tmp_path: Path) -> None:
    case = find_case("smallest")
    base = synthetic_base(case.base, tmp_path)
    images = synthetic_pictures(tmp_path / "pictures", 2, case.resolution)
    found = start(make(case, base, images, tmp_path / "work", "fp32", 1, 4))
    assert list(found.parts) == ["import", "load", "cache", "first step"]
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert min(found.parts.values()) >= 0
    assert 50e6 < found.peak_bytes <= found.whole_peak_bytes
    assert middle([found])["seconds"] == found.seconds


def test_a_start_that_fails_says_what_the_process_said(tmp_path: Path) -> None:
    command = script_command(find_case("smallest"), str(tmp_path), tmp_path, tmp_path, "fp32", 1, 4)
    with pytest.raises(TrainingError, match=r"config\.json"):
        start(command)


def test_the_peak_of_a_process_is_at_least_what_it_holds() -> None:
    import psutil

    assert peak_of(os.getpid()) >= psutil.Process().memory_info().rss * 0.99
