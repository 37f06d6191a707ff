"""How much of its rank an update uses, told by the singular values of what it adds to the weight.

The effective rank is exp(-sum p_k log p_k) with p_k = sigma_k / sum(sigma): r equal values give r, a single one 1 (Roy and
Vetterli, "The effective rank", EUSIPCO 2007, section 2). Beside it stands the rank that keeps 99 % of the update: of its
squared Frobenius norm, so that what is left out has a tenth of its size. The bias of a `full` module has no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from trainers.adapters import ADAPTERS
from trainers.formats.plain import rank_within
from trainers.formats.weights import ModuleWeights

KEPT = 0.99
"""Share of an update's squared norm that "the rank that keeps it" keeps."""
LARGEST = 640
"""Smaller side of the largest matrix that is decomposed as a whole, for types without a shorter way: a second on a core."""


@dataclass(frozen=True)
class UsedRank:
    """Of one module: the effective rank (0 where nothing is changed), the rank that keeps 99 %, and the squared singular
    values, falling, as many as its form can have: for a LoRA its rank."""

    effective: float
    keeps: int
    squares: tuple[float, ...]

    @property
    def most(self) -> int:
        """The rank that its form could have."""
        return len(self.squares)


@dataclass(frozen=True)
class RankSummary:
    """Of a whole file. `effective`: the mean of the modules that change something. `most`: the highest that one could have.
    `keeps`: the rank to which all modules may be cut so that 99 % of the squared norm of all updates together is kept."""

    effective: float
    most: int
    keeps: int

    def sentence(self) -> str:
        """For people."""
        return f"uses {self.effective:.1f} of {self.most} ranks; rank {self.keeps} would keep 99 % of it"


def singular_values(weights: ModuleWeights) -> torch.Tensor | None:
    """Of the change of the weight, in float64, falling: for a LoRA from its factors, without the matrix.

    None where that depends on the base's weight, as of a DoRA, and for a matrix above LARGEST of a type without a short way.
    """
    kind = ADAPTERS[weights.kind]
    if weights.needs_base:
        return None
    if hasattr(kind, "singular_values"):
        values: torch.Tensor | None = kind.singular_values(weights.factors, weights.scale)
        if values is not None:
            return values
    out, *inner = weights.shape
    if min(out, math.prod(inner)) > LARGEST:
        return None
    whole: torch.Tensor = torch.linalg.svdvals(weights.delta().flatten(1))
    return whole


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of singular values taken as shares of their sum; 0 where all are zero."""
    values = values.double()
    if not float(values.sum()):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def used_rank(weights: ModuleWeights) -> UsedRank | None:
    """None where `singular_values` are not known."""
    values = singular_values(weights)
    if values is None:
        return None
    keeps = rank_within(values, (1 - KEPT) ** 0.5)
    return UsedRank(effective_rank(values), keeps, tuple(values.square().tolist()))


def summarise(modules: Iterable[UsedRank | None]) -> RankSummary | None:
    """Of the modules of which it is known; None where that is none, or nothing is changed."""
    known = [module for module in modules if module is not None and module.effective]
    if not known:
        return None
    most = max(module.most for module in known)
    squares = torch.zeros(most, dtype=torch.float64)
    for module in known:
        squares[: module.most] += torch.tensor(module.squares, dtype=torch.float64)
    # Summed place by place they fall still, and their tails are those of all modules cut alike.
    effective = sum(module.effective for module in known) / len(known)
    return RankSummary(effective, most, rank_within(squares.sqrt(), (1 - KEPT) ** 0.5))
