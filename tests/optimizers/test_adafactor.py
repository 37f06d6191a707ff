"""Adafactor: a step as long as the learning rate says, whatever the size of the weights and of the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainers.optimizers.adafactor import AdafactorSettings
from trainers.optimizers.adamw import AdamWSettings
from trainers.optimizers.base import OptimizerSettings

RATE = AdafactorSettings().learning_rate


def learnt(settings: OptimizerSettings, rate: float, steps: int = 100, scale: float = 1.0) -> torch.Tensor:
    """`up` (24, 4) of a LoRA after some steps towards a fixed target of rank 4; the loss is multiplied by `scale`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    target = normal(24, 4) @ normal(4, 32)
    down, up = nn.Parameter(normal(4, 32) / 32**0.5), nn.Parameter(torch.zeros(24, 4))
    optimizer = settings.build([{"params": [down, up], "lr": rate}])
    for _ in range(steps):
        pixels = normal(32, 8)
        loss = scale * (up @ down @ pixels - target @ pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return up.detach()


def size(tensor: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(tensor.square().mean().sqrt())


def test_at_its_default_rate_it_learns_about_as_much_as_adamw_at_the_same_rate() -> None:
    ours, usual = size(learnt(AdafactorSettings(), RATE)), size(learnt(AdamWSettings(weight_decay=0), RATE))
    assert usual > 0.02
    assert 1 / 3 < ours / usual < 3


@pytest.mark.parametrize("start", [0.0, 1e-3, 0.3])
def test_the_first_step_is_the_learning_rate_long_whatever_the_weights_are(start: float) -> None:
    weights = nn.Parameter(torch.full((6, 5), start))
    weights.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    AdafactorSettings().build([{"params": [weights], "lr": RATE}]).step()
    assert size(weights.detach() - start) == pytest.approx(RATE, rel=0.1)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_the_size_of_the_loss_does_not_matter(scale: float) -> None:
    torch.testing.assert_close(learnt(AdafactorSettings(), RATE, 20, scale), learnt(AdafactorSettings(), RATE, 20))


def test_a_gradient_of_zero_moves_nothing() -> None:
    weights = nn.Parameter(torch.ones(3, 4))
    weights.grad = torch.zeros(3, 4)
    AdafactorSettings().build([{"params": [weights], "lr": RATE}]).step()
    assert torch.equal(weights, torch.ones(3, 4))
