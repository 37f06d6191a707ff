"""Grids, differences, tournaments and calibrations over REST: what is refused, filled in, kept across a restart, read back."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.app_client import make_client, make_run, ok, refused
from tests.command_line import ROOT
from tests.tiny_lora import UNET, save_lora
from trainers.grid import read_grid

# Draws as the real worker does, but flat: brightness by strength, hue by prompt and seed. A prompt "wait" is never drawn.
FAKE = """
import json, pathlib, sys, zlib
from PIL import Image
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "cancel":
        print(json.dumps({"event": "cancelled", "id": asked["id"]}), flush=True)
        continue
    held = False
    for number, cell in enumerate(asked["cells"]):
        held = held or cell["prompt"] == "wait"
        if held:
            continue
        text = json.dumps(cell).encode()
        strength = cell["loras"][0]["unet"] if cell["loras"] else 0.0
        hue = zlib.crc32((cell["prompt"] + str(cell["seed"])).encode()) % 100
        path = pathlib.Path(asked["folder"]) / f"{zlib.crc32(text):x}.png"
        Image.new("RGB", (asked["width"], asked["height"]), (int(40 + 80 * strength), hue, 90)).save(path)
        told = {"event": "picture", "id": asked["id"], "cell": number, "strength": strength, "path": str(path)}
        print(json.dumps(told), flush=True)
    if not held:
        print(json.dumps({"event": "done", "id": asked["id"]}), flush=True)
"""
WISH: dict[str, Any] = {
    "rows": "prompt",
    "columns": "strength",
    "prompts": ["a cat", "a dog"],
    "strengths": [0, 0.5, 1],
    "seeds": [4],
    "loras": [{"run": "r1"}],
    "width": 64,
    "height": 64,
}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr("app.studio_client.WORKER", (sys.executable, "-c", FAKE))
    ended = {"type": "finished", "time": 1.0, "step": 1, "path": "ink.safetensors", "seconds": 1}
    run = make_run(tmp_path, "r1", [json.dumps(ended)])
    images = ROOT / "assets" / "samples" / "blackcut"
    run.config.write_text(f'[base]\nmodel = "pocket"\n[dataset]\nimages = {json.dumps(str(images))}\n', encoding="utf-8")
    save_lora(run.path / "ink.safetensors", UNET)
    run.checkpoints.mkdir()
    save_lora(run.checkpoints / "ink-00000010.safetensors", UNET, seed=1)
    return make_client(tmp_path)


def await_end(client: TestClient, path: str, wanted: tuple[str, ...] = ("done", "failed", "cancelled")) -> dict[str, Any]:
    end = time.monotonic() + 60
    while True:
        found: dict[str, Any] = ok(client.get(path))
        if found["state"] in wanted:
            return found
        assert time.monotonic() < end, found
        time.sleep(0.02)


def drawn_grid(client: TestClient, **changes: Any) -> int:
    number = int(ok(client.post("/api/grids", json={**WISH, **changes}))["id"])
    assert await_end(client, f"/api/grids/{number}")["state"] == "done"
    return number


@pytest.mark.parametrize(
    ("changes", "status", "what"),
    [
        ({"columns": "prompt"}, 422, "both over the prompt"),
        ({"seeds": [1, 2]}, 422, "the seed is on no axis"),
        ({"strengths": [9]}, 422, "less than or equal to 4"),
        ({"loras": [{"run": "nobody"}]}, 404, "no such run"),
        ({"loras": [{"run": "r1", "step": 7}]}, 404, "no LoRA of step 7"),
        ({"scheduler": "magic"}, 422, "no sampler"),
        ({"odd": 1}, 422, "Extra inputs"),
    ],
)
def test_what_is_no_grid_is_refused(client: TestClient, changes: dict[str, Any], status: int, what: str) -> None:
    assert what in refused(client.post("/api/grids", json={**WISH, **changes}), status)["what"]


def test_a_grid_is_drawn_saved_and_its_settings_come_back_with_their_files(client: TestClient, tmp_path: Path) -> None:
    loras = [{"run": "r1"}, {"run": "r1", "step": 10}]
    number = drawn_grid(client, rows="lora", prompts=["a cat"], loras=loras)
    found = ok(client.get(f"/api/grids/{number}"))
    assert found["rows"] == ["finished", "step 10"] and found["columns"] == ["strength 0", "strength 0.5", "strength 1"]
    assert [one["cell"] for one in found["cells"]] == list(range(6))
    assert client.get(found["cells"][5]["url"]).content.startswith(b"\x89PNG")
    page = client.get(f"/api/grids/{number}/page").content
    assert str(tmp_path).encode() not in page and read_grid(page).strengths == (0.0, 0.5, 1.0)
    back = ok(client.post("/api/grids/read", content=page[: page.index(b"IDAT")]))
    assert [(one["run"], one["step"]) for one in back["loras"]] == [("r1", None), ("r1", 10)]
    assert back["grid"]["prompts"] == ["a cat"] and back["grid"]["base"] == "pocket"
    (tmp_path / "runs" / "r1" / "ink.safetensors").write_bytes(b"another file of the same name")
    assert ok(client.post("/api/grids/read", content=page))["loras"][0]["run"] == ""
    refused(client.post("/api/grids/read", content=b"GIF89a"), 422)


def test_a_grid_fills_in_and_is_cancelled_with_what_is_drawn(client: TestClient) -> None:
    number = ok(client.post("/api/grids", json={**WISH, "prompts": ["a cat", "wait"]}))["id"]
    end = time.monotonic() + 60
    while len(found := ok(client.get(f"/api/grids/{number}"))["cells"]) < 3:
        assert time.monotonic() < end, found
    ok(client.post(f"/api/grids/{number}/cancel"))
    assert len(await_end(client, f"/api/grids/{number}")["cells"]) == 3
    with Image.open(io.BytesIO(client.get(f"/api/grids/{number}/page").content)) as page:
        assert (231, 226, 218) in {colour for _, colour in page.convert("RGB").getcolors(1 << 24) or []}  # an empty field
    assert "not wholly drawn" in refused(client.post("/api/tournaments", json={"grid": number, "over": "rows"}), 409)["what"]
    refused(client.get("/api/grids/999"), 404)


@pytest.mark.parametrize(("first", "second", "largest"), [(2, 0, 80), (2, 1, 40), (1, None, 40), (0, None, 0)])
def test_a_difference_is_told_with_its_factor(client: TestClient, first: int, second: int | None, largest: int) -> None:
    number = drawn_grid(client)
    asked = ok(client.post(f"/api/grids/{number}/differences", json={"first": first, "second": second}))["id"]
    found = await_end(client, f"/api/differences/{asked}")
    assert found["same_noise"] and found["largest"] == pytest.approx(largest / 255)
    shown = np.asarray(Image.open(io.BytesIO(client.get(found["url"]).content)))
    assert shown.max() == min(255, largest * found["factor"])
    refused(client.post(f"/api/grids/{number}/differences", json={"first": 6}), 404)


def test_a_tournament_is_blind_ranks_and_survives_a_restart(client: TestClient, tmp_path: Path) -> None:
    number = drawn_grid(client)
    name = ok(client.post("/api/tournaments", json={"grid": number, "over": "columns"}))["id"]
    seen = set()
    for count in range(18):
        pair = ok(client.get(f"/api/tournaments/{name}"))
        assert pair["pair"] == count and "strength" not in json.dumps(pair)
        pictures = [Image.open(io.BytesIO(client.get(pair[side]).content)).getpixel((0, 0)) for side in ("left", "right")]
        assert pictures[0][1:] == pictures[1][1:] and pictures[0] != pictures[1]  # the same prompt, another strength
        seen.add((pair["about"], pair["left"]))
        left, right = pictures[0][0], pictures[1][0]  # the stronger is preferred, always
        answer = {"pair": count, "better": "left" if left > right else "right"}
        ok(client.post(f"/api/tournaments/{name}/judgements", json=answer))
        refused(client.post(f"/api/tournaments/{name}/judgements", json=answer), 409)  # a double click
        if count == 8:
            client = make_client(tmp_path)
    assert {about for about, _ in seen} == {"a cat", "a dog"} and len(seen) > 4
    ranking = ok(client.get(f"/api/tournaments/{name}/ranking"))
    assert [place["name"] for place in ranking["places"]] == ["strength 1", "strength 0.5", "strength 0"]
    assert "strength 1" in ranking["words"] and sum(place["compared"] for place in ranking["places"]) == 36
    before = ok(client.get(f"/api/tournaments/{name}"))
    assert ok(client.post(f"/api/tournaments/{name}/undo"))["pair"] == 17
    ok(client.post(f"/api/tournaments/{name}/judgements", json=answer))
    assert ok(client.get(f"/api/tournaments/{name}")) == before
    assert [one["judged"] for one in ok(client.get("/api/tournaments"))["tournaments"]] == [18]
    assert client.delete(f"/api/tournaments/{name}").status_code == 204
    refused(client.get(f"/api/tournaments/{name}"), 404)


def test_one_contestant_or_a_strange_name_is_refused(client: TestClient, tmp_path: Path) -> None:
    number = drawn_grid(client, prompts=["a cat"])
    assert "not 1" in refused(client.post("/api/tournaments", json={"grid": number, "over": "rows"}), 422)["what"]
    for name in ("..", "0" * 12, "x"):
        refused(client.get(f"/api/tournaments/{name}/ranking"), 404)
    damaged = tmp_path / "window" / "tournaments" / ("0" * 12)
    damaged.mkdir(parents=True)
    (damaged / "tournament.json").write_text('{"contestants": 1}', encoding="utf-8")
    assert ok(client.get("/api/tournaments"))["tournaments"] == []


def test_what_is_drawn_is_known_however_much_is_asked_of_the_renderer_after_it(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = drawn_grid(client)
    measured = ok(client.post("/api/calibrations", json={"run": "r1"}))["id"]
    await_end(client, f"/api/calibrations/{measured}")
    monkeypatch.setattr("app.studio_client.REMEMBERED", 1)
    for prompt in ("a", "b", "c"):  # as sliders do
        drawn_grid(client, prompts=[prompt])
    assert len(ok(client.get(f"/api/grids/{grid}"))["cells"]) == 6
    assert client.get(f"/api/grids/{grid}/page").content.startswith(b"\x89PNG")
    assert ok(client.get(f"/api/calibrations/{measured}"))["state"] == "done"


def test_a_calibration_is_measured_shown_and_baked(client: TestClient, tmp_path: Path) -> None:
    number = ok(client.post("/api/calibrations", json={"run": "r1"}))["id"]
    refused(client.post("/api/calibrations/999/bake"), 404)
    found = await_end(client, f"/api/calibrations/{number}")
    end = time.monotonic() + 60
    while len((found := ok(client.get(f"/api/calibrations/{number}")))["result"]["best"]) < 2:
        assert time.monotonic() < end, found
    result = found["result"]
    assert result["points"][0]["strength"] == 0 and len(result["curve"]) == 61
    assert result["points"][0]["drift"] == 0 < result["points"][-1]["drift"]
    assert len(result["whole"]) == 2 and client.get(result["best"][0]).status_code == 200
    original = (tmp_path / "runs" / "r1" / "ink.safetensors").read_bytes()
    assert result["suggested"] > 0
    other = tmp_path / "loras" / f"ink-at-{result['suggested']:.2f}.safetensors"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"another run's")
    refused(client.get(f"/api/calibrations/{number}/baked"), 404)
    baked = ok(client.post(f"/api/calibrations/{number}/bake"))
    assert f"{result['suggested']:.2f}" in baked["name"] and baked["name"] != other.name
    assert client.get(baked["url"]).content == (tmp_path / "loras" / baked["name"]).read_bytes() != original
    assert ok(client.post(f"/api/calibrations/{number}/bake")) == baked and other.read_bytes() == b"another run's"
    assert baked["needs"] == ""
    for folder in ("state", "embeddings"):
        (tmp_path / "runs" / "r1" / folder).mkdir(exist_ok=True)
    (tmp_path / "runs" / "r1" / "embeddings" / "zwx-00000010.safetensors").write_bytes(b"")
    assert "needs the embedding zwx of the run r1" in ok(client.post(f"/api/calibrations/{number}/bake"))["needs"]
    assert (tmp_path / "runs" / "r1" / "ink.safetensors").read_bytes() == original


def test_loras_of_the_library_stand_in_a_grid_and_come_back(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    save_lora(tmp_path / "loras" / "brought.safetensors", UNET, seed=5)
    (card,) = [one for one in ok(client.get("/api/library"))["cards"] if one["name"] == "brought.safetensors"]
    wish = {**WISH, "rows": "lora", "columns": "seed", "prompts": ["a cat"], "strengths": [1]}
    number = drawn_grid(client, **{**wish, "loras": [{"run": "r1"}, {"file": card["key"]}]})
    assert ok(client.get(f"/api/grids/{number}"))["rows"] == ["r1, finished", "brought"]
    back = ok(client.post("/api/grids/read", content=client.get(f"/api/grids/{number}/page").content))["loras"]
    assert back[0]["run"] == "r1" and (back[1]["run"], back[1]["file"]) == ("", card["key"])
    project = ok(client.post("/api/projects", json={"name": "no run yet"}))["id"]
    alone = {**wish, "loras": [{"file": card["key"]}]}
    assert ok(client.post("/api/grids", json={**alone, "project": project}))["id"] > number
    refused(client.post("/api/grids", json=alone), 404)
    gone = refused(client.post("/api/grids", json={**wish, "loras": [{"file": "gone.safetensors"}]}), 404)
    assert "not in the library" in gone["what"] and gone["where"] == "loras.0.file"
