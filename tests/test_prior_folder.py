"""Prior pictures from a folder: captioned, weighed, part of what went into a run; and that prior preservation preserves."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.command_line import TINY, impasto, read_events
from tests.tiny_runs import tiny_config, update_from
from trainers.dataset.prepare import planned_prior
from trainers.doctor import make_report
from trainers.errors import DatasetError
from trainers.launch import plan_run
from trainers.run_folder import RunFolder


@pytest.fixture
def usual(tmp_path: Path) -> Path:
    """A folder of two pictures of the usual kind, one with a caption."""
    folder = tmp_path / "usual"
    (folder / "3_more").mkdir(parents=True)
    Image.new("RGB", (48, 64), "teal").save(folder / "a.png")
    (folder / "a.txt").write_text("a teal wall")
    Image.new("RGB", (64, 64), "olive").save(folder / "3_more" / "some-thing.png")
    return folder


def test_pictures_of_a_folder_are_learnt_beside_ones_own(start: Any, usual: Path) -> None:
    training = start(f"prior.folder={usual}", "prior.caption=a thing", "prior.weight=0.5", "prior.repeats=2")
    prior = {prepared.example.name: prepared for prepared in training.data.training if prepared.prior}
    assert {name: (one.example.caption, one.weight, one.example.repeats) for name, one in prior.items()} == {
        "prior/3_more/some-thing.png": ("a thing", 0.5, 6),
        "prior/a.png": ("a teal wall", 0.5, 2),
    }
    assert len(training.data.own) == 6
    update_from(training, 2)
    captions = {caption for step in range(16) for batch in training.batches.step(step) for caption in batch.captions}
    assert {"a thing", "a teal wall"} <= captions


def test_without_a_caption_for_all_their_file_names_are_theirs(tiny_base: Path, pictures: Path, usual: Path) -> None:
    config = tiny_config(tiny_base, pictures, f"prior.folder={usual}", 'prior.prompts=["never drawn"]')
    assert [one.caption for one in planned_prior(config, Path("p"), 32)] == ["some thing", "a teal wall"]


def test_a_folder_that_cannot_be_used_is_told_before_anything_loads(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    given = {"base": {"model": str(tiny_base)}, "dataset": {"images": str(pictures)}, "prior": {"folder": str(tmp_path / "no")}}
    with pytest.raises(DatasetError, match="no such folder"):
        plan_run("pocket", given, [], force=True)


def test_they_are_part_of_what_went_into_a_run(tiny_base: Path, pictures: Path, usual: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "stop").touch()
    words = ("--base", tiny_base, *TINY, "--set", f"prior.folder={usual}", "--steps", 4)
    assert impasto("train", pictures, "--output", run.path, *words) == 3
    listed = json.loads(run.manifest.read_text())["prior"]
    assert listed["prior/a.png"] == hashlib.sha256((usual / "a.png").read_bytes()).hexdigest() and not run.prior.exists()
    Image.new("RGB", (48, 64), "red").save(usual / "a.png")
    assert impasto("resume", run.path) == 1
    assert "the picture prior/a.png has changed" in read_events(run.path)[-1]["message"]
    Image.new("RGB", (48, 64), "teal").save(usual / "a.png")
    (usual / "a.txt").write_text("a blue wall")
    assert impasto("resume", run.path) == 1
    assert "the caption of prior/a.png has changed" in read_events(run.path)[-1]["message"]
    with zipfile.ZipFile(io.BytesIO(make_report(run))) as report:  # told to others: no names of pictures
        told = json.loads(report.read("manifest.json"))
    assert (told["images"], told["prior"], told["prior_captions"]) == (6, 2, 2)
