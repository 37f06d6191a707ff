"""Turns: the same delta right before and after, the optimizer's means carried over, nothing lost by a kill or a recovery."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from trainers.verify import read_trained

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


@every_type
def test_a_turn_that_fails_half_way_is_taken_later_to_the_same_bytes(
    settings: tuple[str, ...], begin: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory was short for it."""
    whole, broken = begin(*settings, name="whole"), begin(*settings)
    update_from(whole, 3)
    update_from(broken, 2)
    kind, given = type(broken.config.adapter.trained), []
    turn = kind.turn

    def short(self: Any, *those: Any) -> Any:
        given.append(1)
        if len(given) == 5:
            raise MemoryError
        return turn(self, *those)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "turn", short)
        with pytest.raises(MemoryError):
            turn_if_due(broken)
    assert broken.turned == 0
    update_from(broken, 1)
    assert broken.turned == 1 and torch.equal(broken.flat.weights, whole.flat.weights)
    for place, mean in means_of(whole).items():
        assert torch.equal(means_of(broken)[place], mean)


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


def test_momentum_is_carried_into_each_layers_new_projection(begin: Callable[..., Training]) -> None:
    training = begin(*PROJECTION)
    update_from(training, 2)
    old = {layer: dict(zip("uv", (own["u"].clone(), own["v"].clone()), strict=True)) for layer, own in constants_of(training)}
    before = means_of(training)
    turn_if_due(training)
    after, seen = means_of(training), 0
    for layer, own in constants_of(training):
        (_, _, (rank, _)) = training.flat.shapes[layer]["core"]
        u, v, new_u, new_v = (each[name].double().flatten(1) for each in (old[layer], own) for name in ("u", "v"))
        less = (1 + (u.shape[0] + 1) / rank) * (1 + (v.shape[1] + 1) / rank)
        mean, square = (before[name, layer, "core"].double() for name in ("exp_avg", "exp_avg_sq"))
        wanted = new_u.T @ u @ mean @ v @ new_v.T / less
        torch.testing.assert_close(after["exp_avg", layer, "core"], wanted.float(), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(after["exp_avg_sq", layer, "core"], torch.full_like(square, square.mean()).float())
        seen += int(mean.any())
    assert seen > 20


def constants_of(training: Training) -> list[tuple[str, dict[str, torch.Tensor]]]:
    return list(training.flat.constants.items())


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
def test_killed_before_at_or_after_a_turn_it_goes_on_to_the_same_bytes(
    settings: tuple[str, ...], begin: Callable[..., Training], tmp_path: Path
) -> None:
    """Also right after it, as when memory runs out in the first update of a period and the base is read anew."""
    whole, folders = begin(*settings, name="whole"), {}
    for at, turned in ((1, 0), (2, 0), (2, 1), (3, 1)):
        update_from(whole, at - whole.step)
        if turned:
            turn_if_due(whole)
        folders[at, turned] = RunFolder(tmp_path / f"{at}-{turned}")
        StateKeeper(folders[at, turned], whole, None).save()
    update_from(whole, 2)
    kept = {name: tensor for own in whole.flat.constants.values() for name, tensor in own.items()}
    again = begin(*settings, name="again")
    for (at, turned), folder in folders.items():
        with torch.no_grad():
            again.flat.weights.fill_(7)
        StateKeeper(folder, again, load_state(folder))
        assert (again.step, again.turned) == (at, turned)
        update_from(again, 5 - at)
        assert torch.equal(again.flat.weights, whole.flat.weights)
        for layer, constants in whole.flat.constants.items():
            assert all(torch.equal(again.flat.constants[layer][name], constants[name]) for name in kept)
    StateKeeper(folder, whole, None).save()
    known, wanted = read_trained(folder, whole.config, whole.model, 5), exported(whole).modules
    assert known is not None and known.keys() == wanted.keys()
    for name, module in known.items():
        assert torch.equal(module.delta(), wanted[name].delta()), "what the state says is what a file holds"


@every_type
def test_a_recorded_step_sees_each_turn(settings: tuple[str, ...], begin: Callable[..., Training]) -> None:
    """A recording reads factors and constants where they lay when it was made."""
    longer = (*settings, "adapter.every=4", "train.batch_size=2")
    recorded, plain = begin(*longer), begin(*longer, "train.recording=off", name="plain")
    told: list[int] = []
    record = recorded.runner._record  # type: ignore[attr-defined]
    recorded.runner._record = lambda work: (told.append(recorded.step), record(work))[1]  # type: ignore[attr-defined]
    update_from(recorded, 15)
    update_from(plain, 15)
    assert told and told[0] < 12 < recorded.step, "recorded, and turned after that"
    torch.testing.assert_close(recorded.flat.weights, plain.flat.weights, rtol=1e-4, atol=1e-7)


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
