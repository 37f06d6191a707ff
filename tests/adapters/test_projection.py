"""Random projections: right in the mean, momentum carried by its formula, with the factor of the least error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainers.adapters.base import Started, Turn
from trainers.adapters.projection import RandomProjection
from trainers.objective import generator_for

RANK, SCALE = 4, 0.5
OUT, IN = 6, 5
KIND = RandomProjection(1)
DRAWS = 4000


def gradient() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def begin(shape: tuple[int, ...] = (OUT, IN), seed: int = 0) -> dict[str, torch.Tensor]:
    started: Started = KIND.start(shape, RANK, SCALE, generator_for(seed), lambda: torch.zeros(shape))
    return {name: tensor.double() for name, tensor in {**started.factors, **started.constants}.items()}


def turned(known: dict[str, torch.Tensor], number: int) -> tuple[dict[str, torch.Tensor], Turn]:
    turn = KIND.turn(known, generator_for("turn", number))
    return {name: tensor.double() for name, tensor in {**known, **turn.factors, **turn.constants}.items()}, turn


def test_the_optimizer_sees_the_gradient_projected_and_a_step_of_it_is_the_gradient_in_the_mean() -> None:
    """SGD at the rate 1 / n, a new projection each step: after n steps W has moved as far as by full fine-tuning."""
    full, known, layer = gradient(), begin(), nn.Linear(IN, OUT, bias=False).double()
    x = torch.eye(IN, dtype=torch.float64)
    for number in range(1, DRAWS + 1):
        core = known["core"].requires_grad_()
        (KIND.forward(layer, x, {**known, "core": core}, SCALE) * full.T).sum().backward()  # type: ignore[no-untyped-call]
        assert core.grad is not None
        if number < 4:
            torch.testing.assert_close(core.grad, SCALE * known["u"].T @ full @ known["v"].T, rtol=1e-10, atol=1e-10)
        known, _ = turned({**known, "core": (core - core.grad / DRAWS).detach()}, number)
    moved = KIND.delta(known, SCALE)
    # One projection is off by this much of the gradient; the mean of n by a root of n less.
    alone = ((1 + (OUT + 1) / RANK) * (1 + (IN + 1) / RANK) - 1) ** 0.5
    apart = float((moved + SCALE**2 * full).norm() / (SCALE**2 * full).norm())
    assert apart < 1.5 * alone / DRAWS**0.5 < 0.1
    assert int((torch.linalg.svdvals(moved) > 1e-3).sum()) == IN > RANK


@pytest.mark.parametrize("shape", [(OUT, IN), (OUT, IN, 3, 3)])
def test_momentum_goes_over_by_its_formula(shape: tuple[int, ...]) -> None:
    old = begin(shape)
    new, turn = turned(old, 1)
    assert not torch.equal(old["u"], new["u"]) and not torch.equal(old["v"], new["v"])
    mean = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, v, new_u, new_v = (each[name].flatten(1) for each in (old, new) for name in ("u", "v"))
    decompressed = u @ mean @ v
    height, width = decompressed.shape
    less = 1 / ((1 + (height + 1) / RANK) * (1 + (width + 1) / RANK))
    torch.testing.assert_close(
        turn.carry("mean", "core", mean), less * new_u.T @ decompressed @ new_v.T, rtol=1e-12, atol=1e-12
    )
    squares = mean.square()
    assert torch.equal(turn.carry("square", "core", squares), torch.full_like(squares, float(squares.mean())))


def test_the_carried_momentum_has_the_least_error_and_its_squares_the_right_mean() -> None:
    """Of c u (u^T G v^T) v as an estimate of G: better than FLoRA's c = 1, than none, and than a little more or less."""
    full, known = gradient(), begin()
    error: dict[float, float] = dict.fromkeys((0.0, 0.7, 1.0, 1.4), 0.0)
    squares = torch.zeros(RANK, RANK, dtype=torch.float64)
    less = 1 / ((1 + (OUT + 1) / RANK) * (1 + (IN + 1) / RANK))
    for number in range(DRAWS):
        known, _ = turned(known, number)
        core = known["u"].T @ full @ known["v"].T
        squares += core.square() / DRAWS
        for times in error:
            error[times] += float((times * less * known["u"] @ core @ known["v"] - full).square().sum()) / DRAWS
    assert error[1.0] < min(error[0.0], error[0.7], error[1.4])
    assert error[1.0] == pytest.approx(float(full.square().sum()) * (1 - less), rel=0.02)
    torch.testing.assert_close(squares, torch.full_like(squares, float(full.square().sum()) / RANK**2), rtol=0.15, atol=0)


def test_projections_have_the_identity_as_their_mean_and_follow_from_the_seed() -> None:
    ones = torch.zeros(OUT, OUT, dtype=torch.float64)
    for number in range(DRAWS):
        u = turned(begin(), number)[0]["u"]
        ones += u @ u.T / DRAWS
    torch.testing.assert_close(ones, torch.eye(OUT, dtype=torch.float64), rtol=0, atol=0.06)
    assert torch.equal(turned(begin(), 7)[0]["u"], turned(begin(), 7)[0]["u"])


def test_a_turn_of_a_convolution_leaves_what_it_answers() -> None:
    layer: Any = nn.Conv2d(IN, OUT, 3, padding=1).double().requires_grad_(False)
    known = begin((OUT, IN, 3, 3))
    known["core"] = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(2, IN, 7, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before, after = KIND.forward(layer, x, known, SCALE), KIND.forward(layer, x, turned(known, 1)[0], SCALE)
    torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(before, F.conv2d(x, KIND.delta(known, SCALE), padding=1), rtol=1e-10, atol=1e-10)
