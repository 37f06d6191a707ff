"""The queue: order, restarts, what the next run waits for, and what holds it; with real processes in place of trainers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.projects import Project, delete_project, read_project
from app.queue_file import Entry, QueueFile, QueueState
from app.run_queue import RunQueue
from app.runs import Runs
from tests.app_client import await_state, make_client, make_run, ok, project_with, refused
from trainers.process_id import made_at
from trainers.run_folder import RunFolder

STEP = {"type": "step", "time": time.time(), "step": 3, "steps": 6, "loss": 1.0, "seconds_left": 30.0, "seconds_per_step": 10.0}
BEGUN = [json.dumps(one) for one in ({"type": "stage", "name": "scan"}, {"type": "stage", "name": "train"}, STEP)]


class Desk:
    """A window's queue on a home folder; what it would start is only noted. `again` is the next window."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.started, self.forced = home, list[str](), set[str]()
        self.fault: OSError | None = None
        monkeypatch.setattr("app.runs.start_process", self._start)
        self.again()

    def _start(self, run: RunFolder, project: str, home: Path, force: bool = False) -> None:
        if self.fault:
            raise self.fault
        self.started.append(run.path.name)
        self.forced |= {run.path.name} if force else set()
        run.events.write_text('{"type": "stage", "name": "scan"}\n')

    def again(self) -> None:
        self.runs = Runs(self.home)
        self.queue = RunQueue(self.runs)

    def wait_with(self, *names: str) -> None:
        for name in names:
            make_run(self.home, name, [])
        entries = tuple(Entry(run=name, project="p") for name in names)
        (self.home / "queue.json").write_text(QueueState(entries=entries).model_dump_json())

    def order(self) -> list[str]:
        return [entry.run for entry in self.queue.state().entries]

    def end(self, name: str, kind: str) -> None:
        run = RunFolder(self.home / "runs" / name)
        with run.events.open("a") as file:
            file.write(json.dumps({"type": kind, "time": time.time(), "step": 3, "path": "x", "message": "It broke."}) + "\n")

    def goes_on(self, name: str) -> None:
        with RunFolder(self.home / "runs" / name).events.open("a") as file:
            file.write("\n".join(BEGUN) + "\n")


@pytest.fixture
def desk(home: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(home, monkeypatch)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def at_work(desk: Desk, name: str, process: subprocess.Popen[bytes]) -> None:
    make_run(desk.home, name, BEGUN, pid=process.pid, made=made_at(process.pid))


def test_the_next_begins_when_the_one_before_has_ended(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one", "two")
    assert desk.runs.standing(RunFolder(desk.home / "runs" / "one")).state == "waiting"
    for _ in range(3):
        desk.queue.look()
    assert desk.started == [] and desk.order() == ["one", "two"]
    desk.end("busy", "finished")
    desk.queue.look()
    assert desk.started == ["one"] and desk.order() == ["two"]
    assert QueueFile(desk.home).read().last == "one"


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_an_ending_of_any_kind_lets_the_next_begin(desk: Desk, sleeper: subprocess.Popen[bytes], ending: str) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one")
    desk.queue.look()
    desk.end("busy", ending)
    desk.again()  # also where the window was closed when it ended
    desk.queue.look()
    assert desk.started == ["one"]


def test_a_pause_holds_the_queue_until_it_goes_on_and_ends(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one")
    desk.queue.look()
    desk.end("busy", "paused")
    for _ in range(3):
        desk.queue.look()
    assert desk.started == [] and desk.queue.state().hold == "paused"
    desk.goes_on("busy")
    desk.queue.look()
    assert desk.queue.state().hold == "" and desk.started == []
    desk.end("busy", "finished")
    desk.queue.look()
    assert desk.started == ["one"]


def test_a_paused_run_that_is_queued_itself_holds_the_queue_no_more(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one")
    desk.queue.look()
    desk.end("busy", "paused")
    desk.queue.look()
    at_work(desk, "beside", sleeper)  # begun by hand
    desk.queue.look()
    assert desk.queue.state().hold == "paused"
    desk.queue.add(Entry(run="busy", project="p", resumes=True))
    desk.queue.look()
    assert desk.queue.state().hold == "" and desk.started == []
    for name in ("beside", "one"):
        desk.end(name, "finished")
        desk.queue.look()
    assert desk.started == ["one", "busy"]


def test_a_paused_run_resumed_after_another_lets_the_queue_go_on(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one")
    desk.queue.look()
    desk.end("busy", "paused")
    desk.queue.look()
    at_work(desk, "beside", sleeper)
    desk.queue.look()
    desk.end("beside", "finished")
    desk.queue.look()
    assert desk.queue.state().hold == "paused" and desk.started == []
    desk.goes_on("busy")
    desk.queue.look()
    assert desk.queue.state().hold == ""


def test_a_queued_run_that_went_on_elsewhere_and_stopped_waits_no_more(desk: Desk) -> None:
    stopped = make_run(desk.home, "stopped", BEGUN)
    desk.end("stopped", "stopped")
    desk.queue.add(Entry(run="stopped", project="p", resumes=True))
    desk.again()
    assert desk.order() == ["stopped"] and desk.runs.standing(stopped).state == "waiting"
    desk.goes_on("stopped")  # on the command line, while the window is closed
    desk.end("stopped", "stopped")
    desk.again()
    desk.queue.look()
    assert desk.order() == [] and desk.started == [] and desk.runs.standing(stopped).state == "stopped"
    desk.queue.add(Entry(run="stopped", project="p", resumes=True))
    assert desk.order() == ["stopped"]


def test_a_run_cut_off_while_the_window_was_closed_holds_the_queue(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one", "two")
    desk.queue.look()
    sleeper.kill()
    sleeper.wait()  # as a power cut does, and then the window is opened again
    desk.again()
    for _ in range(3):
        desk.queue.look()
    assert desk.started == [] and desk.queue.state().hold == "interrupted" and desk.order() == ["one", "two"]
    desk.queue.go_on()
    desk.queue.look()
    assert desk.started == ["one"]


def test_a_run_that_dies_before_the_windows_eyes_has_failed(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one")
    desk.queue.look()
    sleeper.kill()
    sleeper.wait()
    desk.queue.look()
    assert desk.started == ["one"]


def test_held_by_a_person_it_stays_so_over_a_restart(desk: Desk) -> None:
    desk.wait_with("one")
    desk.queue.hold()
    desk.again()
    desk.queue.look()
    assert desk.started == [] and desk.queue.state().hold == "person"
    desk.queue.go_on()
    desk.queue.look()
    assert desk.started == ["one"]


def test_what_cannot_be_started_stays_first_and_says_why(desk: Desk) -> None:
    desk.wait_with("one", "two")
    desk.fault = OSError(12, "Cannot allocate memory")
    desk.queue.look()
    state = desk.queue.state()
    assert state.hold == "refused" and "Cannot allocate memory" in state.why and desk.order() == ["one", "two"]
    desk.fault = None
    desk.queue.go_on()
    desk.queue.look()
    assert desk.started == ["one"] and desk.queue.state().why == ""


def test_a_run_begun_or_deleted_by_somebody_else_waits_no_more(desk: Desk) -> None:
    desk.wait_with("one", "two", "three")
    RunFolder(desk.home / "runs" / "one").events.write_text('{"type": "finished", "step": 1, "path": "x"}\n')
    desk.runs.delete(RunFolder(desk.home / "runs" / "two"))
    assert desk.order() == ["three"]
    assert desk.runs.standing(RunFolder(desk.home / "runs" / "one")).state == "finished"


def test_a_name_that_leads_out_of_the_folder_of_runs_is_no_run(desk: Desk) -> None:
    outside = make_run(desk.home / "elsewhere", "r", [])
    entry = Entry(run=f"../elsewhere/runs/{outside.path.name}", project="p")
    (desk.home / "queue.json").write_text(QueueState(entries=(entry,)).model_dump_json())
    desk.queue.look()
    assert desk.order() == [] and desk.started == []


def queued(client: TestClient, project: str, **settings: Any) -> str:
    return str(ok(client.post(f"/api/projects/{project}/queue", json={"settings": settings, "force": True}))["id"])


def test_two_wait_are_reordered_and_begin_one_after_the_other(
    home: Path, tiny_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the API and over a restart of the window; trainers that finish at once stand in (the browser has real ones)."""
    started: list[str] = []

    def trained(run: RunFolder, project: str, home: Path) -> None:
        started.append(run.path.name)
        run.events.write_text(json.dumps({"type": "finished", "time": time.time(), "step": 1, "path": "x"}) + "\n")

    monkeypatch.setattr("app.runs.start_process", trained)
    recipe = {"base": {"model": str(tiny_base)}, "adapter": {"rank": 2}, "train": {"steps": 2, "batch_size": 2},
              "prior": {"prompts": []}, "samples": {"every": 0}, "output": {"verify": False}}  # fmt: skip
    begun = time.time()
    before = make_client(home)  # nobody looks after the queue of this one yet
    project = project_with(before, pictures, preset="pocket", recipe=recipe)
    first, second, third = (queued(before, project, train={"steps": steps}) for steps in (2, 3, 4))
    assert ok(before.get(f"/api/runs/{first}/status"))["state"] == "waiting"
    told = ok(before.put("/api/queue", json={"order": [second, third, first]}))
    assert [entry["run"] for entry in told["entries"]] == [second, third, first]
    assert told["entries"][0]["title"] == "3 steps on tiny, preset pocket, rank 2" and told["entries"][0]["seconds"] is None
    assert all(begun <= entry["added"] <= time.time() for entry in told["entries"])
    assert "changed" in refused(before.put("/api/queue", json={"order": [second, first]}), 409)["what"]
    assert before.delete(f"/api/queue/{third}").status_code == 204 and not (home / "runs" / third).exists()
    assert read_project(home, project).runs == (first, second)
    refused(before.delete(f"/api/queue/{third}"), 404)
    with make_client(home) as client:
        assert [entry["run"] for entry in ok(client.get("/api/queue"))["entries"]] == [second, first]
        await_state(client, first, lambda status: status["state"] == "finished", 60)
        assert ok(client.get("/api/queue"))["entries"] == [] and started == [second, first]


def test_a_stopped_run_waits_its_turn_and_goes_on(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    at_work(desk, "busy", sleeper)
    desk.wait_with("one")
    stopped = make_run(desk.home, "stopped", BEGUN, project="p", pid=sleeper.pid, made=1.0)
    desk.end("stopped", "stopped")
    client = make_client(desk.home)
    assert ok(client.get("/api/runs/stopped/status"))["state"] == "stopped"
    told = ok(client.post("/api/runs/stopped/queue", json={}))
    assert told["state"] == "waiting" and told["can"] == []
    refused(client.post("/api/runs/stopped/queue", json={}), 409)  # it waits already
    assert client.delete("/api/queue/stopped").status_code == 204 and desk.runs.standing(stopped).state == "stopped"
    ok(client.post("/api/runs/stopped/queue", json={"force": True}))
    refused(client.post("/api/runs/busy/queue", json={}), 409)
    entry = ok(client.get("/api/queue"))["entries"][1]
    assert entry["run"] == "stopped" and entry["resumes"] and entry["seconds"] == 60.0  # six steps: none is saved
    desk.end("busy", "finished")
    desk.again()  # over a restart, too
    desk.queue.look()
    assert desk.started == ["one"] and desk.order() == ["stopped"]
    desk.end("one", "finished")
    desk.queue.look()
    assert desk.started == ["one", "stopped"] and desk.forced == {"stopped"} and desk.order() == [] and stopped.config.is_file()


def is_held(turn: Any) -> bool:
    """Whether a thread has the turn, as another one finds it."""
    with ThreadPoolExecutor(1) as pool:
        return not pool.submit(lambda: turn.acquire(blocking=False) and (turn.release() or True)).result()


def test_a_run_is_prepared_and_queued_and_a_project_deleted_in_one_turn(
    home: Path, tiny_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, turns, held = make_client(home), list[Any](), list[bool]()
    recipe = {"base": {"model": str(tiny_base)}, "train": {"steps": 2}, "prior": {"prompts": []}}
    project = project_with(client, pictures, preset="pocket", recipe=recipe)

    def broken(queue: RunQueue, *_: Any) -> None:
        turns.append(queue._runs.turn)
        held.append(is_held(turns[0]))
        raise RuntimeError("something unforeseen")

    with monkeypatch.context() as fault:
        fault.setattr(RunQueue, "add", broken)
        answer = client.post(f"/api/projects/{project}/queue", json={"settings": {}, "force": True})
    assert answer.status_code == 500 and held == [True] and not list((home / "runs").iterdir())
    assert read_project(home, project).runs == ()

    def no_process(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as fault:
        fault.setattr("app.runs.start_process", no_process)
        assert client.post(f"/api/projects/{project}/runs", json={"settings": {}, "force": True}).status_code >= 500
    assert not list((home / "runs").iterdir()) and read_project(home, project).runs == ()

    def delete(of: Project) -> None:
        held.append(is_held(turns[0]))
        delete_project(of)

    monkeypatch.setattr("app.routes.delete_project", delete)
    assert client.delete(f"/api/projects/{project}").status_code == 204 and held == [True, True]


def test_times_come_from_a_run_alike_and_a_deleted_project_waits_for_nothing(
    home: Path, tiny_base: Path, pictures: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    client = make_client(home)
    recipe = {"base": {"model": str(tiny_base)}, "train": {"steps": 40}, "prior": {"prompts": []}}
    project = project_with(client, pictures, preset="pocket", recipe=recipe)
    first, second = queued(client, project), queued(client, project, train={"steps": 20})
    busy = make_run(home, "busy", BEGUN, pid=sleeper.pid, made=made_at(sleeper.pid))
    busy.config.write_bytes((home / "runs" / first / "config.toml").read_bytes())
    told = ok(client.get("/api/queue"))
    assert told["at_work"]["id"] == "busy" and [entry["seconds"] for entry in told["entries"]] == [400.0, 200.0]
    begins = [entry["starts_in"] for entry in told["entries"]]
    assert 0 <= begins[0] <= 30 and begins[1] == pytest.approx(begins[0] + 400)
    assert client.delete(f"/api/projects/{project}").status_code == 204
    assert ok(client.get("/api/queue"))["entries"] == []
    assert not (home / "runs" / first).exists() and not (home / "runs" / second).exists()
