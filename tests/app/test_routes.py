"""The REST API as the page uses it: answers, refusals at their field, and names that lead nowhere."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient

from app.projects import add_run, read_project
from app.queue_file import Entry, QueueFile, QueueState
from tests.app_client import make_client, make_run, ok, project_with, refused
from tests.command_line import contents, run_fresh
from trainers.config import build_config
from trainers.process_id import made_at

RECORDED = (Path(__file__).parent / "recorded_events.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def client(home: Path) -> TestClient:
    return make_client(home)


@pytest.fixture
def project(client: TestClient, pictures: Path) -> str:
    return project_with(client, pictures, preset="pocket")


def test_a_project_is_made_changed_listed_and_removed(client: TestClient, home: Path, pictures: Path) -> None:
    made = ok(client.post("/api/projects", json={"name": "Süße Katze"}))
    assert (made["id"], made["source"], made["latest"], made["cover"]) == ("susse-katze", "own", None, "")
    changed = ok(client.patch("/api/projects/susse-katze", json={"name": "Cat", "trigger": "sks"}))
    assert (changed["name"], changed["trigger"], changed["id"]) == ("Cat", "sks", "susse-katze")
    assert ok(client.get("/api/projects")) == {"projects": [changed]}
    assert client.delete("/api/projects/susse-katze").status_code == 204
    refused(client.get("/api/projects/susse-katze"), 404)


@pytest.mark.parametrize("body", [{}, {"name": 5}, {"name": ""}, {"name": "x", "nmae": "y"}, {"name": "x" * 5000}, [], None])
def test_a_wrong_body_is_refused_in_our_form(client: TestClient, body: Any) -> None:
    refused(client.post("/api/projects", json=body), 422)
    assert ok(client.get("/api/projects"))["projects"] == []


def test_a_typed_folder_gives_its_pictures(client: TestClient, project: str, pictures: Path) -> None:
    answer = ok(client.get(f"/api/projects/{project}/images"))
    assert answer["source"] == str(pictures) and answer["health"]["count"] == 6
    first = answer["images"][0]
    assert (first["rel"], first["width"], first["height"], first["tokens"]) == ("00.png", 48, 48, 6)
    thumb = client.get(first["thumb"])
    assert thumb.headers["content-type"] == "image/webp" and "immutable" in thumb.headers["cache-control"]
    assert thumb.content[8:12] == b"WEBP"


def test_a_source_that_is_no_folder_is_refused_in_words(client: TestClient, project: str, pictures: Path) -> None:
    for folder in ("/no/such/folder", "relative", str(pictures / "00.png"), "/", "a\0b"):
        assert client.put(f"/api/projects/{project}/source", json={"folder": folder}).status_code in (400, 422)
    assert ok(client.get(f"/api/projects/{project}"))["source"] == str(pictures)


def test_captions_and_exclusions_are_saved_and_answered(client: TestClient, project: str, pictures: Path) -> None:
    before = contents(pictures)
    ok(client.patch(f"/api/projects/{project}", json={"trigger": "sks"}))
    (saved,) = ok(client.put(f"/api/projects/{project}/captions", json={"03.png": "\U0001f98a " + "word " * 90}))["images"]
    assert saved["tokens"] > 75 and saved["cut"] < len(saved["caption"])
    read = saved["caption"].encode("utf-16-le")[: 2 * saved["cut"]].decode("utf-16-le")
    assert 65 <= read.count("word") < 75  # the trigger word and its comma take their part
    (out,) = ok(client.put(f"/api/projects/{project}/excluded", json={"05.png": True}))["images"]
    assert out["excluded"]
    health = ok(client.get(f"/api/projects/{project}/images"))["health"]
    assert (health["count"], health["excluded"], health["too_long"]) == (5, 1, ["03.png"])
    assert contents(pictures) == before


@pytest.mark.parametrize("name", ["gone.png", "../00.png", "00.txt", "/etc/passwd", "..%2f00.png", "00.png%00"])
def test_a_name_that_is_no_picture_leads_nowhere(client: TestClient, project: str, name: str) -> None:
    assert client.get(f"/api/projects/{project}/thumb/{name}").status_code in (400, 404, 405)
    refused(client.put(f"/api/projects/{project}/captions", json={name: "x"}), 404)
    refused(client.put(f"/api/projects/{project}/excluded", json={name: True}), 404)


@pytest.mark.parametrize("rel", ["sub folder/ä #1?.png", "50%.png", "a&b=c+d.png"])
def test_odd_names_find_their_thumbnail(client: TestClient, project: str, pictures: Path, rel: str) -> None:
    (pictures / rel).parent.mkdir(exist_ok=True)
    (pictures / rel).write_bytes((pictures / "00.png").read_bytes())
    images = {image["rel"]: image for image in ok(client.get(f"/api/projects/{project}/images"))["images"]}
    assert client.get(images[rel]["thumb"]).content[8:12] == b"WEBP"


def test_pictures_are_uploaded_into_a_project_of_its_own_only(client: TestClient, project: str, pictures: Path) -> None:
    files = [("files", ("cats/" + name, (pictures / name).read_bytes())) for name in ("00.png", "00.txt", "01.png")]
    before = contents(pictures)
    told = refused(client.post(f"/api/projects/{project}/images", files=files), 409)
    assert "ever written" in told["what"] and contents(pictures) == before
    own = ok(client.post("/api/projects", json={"name": "Own"}))["id"]
    assert sorted(ok(client.post(f"/api/projects/{own}/images", files=files))["saved"])[0] == "cats/00.png"
    captions = {image["rel"]: image["caption"] for image in ok(client.get(f"/api/projects/{own}/images"))["images"]}
    assert captions == {"cats/00.png": "a red apple, test style", "cats/01.png": ""}


def test_bad_settings_are_told_at_their_field_and_nothing_starts(client: TestClient, project: str, home: Path) -> None:
    settings = {"adapter": {"rank": 0}, "optimizer": {"learning_rate": "fast"}, "train": {"stpes": 5}}
    told = refused(client.post(f"/api/projects/{project}/runs", json={"settings": settings}), 422)
    fields = {problem["where"]: problem for problem in told["problems"]}
    assert set(fields) == {"adapter.rank", "optimizer.learning_rate", "train.stpes"}
    assert fields["train.stpes"]["hint"] == "Did you mean train.steps?"
    assert not list((home / "runs").iterdir()) if (home / "runs").exists() else True


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"base": {"model": "/no/such/base"}}, "base.model"),
        ({"base": {"model": 5}}, "base.model"),
        ({"adapter": 3}, "adapter"),
        ({"adapter": {"rank": 512}}, "adapter.rank"),
        ({"optimizer": {"learning_rate": 1e-8}}, "optimizer.learning_rate"),
        ({"samples": {"scheduler": "magic"}}, "samples.scheduler"),
        ({"dataset": {"resolution": 4096}}, "dataset.resolution"),
        ({"output": {"name": "a/b"}}, "output.name"),
    ],
)
def test_each_check_names_its_field(client: TestClient, project: str, settings: Any, field: str) -> None:
    told = refused(client.post(f"/api/projects/{project}/runs", json={"settings": settings}), 422)
    assert [problem["where"] for problem in told["problems"]] == [field]
    checked = ok(client.post(f"/api/projects/{project}/check", json={"settings": settings}))
    assert not checked["ok"] and checked["problems"] == told["problems"]


def test_what_is_not_advisable_passes_with_force(client: TestClient, project: str) -> None:
    settings = {"optimizer": {"learning_rate": 1e-8}}
    checked = ok(client.post(f"/api/projects/{project}/check", json={"settings": settings, "force": True}))
    assert checked["ok"] and "advice" in {problem["severity"] for problem in checked["problems"]}


def test_a_project_without_pictures_does_not_start(client: TestClient) -> None:
    made = ok(client.post("/api/projects", json={"name": "Empty"}))["id"]
    told = refused(client.post(f"/api/projects/{made}/runs", json={}), 422)
    assert told["problems"][0]["where"] == "dataset.images" and "empty" in told["what"]


def test_a_check_says_what_a_run_would_be(client: TestClient, project: str, pictures: Path) -> None:
    ok(client.put(f"/api/projects/{project}/excluded", json={"05.png": True}))
    settings = {"train": {"steps": 60}, "dataset": {"images": "/elsewhere", "holdout": 0}}
    checked = ok(client.post(f"/api/projects/{project}/check", json={"settings": settings}))
    assert (checked["ok"], checked["steps"], checked["pictures"], checked["base"]) == (True, 60, 5, "pocket")
    assert "5 pictures" in checked["arithmetic"] and "60 steps" in checked["arithmetic"]
    config = build_config(checked["settings"])
    assert config.dataset.images == str(pictures)  # the project says which pictures, not a recipe


def test_the_recipe_goes_in_and_out_as_toml(client: TestClient, project: str) -> None:
    text = "# from a friend\n[adapter]\nrank = 8\n"
    assert ok(client.put(f"/api/projects/{project}/recipe", content=text)) == {"adapter": {"rank": 8}}
    assert client.get(f"/api/projects/{project}/recipe").text == text
    assert ok(client.get(f"/api/projects/{project}"))["recipe"] == {"adapter": {"rank": 8}}
    for wrong in ("[adapter]\nrank = -1", "rank =", b"\xff\xfe"):
        refused(client.put(f"/api/projects/{project}/recipe", content=wrong), 422)
    told = refused(client.patch(f"/api/projects/{project}", json={"trigger": "new", "recipe": {"train": {"steps": 0}}}), 422)
    assert told["problems"][0]["where"] == "train.steps"
    assert ok(client.get(f"/api/projects/{project}"))["trigger"] == ""  # all of it or nothing
    refused(client.patch(f"/api/projects/{project}", json={"preset": "nothing"}), 422)


def test_status_gives_what_is_new(client: TestClient, home: Path) -> None:
    make_run(home, "r", RECORDED)
    first = ok(client.get("/api/runs/r/status"))
    assert first["state"] == "finished" and [event["type"] for event in first["events"]][-1] == "finished"
    assert len(first["events"]) == len(RECORDED) and first["next"] == (home / "runs" / "r" / "events.jsonl").stat().st_size
    again = ok(client.get(f"/api/runs/r/status?since={first['next']}"))
    assert again["events"] == [] and again["next"] == first["next"] and not again["more"]
    middle = len("\n".join(RECORDED[:3]).encode()) + 1
    assert len(ok(client.get(f"/api/runs/r/status?since={middle}"))["events"]) == len(RECORDED) - 3
    assert ok(client.get(f"/api/runs/r/status?since={10**12}"))["events"] == []
    refused(client.get("/api/runs/r/status?since=-1"), 422)


def test_a_long_run_comes_in_pieces(client: TestClient, home: Path) -> None:
    step = next(line for line in RECORDED if '"type": "step"' in line)
    make_run(home, "r", [step] * 12_000)
    since, count, answers = 0, 0, 0
    while True:
        answer = ok(client.get(f"/api/runs/r/status?since={since}"))
        since, count, answers = answer["next"], count + len(answer["events"]), answers + 1
        if not answer["more"]:
            break
    assert count == 12_000 and answers > 1


def test_a_line_that_is_being_written_comes_later(client: TestClient, home: Path) -> None:
    run = make_run(home, "r", RECORDED[:4])
    with run.events.open("ab") as file:
        file.write(b'{"type": "stage", "na')
    answer = ok(client.get("/api/runs/r/status"))
    assert len(answer["events"]) == 4 and answer["more"]
    assert not ok(client.get(f"/api/runs/r/status?since={answer['next']}"))["more"]


def test_a_lora_is_downloaded_from_its_place_also_in_ranges(client: TestClient, home: Path) -> None:
    run = make_run(home, "r", RECORDED)
    refused(client.get("/api/runs/r/download"), 404)
    data = bytes(range(256)) * 100
    (run.path / "my cat-r4.safetensors").write_bytes(data)
    answer = client.get("/api/runs/r/download")
    assert answer.content == data and "attachment" in answer.headers["content-disposition"]
    assert "my%20cat-r4.safetensors" in answer.headers["content-disposition"]
    part = client.get("/api/runs/r/download", headers={"Range": "bytes=100-109"})
    assert part.status_code == 206 and part.content == data[100:110]
    (file,) = ok(client.get("/api/runs/r/status"))["files"]
    assert file == {"step": None, "name": "my cat-r4.safetensors", "size": len(data), "url": "/api/runs/r/download"}
    assert client.get("/api/runs/r/metadata").status_code in (400, 422)  # said in words, as it is no LoRA


def test_a_finished_embedding_is_downloaded_and_a_checkpoint_s_is_not(client: TestClient, home: Path) -> None:
    run = make_run(home, "r", RECORDED)
    run.embeddings.mkdir()
    (run.embeddings / "zwx-00000100.safetensors").write_bytes(b"old")
    (run.embeddings / "a.safetensors").symlink_to(run.config)
    refused(client.get("/api/runs/r/embedding"), 404)
    assert ok(client.get("/api/runs/r/status"))["embedding"] is None
    (run.embeddings / "zwx.safetensors").write_bytes(b"vectors")
    assert client.get("/api/runs/r/embedding").content == b"vectors"
    told = ok(client.get("/api/runs/r/status"))["embedding"]
    assert told == {"name": "zwx.safetensors", "size": 7, "url": "/api/runs/r/embedding"}


@pytest.mark.parametrize("name", ["..%2fconfig.toml", "config.toml", "%2e%2e", "none.png", "secret.txt"])
def test_only_samples_are_served_as_samples(client: TestClient, home: Path, name: str) -> None:
    run = make_run(home, "r", RECORDED)
    run.samples.mkdir()
    (run.samples / "secret.txt").write_text("x")
    (run.samples / "00000000_00.png").write_bytes(b"\x89PNG")
    assert client.get(f"/api/runs/r/samples/{name}").status_code in (404, 405)
    assert client.get("/api/runs/r/samples/00000000_00.png").content == b"\x89PNG"


def test_the_settings_and_the_log_of_a_run_are_read(client: TestClient, home: Path) -> None:
    run = make_run(home, "r", RECORDED)
    run.log.write_text("".join(f"line {number}\n" for number in range(500)))
    assert ok(client.get("/api/runs/r/log"))["lines"] == [f"line {number}" for number in range(300, 500)]
    assert tomllib.loads(client.get("/api/runs/r/config").text) == {"base": {"model": "pocket"}}
    assert [answer["id"] for answer in ok(client.get("/api/runs"))["runs"]] == ["r"]


@pytest.mark.parametrize("ask", ["stop", "pause", "sample-now", "save-now", "resume"])
def test_a_finished_run_is_asked_in_vain(client: TestClient, home: Path, ask: str) -> None:
    make_run(home, "r", RECORDED)
    refused(client.post(f"/api/runs/r/{ask}"), 409)
    refused(client.post(f"/api/runs/nothing/{ask}"), 404)


def test_a_project_s_latest_run_is_one_that_has_begun_also_while_it_waits_to_go_on(client: TestClient, home: Path) -> None:
    project = read_project(home, ok(client.post("/api/projects", json={"name": "Two"}))["id"])
    for at, name in enumerate(("2026-1", "2026-2", "2026-3")):
        add_run(project, name)
        project = read_project(home, project.id)
        run = make_run(home, name, [json.dumps({"type": "stopped", "time": 1.0, "step": 3})] if at < 2 else [])
        os.utime(run.config, (at, at))
    entries = (Entry(run="2026-2", project=project.id, resumes=True), Entry(run="2026-3", project=project.id))
    QueueFile(home).write(QueueState(entries=entries))
    latest = ok(client.get(f"/api/projects/{project.id}"))["latest"]
    assert (latest["id"], latest["state"]) == ("2026-2", "waiting")


def test_a_full_disk_is_a_plain_sentence(client: TestClient, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "captions.json")

    monkeypatch.setattr("app.projects.write_atomically", full)
    told = refused(client.put(f"/api/projects/{project}/captions", json={"00.png": "x"}), 507)
    assert told["what"] == "The disk is full" and told["hint"]


def test_a_start_that_the_disk_refuses_leaves_nothing(
    client: TestClient, project: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(5, "Input/output error", "trainer.log")

    monkeypatch.setattr("app.runs.start_process", refuse)
    refused(client.post(f"/api/projects/{project}/runs", json={}), 500)
    assert list((home / "runs").iterdir()) == []
    assert ok(client.get(f"/api/projects/{project}"))["runs"] == []


def test_a_start_writes_settings_and_every_caption_before_the_process_begins(
    client: TestClient, project: str, home: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def look_on(run: Any, owner: str, _home: Path) -> None:
        edits = json.loads((run.path / "edits.json").read_text(encoding="utf-8"))
        seen.append({"owner": owner, "config": tomllib.loads(run.config.read_text(encoding="utf-8")), "edits": edits})

    monkeypatch.setattr("app.runs.start_process", look_on)
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "a pear"}))
    ok(client.put(f"/api/projects/{project}/excluded", json={"05.png": True}))
    (pictures / "02.txt").unlink()
    made = ok(client.post(f"/api/projects/{project}/runs", json={"settings": {"adapter": {"rank": 4}}}))
    (start,) = seen
    assert start["owner"] == project and start["config"]["adapter"]["rank"] == 4
    assert Path(start["config"]["dataset"]["edits"]) == home / "runs" / made["id"] / "edits.json"
    assert start["edits"]["excluded"] == ["05.png"]
    assert start["edits"]["captions"]["00.png"] == "a pear" and sorted(start["edits"]["captions"]) == [
        "00.png", "01.png", "03.png", "04.png",
    ]  # fmt: skip
    assert ok(client.get(f"/api/projects/{project}"))["runs"] == [made["id"]]


def test_of_two_starts_at_the_same_moment_one_wins(
    client: TestClient, project: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def pretend(run: Any, owner: str, _home: Path) -> None:
        me = psutil.Process()
        note = {"project": owner, "pid": me.pid, "made": made_at(me.pid), "before": 0}
        (run.path / "process.json").write_text(json.dumps(note), encoding="utf-8")

    monkeypatch.setattr("app.runs.start_process", pretend)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.post(f"/api/projects/{project}/runs", json={}).status_code, range(4)))
    assert sorted(answers) == [201, 409, 409, 409]
    assert len(list((home / "runs").iterdir())) == 1


def test_the_routes_load_no_heavy_library() -> None:
    code = "import json, sys, app.routes, pathlib\napp.routes.router(pathlib.Path('nowhere'))\n"
    loaded = run_fresh(code + "print(json.dumps(list(sys.modules)))")
    assert [name for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "gradio") if name in loaded] == []


def test_an_endless_body_is_refused_and_changes_nothing(
    client: TestClient, project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.routing.BODY_BYTES", 1 << 20)
    before = client.get(f"/api/projects/{project}/recipe").text
    recipe = b"# " + b"x" * (1 << 20)
    sent: list[int] = []

    def pieces() -> Iterator[bytes]:  # without a length in front
        for piece in range(40):
            sent.append(piece)
            yield b"#" * (1 << 16)

    for body in (recipe, pieces()):
        told = refused(client.put(f"/api/projects/{project}/recipe", content=body), 413)
        assert told["what"] == "More than 1 MiB in one request: send it in parts"
    refused(client.put(f"/api/projects/{project}/captions", content=b'{"00.png": "' + recipe + b'"}'), 413)
    assert sent and client.get(f"/api/projects/{project}/recipe").text == before
    ok(client.put(f"/api/projects/{project}/recipe", content=b"# " + b"x" * 1000))
