"""Turns: the same delta right before and after, the optimizer's means carried over, nothing lost by a kill or a recovery."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import TINY, impasto, read_events, result_of, tensor_bytes
from tests.tiny_runs import exported, tiny_config, tiny_training, update_from
from trainers.adapters import restart
from trainers.config import build_config
from trainers.dataset.batches import Batch, BatchMaker
from trainers.errors import DivergedError, SettingError
from trainers.recovery import StateKeeper, go_back, remember
from trainers.run_folder import RunFolder
from trainers.setup import Training
from trainers.train import factor_now, update
from trainers.training_state import load_state
from trainers.turns import turn_if_due

RESTART = ("adapter.type=restart", "adapter.every=2", "adapter.warmup=0", "optimizer.learning_rate=1e-2", "output.kind=native")
PROJECTION = ("adapter.type=random_projection", "adapter.every=2", "optimizer.learning_rate=1e-3", "output.kind=native")
every_type = pytest.mark.parametrize("settings", [RESTART, PROJECTION], ids=["restart", "random_projection"])


@pytest.fixture
def begin(tiny_base: Path, pictures: Path, tmp_path: Path) -> Callable[..., Training]:
    def made(*overrides: str, name: str = "run") -> Training:
        return tiny_training(tiny_base, pictures, tmp_path / name, *overrides)

    return made


def deltas(training: Training) -> dict[str, torch.Tensor]:
    return {name: module.delta() for name, module in exported(training).modules.items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        assert float(delta.norm()) > 0
        assert float((delta - theirs[name]).norm() / delta.norm()) < 1e-6, name


@every_type
def test_a_turn_leaves_the_delta_the_loss_and_the_memory_where_they_are(
    settings: tuple[str, ...], begin: Callable[..., Training]
) -> None:
    training = begin(*settings)
    update_from(training, 2)
    before, places = deltas(training), places_of(training)
    factors = training.flat.weights.clone()
    turn_if_due(training)
    assert training.turned == 1 and places_of(training) == places
    assert not torch.equal(training.flat.weights, factors)
    assert_same(before, deltas(training))
    weights = training.flat.weights.clone()
    turn_if_due(training)
    assert torch.equal(training.flat.weights, weights), "taken once"
    update_from(training, 3)
    assert training.turned == 2 and training.step == 5


def places_of(training: Training) -> list[int]:
    flat = training.flat
    return [tensor.data_ptr() for used in flat.used.values() for tensor in used.values()]


@every_type
def test_the_sum_of_periods_has_a_rank_that_a_lora_of_this_rank_cannot_have(
    settings: tuple[str, ...], begin: Callable[..., Training]
) -> None:
    training = begin(*settings)
    update_from(training, 7)
    for name, delta in deltas(training).items():
        values = torch.linalg.svdvals(delta.flatten(1))
        assert int((values > 1e-5 * values[0]).sum()) > 2 * 2, name


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_a_restart_prunes_the_optimizers_means_of_each_factor(optimizer: str, begin: Callable[..., Training]) -> None:
    rate = "optimizer.learning_rate=" + ("1" if optimizer == "prodigy" else "1e-2")
    training = begin(*RESTART, f"optimizer.type={optimizer}", rate, "adapter.prune=0.75")
    update_from(training, 2)
    moments, before = training.config.optimizer.moments, means_of(training)
    turn_if_due(training)
    after = means_of(training)
    assert before.keys() == after.keys() and len(before) > 20
    for place, mean in before.items():
        torch.testing.assert_close(after[place], restart.largest(mean, 0.25))
        assert int(after[place].count_nonzero()) <= round(0.25 * mean.numel())
    assert {name for name, *_ in before} <= set(moments)
    update_from(training, 2)
    assert bool(training.flat.weights.isfinite().all())


def means_of(training: Training) -> dict[tuple[Any, ...], torch.Tensor]:
    """By name, and layer and factor: what the optimizer keeps of each, cut out here by the flat layout itself."""
    found: dict[tuple[Any, ...], torch.Tensor] = {}
    moments, flat = training.config.optimizer.moments, training.flat
    for group, part in zip(training.optimizer.param_groups, flat.groups.values(), strict=True):
        for number, parameter in enumerate(group["params"]):
            state = training.optimizer.state[parameter]
            for name in set(moments) & set(state):
                if training.config.optimizer.views:
                    found[name, number] = state[name].clone()
                    continue
                whole = torch.zeros_like(flat.weights)
                whole[part] = state[name]
                found |= {
                    (name, layer, factor): mean.clone()
                    for layer, factors in flat.split(whole).items()
                    for factor, mean in factors.items()
                    if part.start <= flat.shapes[layer][factor][1].start < part.stop
                }
    return found


def test_an_optimizer_of_another_form_begins_with_an_empty_state(
    begin: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begin(*RESTART)
    monkeypatch.setattr(type(training.config.optimizer), "moments", {})
    update_from(training, 2)
    assert training.optimizer.state
    turn_if_due(training)
    assert not training.optimizer.state


def test_prodigy_measures_its_way_from_the_new_start(begin: Callable[..., Training]) -> None:
    training = begin(*RESTART, "optimizer.type=prodigy", "optimizer.learning_rate=1")
    update_from(training, 2)
    turn_if_due(training)
    for group, part in zip(training.optimizer.param_groups, training.flat.groups.values(), strict=True):
        (parameter,) = group["params"]
        state = training.optimizer.state[parameter]
        assert torch.equal(state["p0"], training.flat.weights[part]) and not state["s"].any()
        assert group["d_numerator"] == 0


def test_the_rate_rises_again_after_each_turn(begin: Callable[..., Training]) -> None:
    training = begin(*RESTART, "adapter.every=6", "adapter.warmup=3", "train.steps=16")
    plain = begin("train.steps=16", name="plain")
    factors = []
    for step in range(16):
        training.step = plain.step = step
        factors.append(factor_now(training) / factor_now(plain))
    rising = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    assert factors == pytest.approx([1] * 6 + rising + rising[:4])
    assert factor_now(plain) < 0.2, "below the cosine, which goes on"


@every_type
@pytest.mark.parametrize("at", [1, 2, 3])
def test_killed_before_at_or_after_a_turn_it_goes_on_to_the_same_bytes(
    settings: tuple[str, ...], at: int, pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[Any] = ["train", pictures, "--base", tiny_base, *TINY, "--steps", 5]
    words += [word for setting in settings for word in ("--set", setting)]

    def asked(run: RunFolder) -> str | None:
        done = run.events.exists() and any(
            event.get("step") == at for event in read_events(run.path) if event["type"] == "step"
        )
        return "stop" if done else None

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "stop_asked", asked)
        assert impasto(*words, "-o", tmp_path / "run") == 3
    state = load_state(RunFolder(tmp_path / "run"))
    assert state is not None and state.facts["turned"] == (at - 1) // 2
    assert impasto("resume", tmp_path / "run") == 0
    assert impasto(*words, "-o", tmp_path / "whole") == 0
    assert tensor_bytes(result_of(tmp_path / "run")) == tensor_bytes(result_of(tmp_path / "whole"))


@every_type
def test_a_state_saved_right_after_a_turn_does_not_take_it_again(
    settings: tuple[str, ...], begin: Callable[..., Training], tmp_path: Path
) -> None:
    """As when memory runs out in the first update of a period, and the base is read anew."""
    whole = begin(*settings, name="whole")
    update_from(whole, 5)
    training = begin(*settings)
    update_from(training, 2)
    turn_if_due(training)
    folder = RunFolder(tmp_path / "run")
    StateKeeper(folder, training, None).save()
    again = begin(*settings, name="again")
    StateKeeper(folder, again, load_state(folder))
    assert again.turned == 1
    update_from(again, 3)
    assert torch.equal(again.flat.weights, whole.flat.weights)
    for layer, constants in whole.flat.constants.items():
        assert all(torch.equal(again.flat.constants[layer][name], constant) for name, constant in constants.items())


@every_type
def test_it_goes_back_over_a_turn(
    settings: tuple[str, ...], begin: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that break in the second period: back to the first, and to the bytes that this one had."""
    training = begin(*settings)
    update_from(training, 1)
    remember(training)
    before, weights = deltas(training), training.flat.weights.clone()
    update_from(training, 2)
    assert training.turned == 1
    made = BatchMaker.step
    with monkeypatch.context() as patch:
        patch.setattr(BatchMaker, "step", lambda self, number: (_broken(batch) for batch in made(self, number)))
        with pytest.raises(DivergedError) as error:
            update(training)
    go_back(training, error.value)
    assert (training.step, training.turned) == (1, 0)
    assert torch.equal(training.flat.weights, weights)
    assert_same(before, deltas(training))
    update_from(training, 3)
    assert training.turned == 1


def _broken(batch: Batch) -> Batch:
    return replace(batch, latents=batch.latents * math.nan)


@every_type
def test_a_running_mean_over_turns_is_refused_in_words(settings: tuple[str, ...], tiny_base: Path, pictures: Path) -> None:
    with pytest.raises(SettingError, match=r"train\.ema"):
        tiny_config(tiny_base, pictures, *settings, "train.ema=0.99")
    assert build_config({"train": {"ema": 0.99}}).train.ema == 0.99
