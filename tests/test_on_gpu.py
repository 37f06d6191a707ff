"""The engine on an NVIDIA GPU against the plain base on the same GPU: skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainers import setup
from trainers.graph import Eager, Graphed
from trainers.train import update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
STEPS = 16


def learnt(start: Any, *settings: str) -> tuple[torch.Tensor, list[float], Any]:
    """Weights and losses after some steps, and the runner that issued them."""
    training = start("train.batch_size=2", "train.min_snr_gamma=0", "dataset.buckets=false", *settings)
    losses = [update(training)[0] for _ in range(STEPS)]
    return training.flat.weights.double().cpu(), losses, training.runner


@pytest.fixture
def plain(start: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, list[float]]:
    with monkeypatch.context() as patch:
        patch.setattr(setup, "_make_fast", lambda *words: [])
        patch.setattr(setup, "choose_runner", lambda *words: Eager())
        weights, losses, _ = learnt(start, "train.precision=fp32")
    return weights, losses


@pytest.mark.parametrize("settings", [(), ("train.recording=off",), ("train.checkpointing=true",)])
def test_the_engine_learns_what_the_plain_base_learns(start: Any, plain: Any, settings: tuple[str, ...]) -> None:
    weights, losses, runner = learnt(start, "train.precision=fp32", *settings)
    assert isinstance(runner, Eager if "train.recording=off" in settings else Graphed)
    if isinstance(runner, Graphed):
        assert runner._recorded and not runner._given_up
    assert losses == pytest.approx(plain[1], rel=1e-4)
    assert float((weights - plain[0]).norm() / plain[0].norm()) < 1e-3


@pytest.mark.parametrize("settings", [("train.precision=bf16",), ("train.precision=fp16",), ("train.base_weights=int8",)])
def test_in_few_bits_the_losses_are_near_by(start: Any, plain: Any, settings: tuple[str, ...]) -> None:
    _, losses, runner = learnt(start, *settings)
    assert runner._recorded
    assert losses == pytest.approx(plain[1], rel=3e-2)
