"""The library's and the blends' routes: cards, files in and out, routing, drawing, blends by name and their export."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app.studio_client import ENDED
from tests.app_client import make_client, make_run, ok, refused
from tests.formats.examples import random_weights
from tests.tiny_lora import TEXT, UNET, save_lora
from trainers.formats import write_adapter

# Answers a drawing with one picture that holds what was asked, and a chore with what was asked.
FAKE = """
import json, pathlib, sys
for line in sys.stdin:
    asked = json.loads(line)
    told = {"id": asked["id"]}
    if asked["do"] == "render":
        path = pathlib.Path(asked["folder"]) / f"picture{asked['id']}.png"
        path.write_text(json.dumps(asked))
        print(json.dumps({**told, "event": "picture", "cell": 0, "strength": 0, "path": str(path)}), flush=True)
    elif asked["do"] != "cancel":
        print(json.dumps({**told, "event": "answer", "answer": asked}), flush=True)
    print(json.dumps({**told, "event": "done"}), flush=True)
"""
CROSS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
WISH = {"prompt": "a cat", "width": 64, "height": 64}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A window with two LoRAs in its library, one of a run, and a project on pocket."""
    monkeypatch.setattr("app.studio_client.WORKER", (sys.executable, "-c", FAKE))
    lora(tmp_path / "loras" / "ink.safetensors", "inkwash")
    run = make_run(tmp_path, "r1", [])
    lora(run.path / "cut.safetensors", "blackcut")
    client = make_client(tmp_path)
    ok(client.post("/api/projects", json={"name": "P"}))
    return client


def lora(path: Path, word: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(path, {CROSS: random_weights((320, 768), 4, 2.0, 0)}, {"modelspec.trigger_phrase": word})
    return path


def use(name: str = "loras/ink.safetensors", unet: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"file": name, "unet": unet, "text": 0.25, **more}


def ended(client: TestClient, number: int) -> dict[str, Any]:
    end = time.monotonic() + 90
    while (told := ok(client.get(f"/api/blend/{number}")))["state"] not in ENDED and time.monotonic() < end:
        time.sleep(0.05)
    return dict(told)


def test_the_library_lists_searches_and_describes(client: TestClient) -> None:
    told = ok(client.get("/api/library"))
    assert {card["key"] for card in told["cards"]} == {"loras/ink.safetensors", "runs/r1/cut.safetensors"}
    found = ok(client.get("/api/library", params={"q": "INK sd1"}))
    assert [card["words"] for card in found["cards"]] == [["inkwash"]] and found["total"] == 2
    details = ok(client.get("/api/library/card", params={"file": "loras/ink.safetensors"}))
    assert details["metadata"]["modelspec.trigger_phrase"] == "inkwash" and details["sha256"].startswith(details["autov2"])
    refused(client.get("/api/library/card", params={"file": "../../etc/passwd"}), 404)
    refused(client.get("/api/library/picture", params={"file": "loras/ink.safetensors"}), 404)
    changed = ok(client.put("/api/library/card", json={"file": "loras/ink.safetensors", "strength": 0.7, "routed": False}))
    assert (changed["strength"], changed["routed"], changed["words"]) == (0.7, False, ["inkwash"])
    refused(client.put("/api/library/card", json={"file": "loras/ink.safetensors", "strength": 9}), 422)


def test_files_are_brought_in_checked_and_taken_out_and_back(client: TestClient, tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "PNG")
    good = lora(tmp_path / "new.safetensors", "zorbo").read_bytes()
    sent = {"../new.safetensors": good, "new.png": image.getvalue(), "bad.safetensors": b"no", "x.exe": b"MZ"}
    told = ok(client.post("/api/library/files", files=[("files", (name, data)) for name, data in sent.items()]))
    assert sorted(told["saved"]) == ["new.png", "new.safetensors"]
    assert {name for name, _ in told["rejected"]} == {"bad.safetensors", "x.exe"}
    assert (tmp_path / "loras" / "new.safetensors").read_bytes() == good
    (card,) = ok(client.get("/api/library", params={"q": "zorbo"}))["cards"]
    assert client.get(card["picture"]).content == image.getvalue()
    ticket = ok(client.post("/api/library/remove", json={"file": "loras/new.safetensors"}))["ticket"]
    assert ok(client.get("/api/library"))["total"] == 2
    assert ok(client.post("/api/library/restore", json={"ticket": ticket}))["total"] == 3
    refused(client.post("/api/library/remove", json={"file": "runs/r1/cut.safetensors"}), 400)
    assert (tmp_path / "runs" / "r1" / "cut.safetensors").is_file()
    again = ok(client.post("/api/projects/p/images", files=[("files", ("new.safetensors", good))]))
    assert again["saved"] == [] and "not read" in again["rejected"][0][1]  # a project takes pictures only


def test_a_drawn_picture_becomes_a_card_s_and_its_own_comes_back(client: TestClient, tmp_path: Path) -> None:
    def shown(key: str) -> dict[str, Any]:
        return next(card for card in ok(client.get("/api/library"))["cards"] if card["key"] == key)

    drawn = tmp_path / "window" / "studio"
    drawn.mkdir(parents=True, exist_ok=True)
    for name, colour in (("a" * 40, "red"), ("b" * 40, "blue")):
        Image.new("RGB", (8, 8), colour).save(drawn / f"{name}.png")
    own = Image.new("RGB", (8, 8), "green")
    own.save(tmp_path / "loras" / "ink.preview.png")
    was = (tmp_path / "loras" / "ink.preview.png").read_bytes()
    addresses = {shown("loras/ink.safetensors")["picture"]}
    for key in ("loras/ink.safetensors", "runs/r1/cut.safetensors"):
        for name in ("a" * 40, "b" * 40):
            told = ok(client.put("/api/library/picture", json={"file": key, "picture": f"{name}.png"}))
            assert told["chosen"] == f"{name}.png" == shown(key)["chosen"]
            addresses.add(told["picture"])
            data = (drawn / f"{name}.png").read_bytes()
            assert client.get(told["picture"]).content == data
    assert len(addresses) == 5, "a picture that has changed has another address"
    (drawn / f"{'b' * 40}.png").unlink()  # what the renderer tidies away stays on the card
    assert client.get(shown("runs/r1/cut.safetensors")["picture"]).content == data
    ok(client.put("/api/library/picture", json={"file": "loras/ink.safetensors", "picture": ""}))
    assert client.get(shown("loras/ink.safetensors")["picture"]).content == was
    for name in ("../../queue.json", "c.png", ".."):
        refused(client.put("/api/library/picture", json={"file": "loras/ink.safetensors", "picture": name}), 400)
    refused(client.put("/api/library/picture", json={"file": "loras/no.safetensors", "picture": ""}), 404)
    assert sorted(path.name for path in (tmp_path / "runs" / "r1").iterdir()) == ["config.toml", "cut.safetensors"]


def test_a_prompt_brings_in_what_it_names(client: TestClient) -> None:
    ok(client.put("/api/library/card", json={"file": "loras/ink.safetensors", "strength": 0.7}))
    told = ok(client.post("/api/projects/p/route", json={"prompt": "a Blackcut wolf, inkwash"}))
    assert told["loras"] == [
        {"file": "runs/r1/cut.safetensors", "word": "Blackcut", "strength": 1.0},
        {"file": "loras/ink.safetensors", "word": "inkwash", "strength": 0.7},
    ]
    assert ok(client.post("/api/projects/p/route", json={"prompt": "a wolf"}))["loras"] == []


def test_a_blend_is_drawn_on_the_project_s_base(client: TestClient, tmp_path: Path) -> None:
    begin = ok(client.get("/api/projects/p/blend"))
    assert (begin["family"], begin["width"], begin["blends"]) == ("sd1", 64, []) and "mid" in begin["blocks"]
    with client:
        loras = [use(blocks={"mid": 0.0}), use("runs/r1/cut.safetensors", -1.5)]
        told = ended(client, ok(client.post("/api/projects/p/blend", json={**WISH, "loras": loras}))["id"])
        asked = json.loads(client.get(told["picture"]).text)
        assert asked["base"]["model"] == "pocket" and asked["replaces"] is True and asked["width"] == 64
        (cell,) = asked["cells"]
        assert [one["path"] for one in cell["loras"]] == [
            str(tmp_path / "loras" / "ink.safetensors"),
            str(tmp_path / "runs" / "r1" / "cut.safetensors"),
        ]
        assert cell["loras"][0]["blocks"] == {"mid": 0.0} and cell["loras"][1]["unet"] == -1.5
        weighed = ended(client, ok(client.post("/api/projects/p/blend/weigh", json={"file": "loras/ink.safetensors"}))["id"])
        assert weighed["answer"]["path"] == str(tmp_path / "loras" / "ink.safetensors")
        export = {"name": "both", "loras": loras}
        told = ended(client, ok(client.post("/api/projects/p/blend/export", json=export))["id"])["answer"]
        assert told["output"] == str(tmp_path / "loras" / "both.safetensors") and told["family"] == "sd1"


@pytest.mark.parametrize(
    ("loras", "status"),
    [
        ([use("loras/none.safetensors")], 404),
        ([use("../ink.safetensors")], 404),
        ([use(), use()], 422),
        ([use(unet=5.0)], 422),
        ([use(blocks={"sideways": 1.0})], 422),
        ([use(path="/etc/passwd")], 422),
    ],
)
def test_what_cannot_be_blended_is_refused(client: TestClient, loras: list[dict[str, Any]], status: int) -> None:
    answer = client.post("/api/projects/p/blend", json={**WISH, "loras": loras})
    assert answer.status_code in (status, 400) and answer.json()["what"]
    assert client.put("/api/blends/x", json={"loras": loras}).status_code >= 400


def test_blends_are_kept_by_name(client: TestClient, tmp_path: Path) -> None:
    blend = [use(blocks={"up_1": 0.5}), use("runs/r1/cut.safetensors", -1.0)]
    assert ok(client.put("/api/blends/my two", json={"loras": blend}))["blends"] == ["my two"]
    assert ok(client.get("/api/blends/my two")) == {"loras": [{"blocks": {}, **one} for one in blend], "missing": []}
    ok(client.post("/api/library/remove", json={"file": "loras/ink.safetensors"}))
    left = ok(client.get("/api/blends/my two"))
    assert left["missing"] == ["ink.safetensors"] and len(left["loras"]) == 1
    assert client.delete("/api/blends/my two").status_code == 204
    refused(client.get("/api/blends/my two"), 404)
    assert client.put("/api/blends/..%2fx", json={"loras": blend}).status_code >= 400
    assert not list(tmp_path.glob("*.toml"))


def test_real_blending_through_the_window(tiny_base: Path, tmp_path: Path) -> None:
    """Two LoRAs drawn, exported, and drawn again as one, by the real renderer."""
    first, second = (tmp_path / "loras" / f"{name}.safetensors" for name in "ab")
    first.parent.mkdir()
    save_lora(first, UNET, TEXT)
    save_lora(second, UNET, seed=1)
    with make_client(tmp_path) as client:
        ok(client.post("/api/projects", json={"name": "P"}))
        ok(client.patch("/api/projects/p", json={"recipe": {"base": {"model": str(tiny_base)}}}))
        wish = {"prompt": "a cat", "seed": 5, "steps": 3, "width": 32, "height": 32}
        both = [use("loras/a.safetensors", 0.5), {**use("loras/b.safetensors", -0.5), "text": -0.5}]

        def draw(*loras: dict[str, Any]) -> Any:
            told = ended(client, ok(client.post("/api/projects/p/blend", json={**wish, "loras": list(loras)}))["id"])
            assert told["state"] == "done", told
            return Image.open(io.BytesIO(client.get(told["picture"]).content))

        blended, base = draw(*both), draw()
        told = ended(client, ok(client.post("/api/projects/p/blend/export", json={"name": "sum", "loras": both}))["id"])
        assert told["state"] == "done", told
        whole = draw({"file": "loras/sum.safetensors", "unet": 1.0, "text": 1.0})
    apart = [max(abs(a - b) for a, b in zip(blended.tobytes(), other.tobytes(), strict=True)) for other in (whole, base)]
    assert apart[0] <= 1 and apart[1] > 2
