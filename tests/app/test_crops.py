"""The crop that the window draws is the one that the training makes, wherever a person moves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.planning import plan_project, take_edits
from app.projects import read_project
from app.scanning import Scanner
from tests.app_client import make_client, ok, project_with, refused
from trainers.dataset.buckets import CENTRE, assign_buckets, crop_share, place
from trainers.dataset.edits import write_edits
from trainers.dataset.pictures import load_pixels
from trainers.dataset.prepare import prepare, scan_images


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Pictures that no bucket fits, each column and row of another colour."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for number, (width, height) in enumerate([(700, 100), (90, 500), (130, 128), (64, 64)]):
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        pixels = np.stack([across * 255 // width, down * 255 // height, (across + down) % 256], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def test_what_is_drawn_is_what_is_trained_on(wide: Path, home: Path, tmp_path: Path) -> None:
    client = make_client(home)
    project = project_with(client, wide)
    middle = ok(client.get(f"/api/projects/{project}/crops"))
    moves = {"0.png": [0.25, 0.5], "1.png": [0.5, 1.0], "2.png": [0.0, 0.5]}
    ok(client.put(f"/api/projects/{project}/crops", json=moves))
    drawn = ok(client.get(f"/api/projects/{project}/crops"))
    assert drawn["3.png"] == middle["3.png"]
    assert {name for name in drawn if drawn[name]["moved"]} == set(moves)
    # As a run does it: edits in a file of the run's own, scanned anew by the trainer.
    scanner, edits_file = Scanner(), tmp_path / "edits.json"
    found = read_project(home, project)
    edits = take_edits(found, scanner)
    edits_file.write_bytes(write_edits(edits))
    plan = plan_project(found, scanner, {"dataset": {"holdout": 0}}, edits, edits_file, force=True)
    data = prepare(plan.config, plan.base, scan_images(plan.config).examples, [])
    assert len(data.training) == 4
    for prepared in data.training:
        name, placement = prepared.example.name, prepared.placement
        assert drawn[name]["box"] == pytest.approx(crop_share(placement), abs=0)
        pixels = load_pixels(prepared.example.path)
        left, top, right, bottom = drawn[name]["box"]
        box = (left * pixels.width, top * pixels.height, right * pixels.width, bottom * pixels.height)
        seen = pixels.resize(tuple(drawn[name]["size"]), Image.Resampling.LANCZOS, box=box)
        assert np.array_equal(seen, place(pixels, placement, flip=False))
    assert drawn["0.png"]["box"][0] == pytest.approx(middle["0.png"]["box"][0] / 2, abs=0.01)
    assert drawn["1.png"]["box"][3] == 1
    assert drawn["2.png"]["box"][0] == 0


def test_moves_are_steps_and_null_is_the_middle(wide: Path, home: Path) -> None:
    client = make_client(home)
    project = project_with(client, wide)
    middle = ok(client.get(f"/api/projects/{project}/crops"))
    assert ok(client.put(f"/api/projects/{project}/crops", json={"0.png": [1, 0.5]}))["0.png"]["box"][2] == 1
    ok(client.post(f"/api/projects/{project}/undo"))
    assert ok(client.get(f"/api/projects/{project}/crops")) == middle
    ok(client.post(f"/api/projects/{project}/redo"))
    assert ok(client.put(f"/api/projects/{project}/crops", json={"0.png": None})) == {"0.png": middle["0.png"]}
    for wrong in ([1.1, 0], [0], None):
        body: Any = {"no.png" if wrong is None else "0.png": wrong}
        refused(client.put(f"/api/projects/{project}/crops", json=body), 404 if wrong is None else 422)
    ok(client.patch(f"/api/projects/{project}", json={"recipe": {"base": {"model": "/nowhere"}}}))
    assert ok(client.get(f"/api/projects/{project}/crops")) == {}


@pytest.mark.parametrize("size", [(100, 700), (511, 333), (64, 64), (48, 49), (500, 90)])
def test_the_middle_is_where_it_was_and_ends_are_ends(size: tuple[int, int]) -> None:
    (plain,) = assign_buckets([size], 64, 8)
    assert assign_buckets([size], 64, 8, crops=[CENTRE]) == [plain]
    (height, width), (bucket_height, bucket_width) = plain.resized, plain.bucket
    assert plain.crop[:2] == ((width - bucket_width) // 2, (height - bucket_height) // 2)
    assert assign_buckets([size], 64, 8, crops=[(0, 0)])[0].crop[:2] == (0, 0)
    assert assign_buckets([size], 64, 8, crops=[(1, 1)])[0].crop[2:] == (width, height)
    with pytest.raises(ValueError, match="crop"):
        assign_buckets([size], 64, 8, crops=[(0, 1.5)])
