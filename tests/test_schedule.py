"""The learning rate's way: warm-up, then constant, linear or cosine down to a floor."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from trainers.schedule import rate_factor

Kind = Literal["constant", "linear", "cosine"]
KINDS: list[Kind] = ["constant", "linear", "cosine"]


def factors(kind: Kind, warmup: int = 0, floor: float = 0.0, steps: int = 10) -> list[float]:
    return [rate_factor(kind, warmup, floor, step, steps) for step in range(steps)]


def test_constant_stays_at_one() -> None:
    assert factors("constant") == [1.0] * 10


def test_linear_falls_by_the_same_amount_each_step() -> None:
    assert factors("linear") == pytest.approx([1 - step / 10 for step in range(10)])


def test_cosine_is_half_a_cosine() -> None:
    assert factors("cosine") == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_evenly_from_above_zero_to_one(kind: Kind) -> None:
    assert factors(kind, warmup=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_fall_takes_what_the_warm_up_leaves(kind: Kind) -> None:
    assert factors(kind, warmup=4, steps=14)[4:] == pytest.approx(factors(kind, steps=10))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_fall_would_reach_its_floor_after_the_last_step(kind: Kind) -> None:
    assert rate_factor(kind, 2, 0.1, 10, 10) == pytest.approx(0.1)
    assert min(factors(kind, warmup=0, floor=0.1)) > 0.1


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_factor_lies_above_zero_and_at_most_at_one(kind: Kind, floor: float, warmup: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(kind, warmup, floor, steps=25))


def test_a_floor_of_one_never_falls() -> None:
    assert factors("cosine", floor=1.0) == pytest.approx([1.0] * 10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_up_longer_than_the_run_still_only_rises(kind: Kind) -> None:
    rising = factors(kind, warmup=50, steps=10)
    assert rising == sorted(rising) and rising[-1] == pytest.approx(10 / 51)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step_learns_at_the_full_rate(kind: Kind) -> None:
    assert rate_factor(kind, 0, 0.0, 0, 1) == 1.0
