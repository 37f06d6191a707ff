"""A folder with every kind of bad input: `check` names each, `train` finishes on the good ones and changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input import GOOD, make_bad_folder, unlock
from tests.command_line import TINY, contents, impasto, read_events, result_of, run_fresh


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder, and name -> words that the report on that name must contain."""
    folder = tmp_path_factory.mktemp("bad") / "pictures"
    yield folder, make_bad_folder(folder)
    unlock(folder)


def test_check_names_each_bad_file_with_what_was_done(
    bad: tuple[Path, dict[str, str]], tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = bad
    before = contents(folder)
    assert impasto("check", folder, "--base", tiny_base, "--no-measure") == 0
    lines = capsys.readouterr().out.splitlines()
    untold = {
        name: words
        for name, words in expected.items()
        if not any(f" {name}: " in line and words in line.lower() for line in lines)
    }
    assert untold == {}
    assert contents(folder) == before


def test_train_finishes_on_the_good_pictures_and_leaves_the_folder_alone(
    bad: tuple[Path, dict[str, str]], tiny_base: Path, tmp_path: Path
) -> None:
    folder, expected = bad
    before = contents(folder)
    words = (*TINY, "--steps", 5, "--set", "dataset.flip=true")
    assert impasto("train", folder, "--output", tmp_path / "run", "--base", tiny_base, *words) == 0
    assert result_of(tmp_path / "run").stat().st_size > 1000
    told = read_events(tmp_path / "run")
    started = next(event for event in told if event["type"] == "started")
    assert started["images"] + started["held_out"] > len(GOOD)
    warnings = " ".join(event["message"] for event in told if event["type"] == "warning")
    assert [name for name in expected if name not in warnings] == []
    assert contents(folder) == before


def test_memory_stays_bounded_whatever_lies_beside_the_good_pictures(
    bad: tuple[Path, dict[str, str]], tiny_base: Path, tmp_path: Path
) -> None:
    folder, expected = bad
    assert len(expected) >= 60
    good = tmp_path / "good"
    good.mkdir()
    for name in GOOD:
        shutil.copyfile(folder / name, good / name)
    peaks = {}
    for name, pictures in (("good", good), ("bad", folder)):
        words = ("train", pictures, "--output", tmp_path / f"run {name}", "--base", tiny_base, *TINY, "--steps", 3)
        peaks[name] = run_fresh(MEASURED, *words)
    print(
        f"{len(expected)} kinds of bad input: peak of {peaks['bad'] / 1e6:.0f} MB,"
        f" of the good alone {peaks['good'] / 1e6:.0f} MB"
    )
    assert peaks["bad"] < peaks["good"] + 150e6


MEASURED = """
import json, sys
from tests.command_line import impasto
assert impasto(*sys.argv[1:]) == 0
from trainers.memory import memory_peak
import torch
print(json.dumps(memory_peak(torch.device("cpu"))[0]))
"""
