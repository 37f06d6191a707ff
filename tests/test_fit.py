"""Too little memory for a step: what is done about it, in which order, what it costs, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.command_line import TINY, impasto, read_events, result_of
from tests.tiny_runs import shake
from trainers import fit as fitting
from trainers import train as training_loop
from trainers.fit import Fit, ReloadBase, bytes_of_a_picture, can_fit, fit_before_first_step, make_room
from trainers.launch import STOPPED
from trainers.run_folder import RunFolder
from trainers.setup import Training
from trainers.train import loss_of, update, update_within_memory
from trainers.training_state import load_state

STEP = training_loop.training_step


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, Any], bool]], list[int]]:
    """room(enough) makes a GPU of the machine on which `enough(model, batch)` says what fits. Returns the batches asked for."""

    def within(enough: Callable[[Any, Any], bool]) -> list[int]:
        asked: list[int] = []

        def step(model: Any, batch: Any, *words: Any) -> torch.Tensor:
            if not torch.is_grad_enabled():  # the held-out loss keeps nothing
                return STEP(model, batch, *words)
            asked.append(len(batch.captions))
            if not enough(model, batch):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return STEP(model, batch, *words)

        monkeypatch.setattr(training_loop, "training_step", step)
        monkeypatch.setattr(training_loop, "fit_before_first_step", lambda *words: None)  # a GPU is tried, not estimated
        return asked

    return within


def is_packed(model: Any) -> bool:
    from trainers.quantised import PackedLayer

    return any(isinstance(layer, PackedLayer) for layer in model.unet.modules())


def test_checkpointing_comes_first_and_changes_no_bit(start: Any, room: Any) -> None:
    usual, short = start("train.batch_size=2"), start("train.batch_size=2")
    shake(usual), shake(short)
    expected = update(usual)
    told: list[str] = []
    room(lambda model, batch: model.unet.is_gradient_checkpointing)
    assert update_within_memory(short, told.append) == expected
    assert torch.equal(short.flat.weights, usual.flat.weights)
    assert short.fit == Fit(checkpointing=True)
    assert len(told) == 1 and "checkpointing" in told[0] and "third more time" in told[0]


@pytest.mark.parametrize("size", [4, 3])
def test_then_fewer_pictures_at_once_with_the_same_noises(start: Any, room: Any, size: int) -> None:
    words = (f"train.batch_size={size}", "train.max_grad_norm=0", "optimizer.learning_rate=1e-3")
    usual, short = start(*words), start(*words)
    shake(usual), shake(short)
    expected, _ = update(usual)
    told: list[str] = []
    asked = room(lambda model, batch: len(batch.captions) == 1)
    found, _ = update_within_memory(short, told.append)
    assert asked == [size, size, -(-size // 2), *[1] * size]
    assert found == pytest.approx(expected, rel=1e-6)
    assert (short.flat.gradient - usual.flat.gradient).norm() < 1e-5 * usual.flat.gradient.norm()
    assert short.fit == Fit(checkpointing=True, at_once=1)
    assert [word in line for word, line in zip(("checkpointing", "at once", "at once"), told, strict=True)] == [True] * 3
    assert short.config.examples_per_step == usual.config.examples_per_step == size


def test_when_nothing_is_left_the_error_stays_what_it_was(start: Any, room: Any) -> None:
    training = start("train.base_weights=int8")
    room(lambda model, batch: False)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        update_within_memory(training, lambda _: None)
    assert training.fit == Fit(checkpointing=True)


@pytest.mark.parametrize("words", [("train.fit=false",), ()], ids=["not wanted", "several processes"])
def test_nothing_is_changed_where_it_may_not_be(start: Any, room: Any, words: tuple[str, ...]) -> None:
    from dataclasses import replace

    training = start(*words)
    if not words:
        training.device = replace(training.device, count=2)
    room(lambda model, batch: False)
    assert not can_fit(training)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        update_within_memory(training, lambda _: None)
    assert training.fit == Fit()


def test_another_error_is_no_reason_to_save_memory(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*words: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    training = start()
    monkeypatch.setattr(training_loop, "training_step", breaks)
    with pytest.raises(RuntimeError, match="mat1"):
        update_within_memory(training, lambda _: None)
    assert training.fit == Fit()


def test_a_failed_try_leaves_no_memory_behind(start: Any, room: Any) -> None:
    import gc
    import weakref

    training, kept = start("train.batch_size=2"), []

    def enough(model: Any, batch: Any) -> bool:
        kept.append(weakref.ref(batch.latents))
        return bool(model.unet.is_gradient_checkpointing)

    room(enough)
    released: list[bool] = []
    gc.disable()
    try:
        update_within_memory(training, lambda _: released.extend(reference() is None for reference in kept))
    finally:
        gc.enable()
    assert released == [True]


def test_a_base_that_is_too_large_goes_on_in_int8_and_a_resume_asks_no_more(
    pictures: Path, tiny_base: Path, tmp_path: Path, room: Any
) -> None:
    run = tmp_path / "run"

    def enough(model: Any, batch: Any) -> bool:
        fits = is_packed(model) and len(batch.captions) == 1
        if fits and len(asked) == 7:
            (run / "stop").touch()
        return fits

    asked = room(enough)
    assert impasto("train", pictures, "--output", run, "--base", tiny_base, *TINY, "--steps", 4) == STOPPED
    warned = [event["message"] for event in read_events(run) if event["type"] == "warning"]
    measures = [line for line in warned if line.startswith("Memory is too small for a step")]
    assert [word in line for word, line in zip(("checkpointing", "at once", "int8"), measures, strict=True)] == [True] * 3
    state = load_state(RunFolder(run))
    assert state is not None and 0 < state.step < 4
    assert Fit.of(state.facts["fit"]) == Fit(checkpointing=True, at_once=1, base_weights="int8")

    asked.clear()
    assert impasto("resume", run) == 0
    assert asked in ([1], [1, 1]), "a resumed run begins as it has ended"
    assert [event["step"] for event in read_events(run) if event["type"] == "step"] == [1, 2, 3, 4]
    again = [event["message"] for event in read_events(run) if event["type"] == "warning"][len(warned) :]
    assert not [line for line in again if line.startswith("Memory")]
    with safe_open(result_of(run), framework="pt") as file:
        assert file.metadata()["ss_total_batch_size"] == "2"


@pytest.mark.parametrize("size", [64, 96])
def test_a_steps_memory_is_told_by_a_small_part_of_a_picture(start: Any, size: int) -> None:
    training = start(f"dataset.resolution={size}", "text_encoder.learning_rate=0")
    (batch,) = training.batches.step(0)
    whole = fitting._kept_bytes(training, lambda: loss_of(training, batch))
    assert 0.6 < bytes_of_a_picture(training, lambda part: loss_of(training, part))[0] / whole < 1.6


@pytest.mark.parametrize("kind", ["full", "restart"])
def test_a_copy_of_what_learns_is_no_part_of_a_picture(start: Any, kind: str) -> None:
    def counted(*settings: str) -> tuple[int, int]:
        training = start("dataset.resolution=64", "train.precision=bf16", "text_encoder.learning_rate=0", *settings)
        return bytes_of_a_picture(training, lambda part: loss_of(training, part))

    (plain, few), (picture, copies) = counted("adapter.type=lora"), counted(f"adapter.type={kind}")
    weights = start("adapter.type=full", "text_encoder.learning_rate=0").flat.weights.numel()
    assert 0.9 < picture / plain < 1.1
    assert 0.7 < copies / (2 * weights) < 1.3, "each adapted weight once, in 16 bits, if its input has a gradient"
    assert few < copies / 2


def test_nothing_is_counted_where_all_fits_by_far(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start("dataset.resolution=64")
    (batch,) = training.batches.step(0)
    whole = fitting._kept_bytes(training, lambda: loss_of(training, batch))
    least = next(size for size in range(20, 50) if _by_far(training, 2**size, monkeypatch))
    assert 2**least > whole

    def never(batch: Any) -> torch.Tensor:
        raise AssertionError("counted all the same")

    fit_before_first_step(training, lambda _: None, never)


def _by_far(training: Training, free: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(fitting, "memory_free", lambda: free)
    return fitting._fits_by_far(training)


def test_on_a_cpu_it_is_made_to_fit_before_the_first_step(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(free: float) -> tuple[Training, list[str]]:
        training, told = start("train.batch_size=4"), []
        kept, copies = bytes_of_a_picture(training, lambda part: loss_of(training, part))
        assert copies < kept / 20, "in fp32 what learns is computed with as it is"
        monkeypatch.setattr(fitting, "memory_free", lambda: int(free * 1.3 / 0.9 * kept))
        fit_before_first_step(training, told.append, lambda part: loss_of(training, part))
        return training, told

    training, told = fitted(4.1)
    assert training.fit == Fit() and not told
    training, told = fitted(1.5)
    assert training.fit == Fit(checkpointing=True) and "GB are free" in told[0]
    training, told = fitted(0.7)
    assert training.fit == Fit(checkpointing=True, at_once=2) and len(told) == 2
    update(training)
    with pytest.raises(ReloadBase):
        fitted(0.01)


def test_room_is_made_no_further_than_there_are_ways(start: Any) -> None:
    training = start("train.base_weights=int8", "train.checkpointing=true")
    with pytest.raises(ValueError, match="nothing is left"):
        make_room(training, lambda _: None, "Short")
