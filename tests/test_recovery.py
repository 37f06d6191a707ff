"""Numbers that break: back to the last good state at a lower rate, a few times, and never into a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.command_line import TINY, impasto, read_events, result_of, tensor_bytes
from trainers import events, recovery
from trainers.dataset.batches import Batch, BatchMaker
from trainers.errors import DivergedError
from trainers.recovery import go_back, put_back, remember, snapshot
from trainers.run_folder import RunFolder
from trainers.train import update
from trainers.training_state import load_good, load_state

STEPS = 12


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """broken(lambda step: ...) puts a NaN into the latents of those steps (counted from 0)."""
    made = BatchMaker.step

    def breaks(where: Callable[[int], bool]) -> None:
        def step(self: BatchMaker, number: int) -> Iterator[Batch]:
            for batch in made(self, number):
                yield replace(batch, latents=batch.latents * math.nan) if where(number) else batch

        monkeypatch.setattr(BatchMaker, "step", step)

    return breaks


@pytest.fixture
def trained(pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains 12 steps, a state remembered every 4, into a folder of a name; returns the run."""
    monkeypatch.setattr(recovery, "EVERY", 4)

    def train(name: str, *words: object, code: int = 0) -> Path:
        options = (*TINY, "--steps", STEPS, *words)
        assert impasto("train", pictures, "--output", tmp_path / name, "--base", tiny_base, *options) == code
        return tmp_path / name

    return train


def of_type(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["type"] == kind]


def test_a_nan_in_one_batch_is_rolled_back_and_the_run_finishes(
    trained: Callable[..., Path], broken: Callable[..., None]
) -> None:
    broken(lambda step: step == 6)
    run = trained("run")
    (back,) = of_type(run, "recovered")
    assert (back["broke"], back["step"], back["attempt"], back["rate"]) == (6, 4, 1, 0.5)
    steps = [event["step"] for event in of_type(run, "step")]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 8, 9, 10, 11, 12], "what came after the good state is told once more"
    rates = {event["step"]: event["learning_rates"]["unet"] for event in of_type(run, "step")}
    first = {event["step"]: event["learning_rates"]["unet"] for event in of_type(run, "step")[:6]}
    assert rates[5] == pytest.approx(first[5] / 2)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(result_of(run)).values())
    with safe_open(result_of(run), framework="pt") as file:
        assert len(file.metadata().get("ss_new_sd_model_hash", "")) == 64, "what is told of the base is told all the same"


def test_a_nan_in_every_batch_ends_after_k_with_the_last_good_state_as_a_file(
    trained: Callable[..., Path], broken: Callable[..., None]
) -> None:
    broken(lambda step: step >= 5)
    run = trained("run", "--set", "train.recoveries=2", code=1)
    assert [event["rate"] for event in of_type(run, "recovered")] == [0.5, 0.25]
    last = read_events(run)[-1]
    assert last["type"] == "failed"
    assert "the run went back 2 times" in last["message"] and "optimizer.learning_rate" in last["message"]
    assert "adapter of step 4" in last["message"]
    (kept,) = (run / "checkpoints").glob("*.safetensors")
    tensors = load_file(kept)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_up" in name), "four steps were learnt"
    assert list(run.glob("*.safetensors")) == []


def test_two_runs_go_back_alike_and_a_resumed_one_as_far(
    trained: Callable[..., Path], broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(lambda step: step in (6, 9))
    whole = trained("whole")
    told = events.append

    def stop_at_five(path: Path, event: events.Event) -> None:
        told(path, event)
        if isinstance(event, events.Step) and event.step == 5:
            (path.parent / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(events, "append", stop_at_five)
        run = trained("run", code=3)
    assert impasto("resume", run) == 0
    assert [event["step"] for event in of_type(run, "recovered")] == [4, 8]
    assert tensor_bytes(result_of(run)) == tensor_bytes(result_of(whole))


def test_after_a_recovery_the_newest_state_is_the_one_gone_back_to(
    trained: Callable[..., Path], broken: Callable[..., None]
) -> None:
    broken(lambda step: step >= 6)
    run = RunFolder(trained("run", "--set", "train.save_state_seconds=0", "--set", "train.recoveries=1", code=1))
    state = load_state(run)
    assert state is not None and state.step == 4
    assert state.facts["recovery"] == {"attempts": 1, "rate": 0.5, "skipped": [6]}
    good = load_good(run, 4)
    assert good is not None and torch.equal(good.weights, state.weights)


def test_what_is_remembered_is_not_changed_by_what_follows(start: Any) -> None:
    training = start("train.ema=0.9")
    update(training)
    state = snapshot(training)
    weights = training.flat.weights.clone()
    first = update(training)
    assert not torch.equal(training.flat.weights, weights) and torch.equal(state.weights, weights)
    put_back(training, state)
    assert update(training) == first
    put_back(training, state)
    assert update(training) == first, "to be put back a second time"


def test_weights_that_are_not_finite_are_not_remembered(start: Any) -> None:
    training = start()
    remember(training)
    training.step = recovery.EVERY
    with torch.no_grad():
        training.flat.weights[3] = math.inf
    remember(training)
    assert training.good is not None and training.good.step == 0
    go_back(training, DivergedError("broken"))
    assert bool(torch.isfinite(training.flat.weights).all()) and training.step == 0
    assert training.recovery.rate == 0.5 and training.recovery.skipped == (recovery.EVERY,)
