"""Bulk edits with preview, undo and redo over many steps and windows; crops; the person's own folder stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import history
from tests.app_client import make_client, ok, project_with, refused
from tests.command_line import contents


def captions(client: TestClient, project: str) -> dict[str, str]:
    images = ok(client.get(f"/api/projects/{project}/images"))["images"]
    return {image["rel"]: image["caption"] for image in images}


def bulk(client: TestClient, project: str, **body: Any) -> dict[str, Any]:
    preview = ok(client.post(f"/api/projects/{project}/bulk/preview", json=body))
    answer: dict[str, Any] = ok(client.post(f"/api/projects/{project}/bulk", json={**body, "key": preview["key"]}))
    assert len(answer["images"]) == preview["count"]
    return answer


def hashes(folder: Path) -> dict[str, str]:
    """The files' bytes alone: an own project's captions are written anew."""
    return {name: told.split()[0] for name, told in contents(folder).items()} if folder.is_dir() else {}


def own_project(client: TestClient, pictures: Path) -> str:
    """A project with copies of the pictures; the last one without a caption."""
    made = str(ok(client.post("/api/projects", json={"name": "Own"}))["id"])
    for path in sorted(pictures.iterdir())[:5]:
        ok(client.post(f"/api/projects/{made}/images", files={"file": (path.name, path.read_bytes())}))
    return made


@pytest.mark.parametrize("own", [True, False])
def test_many_steps_go_back_and_forward_also_after_the_window_was_closed(pictures: Path, tmp_path: Path, own: bool) -> None:
    home, before = tmp_path / "home", contents(pictures)
    (pictures / "02.txt").unlink()
    untouched = contents(pictures)
    client = make_client(home)
    project = own_project(client, pictures) if own else project_with(client, pictures)
    files = hashes(home / "projects" / project / "images")
    states = [captions(client, project)]
    for body in (
        {"kind": "add", "text": "ink", "names": ["00.png", "02.png"]},
        {"kind": "replace", "text": "ink", "into": "oil"},
        {"kind": "prepend", "text": "art of"},
    ):
        bulk(client, project, **body)
        states.append(captions(client, project))
    ok(client.put(f"/api/projects/{project}/captions", json={"01.png": "typed"}))
    states.append(captions(client, project))
    ok(client.put(f"/api/projects/{project}/excluded", json={"00.png": True}))
    client = make_client(home)  # another window: nothing is kept in memory
    standing = ok(client.get(f"/api/projects/{project}/history"))
    assert (standing["undo"], standing["undos"], standing["redos"]) == ("Left out: 00.png", 5, 0)
    assert ok(client.post(f"/api/projects/{project}/undo"))["images"][0]["excluded"] is False
    for state in states[-2::-1]:
        assert ok(client.post(f"/api/projects/{project}/undo"))["left"] == []
        assert captions(client, project) == state
    refused(client.post(f"/api/projects/{project}/undo"), 409)
    if own:
        assert hashes(home / "projects" / project / "images") == files
    for state in states[1:]:
        ok(client.post(f"/api/projects/{project}/redo"))
        assert captions(client, project) == state
    assert contents(pictures) == untouched != before


def test_a_preview_writes_nothing_and_only_what_it_showed_is_applied(pictures: Path, home: Path) -> None:
    client = make_client(home)
    project = project_with(client, pictures)
    body = {"kind": "remove", "text": "Test Style"}
    preview = ok(client.post(f"/api/projects/{project}/bulk/preview", json=body))
    assert (preview["count"], preview["total"]) == (6, 6)
    assert preview["changes"][0] == {"rel": "00.png", "before": "a red apple, test style", "after": "a red apple"}
    assert ok(client.get(f"/api/projects/{project}/history"))["undo"] == ""
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "changed, test style"}))
    refused(client.post(f"/api/projects/{project}/bulk", json={**body, "key": preview["key"]}), 409)
    assert captions(client, project)["01.png"] == "a green leaf, test style"
    refused(client.post(f"/api/projects/{project}/bulk/preview", json={"kind": "replace", "text": "(", "pattern": True}), 422)
    refused(client.post(f"/api/projects/{project}/bulk/preview", json={**body, "names": ["no.png"]}), 404)


def test_a_file_name_is_what_a_bulk_edit_begins_with_where_there_is_no_caption(pictures: Path, home: Path) -> None:
    (pictures / "00.txt").unlink()
    (pictures / "00.png").rename(pictures / "red apple.png")
    client = make_client(home)
    project = project_with(client, pictures)
    bulk(client, project, kind="add", text="ink", names=["red apple.png"])
    assert captions(client, project)["red apple.png"] == "red apple, ink"
    ok(client.post(f"/api/projects/{project}/undo"))
    assert captions(client, project)["red apple.png"] == ""


def test_what_was_changed_by_another_way_since_stays_as_it_is(pictures: Path, home: Path) -> None:
    client = make_client(home)
    project = own_project(client, pictures)
    bulk(client, project, kind="add", text="ink")
    (home / "projects" / project / "images" / "00.txt").write_text("by hand")
    stepped = ok(client.post(f"/api/projects/{project}/undo"))
    assert stepped["left"] == ["00.png"]
    assert captions(client, project) == {"00.png": "by hand", "01.png": "a green leaf, test style", "02.png": ""}


def test_a_new_step_forgets_what_could_be_done_again_and_the_oldest_are_dropped(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MAX_STEPS", 3)
    client = make_client(home)
    project = project_with(client, pictures)
    for number in range(5):
        ok(client.put(f"/api/projects/{project}/captions", json={"00.png": f"step {number}"}))
    ok(client.post(f"/api/projects/{project}/undo"))
    assert ok(client.get(f"/api/projects/{project}/history"))["redo"] == "Caption: 00.png"
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "another way"}))
    standing = ok(client.get(f"/api/projects/{project}/history"))
    assert (standing["undos"], standing["redos"], standing["redo"]) == (3, 0, "")
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "another way"}))  # no change is no step
    assert ok(client.get(f"/api/projects/{project}/history"))["undos"] == 3


def test_steps_belong_to_a_source(pictures: Path, home: Path, tmp_path: Path) -> None:
    client = make_client(home)
    project = project_with(client, pictures)
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "edited"}))
    ok(client.put(f"/api/projects/{project}/source", json={"folder": "own"}))
    assert ok(client.get(f"/api/projects/{project}/history"))["undo"] == ""
    ok(client.put(f"/api/projects/{project}/source", json={"folder": str(pictures)}))
    ok(client.post(f"/api/projects/{project}/undo"))
    assert captions(client, project)["00.png"] == "a red apple, test style"


def test_a_damaged_history_stops_nothing(pictures: Path, home: Path) -> None:
    client = make_client(home)
    project = project_with(client, pictures)
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "edited"}))
    for path in (home / "projects" / project / "history").rglob("*.json"):
        path.write_text('{"label": []}')
    assert ok(client.get(f"/api/projects/{project}/history"))["undo"] == ""
    refused(client.post(f"/api/projects/{project}/undo"), 409)
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "edited again"}))
    ok(client.post(f"/api/projects/{project}/undo"))
    assert captions(client, project)["00.png"] == "edited"
