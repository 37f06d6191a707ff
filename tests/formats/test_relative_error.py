"""The distance of two modules without their matrices, against the matrices; and the quick look for numbers that are none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.formats.examples import random_weights
from trainers.formats import ModuleWeights
from trainers.formats.weights import relative_error
from trainers.tensors import FLOATS, all_finite


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 2), (32, 16, 1, 1), (16, 8, 3, 3)], ids=str)
@pytest.mark.parametrize("other_rank", [4, 7])
def test_the_error_is_that_of_the_whole_matrices(shape: tuple[int, ...], other_rank: int) -> None:
    wanted, other = random_weights(shape, 4, 3.0, seed=1), random_weights(shape, other_rank, 5.0, seed=2)
    plain = float((other.delta() - wanted.delta()).norm() / wanted.delta().norm())
    assert relative_error(other, wanted) == pytest.approx(plain, rel=1e-12)


def test_the_same_numbers_are_no_error_and_a_small_one_is_found() -> None:
    wanted = random_weights((64, 48), 8, 4.0, seed=1)
    assert relative_error(wanted, wanted) < 1e-15
    for size in (1e-3, 1e-9):
        assert relative_error(dataclasses.replace(wanted, alpha=4.0 * (1 + size)), wanted) == pytest.approx(size, rel=1e-5)
    # Other factors of the same matrix.
    turned = ModuleWeights({"down": wanted.factors["down"] * 4, "up": wanted.factors["up"] / 4}, 4.0)
    assert relative_error(turned, wanted) < 1e-15


def test_what_cannot_be_compared_is_infinitely_far() -> None:
    wanted = random_weights((8, 6), 2, 2.0, seed=1)
    assert relative_error(random_weights((8, 7), 2, 2.0, seed=1), wanted) == math.inf
    broken = ModuleWeights({**wanted.factors, "up": wanted.factors["up"] * math.nan}, 2.0)
    assert relative_error(broken, wanted) == relative_error(wanted, broken) == math.inf
    zero = ModuleWeights({**wanted.factors, "up": wanted.factors["up"] * 0}, 2.0)
    assert relative_error(zero, zero) == 0 and relative_error(wanted, zero) == math.inf
    assert relative_error(zero, wanted) == pytest.approx(1)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
def test_one_number_that_is_none_is_found_anywhere(dtype: torch.dtype) -> None:
    assert all_finite(torch.zeros(0).to(dtype)) and all_finite(torch.tensor(3.0).to(dtype))
    for size in (1, 7, 64, 1000):
        numbers = torch.randn(size)
        assert all_finite(numbers.to(dtype))
        for bad in (math.nan,) if dtype is torch.float8_e4m3fn else (math.nan, math.inf, -math.inf):
            for place in {0, size // 2, size - 1}:
                assert not all_finite(torch.where(torch.arange(size) == place, bad, numbers).to(dtype)), (bad, place)


def test_whole_numbers_are_finite() -> None:
    assert all_finite(torch.arange(77)) and all_finite(torch.tensor(8))
