"""What a run would be and what two real steps of it take, asked through the API, with the real process and with slow ones."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.app_client import await_state, make_client, ok, project_with, refused
from trainers.dataset.pictures import Picture, read_picture

SLOWER = """
import sys, time
from trainers import preflight, train
real = train.training_step
def slower(*given):
    time.sleep(0.7)
    return real(*given)
train.training_step = slower
sys.exit(preflight.main(sys.argv[1:]))
"""


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return make_client(tmp_path / "home")


def project_on(client: TestClient, base: Path, pictures: Path, **settings: Any) -> str:
    """A project that trains on a tiny base, quickly."""
    recipe = {"base": {"model": str(base)}, "train": {"steps": 40, "batch_size": 2}, "samples": {"every": 0}, **settings}
    return project_with(client, pictures, recipe=recipe)


def measured(client: TestClient, project: str, **settings: Any) -> dict[str, Any]:
    """What is told once it is no longer measured."""
    end = time.monotonic() + 90
    while True:
        told: dict[str, Any] = ok(client.post(f"/api/projects/{project}/measure", json={"settings": settings, "force": True}))
        if told["state"] != "measuring" or time.monotonic() > end:
            return told
        time.sleep(0.1)


def test_a_check_tells_numbers_layers_and_the_file(client: TestClient, tiny_base: Path, pictures: Path) -> None:
    project = project_on(client, tiny_base, pictures)
    sizes = []
    for rank in (4, 8):
        told = ok(client.post(f"/api/projects/{project}/check", json={"settings": {"adapter": {"rank": rank}}, "force": True}))
        assert told["ok"] and told["layers"] > 0 and not told["is_quick"]
        sizes.append((told["parameters"], told["file_bytes"]))
    assert sizes[1][0] == 2 * sizes[0][0]  # tiny's text encoder follows the rank too
    assert 0 < sizes[0][1] < sizes[1][1] < 2 * sizes[0][1]


def test_a_prior_folder_is_read_once_for_all_checks(
    client: TestClient, tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def reading(path: Path, *, decode: bool) -> Picture:
        read.append(path)
        assert not decode, "the window reads headers"
        return read_picture(path, decode=decode)

    prior = Path(shutil.copytree(pictures, tmp_path / "prior"))
    for module in ("app.scanning", "trainers.dataset.folder"):
        monkeypatch.setattr(f"{module}.read_picture", reading)
    project = project_on(client, tiny_base, pictures, prior={"folder": str(prior)})
    for _ in range(2):
        told = ok(client.post(f"/api/projects/{project}/check", json={"settings": {}, "force": True}))
        assert told["ok"] and "prior" in told["arithmetic"]
    assert len([path for path in read if path.is_relative_to(prior)]) == 6


def test_a_damaged_base_is_told_at_its_field(client: TestClient, tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    told = ok(client.post(f"/api/projects/{project_on(client, tmp_path / 'base', pictures)}/check", json={}))
    assert not told["ok"] and [problem["where"] for problem in told["problems"]] == ["base.model"]


def test_figures_change_when_the_machine_is_slower(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(tmp_path / "one")
    first = measured(client, project_on(client, tiny_base, pictures))
    assert first["state"] == "done" and first["fits"] and 0 < first["memory"] < first["memory_free"]
    (tmp_path / "slower.py").write_text(SLOWER)
    monkeypatch.setattr("app.preflight.MEASURE", (sys.executable, "-P", str(tmp_path / "slower.py")))
    client = make_client(tmp_path / "two")
    project = project_on(client, tiny_base, pictures)
    slow = measured(client, project)
    assert slow["seconds_per_step"] > first["seconds_per_step"] + 0.5
    assert slow["seconds"] > first["seconds"] + 40 * 0.5
    more = measured(client, project, train={"steps": 80})  # follows from what was measured, at once
    assert more["seconds"] - slow["seconds"] == pytest.approx(40 * slow["seconds_per_step"])


def test_what_does_not_fit_says_what_to_change(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = (
        '{"step_seconds": 1, "load_seconds": 1, "sampling_seconds": 0, "picture_seconds": 0, "memory": 95, "memory_free": 100'
    )
    monkeypatch.setattr("app.preflight.MEASURE", (sys.executable, "-c", f'print(\'{large}, "device": "gpu"}}\')'))
    client = make_client(tmp_path / "home")
    told = measured(client, project_on(client, tiny_base, pictures))
    assert not told["fits"] and any("train.batch_size" in hint for hint in told["hints"])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory runs out"),
        ("raise ValueError('a fault of ours')", "ValueError: a fault of ours"),
        ("""print('{"what": "No such base", "where": "x", "hint": "Name one."}')""", "No such base"),
    ],
)
def test_a_measurement_that_fails_is_told_and_may_be_tried_again(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    monkeypatch.setattr("app.preflight.MEASURE", (sys.executable, "-c", code))
    client = make_client(tmp_path / "home")
    project = project_on(client, tiny_base, pictures)
    for _ in range(2):
        told = measured(client, project)
        assert told["state"] == "failed" and words in told["what"] and told["hints"]


def test_a_run_takes_the_machine_from_the_measurement_and_is_not_measured_beside(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "lived on"
    code = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    monkeypatch.setattr("app.preflight.MEASURE", (sys.executable, "-c", code))
    client = make_client(tmp_path / "home")
    project = project_on(client, tiny_base, pictures)
    begun = time.monotonic()
    assert ok(client.post(f"/api/projects/{project}/measure", json={"force": True}))["state"] == "measuring"
    run = ok(client.post(f"/api/projects/{project}/runs", json={"force": True}))["id"]
    assert ok(client.post(f"/api/projects/{project}/measure", json={"force": True}))["state"] == "busy"
    await_state(client, run, lambda status: status["state"] == "finished", 120)
    time.sleep(max(0.0, begun + 6 - time.monotonic()))  # most of which the run has taken
    assert not mark.exists()


def test_wrong_settings_are_refused_before_anything_is_measured(client: TestClient, pictures: Path, tmp_path: Path) -> None:
    project = project_with(client, pictures)
    body = {"settings": {"adapter": {"rank": -3}}}
    told = refused(client.post(f"/api/projects/{project}/measure", json=body), 422)
    assert told["problems"][0]["where"] == "adapter.rank"
    assert not (tmp_path / "home" / "window" / "preflight").exists()
