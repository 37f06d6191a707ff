"""Training states: what is put back goes on with the same bits, and damage is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.errors import RunFolderError
from trainers.recovery import StateKeeper, remember
from trainers.run_folder import RunFolder
from trainers.train import update
from trainers.training_state import TrainingState, load_state, save_state

OPTIMIZERS = {
    "adamw": ("optimizer.type=adamw", "optimizer.learning_rate=1e-2"),
    "adafactor": ("optimizer.type=adafactor", "optimizer.learning_rate=1e-2"),
    "prodigy": ("optimizer.type=prodigy", "optimizer.growth=1000"),
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def simple(step: int, value: float = 0.0) -> TrainingState:
    """A state that is quick to make, its weights telling its step."""
    return TrainingState(step, torch.full((50,), step + value), None, {"state": {}, "param_groups": []}, {"at": 1.0})


def states(run: RunFolder) -> list[Path]:
    """Files in the state folder, oldest first."""
    return sorted(run.state.iterdir())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_after_a_reload_give_bit_identical_weights(start: Any, run: RunFolder, optimizer: str) -> None:
    settings = (*OPTIMIZERS[optimizer], "train.batch_size=2", "train.ema=0.9")
    unbroken = start(*settings)
    for _ in range(3):
        update(unbroken)
    remember(unbroken)
    kept = StateKeeper(run, unbroken, None)
    kept.save()
    state = load_state(run)
    assert state is not None
    saved = state.facts["seconds"]
    resumed = start(*settings)
    keeper = StateKeeper(run, resumed, load_state(run))
    assert keeper.began == kept.began and 0 < saved <= keeper.seconds < 60
    assert resumed.step == 3 and resumed.good is not None
    assert torch.equal(resumed.good.weights, unbroken.flat.weights)
    for _ in range(2):
        assert update(resumed) == update(unbroken)
        assert torch.equal(resumed.flat.weights, unbroken.flat.weights)
        assert torch.equal(resumed.mean, unbroken.mean)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_its_optimizer_state_a_run_would_go_on_otherwise(start: Any, run: RunFolder, optimizer: str) -> None:
    """So that the test above would notice a state that is not put back."""
    unbroken = start(*OPTIMIZERS[optimizer])
    for _ in range(3):
        update(unbroken)
    forgetful = start(*OPTIMIZERS[optimizer])
    forgetful.step = unbroken.step
    with torch.no_grad():
        forgetful.flat.weights.copy_(unbroken.flat.weights)
    update(unbroken)
    update(forgetful)
    assert not torch.equal(forgetful.flat.weights, unbroken.flat.weights)


def test_a_state_comes_back_as_it_was_saved(run: RunFolder) -> None:
    optimizer = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.linspace(-1, 1, 7), "count": 3},
            1: {"rows": torch.ones(2, 3, dtype=torch.float64), "counts": torch.tensor([1, -2], dtype=torch.int16)},
        },
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.99), "fused": True, "foreach": None, "params": [0, 1]}],
    }
    facts = {"at": 1.7e9 + 1 / 3, "threads": 2}
    save_state(run, TrainingState(7, torch.linspace(0, 1, 9), torch.linspace(1, 2, 9), optimizer, facts))
    state = load_state(run)
    assert state is not None and state.mean is not None
    assert state.step == 7 and state.facts == facts
    assert torch.equal(state.weights, torch.linspace(0, 1, 9)) and torch.equal(state.mean, torch.linspace(1, 2, 9))
    assert state.optimizer["param_groups"] == optimizer["param_groups"]
    assert isinstance(state.optimizer["param_groups"][0]["betas"], tuple)
    assert list(state.optimizer["state"]) == [0, 1]  # whole numbers, as torch wants them
    for index, expected in optimizer["state"].items():  # type: ignore[attr-defined]
        found = state.optimizer["state"][index]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype and found[name].shape == value.shape
                assert torch.equal(found[name], value)
            else:
                assert found[name] == value


def test_a_run_without_a_state_has_none_to_load(run: RunFolder) -> None:
    assert load_state(run) is None


def test_the_newest_state_is_loaded(run: RunFolder) -> None:
    for step in (9, 10, 11):
        save_state(run, simple(step))
    state = load_state(run)
    assert state is not None and state.step == 11 and float(state.weights[0]) == 11


def test_two_generations_are_kept_and_nothing_else(run: RunFolder) -> None:
    for step in (5, 10, 15, 20):
        save_state(run, simple(step))
    assert [path.name for path in states(run)] == ["step-00000015.safetensors", "step-00000020.safetensors"]


def test_a_state_saved_twice_at_one_step_is_the_later_one(run: RunFolder) -> None:
    save_state(run, simple(5))
    save_state(run, simple(5, value=0.25))
    state = load_state(run)
    assert state is not None and float(state.weights[0]) == 5.25
    assert len(states(run)) == 1


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 500)


@pytest.mark.parametrize("damage", [_cut, _empty, _scribble])
def test_a_damaged_newest_state_falls_back_to_the_one_before(run: RunFolder, damage: Callable[[Path], None]) -> None:
    save_state(run, simple(5))
    save_state(run, simple(10))
    damage(states(run)[-1])
    state = load_state(run)
    assert state is not None and state.step == 5 and float(state.weights[0]) == 5


def test_when_both_are_damaged_the_run_says_so_with_what_to_do(run: RunFolder) -> None:
    save_state(run, simple(5))
    save_state(run, simple(10))
    for path in states(run):
        _cut(path)
    with pytest.raises(RunFolderError, match="Every training state of this run is damaged") as caught:
        load_state(run)
    assert str(run.state) in str(caught.value) and "new folder" in str(caught.value)


def test_one_flipped_bit_anywhere_in_the_tensors_is_noticed(run: RunFolder) -> None:
    save_state(run, simple(5))
    (path,) = states(run)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - header == 50 * 4
    for place in range(header, len(whole)):
        _flip(path, whole, place)
        with pytest.raises(RunFolderError):
            load_state(run)


def test_one_flipped_bit_in_the_numbers_beside_the_tensors_never_changes_what_is_loaded(run: RunFolder) -> None:
    """A flip in the header's white space or a tensor's name for itself may be harmless; another step or rate never is."""
    saved = TrainingState(
        5, torch.ones(4), None, {"state": {}, "param_groups": [{"lr": 0.125, "params": [0]}]}, {"at": 1.0, "threads": 2}
    )
    save_state(run, saved)
    (path,) = states(run)
    whole = path.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        _flip(path, whole, place)
        try:
            state = load_state(run)
        except RunFolderError:
            continue
        assert state is not None
        assert (state.step, state.optimizer, state.facts) == (saved.step, saved.optimizer, saved.facts)
        assert torch.equal(state.weights, saved.weights)


def _flip(path: Path, whole: bytes, place: int) -> None:
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
