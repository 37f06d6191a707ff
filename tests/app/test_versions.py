"""Versions of a dataset: pinned by runs, compared, gone back to and forth again; and masks as the window shows them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.app_client import make_client, ok, project_with, refused
from tests.command_line import TINY, contents, impasto
from trainers.dataset.edits import Edits
from trainers.dataset.folder import scan_folder
from trainers.dataset.versions import compare_versions, name_version, read_version, version_of, write_version
from trainers.errors import DatasetError


@pytest.fixture
def client(home: Path) -> TestClient:
    return make_client(home)


def versions(client: TestClient, project: str) -> list[dict[str, Any]]:
    return list(ok(client.get(f"/api/projects/{project}/versions"))["versions"])


def keep(client: TestClient, project: str) -> str:
    return str(ok(client.post(f"/api/projects/{project}/versions"))["present"])


def captions(client: TestClient, project: str) -> dict[str, tuple[str, bool, bool]]:
    images = ok(client.get(f"/api/projects/{project}/images"))["images"]
    return {image["rel"]: (image["caption"], image["edited"], image["excluded"]) for image in images}


def change(client: TestClient, project: str) -> None:
    """One caption edited, one edit more, one picture left out, one taken away and one added."""
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "a new word", "01.png": "another"}))
    ok(client.put(f"/api/projects/{project}/excluded", json={"02.png": True}))


@pytest.mark.parametrize("kind", ["typed", "own"])
def test_there_and_back_again(client: TestClient, home: Path, pictures: Path, kind: str) -> None:
    project = project_with(client, pictures)
    if kind == "own":
        shutil.copytree(pictures, home / "projects" / project / "images", dirs_exist_ok=True)
        ok(client.put(f"/api/projects/{project}/source", json={"folder": "own"}))
    source = contents(pictures)
    before, first = captions(client, project), keep(client, project)
    assert keep(client, project) == first and len(versions(client, project)) == 1, "the same content is the same version"
    change(client, project)
    after, second = captions(client, project), keep(client, project)
    newest, oldest = versions(client, project)
    assert (newest["id"], oldest["id"]) == (second, first) and newest["is_present"] and not oldest["is_present"]
    assert [(one["name"], one["after"]) for one in newest["captions"]] == [("00.png", "a new word"), ("01.png", "another")]
    assert newest["removed"] == ["02.png"] and newest["added"] == [] and oldest["is_first"]

    went = ok(client.post(f"/api/projects/{project}/versions/{first}/back"))
    assert went == {"before": second, "gone": [], "left_out": []}
    assert captions(client, project) == before
    assert [one["is_present"] for one in versions(client, project) if one["id"] == first] == [True]
    ok(client.post(f"/api/projects/{project}/versions/{went['before']}/back"))
    assert captions(client, project) == after
    assert contents(pictures) == source


def test_going_back_without_a_picture_and_with_a_new_one(client: TestClient, pictures: Path) -> None:
    project = project_with(client, pictures)
    (pictures / "04.txt").unlink()
    first = keep(client, project)
    (pictures / "01.png").unlink()
    Image.new("RGB", (48, 48), "red").save(pictures / "03.png")
    shutil.copy(pictures / "00.png", pictures / "new.png")
    ok(client.put(f"/api/projects/{project}/captions", json={"04.png": "a caption since", "new.png": "new"}))
    keep(client, project)
    newest = versions(client, project)[0]
    assert (newest["added"], newest["removed"], newest["replaced"]) == (["new.png"], ["01.png"], ["03.png"])
    went = ok(client.post(f"/api/projects/{project}/versions/{first}/back"))
    assert went["gone"] == ["01.png", "03.png"] and went["left_out"] == ["new.png"]
    now = captions(client, project)
    assert now["new.png"] == ("new", True, True), "left out, and its caption kept"
    assert now["04.png"][0] == "" and not now["00.png"][2]


def test_what_is_no_version_is_refused(client: TestClient, home: Path, pictures: Path) -> None:
    project = project_with(client, pictures)
    first = keep(client, project)
    for name in ("..", "0" * 64, "project", first[:-1]):
        assert client.post(f"/api/projects/{project}/versions/{name}/back").status_code in (404, 405)
    (path,) = (home / "projects" / project / "dataset" / "versions").glob("*/*.json")
    path.write_text(path.read_text().replace("apple", "pear"))
    assert versions(client, project) == []
    assert "was changed" in refused(client.post(f"/api/projects/{project}/versions/{first}/back"), 400)["what"]


def test_a_run_pins_the_version_it_trains_on(
    client: TestClient, home: Path, tiny_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.runs.start_process", lambda run, project, home: None)
    recipe = {"base": {"model": str(tiny_base)}, "adapter": {"rank": 2}, "train": {"steps": 1, "batch_size": 2},
              "prior": {"prompts": []}, "samples": {"every": 0}, "output": {"verify": False}}  # fmt: skip
    project = project_with(client, pictures, preset="pocket", recipe=recipe, trigger="sks")
    change(client, project)
    run = ok(client.post(f"/api/projects/{project}/runs", json={"force": True}))["id"]
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "edited since"}))
    (one,) = versions(client, project)
    assert one["runs"] == [run] and not one["is_present"] and one["pictures"] == 5
    assert impasto("resume", home / "runs" / run) == 0
    manifest = json.loads((home / "runs" / run / "manifest.json").read_text())
    assert manifest["dataset_version"] == one["id"]
    scan = scan_folder(pictures, trigger="sks", edits=Edits({}, frozenset({"02.png"})))
    assert manifest["images"] == {example.name: example.sha256 for example in scan.examples}
    version = read_version(next((home / "projects" / project / "dataset" / "versions").glob("*/*.json")))
    assert version.pictures == manifest["images"] and version.captions["00.png"] == "a new word"


def test_a_run_of_the_command_line_names_its_version_too(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *TINY, "--steps", 1) == 0
    named = json.loads((tmp_path / "run" / "manifest.json").read_text())["dataset_version"]
    assert named == name_version(version_of(scan_folder(pictures), None))
    (pictures / "00.txt").write_text("other words")
    assert named != name_version(version_of(scan_folder(pictures), None))


def test_whatever_else_belongs_to_a_picture_is_compared(tmp_path: Path) -> None:
    found = []
    for crop in ([0.5, 0.5], [0.0, 0.5]):
        values = json.loads(write_version({"a.png": "1", "b.png": "2"}, Edits({"a.png": "x"})))
        values["edits"]["crops"] = {"a.png": crop}
        data = json.dumps(values).encode()
        path = tmp_path / f"{name_version(data)}.json"
        path.write_bytes(data)
        found.append(read_version(path))
    assert compare_versions(*found).other == ("a.png",) and compare_versions(found[0], found[0]).other == ()
    (tmp_path / "x.json").write_text('{"pictures": 3}')
    with pytest.raises(DatasetError, match="damaged"):
        read_version(tmp_path / "x.json")


def test_masks_are_shown_as_a_veil(client: TestClient, pictures: Path) -> None:
    project = project_with(client, pictures)
    mask = Image.new("L", (48, 48), 255)
    mask.paste(0, (0, 0, 48, 24))
    mask.save(pictures / "00-masklabel.png")
    Image.new("L", (48, 64), 0).save(pictures / "02-masklabel.png")
    told = ok(client.get(f"/api/projects/{project}/masks"))
    assert told == {"setting": "off", "masks": {}}
    assert "not used: 2" in ok(client.get(f"/api/projects/{project}/images"))["health"]["problems"][0]["what"]
    ok(client.patch(f"/api/projects/{project}", json={"recipe": {"dataset": {"masks": "auto"}}}))
    told = ok(client.get(f"/api/projects/{project}/masks"))
    assert list(told["masks"]) == ["00.png"]
    (left_out,) = ok(client.get(f"/api/projects/{project}/images"))["health"]["unreadable"]
    assert left_out["where"] == "02.png" and "mask is empty" in left_out["what"]
    with Image.open(io.BytesIO(client.get(told["masks"]["00.png"]).content)) as veil:
        assert veil.mode == "RGBA" and veil.getpixel((5, 5)) == (0, 0, 0, 191) and veil.getpixel((5, 40)) == (0, 0, 0, 0)
    refused(client.get(f"/api/projects/{project}/mask/01.png"), 404)
