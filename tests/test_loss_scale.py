"""fp16: the factor on the loss moves by itself, loses no step, and goes on after a resume where it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import TINY, impasto, read_events, result_of, tensor_bytes
from tests.tiny_runs import shake
from trainers import events, loss_scale, train
from trainers.dataset.batches import Batch
from trainers.device import check_device, choose_device
from trainers.errors import DivergedError, SettingError
from trainers.loss_scale import LARGEST, START, LossScale
from trainers.recovery import go_back, remember
from trainers.run_folder import RunFolder
from trainers.train import update
from trainers.training_state import load_state

FP16 = ("train.precision=fp16", "train.max_grad_norm=0")


def test_it_doubles_after_enough_good_steps_and_halves_at_once() -> None:
    scale = LossScale.of("fp16")
    assert scale.factor == START
    for _ in range(loss_scale.GROWS_AFTER - 1):
        scale = scale.after_good_step()
    assert scale.factor == START and scale.after_good_step() == LossScale(2 * START, LARGEST, 0)
    assert scale.lowered() == LossScale(START / 2, LARGEST, 0)
    top = LossScale(LARGEST, LARGEST, loss_scale.GROWS_AFTER - 1)
    assert top.after_good_step().factor == LARGEST


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_it_stays_one_in_the_formats_with_a_wide_range(name: str) -> None:
    scale = LossScale.of(name)
    for _ in range(3 * loss_scale.GROWS_AFTER):
        scale = scale.after_good_step()
    assert scale.factor == 1 and scale.lowest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_it_the_gradient_is_the_plain_one_bit_for_bit(start: Any, precision: str) -> None:
    settings = (f"train.precision={precision}", "train.batch_size=2", "train.accumulation=2", "train.max_grad_norm=0")
    ours, plain = start(*settings), start(*settings)
    for training in (ours, plain):
        shake(training)
    update(ours)
    plain.flat.gradient.zero_()
    for batch in plain.batches.step(0):
        train.training_step(plain.model, batch, plain.condition, plain.config.train.min_snr_gamma).backward()
    assert torch.equal(ours.flat.gradient, plain.flat.gradient)


def test_it_takes_the_gradient_of_half_precision_near_that_of_float32(start: Any) -> None:
    """A loss as small as a long picture's: without the factor most of its gradient would be below what fp16 can hold."""
    gradients = []
    for precision, scale in (("fp32", LossScale()), ("fp16", LossScale.of("fp16")), ("fp16", LossScale())):
        training = start(f"train.precision={precision}", "train.max_grad_norm=0")
        shake(training)
        training.loss_scale = scale
        training.batches = Lighter(training.batches, 1e-3)
        update(training)
        gradients.append(training.flat.gradient.double())
    scaled, bare = ((found - gradients[0]).norm() / gradients[0].norm() for found in gradients[1:])
    assert scaled < 0.01 < bare


class Lighter:
    """Batches whose loss is weighted down."""

    def __init__(self, batches: Any, weight: float) -> None:
        self._batches, self._weight = batches, weight

    def step(self, step: int) -> Iterator[Batch]:
        for batch in self._batches.step(step):
            yield replace(batch, weights=batch.weights * self._weight)

    def make_ready(self, step: int) -> None:
        """Nothing is made ahead."""


def test_masters_and_optimizer_are_float32_over_a_half_precision_base(start: Any) -> None:
    training = start(*FP16)
    update(training)
    assert {p.dtype for part in training.model.parts().values() for p in part.parameters()} == {torch.float16}
    assert next(training.model.vae.parameters()).dtype == torch.float32
    assert training.flat.weights.dtype == training.flat.gradient.dtype == torch.float32
    assert training.device.dtype_name == "fp16"


def test_a_gradient_that_overflows_halves_it_and_is_computed_again(start: Any) -> None:
    training, lower = start(*FP16), start(*FP16)
    for each in (training, lower):
        shake(each)
    training.loss_scale = LossScale(2.0**40, 2.0**40)
    update(training)
    factor = training.loss_scale.factor
    assert 1 < factor < 2.0**30 and training.loss_scale.good == 1 and training.step == 1
    lower.loss_scale = LossScale(factor, LARGEST)
    update(lower)
    assert lower.loss_scale.factor == factor, "the first that fits is taken"
    assert torch.equal(training.flat.gradient, lower.flat.gradient), "of the same pictures"
    assert torch.equal(training.flat.weights, lower.flat.weights)


def test_a_gradient_that_is_never_finite_diverges_and_going_back_restores_it(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(*FP16)
    shake(training)
    remember(training)
    before, tries = training.flat.weights.clone(), []
    filled = train.fill_gradient

    def broken(training: Any) -> tuple[float, float]:
        tries.append(training.loss_scale.factor)
        return filled(training)[0], math.inf

    monkeypatch.setattr(train, "fill_gradient", broken)
    with pytest.raises(DivergedError, match="gradient") as caught:
        update(training)
    assert tries == [START / 2**n for n in range(17)]
    assert torch.equal(training.flat.weights, before) and training.step == 0
    go_back(training, caught.value)
    assert training.loss_scale == LossScale.of("fp16")


def test_a_loss_that_is_not_finite_is_not_tried_again(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training, tries = start(*FP16), []

    def broken(training: Any) -> tuple[float, float]:
        tries.append(1)
        return math.nan, math.nan

    monkeypatch.setattr(train, "fill_gradient", broken)
    with pytest.raises(DivergedError, match="loss"):
        update(training)
    assert len(tries) == 1


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor starts low and grows every second step."""
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 2)
    monkeypatch.setattr(loss_scale, "START", 2.0**10)


@pytest.mark.parametrize("words", [("train.precision=fp16",), ("train.base_weights=int8",)], ids=["fp16", "int8"])
def test_a_resumed_run_equals_an_unbroken_one(
    words: tuple[str, ...], restless: None, pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("dataset.holdout=0", "dataset.resolution=32")
    rest = (*TINY, "--steps", 7, *(part for word in (*small, *words) for part in ("--set", word)))
    command = ("train", pictures, "--base", tiny_base, *rest, "--output")
    assert impasto(*command, tmp_path / "whole") == 0
    told = events.append

    def stop_at_three(path: Path, event: events.Event) -> None:
        told(path, event)
        if isinstance(event, events.Step) and event.step == 3:
            (path.parent / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(events, "append", stop_at_three)
        assert impasto(*command, tmp_path / "run") == 3
    halfway = load_state(RunFolder(tmp_path / "run"))
    assert impasto("resume", tmp_path / "run") == 0
    assert tensor_bytes(result_of(tmp_path / "run")) == tensor_bytes(result_of(tmp_path / "whole"))
    whole, resumed = (load_state(RunFolder(tmp_path / name)) for name in ("whole", "run"))
    assert halfway is not None and whole is not None and resumed is not None
    assert whole.facts.get("loss_scale") == resumed.facts.get("loss_scale")
    if "fp16" in words[0]:
        assert halfway.facts["loss_scale"] == {"factor": 2.0**11, "good": 1}, "stopped between two doublings"
        assert whole.facts["loss_scale"] == {"factor": 2.0**13, "good": 1}
    else:
        assert "loss_scale" not in whole.facts
        assert any("base weights in int8" in event.get("detail", "") for event in read_events(tmp_path / "whole"))


def test_a_run_that_goes_on_in_fp16_begins_with_fp16_s_scale() -> None:
    """Begun in bf16, which has none: with a factor of 1 its gradients would underflow for thousands of steps."""
    before = LossScale.of("bf16").after_good_step().facts()
    assert LossScale.of("fp16").as_in(before) == LossScale.of("fp16")


@pytest.mark.parametrize(
    ("native", "size", "expected"), [(True, 1 << 30, "bf16"), (False, 1 << 30, "fp16"), (False, 1 << 20, "fp32")]
)
def test_a_gpu_without_bf16_gets_fp16_for_a_large_base(
    native: bool, size: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert choose_device("auto", size).dtype_name == expected
    assert choose_device("fp16", size).dtype_name == "fp16"
    if not native:
        with pytest.raises(SettingError, match=r"train\.precision=fp16"):
            choose_device("bf16", size)


def test_on_a_cpu_half_precision_is_told_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    (problem,) = check_device(choose_device("fp16", 0))
    assert problem.severity == "warning" and "slow" in problem.what
    assert check_device(choose_device("bf16", 0)) == []
