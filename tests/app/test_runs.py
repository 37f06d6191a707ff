"""Runs: what recorded events add up to, how each ending is told, re-attaching to processes, and one real training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.processes import Process, is_alive, read_process, tail
from app.progress import Progress, in_a_sentence, state_of
from app.refusals import Refusal
from app.runs import Runs, find_lora
from tests.app_client import await_state, make_client, make_run, ok, project_with, refused
from tests.command_line import TINY, contents, impasto
from trainers.process_id import made_at

RECORDED = (Path(__file__).parent / "recorded_events.jsonl").read_text(encoding="utf-8").splitlines()
"""A run on pocket, 6 steps, samples every 3: all that the trainer told."""
TOLD = [json.loads(line) for line in RECORDED]


def until(kind: str, step: int | None = None) -> list[str]:
    """The recorded lines up to the first event of this kind (and step)."""
    last = next(n for n, event in enumerate(TOLD) if event["type"] == kind and step in (None, event.get("step")))
    return RECORDED[: last + 1]


def folded(lines: list[str]) -> Progress:
    progress = Progress()
    for line in lines:
        progress.apply(json.loads(line))
    return progress


def line(kind: str, **values: Any) -> str:
    return json.dumps({"type": kind, "time": TOLD[-1]["time"] + 1, **values})


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, in place of a trainer."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def note_of(process: subprocess.Popen[bytes], **more: Any) -> dict[str, Any]:
    return {"pid": process.pid, "made": made_at(process.pid), **more}


def test_recorded_events_add_up() -> None:
    progress = folded(until("step", 3))
    assert (progress.phase, progress.step, progress.steps) == ("train", 3, 6)
    assert progress.loss == next(event["loss"] for event in TOLD if event.get("step") == 3 and event["type"] == "step")
    assert progress.held_out_loss and progress.memory and progress.sample.startswith("samples/")
    assert len(progress.warnings) == 1


def test_phases_follow_one_another() -> None:
    assert folded(RECORDED[:1]).phase == "scan"
    assert folded(RECORDED[:2]).phase == "load"
    assert folded(RECORDED[:-1]).phase == "export"


def test_the_time_left_is_told_from_the_third_step_and_runs_down() -> None:
    assert folded(until("step", 2)).left_now() is None
    progress = folded(until("step", 3))
    assert progress.left_now(progress.told) == progress.seconds_left
    assert progress.left_now(progress.told + 5) == pytest.approx((progress.seconds_left or 0) - 5)
    assert progress.left_now(progress.told + 10**6) == 0


@pytest.mark.parametrize(
    ("lines", "state", "words"),
    [
        (RECORDED, "finished", "Finished: 6 steps in "),
        ([*until("step", 4), line("stopped", step=4, path="x")], "stopped", "Stopped at step 4 of 6. The LoRA as it stands"),
        ([*until("step", 4), line("paused", step=4)], "paused", "Paused at step 4 of 6."),
        (
            [*until("step", 4), line("failed", message="The disk is full (x).")],
            "failed",
            "Training failed: The disk is full (x).",
        ),
        (until("step", 4), "lost", "Training ended unexpectedly at step 4 of 6. Resume begins it again."),
        (RECORDED[:2], "lost", "Training ended unexpectedly before its first step. Resume begins it again."),
        ([], "lost", "Training ended unexpectedly before its first step."),
    ],
)
def test_every_ending_is_one_plain_sentence(home: Path, lines: list[str], state: str, words: str) -> None:
    standing = Runs(home).standing(make_run(home, "r", lines, pid=2**22 + 1))
    assert standing.state == state
    assert standing.sentence.startswith(words)
    assert standing.can == ([] if state == "finished" else ["resume"])


def test_resume_names_the_step_that_is_saved(home: Path) -> None:
    run = make_run(home, "r", until("step", 5), exit_code=-9)
    run.state.mkdir()
    for step in (2, 4):
        (run.state / f"step-{step:08d}.safetensors").write_bytes(b"")
    sentence = Runs(home).standing(run).sentence
    assert sentence == (
        "Training was killed at step 5 of 6, as the system does when memory runs out. Resume goes on from step 4."
    )


def test_a_trainer_that_refuses_to_begin_is_quoted(home: Path) -> None:
    run = make_run(home, "r", [], exit_code=2)
    run.log.write_text("noise\nimpasto: The file with edited captions is missing (x). Put it back.\n", encoding="utf-8")
    assert Runs(home).standing(run).sentence == (
        "Training could not begin: The file with edited captions is missing (x). Put it back."
    )


def test_a_living_process_is_found_again_by_a_new_window(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(home, "r", until("step", 3), **note_of(sleeper))
    assert Runs(home).standing(run).state == "running"
    assert Runs(home).standing(run).sentence == "Training, step 3 of 6."
    sleeper.kill()
    sleeper.wait()
    assert Runs(home).standing(run).state == "lost"


def test_another_process_with_the_same_id_is_not_taken_for_it(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(home, "r", until("step", 3), pid=sleeper.pid, made=(made_at(sleeper.pid) or 0) - 3600)
    assert Runs(home).standing(run).state == "lost"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows buries its dead at once")
def test_a_dead_child_that_nobody_waited_for_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    made = made_at(child.pid)
    assert made
    deadline = time.monotonic() + 60
    while is_alive(Process("", child.pid, made, 0)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(Process("", child.pid, made, 0))
    child.wait()


def test_a_run_of_the_command_line_is_known_by_the_process_that_it_names(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    def named(made: float) -> list[str]:
        told = [json.loads(text) for text in until("step", 3)]
        return [json.dumps({**one, "process": sleeper.pid, "made": made} if one["type"] == "started" else one) for one in told]

    made = made_at(sleeper.pid)
    assert made
    assert Runs(home).standing(make_run(home, "alive", named(made))).state == "running"
    assert Runs(home).standing(make_run(home, "dead", named(made - 7200))).state == "lost", "the same id, another process"


def test_setting_the_clock_changes_nothing(
    home: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events an hour before the process that tells them, and a system whose clock was moved by a day since."""
    told = [json.loads(text) for text in until("step", 3)]
    earlier = [json.dumps({**one, "time": one["time"] - 3600}) for one in told]
    run = make_run(home, "r", earlier, **note_of(sleeper))
    assert Runs(home).standing(run).state == "running"
    booted = psutil.boot_time()
    made = psutil.Process(sleeper.pid).create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: booted + 86400)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: made + 86400)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    standing = Runs(home).standing(run)
    assert standing.state == "running" and (standing.progress.left_now() or 0) >= 0
    with run.events.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"type": "stopped", "time": 5.0, "step": 3, "path": "x"}) + "\n")
    assert Runs(home).standing(run).state == "stopped"


def test_an_older_ending_is_not_that_of_a_process_started_since(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    lines = [*until("step", 4), line("stopped", step=4, path="x")]
    run = make_run(home, "r", lines, **note_of(sleeper, before=len(lines)))
    assert Runs(home).standing(run).state == "starting"
    sleeper.kill()
    sleeper.wait()
    assert Runs(home).standing(run).state == "lost"
    assert state_of(folded(lines), False, 0) == "stopped"


def test_only_new_bytes_are_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers import events

    asked: list[int] = []
    real = events.read_since
    monkeypatch.setattr(events, "read_since", lambda path, offset=0: (asked.append(offset), real(path, offset))[1])
    runs, run = Runs(home), make_run(home, "r", until("step", 2))
    runs.standing(run)
    runs.standing(run)
    assert asked == [0]
    size = run.events.stat().st_size
    with run.events.open("a", encoding="utf-8") as file:
        file.write(RECORDED[len(until("step", 2))] + '\n{"type": "st')
    assert runs.standing(run).progress.step == 3 or runs.standing(run).progress.sample
    assert asked[1] == size and set(asked[1:]) <= {size, run.events.stat().st_size - len('{"type": "st')}


def test_events_with_parts_missing_or_unknown_hurt_nothing() -> None:
    progress = folded([*until("step", 3), *('{"type": "step"}', '{"type": "new"}', "{}", '{"type": "started"}')])
    assert in_a_sentence("running", progress, 0)


def test_the_tail_of_a_large_log_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"line %d \xff\n" % number for number in range(100_000)))
    lines = tail(path, 200)
    assert len(lines) == 200 and lines[-1].startswith("line 99999") and lines[0].startswith("line 99800")
    assert tail(path, 10**9)[0].startswith("line ") and tail(tmp_path / "none") == []


def test_stop_pause_and_the_rest_are_files_in_the_run(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    runs, run = Runs(home), make_run(home, "r", until("step", 3), **note_of(sleeper))
    runs.ask(run, "sample-now")
    runs.ask(run, "save-now")
    assert run.take_flag("sample-now") and run.take_flag("save-now")
    runs.ask(run, "pause")
    assert run.stop_asked() == "pause" and runs.standing(run).can == ["stop"]
    runs.ask(run, "stop")
    assert run.stop_asked() == "stop" and runs.standing(run).can == []


def test_nothing_is_asked_of_a_run_that_does_not_train(home: Path) -> None:
    runs, run = Runs(home), make_run(home, "r", RECORDED)
    before = contents(run.path)
    with pytest.raises(Refusal, match="not training") as refusal:
        runs.ask(run, "stop")
    assert refusal.value.status == 409 and contents(run.path) == before
    with pytest.raises(Refusal, match="finished"):
        runs.resume(run)


def test_a_second_training_is_refused(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    make_run(home, "first", until("step", 3), **note_of(sleeper))
    other = make_run(home, "second", [*until("step", 4), line("stopped", step=4, path="x")])
    with pytest.raises(Refusal, match="Another training is going on: first"):
        Runs(home).resume(other)


@pytest.mark.parametrize("name", ["..", ".", "", "r/../r", "nothing", "R"])
def test_a_run_is_looked_up_in_the_list(home: Path, name: str) -> None:
    make_run(home, "r", [])
    (home / "runs" / "no-run").mkdir()
    for asked in (name, "no-run"):
        with pytest.raises(Refusal, match="no such run"):
            Runs(home).find(asked)


def test_a_run_is_deleted_whole_but_not_while_it_trains(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    runs = Runs(home)
    done = make_run(home, "done", [json.dumps({"type": "finished", "time": 1.0, "step": 1, "path": "x.safetensors"})])
    (done.path / "x.safetensors").write_bytes(b"a file")
    runs.delete(done)
    assert not done.path.exists() and runs.standings() == []
    busy = make_run(home, "busy", [], pid=sleeper.pid, made=made_at(sleeper.pid))
    with pytest.raises(Refusal, match="training"):
        runs.delete(busy)
    assert busy.config.is_file()


def test_the_finished_lora_comes_first_then_the_newest_checkpoint(home: Path) -> None:
    run = make_run(home, "r", RECORDED)
    with pytest.raises(Refusal, match="no LoRA yet"):
        find_lora(run, None)
    run.checkpoints.mkdir()
    for step in (3, 6, 12):
        (run.checkpoints / f"a-{step:08d}.safetensors").write_bytes(b"x")
    assert find_lora(run, None).name == "a-00000012.safetensors"
    assert find_lora(run, 3).name == "a-00000003.safetensors"
    (run.path / "a.safetensors").write_bytes(b"x")
    assert find_lora(run, None).name == "a.safetensors"
    with pytest.raises(Refusal, match="no LoRA of step 5"):
        find_lora(run, 5)


def test_a_real_training_from_edited_captions_to_a_kill(home: Path, tiny_base: Path, pictures: Path) -> None:
    """Start, edited text in what was trained on, a sample on request, stop and keep, resume, SIGKILL, the sentence."""
    import hashlib

    before = contents(pictures)
    client = make_client(home)
    recipe = {"base": {"model": str(tiny_base)}, "adapter": {"rank": 2}, "train": {"steps": 100_000, "batch_size": 2},
              "prior": {"prompts": []}, "samples": {"every": 0, "steps": 1, "prompts": ["a cat"]}}  # fmt: skip
    project = project_with(client, pictures, preset="pocket", trigger="sks", recipe=recipe)
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "an edited pear"}))
    ok(client.put(f"/api/projects/{project}/excluded", json={"05.png": True}))
    run_id = ok(client.post(f"/api/projects/{project}/runs", json={"force": True}))["id"]
    run = Runs(home).find(run_id)
    assert "going on" in refused(client.post(f"/api/projects/{project}/runs", json={"force": True}), 409)["what"]
    assert refused(client.delete(f"/api/projects/{project}"), 409)
    ok(client.put(f"/api/projects/{project}/captions", json={"00.png": "edited again, for another run"}))
    await_state(client, run_id, lambda status: status["step"] >= 1 or status["state"] not in ("starting", "running"), 400)
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    assert manifest["captions"]["00.png"] == hashlib.sha256(b"sks, an edited pear").hexdigest()
    assert "05.png" not in manifest["captions"]
    ok(client.post(f"/api/runs/{run_id}/sample-now"))
    sample = await_state(client, run_id, lambda status: status["sample"], 120)["sample"]
    assert client.get(sample).content.startswith(b"\x89PNG")
    ok(client.post(f"/api/runs/{run_id}/stop"))
    stopped = await_state(client, run_id, lambda status: status["state"] == "stopped", 120)
    assert stopped["can"] == ["resume"] and stopped["saved_step"] == stopped["step"] > 0
    (file,) = stopped["files"]
    downloaded = client.get(file["url"])
    assert downloaded.content == next(run.checkpoints.iterdir()).read_bytes() and len(downloaded.content) == file["size"]
    assert ok(client.get(f"/api/runs/{run_id}/metadata"))["metadata"]["modelspec.trigger_phrase"] == "sks"
    assert ok(client.post(f"/api/runs/{run_id}/resume"))["state"] == "starting"
    process = read_process(run)
    assert process is not None
    os.kill(process.pid, 9)
    lost = await_state(make_client(home), run_id, lambda status: status["state"] == "lost", 5)
    assert f"Resume goes on from step {stopped['step']}" in lost["sentence"] and lost["can"] == ["resume"]
    assert contents(pictures) == before


def test_a_run_whose_pictures_have_changed_can_be_resumed_all_the_same(home: Path, tiny_base: Path, pictures: Path) -> None:
    run = home / "runs" / "r"
    run.mkdir(parents=True)
    (run / "stop").touch()
    assert impasto("train", pictures, "--output", run, "--base", tiny_base, *TINY, "--steps", 4) == 3
    (pictures / "00.png").unlink()
    assert impasto("resume", run) == 1
    client = make_client(home)
    status = ok(client.get("/api/runs/r/status"))
    assert "the picture 00.png is gone" in status["sentence"] and status["can"] == ["resume", "resume-anyway"]
    report = client.get("/api/runs/r/report")
    assert report.status_code == 200 and report.content.startswith(b"PK")
    ok(client.post("/api/runs/r/resume-anyway"))
    status = await_state(client, "r", lambda status: status["state"] == "finished", 60)
    assert any("goes on all the same" in warning for warning in status["warnings"])
