"""Looking over pictures in the background: remembered by content, capped, and gone on with after the window was closed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import inspection
from tests.app_client import make_client, ok, project_with
from tests.command_line import contents


def looked_over(client: TestClient, project: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    while True:
        found: dict[str, Any] = ok(client.get(f"/api/projects/{project}/inspection"))
        if found["done"] == found["total"]:
            return found
        assert time.monotonic() < end, found
        time.sleep(0.02)


def same(found: dict[str, Any]) -> list[list[str]]:
    return [flaw["pictures"] for flaw in found["flaws"] if flaw["kind"] == "same"]


def copies(pictures: Path) -> Path:
    """With one picture twice, as another file name."""
    (pictures / "06.png").write_bytes((pictures / "03.png").read_bytes())
    return pictures


def test_a_copy_is_told_until_it_is_left_out_and_nothing_is_measured_twice(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    real = inspection.measure_picture

    def counted(path: Path) -> Any:
        measured.append(path.name)
        return real(path)

    monkeypatch.setattr(inspection, "measure_picture", counted)
    before = contents(copies(pictures))
    with make_client(home) as client:
        project = project_with(client, pictures)
        found = looked_over(client, project)
        assert same(found) == [["03.png", "06.png"]]
        ok(client.put(f"/api/projects/{project}/excluded", json={"06.png": True}))
        assert same(looked_over(client, project)) == []
        ok(client.post(f"/api/projects/{project}/undo"))
        assert looked_over(client, project)["flaws"] == found["flaws"]
    assert len(measured) == len({*measured} - {"06.png"} | {"03.png"}) == 6
    with make_client(home) as client:
        assert looked_over(client, project) == found
    assert len(measured) == 6
    assert contents(pictures) == before


def test_a_large_folder_is_capped_a_damaged_picture_and_memory_stop_nothing(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MOST", 4)
    data = (pictures / "01.png").read_bytes()
    (pictures / "01.png").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2 - 12) + data[-12:])
    with make_client(home) as client:
        project = project_with(client, pictures)
        found = looked_over(client, project)
        assert (found["total"], found["left"]) == (4, 2)
    file = home / "projects" / project / "quality.json"
    assert len(json.loads(file.read_text())["pictures"]) == 4
    file.write_text("{}")
    with make_client(home) as client:
        assert looked_over(client, project) == found
