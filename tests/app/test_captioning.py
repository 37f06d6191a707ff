"""Captions by a model in the window: looked at before they are taken, cancelled, taken back, and one project at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import captioning
from tests.app_client import make_client, ok, project_with, refused
from tests.command_line import contents
from tests.tiny_captioners import save_tiny_blip

SLOW = """
import json, sys, time
request = json.loads(sys.stdin.readline())
def tell(**event): print(json.dumps(event), flush=True)
tell(event="loading")
tell(event="loaded", device="cpu")
for name, path in request["pictures"]:
    tell(event="caption", name=name, text="a " + request["prompt"])
    {then}
tell(event="done")
"""


def wait(client: TestClient, project: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    end = time.monotonic() + 120
    while not wanted(found := ok(client.get(f"/api/projects/{project}/captioning"))):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return dict(found)


def stand_in(monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """A captioner without a model, to see what the window does with one that is slow or dies."""
    monkeypatch.setattr(captioning, "CAPTIONER", (sys.executable, "-c", SLOW.replace("{then}", then)))


def test_captions_of_a_real_model_are_looked_at_taken_and_taken_back(pictures: Path, home: Path, tmp_path: Path) -> None:
    model = save_tiny_blip(tmp_path / "blip")
    for name in ("01.txt", "05.txt"):
        (pictures / name).unlink()
    before = contents(pictures)
    with make_client(home) as client:
        project = project_with(client, pictures)
        body = {"model": str(model), "prompt": "a photo of", "max_tokens": 6}
        started = ok(client.post(f"/api/projects/{project}/captioning", json=body))
        assert (started["state"], started["total"]) == ("loading", 2)  # those without a caption
        refused(client.post(f"/api/projects/{project}/captioning", json=body), 409)
        found = wait(client, project, lambda now: now["state"] not in ("loading", "writing"))
        assert (found["state"], found["done"], found["problem"]) == ("done", 2, "")
        assert set(found["captions"]) == {"01.png", "05.png"}
        assert all(text.startswith("a photo of ") for text in found["captions"].values())
        images = {image["rel"]: image["caption"] for image in ok(client.get(f"/api/projects/{project}/images"))["images"]}
        assert images["01.png"] == ""  # nothing is saved yet
        change = {"label": "Captions by blip", "captions": found["captions"]}
        saved = ok(client.post(f"/api/projects/{project}/changes", json=change))
        assert {image["rel"]: image["caption"] for image in saved["images"]} == found["captions"]
        undone = ok(client.post(f"/api/projects/{project}/undo"))
        assert (undone["label"], [image["caption"] for image in undone["images"]]) == ("Captions by blip", ["", ""])
        other = project_with(client, pictures)
        assert ok(client.get(f"/api/projects/{other}/captioning"))["state"] == "none"
    assert contents(pictures) == before


def test_it_is_cancelled_between_pictures_and_what_is_written_stays(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "if name == '01.png': time.sleep(1000)")
    with make_client(home) as client:
        project, other = project_with(client, pictures), project_with(client, pictures)
        body = {"model": "a folder", "prompt": "cat", "names": ["00.png", "01.png", "02.png"]}
        ok(client.post(f"/api/projects/{project}/captioning", json=body))
        found = wait(client, project, lambda now: now["done"] == 2)
        assert found["state"] == "writing" and found["seconds_left"] >= 0
        refused(client.post(f"/api/projects/{other}/captioning", json=body), 409)
        assert ok(client.get(f"/api/projects/{other}/captioning"))["busy"]
        found = ok(client.delete(f"/api/projects/{project}/captioning"))
        assert (found["state"], found["captions"]) == ("cancelled", {"00.png": "a cat", "01.png": "a cat"})
        assert not ok(client.get(f"/api/projects/{other}/captioning"))["busy"]


def test_a_captioner_that_dies_is_told_and_the_next_one_starts_anew(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "print('half a li', end='', flush=True); sys.exit(7)")
    with make_client(home) as client:
        project = project_with(client, pictures)
        body = {"model": "a folder", "names": ["00.png", "01.png"]}
        for _ in range(2):
            ok(client.post(f"/api/projects/{project}/captioning", json=body))
            found = wait(client, project, lambda now: now["state"] == "failed")
            assert "exit code 7" in found["problem"] and found["captions"] == {"00.png": "a "}
        refused(client.post(f"/api/projects/{project}/captioning", json={"model": " "}), 422)
        refused(client.post(f"/api/projects/{project}/captioning", json={"model": "a folder"}), 422)  # all have captions
        refused(client.post(f"/api/projects/{project}/captioning", json={"model": "a folder", "names": ["no.png"]}), 404)
