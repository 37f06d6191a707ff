"""Several processes train as one: the result differs by rounding only, one of them writes, and none outlives another's loss."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import TINY, environment, impasto, read_events, result_of
from tests.conftest import make_pictures
from trainers import train
from trainers.device import check_device, choose_device
from trainers.launch import given_settings, plan_run
from trainers.process_id import place
from trainers.setup import Training

STEPS = 4
# Prior pictures are drawn by one and read by all; one held-out picture is no even share for two.
SETTINGS = (
    *(*TINY, "--steps", str(STEPS), "--set", "train.accumulation=2", "--set", "output.dtype=fp32", "--seed", "1"),
    *(
        "--set",
        'prior.prompts=["a lamp"]',
        "--set",
        "prior.steps=2",
        "--set",
        "samples.every=2",
        "--set",
        "dataset.holdout=0.2",
    ),
    *("--set", "train.save_state_seconds=0"),
)
# The second process ends at its step 2 as if the system had killed it.
KILLED = """
import os, sys
from trainers import train
whole = train.update
def update(training):
    if training.step == 1 and training.device.index == 1:
        os.kill(os.getpid(), 9)
    return whole(training)
train.update = update
from trainers.cli import cli, run_cli
sys.exit(run_cli(cli, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def words(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that all of these trainings begin with."""
    pictures = make_pictures(tmp_path_factory.mktemp("many") / "pictures")
    return ["train", str(pictures), "--base", str(tiny_base), *SETTINGS]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert impasto(*words, "--output", run) == 0
    return run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, all it says in `stdout`."""
    whole = [sys.executable, *command]
    return subprocess.run(
        whole, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=200
    )


Fault = Callable[[Training], None]


def train_with_fault(words: list[str], variables: dict[str, str], said: Path, fault: Fault) -> None:
    """The whole life of a process, which does what `fault` says at its step 2. What it says goes into a file."""
    os.environ |= variables
    whole = train.update

    def update(training: Training) -> tuple[float, float]:
        if training.step == 1:
            fault(training)
        return whole(training)

    train.update = update
    with said.open("w", encoding="utf-8", buffering=1) as sys.stdout, redirect_stderr(sys.stdout):
        sys.exit(impasto(*words))


@pytest.fixture
def two(words: list[str], tmp_path: Path) -> Iterator[Callable[..., list[BaseProcess]]]:
    """two(fault, *words) -> the processes of a training without a launcher, copies of this one."""
    if os.name == "nt":
        pytest.skip("a process cannot be copied")
    started: list[BaseProcess] = []

    def begin(fault: Fault, *more: str) -> list[BaseProcess]:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for index in "01":
            given = [*words, *more, "--output", str(tmp_path / "run")], shared | {"RANK": index, "LOCAL_RANK": index}
            process = get_context("fork").Process(target=train_with_fault, args=(*given, tmp_path / f"said-{index}", fault))
            process.start()
            started.append(process)
        return started

    yield begin
    for process in started:
        process.kill()
        process.join()


def assert_same_but_for_rounding(run: Path, alone: Path) -> None:
    one, many = (load_file(result_of(folder)) for folder in (alone, run))
    assert one.keys() == many.keys()
    assert max((one[name] - many[name]).abs().max().item() for name in one) < 1e-5
    assert max(tensor.abs().max().item() for name, tensor in many.items() if "lora_up" in name) > 1e-5
    told = [[event for event in read_events(folder) if event["type"] == "step"] for folder in (alone, run)]
    assert [event["step"] for event in told[1]] == list(range(1, STEPS + 1))
    for mine, others in zip(*told, strict=True):
        assert abs(mine["loss"] - others["loss"]) < 1e-5
        assert (mine["held_out_loss"] is None) == (others["held_out_loss"] is None)
        assert abs((mine["held_out_loss"] or 0) - (others["held_out_loss"] or 0)) < 1e-5
    assert any(event["held_out_loss"] for event in told[1])


def test_two_processes_give_what_one_gives_to_rounding(words: list[str], alone: Path, tmp_path: Path) -> None:
    overrides = [word for word in SETTINGS if "=" in word]
    plan = plan_run(None, given_settings(Path(words[1]), words[3], STEPS, 1, None), overrides, force=True).data.plan
    assert {1} < {len(plan.indices(step)) for step in range(STEPS)}, "the second process has nothing to do in some steps"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={free_port()}"]
    done = launched(*launch, "-m", "trainers", *words, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout[-2000:]
    assert_same_but_for_rounding(tmp_path / "run", alone)
    assert {path.name for path in tmp_path.glob("run/.*")} <= {".lock"}

    (started,) = (event for event in read_events(tmp_path / "run") if event["type"] == "started")
    megabytes = 4 * (started["parameters"] + 2) / 1e6  # all of the message, once, as two processes need it
    assert f"2 processes, {megabytes:.2f} MB sent by each in a step" in started["device"]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_process_ends_all_in_words_and_another_number_goes_on(words: list[str], alone: Path, tmp_path: Path) -> None:
    """Killed under a launcher, which sends the others SIGTERM: nobody has asked this training to stop."""
    run = tmp_path / "run"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    done = launched(*launch, "--no-python", sys.executable, "-P", "-c", KILLED, *words, "--output", str(run))
    assert done.returncode != 0
    told = read_events(run)
    assert told[-1]["type"] == "failed", done.stdout[-2000:]
    assert "Process 2 of 2 (id " in told[-1]["message"] and "killed" in told[-1]["message"]
    assert "impasto resume" in told[-1]["message"]
    assert not {"stopped", "paused"} & {event["type"] for event in told}
    assert impasto("resume", run) == 0
    assert "processes 2 is now 1" in " ".join(event["message"] for event in read_events(run) if event["type"] == "warning")
    assert_same_but_for_rounding(run, alone)


def test_what_fails_in_another_process_is_told_by_the_first(two: Callable[..., list[BaseProcess]], tmp_path: Path) -> None:
    """While the first one is at long work, from which nothing wakes it."""

    def fault(training: Training) -> None:
        if training.device.is_main:
            time.sleep(1000)
        raise MemoryError("no more")

    assert ends(two(fault)) == [1, 1]
    last = read_events(tmp_path / "run")[-1]
    assert last["type"] == "failed"
    assert last["message"].startswith("Process 2 of 2 failed: Out of memory. Set `checkpointing = true`"), last
    assert list((tmp_path / "run" / "state").glob("step-*"))


def test_a_process_that_hangs_ends_when_the_first_is_killed(two: Callable[..., list[BaseProcess]], tmp_path: Path) -> None:
    """The second one sleeps where nothing wakes it. The first one leaves no word: so the run is shown as lost."""

    def fault(training: Training) -> None:
        if training.device.is_main:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)

    processes = two(fault)
    assert ends(processes) == [-signal.SIGKILL, 1]
    said = (tmp_path / "said-1").read_text(encoding="utf-8")
    assert f"impasto: Process 1 of 2 (id {processes[0].pid}) has died without a word" in said
    assert read_events(tmp_path / "run")[-1]["type"] not in ("failed", "stopped", "paused", "finished")


def test_a_loss_that_breaks_in_another_process_breaks_for_all(two: Callable[..., list[BaseProcess]], tmp_path: Path) -> None:
    def fault(training: Training) -> None:
        if not training.device.is_main:
            with torch.no_grad():
                training.flat.weights.fill_(math.nan)

    assert ends(two(fault, "--set", "train.recoveries=0")) == [1, 1]
    last = read_events(tmp_path / "run")[-1]
    assert last["type"] == "failed" and "The loss is no longer a finite number" in last["message"]
    assert "The adapter of step 0, the last good one, is kept as checkpoints/" in last["message"]
    assert "The loss is no longer a finite number" in (tmp_path / "said-1").read_text(encoding="utf-8")


def ends(processes: list[BaseProcess]) -> list[int | None]:
    """Their exit codes; None for one that does not end."""
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def test_a_process_whose_launcher_ends_it_before_all_are_there_says_so(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("trainers.peers.time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    assert impasto(*words, "--output", tmp_path / "run") == 1
    assert "before all its processes were there (still missing: process 2 of 2)" in read_events(tmp_path / "run")[-1]["message"]


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")])
def test_a_launcher_says_which_of_how_many(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() == (0, 1)
    monkeypatch.setenv(names[0], "2")
    monkeypatch.setenv(names[1], "3")
    assert place() == (2, 3)


def test_one_process_that_was_to_be_several_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device(choose_device("fp32", 0)) == []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    (problem,) = check_device(choose_device("fp32", 0))
    assert "--multi_gpu" in problem.hint
