"""A blind tournament: judged pairs -> a ranking with its uncertainty, and the pair that tells most next. No torch.

The model is Davidson's of 1970, which is Bradley and Terry's of 1952 with draws: of two with worths a and b the first is
preferred with a / (a + b + n sqrt(a b)) and neither with n sqrt(a b) / (the same). In the logarithms of the worths and of n
the likelihood is concave, and a weak normal prior makes its maximum unique, also for one that has won every time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["first", "second", "same"]
Numbers = NDArray[np.float64]

PRIOR_SD = 2.0
"""Standard deviation of the prior on each log worth: a favourite of 8 to 1 is nothing unusual."""
DRAW_PRIOR = (math.log(0.5), 1.5)
"""Mean and standard deviation of the prior on log n. n = 0.5 calls a fifth of the comparisons of equals a draw."""
SURE = 1.959963984540054
"""Standard errors by which two must differ to be told apart: 95 % of a normal distribution lie within them."""
_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Judgement:
    """One pair that was looked at: the numbers of the two and which was preferred."""

    first: int
    second: int
    outcome: Outcome


@dataclass(frozen=True)
class Ranking:
    """The most probable log worths (N,), of mean 0, log n, and the covariance (N + 1, N + 1) of both, n last."""

    worths: Numbers
    log_draw: float
    covariance: Numbers

    @property
    def order(self) -> list[int]:
        """Numbers of the contestants, the best first."""
        return [int(number) for number in np.argsort(-self.worths, kind="stable")]

    def error(self, number: int) -> float:
        """Standard error of one log worth against the mean of all."""
        count = len(self.worths)
        weights = np.full(count, -1.0 / count)
        weights[number] += 1.0
        return float(np.sqrt(weights @ self.covariance[:count, :count] @ weights))

    def difference(self, first: int, second: int) -> tuple[float, float]:
        """(log worth of the first minus the second's, its standard error)."""
        c = self.covariance
        variance = c[first, first] + c[second, second] - 2.0 * c[first, second]
        return float(self.worths[first] - self.worths[second]), float(np.sqrt(variance))

    def not_told_apart(self) -> list[int]:
        """Those that the leader cannot be told apart from at 95 %; empty when it leads for sure."""
        leader, *others = self.order
        return [other for other in others if self.difference(leader, other)[0] < SURE * self.difference(leader, other)[1]]


def chances(difference: float, log_draw: float) -> tuple[float, float, float]:
    """Probabilities that the first, the second, neither is preferred, at a difference of log worths."""
    logits = np.array([difference / 2.0, -difference / 2.0, log_draw])
    weights = np.exp(logits - logits.max())
    first, second, same = weights / weights.sum()
    return float(first), float(second), float(same)


def log_posterior(parameters: Numbers, judgements: Sequence[Judgement]) -> float:
    """Logarithm of likelihood times prior, but for a constant, at log worths and log n (N + 1,)."""
    worths, log_draw = parameters[:-1], float(parameters[-1])
    mean, spread = DRAW_PRIOR
    total = -float(worths @ worths) / (2.0 * PRIOR_SD**2) - (log_draw - mean) ** 2 / (2.0 * spread**2)
    place = {"first": 0, "second": 1, "same": 2}
    for one in judgements:
        total += math.log(chances(float(worths[one.first] - worths[one.second]), log_draw)[place[one.outcome]])
    return total


def rank(count: int, judgements: Sequence[Judgement]) -> Ranking:
    """The maximum of `log_posterior` for `count` contestants, by Newton's method; errors from its curvature there.

    Raises ValueError for a judgement about one that is not there, or about one against itself.
    """
    for one in judgements:
        if one.first == one.second or not (0 <= one.first < count and 0 <= one.second < count):
            raise ValueError(f"there is no pair {one.first}, {one.second} among {count}")
    parameters = np.zeros(count + 1)
    parameters[-1] = DRAW_PRIOR[0]
    value = log_posterior(parameters, judgements)
    for _ in range(_NEWTON_STEPS):
        gradient, curvature = _derivatives(parameters, judgements)
        step, share = np.linalg.solve(curvature, gradient), 1.0
        while log_posterior(parameters + share * step, judgements) < value and share > 1e-6:
            share /= 2.0
        parameters = parameters + share * step
        value = log_posterior(parameters, judgements)
        if float(np.abs(step).max()) < 1e-10:
            break
    covariance: Numbers = np.linalg.inv(_derivatives(parameters, judgements)[1]).astype(np.float64)
    # The prior alone knows where zero is; what is told is only about differences.
    return Ranking(parameters[:-1] - parameters[:-1].mean(), float(parameters[-1]), covariance)


def _derivatives(parameters: Numbers, judgements: Sequence[Judgement]) -> tuple[Numbers, Numbers]:
    """Gradient (N + 1,) and negative Hessian (N + 1, N + 1) of the log posterior."""
    count = len(parameters) - 1
    mean, spread = DRAW_PRIOR
    precision = np.full(count + 1, 1.0 / PRIOR_SD**2)
    precision[-1] = 1.0 / spread**2
    centre = np.zeros(count + 1)
    centre[-1] = mean
    gradient = -(parameters - centre) * precision
    curvature = np.diag(precision)
    for one in judgements:
        first, second, same = chances(float(parameters[one.first] - parameters[one.second]), float(parameters[-1]))
        # The three logits are linear: rows of what each takes from (first, second, log n).
        rows = np.array([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
        weights = np.array([first, second, same])
        expected = weights @ rows
        where = [one.first, one.second, count]
        gradient[where] += rows[{"first": 0, "second": 1, "same": 2}[one.outcome]] - expected
        curvature[np.ix_(where, where)] += rows.T @ (weights[:, None] * rows) - np.outer(expected, expected)
    return gradient, curvature


def next_pair(ranking: Ranking, judgements: Sequence[Judgement], seed: int) -> tuple[int, int]:
    """The pair of contestants whose comparison tells most now, its two in random order.

    What is told of a difference d is log(1 + I var(d)) with I the Fisher information of one comparison: large for the two
    that are closest and least compared. Equal ones are chosen among by `seed` and the number of judgements alone, so that
    a tournament that is opened again shows the same.
    """
    draw = random.Random(f"{seed}:{len(judgements)}")
    count = len(ranking.worths)
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    draw.shuffle(pairs)

    def told(pair: tuple[int, int]) -> float:
        difference, error = ranking.difference(*pair)
        first, second, _ = chances(difference, ranking.log_draw)
        information = (first + second) / 4.0 - ((first - second) / 2.0) ** 2
        return math.log1p(information * error**2)

    best = max(pairs, key=lambda pair: round(told(pair), 9))
    return best if draw.random() < 0.5 else best[::-1]


def in_words(ranking: Ranking, names: Sequence[str], judgements: Sequence[Judgement]) -> str:
    """What the ranking says, and whether that is more than chance."""
    if not judgements:
        return "Nothing is judged yet."
    leader, unsure = ranking.order[0], ranking.not_told_apart()
    if not unsure:
        return f"{names[leader]} leads: more than chance against every other (95 %)."
    others = ", ".join(names[number] for number in unsure)
    return f"{names[leader]} is first, but not to be told apart from {others} (95 %) by {len(judgements)} judgements."
