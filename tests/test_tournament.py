"""The ranking: against a direct search for the maximum, its intervals by simulation, ties, and which pair is shown next."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trainers.tournament import SURE, Judgement, chances, in_words, log_posterior, next_pair, rank


def simulate(worths: list[float], log_draw: float, games: int, seed: int) -> list[Judgement]:
    """Judgements of random pairs, drawn from the model."""
    draw, found = random.Random(seed), []
    for _ in range(games):
        first, second = draw.sample(range(len(worths)), 2)
        weights = chances(worths[first] - worths[second], log_draw)
        found.append(Judgement(first, second, draw.choices(("first", "second", "same"), weights)[0]))
    return found


def search(count: int, judgements: list[Judgement]) -> np.ndarray:
    """The maximum of the log posterior by trying steps along each axis, ever smaller: knows no derivative."""
    best = np.zeros(count + 1)
    value, step = log_posterior(best, judgements), 1.0
    while step > 1e-7:
        moved = False
        for axis in range(count + 1):
            for way in (step, -step):
                tried = best.copy()
                tried[axis] += way
                if (now := log_posterior(tried, judgements)) > value:
                    best, value, moved = tried, now, True
        step = step if moved else step / 2
    return best


@pytest.mark.parametrize("seed", [1, 2])
def test_the_ranking_is_the_maximum(seed: int) -> None:
    judgements = simulate([1.0, 0.2, -0.4, -0.8], np.log(0.6), 30, seed)
    found, searched = rank(4, judgements), search(4, judgements)
    assert np.allclose(found.worths, searched[:-1] - searched[:-1].mean(), atol=1e-5)
    assert found.log_draw == pytest.approx(searched[-1], abs=1e-5)


def test_the_errors_are_the_curvature_at_the_maximum() -> None:
    judgements = simulate([0.5, 0.0, -0.5], np.log(0.5), 40, 3)
    found = rank(3, judgements)
    parameters, step = np.append(found.worths, found.log_draw), 1e-4
    hessian = np.zeros((4, 4))
    for row, a in enumerate(np.eye(4) * step):
        for column, b in enumerate(np.eye(4) * step):
            corners = [parameters + a + b, parameters + a - b, parameters - a + b, parameters - a - b]
            values = [log_posterior(corner, judgements) for corner in corners]
            hessian[row, column] = (values[0] - values[1] - values[2] + values[3]) / (4 * step**2)
    assert np.allclose(np.linalg.inv(-hessian), found.covariance, rtol=1e-3, atol=1e-5)


def test_the_intervals_hold_the_truth_as_often_as_they_say() -> None:
    worths, inside, asked = [0.9, 0.3, -0.3, -0.9], 0, 0
    for seed in range(80):
        found = rank(4, simulate(worths, np.log(0.5), 60, seed))
        for first, second in ((0, 1), (0, 3), (1, 2)):
            difference, error = found.difference(first, second)
            inside += abs(difference - (worths[first] - worths[second])) <= SURE * error
            asked += 1
    assert 0.92 <= inside / asked <= 0.985


def test_one_that_wins_every_time_has_a_finite_place_and_a_draw_is_no_win() -> None:
    won = rank(2, [Judgement(0, 1, "first")] * 5)
    assert won.order == [0, 1] and 0 < won.worths[0] < 5
    drawn = rank(2, [Judgement(0, 1, "same")] * 5)
    assert drawn.worths == pytest.approx([0, 0]) and drawn.log_draw > won.log_draw
    assert rank(2, [Judgement(1, 0, "second")] * 5).worths == pytest.approx(won.worths)


def test_a_leader_is_told_only_when_it_is_more_than_chance() -> None:
    few, many = [Judgement(0, 1, "first")] * 2, [Judgement(0, 1, "first")] * 20
    assert rank(2, few).not_told_apart() == [1] and rank(2, many).not_told_apart() == []
    assert "not to be told apart from b" in in_words(rank(2, few), ("a", "b"), few)
    assert in_words(rank(2, many), ("a", "b"), many).startswith("a leads")


def test_the_next_pair_is_close_little_compared_and_the_same_after_a_restart() -> None:
    seen = [*([Judgement(0, 1, "first"), Judgement(0, 1, "second")] * 10), *[Judgement(0, 2, "first")] * 2]
    seen += [Judgement(1, 2, "first")] * 2
    assert set(next_pair(rank(3, seen), seen, 4)) != {0, 1}  # compared twenty times already
    # 2 has lost against both, clearly: the two that are close tell more.
    seen = [Judgement(first, 2, "first") for first in (0, 1)] * 8 + [Judgement(0, 1, "same")]
    assert set(next_pair(rank(3, seen), seen, 4)) == {0, 1}
    assert next_pair(rank(3, seen), seen, 4) == next_pair(rank(3, seen), seen, 4)
    first = {next_pair(rank(4, []), [], seed) for seed in range(60)}
    assert len(first) == 12  # all pairs, both ways round


def test_a_judgement_about_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="no pair 0, 3 among 3"):
        rank(3, [Judgement(0, 3, "same")])
