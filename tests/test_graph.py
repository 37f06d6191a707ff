"""The step as a recording: the same bits as operation by operation, for every shape, and back to that when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recorder import recorder
from tests.tiny_runs import shake, tiny_training
from trainers.graph import MOST, WARM_UP, Eager, Graphed, choose_runner
from trainers.setup import Training
from trainers.train import update

STEPS = 7


def recorded(training: Training) -> tuple[Graphed, list[str]]:
    told: list[str] = []
    training.runner = runner = Graphed(recorder(training.flat.gradient), told.append)
    return runner, told


def run(training: Training, steps: int = STEPS) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """(loss, norm) of each step, and the weights after the last."""
    shake(training)
    return [update(training) for _ in range(steps)], training.flat.weights.clone()


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sd2_base", "tiny_sdxl_base"])
@pytest.mark.parametrize("rate", ["0", "1e-3"], ids=["text-frozen", "text-learns"])
def test_a_recorded_step_gives_the_bits_of_the_usual_one(
    base: str, rate: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    words = (f"text_encoder.learning_rate={rate}", "optimizer.learning_rate=1e-3", "train.batch_size=2")
    words += ("dataset.caption_dropout=0.3", "dataset.flip=true", "train.accumulation=2")
    usual, other = (
        tiny_training(request.getfixturevalue(base), pictures, tmp_path / name, *words) for name in ("usual", "other")
    )
    runner, told = recorded(other)
    expected, weights = run(usual)
    found, same = run(other)
    assert not told and len(runner._recorded) == 1
    assert found == expected
    assert torch.equal(same, weights)


@pytest.mark.parametrize(
    "words",
    [
        ("train.checkpointing=true",),
        ('adapter.targets=["attention", "convolutions"]', "train.min_snr_gamma=0"),
        ("train.base_weights=int8",),
        ("train.precision=bf16",),
    ],
    ids=lambda words: words[0],
)
def test_what_else_may_be_in_a_step_can_be_recorded(start: Any, words: tuple[str, ...]) -> None:
    usual, other = start(*words), start(*words)
    runner, told = recorded(other)
    expected, weights = run(usual, 5)
    found, same = run(other, 5)
    assert not told and runner._recorded
    assert found == expected and torch.equal(same, weights)


def test_every_shape_has_a_recording_of_its_own_after_it_has_come_twice(start: Any) -> None:
    words = ("dataset.buckets=true", "dataset.resolution=48", "train.batch_size=2")
    usual, other = start(*words), start(*words)
    runner, told = recorded(other)
    sizes = {batch.latents.shape for step in range(12) for batch in usual.batches.step(step)}
    expected, weights = run(usual, 24)
    found, same = run(other, 24)
    assert len(sizes) > 2 and not told
    assert {shape[0][1] for shape in runner._recorded} <= sizes
    assert len(runner._recorded) == sum(count > WARM_UP for count in runner._seen.values()) > 1
    assert found == expected and torch.equal(same, weights)


def test_the_loss_scale_is_read_anew_at_each_step(start: Any) -> None:
    from trainers.loss_scale import LossScale

    usual, other = start("train.max_grad_norm=0"), start("train.max_grad_norm=0")
    recorded(other)
    for training in (usual, other):
        shake(training)
        for _ in range(4):
            update(training)
        training.loss_scale = LossScale(2.0**30, 2.0**40)
        update(training)
    assert torch.equal(usual.flat.gradient, other.flat.gradient), "a scale that is recorded would not be divided out again"


def test_what_cannot_be_recorded_is_computed_as_usual_and_told_once(start: Any) -> None:
    usual, other = start(), start()
    runner, told = recorded(other)
    predict = other.model.predict

    def asks(*words: Any) -> torch.Tensor:
        assert float(words[0].abs().max()) > 0  # the device must answer before anything follows
        return predict(*words)  # type: ignore[no-any-return]

    other.model.predict = asks
    expected, weights = run(usual)
    found, same = run(other)
    assert len(told) == 1 and "slower" in told[0]
    assert not runner._recorded
    assert found == expected and torch.equal(same, weights)


def test_what_was_recorded_is_forgotten_with_the_adapter_and_can_be_recorded_again(start: Any) -> None:
    usual, other = start(), start()
    runner, _ = recorded(other)
    expected, _ = run(usual, 9)
    shake(other)
    found = [update(other) for _ in range(4)]
    runner.forget()
    assert not runner._recorded
    found += [update(other) for _ in range(5)]
    assert runner._recorded and found == expected
    other.take_out()
    assert not runner._recorded


def test_no_more_shapes_are_recorded_than_have_room(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.graph.MOST", 1)
    training = start("dataset.buckets=true", "dataset.resolution=48")
    runner, _ = recorded(training)
    run(training, 24)
    assert len(runner._recorded) == 1 < MOST


def test_a_step_waits_for_its_numbers_once(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start("train.accumulation=3", "train.ema=0.9", "text_encoder.learning_rate=0")
    update(training)
    batches = list(training.batches.step(training.step))  # drawn on the host, where asking costs nothing
    monkeypatch.setattr(training.batches, "step", lambda step: batches)
    for batch in batches:
        training.condition(batch.captions)  # once for each caption
    asked = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def told(tensor: torch.Tensor, *words: Any, real: Any = real, name: str = name) -> Any:
            asked.append((name, tuple(tensor.shape)))
            return real(tensor, *words)

        monkeypatch.setattr(torch.Tensor, name, told)
    update(training)
    assert asked == [("tolist", (3,))]


def test_nothing_is_recorded_when_it_is_off_or_layers_are_large() -> None:
    for setting, kind, small in (("auto", "cpu", False), ("auto", "mps", True), ("off", "cuda", True), ("off", "cpu", True)):
        assert isinstance(choose_runner(setting, torch.device(kind), small, lambda _: None), Eager)
