"""A run that is asked to stop while the base still draws prior pictures stops there, and goes on with those it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import TINY, impasto, read_events
from trainers.launch import DONE, STOPPED
from trainers.run_folder import RunFolder


@pytest.mark.parametrize("flag", ["", "pause\n"], ids=["stop", "pause"])
def test_stops_between_prior_pictures(home: Path, tiny_base: Path, pictures: Path, tmp_path: Path, flag: str) -> None:
    prior = ("--set", 'prior.prompts=["a lamp", "a door", "a cup"]', "--set", "prior.images=3", "--set", "prior.steps=1")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "stop").write_text(flag)
    words = ("--base", tiny_base, *TINY, "--steps", 1, "--force", *prior)
    assert impasto("train", pictures, "-o", run.path, *words) == STOPPED
    drawn = sorted(path.name for path in run.prior.iterdir())
    assert 0 < len(drawn) < 9 and read_events(run.path)[-1]["type"] == "paused"
    assert not (run.path / "stop").exists()
    before = (run.prior / drawn[0]).stat().st_mtime_ns
    assert impasto("resume", run.path) == DONE
    assert len(list(run.prior.iterdir())) == 9 and (run.prior / drawn[0]).stat().st_mtime_ns == before
