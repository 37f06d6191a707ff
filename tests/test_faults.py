"""What disks, memory and other programs do to a training, done to real processes: full disks, vanished files, no memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import TINY, environment, impasto, read_events, result_of, start_apart, tensor_bytes
from trainers.setup import set_up

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits, mounts and signals of POSIX")
STEPS = 8
SLOW = (*TINY, "--steps", STEPS, "--set", "train.accumulation=2", "--set", "dataset.buckets=false")
_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.path.insert(0, sys.argv[2])
from tests.command_line import impasto
sys.exit(impasto(*sys.argv[3:]))
"""


def limited(most: int, *words: object) -> subprocess.CompletedProcess[str]:
    """`impasto WORDS` in a process that the system lets write no file of more than `most` bytes."""
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-P", "-c", _LIMITED, str(most), root, *(str(word) for word in words)]
    return subprocess.run(command, env=environment(), capture_output=True, encoding="utf-8", timeout=90)


def until(process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Reads its JSON lines up to the event that is wanted, and halts it there."""
    assert process.stdout
    for line in process.stdout:
        if wanted(json.loads(line)):
            process.send_signal(signal.SIGSTOP)
            return
    raise AssertionError(f"it ended before: {process.communicate()[1]}")


def stage(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["type"] == "stage" and event["name"] == name


def go_on(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    """Lets it run to its end; returns the exit code and what it told since."""
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=90)
    return process.returncode, [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def stopped(pictures: Path, tiny_base: Path, tmp_path: Path) -> Path:
    """A run that was asked to stop before its first step."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *SLOW) == 3
    return tmp_path / "run"


def test_a_file_that_does_not_fit_ends_the_run_with_the_bytes_and_keeps_what_is_there(stopped: Path) -> None:
    """A limit on the size of files stands in for a full disk: the system refuses the write of the training state."""
    before = {path: path.read_bytes() for folder in ("state", "checkpoints") for path in (stopped / folder).iterdir()}
    done = limited(100_000, "resume", stopped, "--json")
    last = read_events(stopped)[-1]
    assert done.returncode == 1 and last["type"] == "failed", done.stderr
    assert "The disk is full: 0.2 MB were needed" in last["message"] and "resume" in last["message"]
    assert {path: path.read_bytes() for path in before} == before
    assert list(stopped.rglob(".*.tmp")) == [] and "Traceback" not in done.stderr
    assert impasto("resume", stopped) == 0
    steps = [event["step"] for event in read_events(stopped) if event["type"] == "step"]
    assert steps == list(range(1, STEPS + 1)), "told once"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "impasto-test", str(folder)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this process may not mount anything")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_room_for_the_reason(small_disk: Path, pictures: Path, tiny_base: Path) -> None:
    run = small_disk / "run"
    process = start_apart("train", pictures, "--output", run, "--base", tiny_base, *SLOW, "--json")
    until(process, lambda event: event["type"] == "step")
    (run / "stop").write_text("")
    code, _ = go_on(process)
    assert code == 3
    process = start_apart("resume", run, "--json")
    until(process, lambda event: event["type"] == "step")
    try:  # somebody else's file takes the rest
        with (small_disk / "other").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    code, _ = go_on(process)
    assert code == 1
    last = read_events(run)[-1]
    assert last["type"] == "failed" and "The disk is full" in last["message"]
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    (small_disk / "other").unlink()
    shutil.rmtree(run / "checkpoints")
    assert impasto("resume", run) == 0 and result_of(run).stat().st_size > 0


def test_a_folder_that_cannot_be_written_is_a_sentence(
    pictures: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert impasto("train", pictures, "--output", "/proc/impasto-run", "--base", tiny_base, *TINY) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_state_folder_that_is_none_ends_the_run_in_words(stopped: Path) -> None:
    shutil.rmtree(stopped / "state")
    (stopped / "state").write_text("in the way")
    assert impasto("resume", stopped) == 1
    last = read_events(stopped)[-1]
    assert last["type"] == "failed" and "cannot be read or written" in last["message"] and "state" in last["message"]


def test_pictures_that_vanish_or_change_while_it_trains_are_named_and_left_out(
    pictures: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start_apart("train", pictures, "--output", run, "--base", tiny_base, *SLOW, "--json")
    until(process, stage("load"))
    (pictures / "00.png").unlink()
    shutil.copyfile(pictures / "02.png", pictures / "01.png")
    (pictures / "03.png").write_bytes(b"")
    (pictures / "04.png").unlink()
    (pictures / "04.png").mkdir()
    code, told = go_on(process)
    assert code == 0, told[-1]
    warned = " ".join(event["message"] for event in told if event["type"] == "warning")
    for name, why in (
        ("00.png", "No such file"),
        ("01.png", "was changed"),
        ("03.png", "empty"),
        ("04.png", "not a regular file"),
    ):
        assert f"({name}). It is left out" in warned and why in warned, (name, warned)
    assert [event["step"] for event in told if event["type"] == "step"] == list(range(1, STEPS + 1))


def test_without_any_picture_left_it_ends_in_words(
    pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_up_and_delete(*given: Any) -> object:
        training = set_up(*given)
        for path in pictures.glob("*.png"):
            path.unlink()
        return training

    monkeypatch.setattr("trainers.train.set_up", set_up_and_delete)
    assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *SLOW) == 1
    last = read_events(tmp_path / "run")[-1]
    assert last["type"] == "failed" and "No picture can be read any more" in last["message"]


def test_a_base_that_vanishes_is_not_missed_until_the_next_start(
    pictures: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    run = tmp_path / "run"
    process = start_apart("train", pictures, "--output", run, "--base", base, *SLOW, "--json")
    until(process, lambda event: event["type"] == "step" and event["step"] == 3)
    for path in base.rglob("*.safetensors"):  # cut short, what is mapped into a process kills it
        os.truncate(path, 0)
        if path.parent.name == "unet":
            path.unlink()
    (run / "stop").touch()
    code, told = go_on(process)
    assert code == 3, told[-1]
    assert told[-1]["type"] == "stopped" and (run / told[-1]["path"]).stat().st_size > 1000
    assert impasto("resume", run) in (1, 2)
    said = capsys.readouterr()
    assert "base" in said.out + said.err and "Traceback" not in said.out + said.err
    shutil.rmtree(base)
    shutil.copytree(tiny_base, base)
    assert impasto("resume", run) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a limit from outside")
def test_out_of_memory_names_the_setting_to_change(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    import resource

    import psutil

    run = tmp_path / "run"
    options = (*TINY, "--steps", 30, "--set", "dataset.resolution=256", "--set", "train.batch_size=4", "--force")
    process = start_apart("train", pictures, "--output", run, "--base", tiny_base, *options, "--json")
    until(process, lambda event: event["type"] == "started")  # libraries and base are read
    limit = psutil.Process(process.pid).memory_info().vms + 24 * 2**20  # room for a thread's stack, and for no step
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    code, told = go_on(process)
    assert code == 1, told
    assert told[-1]["type"] == "failed" and "Out of memory" in told[-1]["message"], told[-1]
    assert "train.batch_size" in told[-1]["message"]


def test_a_clock_that_is_set_back_changes_nothing(
    pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert impasto("train", pictures, "--output", tmp_path / "plain", "--base", tiny_base, *SLOW) == 0
    now, calls = time.time, []

    def jumping() -> float:
        calls.append(1)
        return now() + (-86_400 if len(calls) % 2 else 86_400)

    monkeypatch.setattr(time, "time", jumping)
    words = (*SLOW, "--set", "train.save_state_seconds=0")
    assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *words) == 0
    assert tensor_bytes(result_of(tmp_path / "run")) == tensor_bytes(result_of(tmp_path / "plain"))
    steps = [event for event in read_events(tmp_path / "run") if event["type"] == "step"]
    assert all(0 <= event["seconds_left"] < 600 for event in steps)


def test_resume_with_force_goes_on_with_other_pictures(
    stopped: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "00.txt").write_text("another caption", encoding="utf-8")
    (pictures / "05.png").unlink()
    assert impasto("resume", stopped) == 1
    last = read_events(stopped)[-1]
    assert last["changed"] and "the picture 05.png is gone" in last["message"] and "--force" in last["message"]
    assert impasto("resume", stopped, "--force") == 0
    told = " ".join(event["message"] for event in read_events(stopped) if event["type"] == "warning")
    assert "the caption of 00.png has changed; it goes on all the same" in told


def test_force_does_not_put_a_state_into_another_adapter(stopped: Path) -> None:
    text = (stopped / "config.toml").read_text(encoding="utf-8")
    (stopped / "config.toml").write_text(text.replace("rank = 4", "rank = 6", 1), encoding="utf-8")
    assert impasto("resume", stopped, "--force") == 1
    assert "another adapter or optimizer" in read_events(stopped)[-1]["message"]
