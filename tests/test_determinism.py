"""Same seed, same file: also after Ctrl-C, a stop by file, a kill, and a resume. And who may use a run folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import TINY, impasto, read_events, result_of, start_apart, tensor_bytes
from tests.conftest import make_pictures
from trainers import events

STEPS = 40
# Flips, shuffled captions and a text encoder that learns: all that is random takes part. Eight micro-batches make a
# step slow enough to be interrupted at.
SETTINGS = (
    *TINY,
    *("--steps", STEPS, "--set", "train.accumulation=8", "--set", "dataset.flip=true"),
    *("--set", "dataset.caption_shuffle=true", "--set", "dataset.caption_dropout=0.2", "--set", "train.noise_offset=0.05"),
)
QUICK = (*TINY, "--steps", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("determinism") / "pictures")


@pytest.fixture(scope="module")
def unbroken(folder: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that nothing has interrupted."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert impasto("train", folder, "--output", run, "--base", tiny_base, *SETTINGS) == 0
    return run


@pytest.fixture
def quick(folder: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains 6 steps with more options into a folder of the given name, expecting an exit code; returns the run."""

    def train(name: str, *words: object, code: int = 0) -> Path:
        assert impasto("train", folder, "--output", tmp_path / name, "--base", tiny_base, *QUICK, *words) == code
        return tmp_path / name

    return train


def steps_told(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run) if event["type"] == "step"]


def of_type(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["type"] == kind]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(event["step"], event["loss"], event["gradient_norm"]) for event in of_type(run, "step")]


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(quick: Callable[..., Path]) -> None:
    first, second, other = quick("first", "--seed", 7), quick("second", "--seed", 7), quick("other", "--seed", 8)
    assert tensor_bytes(result_of(first)) == tensor_bytes(result_of(second))
    assert tensor_bytes(result_of(first)) != tensor_bytes(result_of(other))


def test_with_a_source_date_the_whole_file_is_the_same(quick: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    assert result_of(quick("first")).read_bytes() == result_of(quick("second")).read_bytes()


def test_a_source_date_that_is_none_is_refused_before_training(
    quick: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert not quick("run", code=2).exists()
    assert "SOURCE_DATE_EPOCH" in capsys.readouterr().err


def test_the_order_in_which_the_disk_lists_pictures_does_not_matter(
    quick: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quick("first")
    listed = os.scandir

    class Reversed:
        def __init__(self, path: Any) -> None:
            with listed(path) as entries:
                self._entries = list(reversed(list(entries)))

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self._entries)

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self._entries)

        def close(self) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert tensor_bytes(result_of(quick("second"))) == tensor_bytes(result_of(first))


def test_samples_checkpoints_and_the_cache_do_not_change_what_is_learnt(quick: Callable[..., Path]) -> None:
    plain = quick("plain")  # fills the cache
    watched = quick("watched", "--set", "samples.every=2", "--set", "checkpoints.every=1")
    assert tensor_bytes(result_of(watched)) == tensor_bytes(result_of(plain))


def next_step(output: Iterator[str], step: int) -> dict[str, Any]:
    """Reads the JSON lines of a process up to that step's."""
    for line in output:
        event: dict[str, Any] = json.loads(line)
        if event["type"] == "step" and event["step"] >= step:
            return event
    raise AssertionError(f"the process ended before step {step}")


def test_ctrl_c_saves_says_how_to_go_on_and_resume_ends_with_the_same_bytes(
    folder: Path, tiny_base: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    process = start_apart("train", folder, "--output", run, "--base", tiny_base, *SETTINGS, "--json")
    assert process.stdout and process.stderr
    assert next_step(process.stdout, 2)["step"] == 2
    assert impasto("resume", run) == 2, "another process has the folder"
    assert f"Another process is training in this run folder: process {process.pid}" in capsys.readouterr().err
    next_step(process.stdout, 20)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 3, said
    assert "Traceback" not in said
    last = json.loads(rest.splitlines()[-1])
    assert last["type"] == "stopped" and 20 <= last["step"] < STEPS and (run / last["path"]).is_file()
    assert list(run.glob("*.safetensors")) == []
    assert impasto("resume", run) == 0
    assert tensor_bytes(result_of(run)) == tensor_bytes(result_of(unbroken))
    assert losses(run) == losses(unbroken)


def test_a_line_torn_by_a_kill_and_a_save_now_that_is_done_once(quick: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    run = quick("run", code=3)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"type": "step", "st')  # as a kill amid a line leaves it
    (run / "save-now").touch()
    assert impasto("resume", run) == 0
    assert steps_told(run) == [1, 2, 3, 4, 5, 6] and not (run / "save-now").exists()


def test_a_terminated_run_stops_after_its_step_with_everything_saved(
    quick: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick("whole")
    append = events.append

    def append_and_terminate(path: Path, event: events.Event) -> None:
        append(path, event)
        if isinstance(event, events.Step) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(events, "append", append_and_terminate)
    run = quick("run", code=3)
    assert steps_told(run) == [1, 2, 3] and read_events(run)[-1]["type"] == "stopped"
    assert impasto("resume", run) == 0
    assert steps_told(run) == [1, 2, 3, 4, 5, 6]
    assert tensor_bytes(result_of(run)) == tensor_bytes(result_of(whole))


@pytest.mark.parametrize(("written", "told"), [("", "stopped"), ("pause", "paused")])
def test_a_file_named_stop_ends_the_run_before_its_next_step(
    written: str, told: str, quick: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").write_text(written)
    run = quick("run", code=3)
    assert steps_told(run) == [] and read_events(run)[-1]["type"] == told
    assert not (run / "stop").exists()
    assert impasto("resume", run) == 0
    assert steps_told(run) == [1, 2, 3, 4, 5, 6]


def test_sample_now_and_save_now_are_done_after_the_step_and_removed(quick: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("sample-now", "save-now"):
        (tmp_path / "run" / name).touch()
    run = quick("run")  # whose samples.every is 0
    assert [event["step"] for event in of_type(run, "sample")] == [1, 1]
    assert sorted(path.name for path in (run / "state").glob("step-*")) == [
        "step-00000001.safetensors",
        "step-00000006.safetensors",
    ]
    assert not {"sample-now", "save-now"} & {path.name for path in run.iterdir()}


def test_resume_of_a_finished_run_says_so_and_changes_nothing(
    quick: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = quick("run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    assert impasto("resume", run) == 0
    said = capsys.readouterr().out
    assert "finished" in said and result_of(run).name in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_train_refuses_a_folder_that_holds_a_run(quick: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = quick("run")
    before = result_of(run).read_bytes(), (run / "config.toml").read_bytes()
    quick("run", "--seed", 9, code=2)
    assert "already holds a run" in capsys.readouterr().err
    assert (result_of(run).read_bytes(), (run / "config.toml").read_bytes()) == before


def test_train_accepts_a_folder_without_a_config(quick: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.md").write_text("mine")
    assert (quick("run") / "notes.md").read_text() == "mine"


def test_resume_refuses_when_a_picture_has_changed(
    quick: Callable[..., Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    run = quick("run", code=3)
    caption = folder / "00.txt"
    before = caption.read_text(encoding="utf-8")
    try:
        caption.write_text("something else", encoding="utf-8")
        assert impasto("resume", run) == 1
        assert "the caption of 00.png has changed" in capsys.readouterr().out
    finally:
        caption.write_text(before, encoding="utf-8")
    assert impasto("resume", run) == 0
