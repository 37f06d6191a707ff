"""The studio's routes: what is refused, what is looked up, and real pictures of a ladder."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app.studio_client import ENDED
from tests.app_client import make_client, make_run, ok, refused
from tests.command_line import impasto
from tests.tiny_lora import TEXT, UNET, UNET_OUT, save_lora

# Answers every request with one picture for each strength, as the real worker does, but at once.
FAKE = """
import json, pathlib, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] != "render":
        continue
    for cell, strength in enumerate(asked["strengths"]):
        path = pathlib.Path(asked["folder"]) / f"picture{strength}.png"
        path.write_text(json.dumps(asked))
        told = {"event": "picture", "id": asked["id"], "cell": cell, "strength": strength, "path": str(path)}
        print(json.dumps(told), flush=True)
    print(json.dumps({"event": "done", "id": asked["id"]}), flush=True)
"""
WISH = {"prompt": "a cat", "width": 64, "height": 64, "strengths": [0.0, 1.0]}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr("app.studio_client.WORKER", (sys.executable, "-c", FAKE))
    ended = {"type": "finished", "time": 1.0, "step": 1, "path": "x.safetensors", "seconds": 1}
    run = make_run(tmp_path, "r1", [json.dumps(ended)])
    run.config.write_text('[base]\nmodel = "pocket"\n[samples]\nprompts = ["a dog"]\nseed = 3\n', encoding="utf-8")
    (run.path / "x.safetensors").write_bytes(b"nothing reads this here")
    return make_client(tmp_path)


def test_it_begins_with_the_run_s_own_prompt_seed_and_size(client: TestClient) -> None:
    told = ok(client.get("/api/runs/r1/studio"))
    assert (told["prompt"], told["seed"], told["width"], told["height"]) == ("a dog", 3, 64, 64)
    assert "euler" in told["schedulers"] and [file["name"] for file in told["files"]] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"strengths": [9]}, "strengths.0"),
        ({"strengths": []}, "strengths"),
        ({"strengths": [0.1] * 18}, "strengths"),
        ({"width": 65}, "width"),
        ({"height": 4096}, "height"),
        ({"steps": 0}, "steps"),
        ({"guidance": 31}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"prompt": "x" * 4097}, "prompt"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"folder": "/tmp"}, "folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_its_field(client: TestClient, change: dict[str, Any], where: str) -> None:
    told = refused(client.post("/api/studio", json={"run": "r1", **WISH, **change}), 422)
    assert told["problems"][0]["where"] == where


@pytest.mark.parametrize("run", ["none", "../r1", "", "."])
def test_only_runs_that_are_there_are_drawn(client: TestClient, run: str) -> None:
    refused(client.post("/api/studio", json={"run": run, **WISH}), 404)


@pytest.mark.parametrize("name", ["none.png", "worker.log", "..%2f..%2fx.png", "%2e%2e"])
def test_only_pictures_of_the_studio_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/api/studio/pictures/{name}").status_code == 404


def test_an_unknown_drawing_is_told_in_words(client: TestClient) -> None:
    refused(client.get("/api/studio/77"), 404)
    assert client.get("/api/studio/x").status_code == 422


def test_a_ladder_comes_picture_by_picture_from_the_run_s_file(client: TestClient, tmp_path: Path) -> None:
    with client:
        number = ok(client.post("/api/studio", json={"run": "r1", **WISH}))["id"]
        end = time.monotonic() + 30
        while (told := ok(client.get(f"/api/studio/{number}")))["state"] != "done" and time.monotonic() < end:
            time.sleep(0.05)
        assert [one["strength"] for one in told["pictures"]] == [0.0, 1.0], told
        asked = json.loads(client.get(told["pictures"][1]["url"]).text)
        assert asked["lora"] == str(tmp_path / "runs" / "r1" / "x.safetensors") and asked["base"]["model"] == "pocket"
        ok(client.post(f"/api/studio/{number}/cancel"))


@pytest.mark.parametrize("layers", [(UNET, UNET_OUT), (UNET, TEXT)], ids=["unet", "with text encoder"])
def test_the_window_s_ladder_is_what_generate_draws(tiny_base: Path, tmp_path: Path, layers: tuple[str, ...]) -> None:
    """Through the real renderer and the real command: 0 is the base bit for bit, the others agree within 1/255."""
    home, strengths = tmp_path / "home", [-0.5, 0.0, 0.5, 1.0, 1.5]
    run = make_run(home, "r1", [json.dumps({"type": "finished", "time": 1.0, "step": 1, "path": "x.safetensors"})])
    run.config.write_text(f'[base]\nmodel = "{tiny_base.as_posix()}"\n', encoding="utf-8")
    file = save_lora(run.path / "x.safetensors", *layers)
    wish = {"prompt": "a red apple", "seed": 5, "steps": 3, "guidance": 4.0, "width": 32, "height": 32, "strengths": strengths}
    with make_client(home) as client:
        number = ok(client.post("/api/studio", json={"run": "r1", **wish}))["id"]
        end = time.monotonic() + 90
        while (told := ok(client.get(f"/api/studio/{number}")))["state"] not in ENDED and time.monotonic() < end:
            time.sleep(0.1)
        assert told["state"] == "done", told
        shown = {one["strength"]: pixels(client.get(one["url"]).content) for one in told["pictures"]}
    words = ("--base", tiny_base, "-p", "a red apple", "--seed", 5, "--steps", 3, "--guidance", 4, "--size", "32x32")
    for strength in strengths:
        lora = ("--lora", file, f"--strengths={strength}") if strength else ()
        assert impasto("generate", *words, *lora, "-o", tmp_path / "one.png") == 0
        drawn = pixels((tmp_path / "one.png").read_bytes())
        assert numpy.abs(shown[strength] - drawn).max() <= (1 if strength else 0)
    assert numpy.abs(shown[1.5] - shown[0.0]).max() > 2


def pixels(data: bytes) -> Any:
    """(H, W, 3) as whole numbers."""
    return numpy.asarray(Image.open(io.BytesIO(data))).astype(int)
