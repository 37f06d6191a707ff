"""Any adapter as a plain LoRA: the best one of a rank (Eckart and Young 1936), by singular values of the exact delta."""

from __future__ import annotations

from typing import Any

import torch

from trainers.adapters import ADAPTERS
from trainers.adapters.base import Decomposed
from trainers.errors import AdapterFileError
from trainers.formats.weights import ModuleWeights
from trainers.text import printable

COARSE = 1e-4
"""From this relative error on that is asked for, singular values below 1e-8 of the largest tell nothing."""


def to_lora(
    name: str, weights: ModuleWeights, rank: int, base_weight: torch.Tensor | None = None, within: float = 0.0
) -> tuple[ModuleWeights, float]:
    """(a LoRA of at most `rank`, its relative error ||difference|| / ||delta|| as it is stored, in float32).

    `weights` must be fitted to its layer where that is a convolution, so that the kernel is known. A rank above what the
    delta has is cut to it, and the LoRA is then exact but for rounding; of a relative error `within`, a lower one is taken that
    comes so near. alpha is the rank, the scale 1. Raises
    AdapterFileError for a DoRA without `base_weight`, and for numbers that are not finite.
    """
    return nearest_lora(name, weights, rank, base_weight, within)[:2]


def nearest_lora(
    name: str, weights: ModuleWeights, rank: int, base_weight: torch.Tensor | None = None, within: float = 0.0
) -> tuple[ModuleWeights, float, int]:
    """As `to_lora`, with the rank at which it would come `within` that error, whatever `rank` allows."""
    if weights.needs_base and base_weight is None:
        what = f"{printable(name, 120)} is a DoRA: what it changes depends on the base model's weight"
        raise AdapterFileError(what, hint="Give the base model too.")
    delta = weights.delta(base_weight)
    if not bool(delta.isfinite().all()):
        raise AdapterFileError(f"{printable(name, 120)} holds NaN or infinite numbers", hint="Take an earlier checkpoint.")
    size = float(delta.norm())
    up, down, needed = _factored(weights, delta, rank, within)
    ones = (1,) * (delta.ndim - 2)
    made = ModuleWeights({"down": down.reshape(-1, *delta.shape[1:]), "up": up.reshape(*up.shape, *ones)}, float(down.shape[0]))
    return made, float((made.delta() - delta).norm()) / size if size else 0.0, needed


def _factored(weights: ModuleWeights, delta: torch.Tensor, rank: int, within: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """up (out, r) and down (r, in * kernel) of equal sizes, float32, contiguous, r at least 1; the rank needed."""
    matrix = delta.flatten(1)
    left, values, right = _decomposed(weights, matrix, rank, within)
    # What lies below float64's rounding is no direction of the delta's.
    present = int((values > values[0] * 1e-13 * max(matrix.shape)).sum()) if float(values[0]) else 1
    needed = max(1, min(present, rank_within(values, within) if within else present))
    keep = min(rank, needed)
    roots = values[:keep].sqrt()
    up, down = left[:, :keep] * roots, roots[:, None] * right[:keep]
    return up.float().contiguous(), down.float().contiguous(), needed


def rank_within(values: torch.Tensor, error: float) -> int:
    """The lowest rank at which what is left of a matrix with these singular values, falling, is at most `error` of it."""
    squares = values.double().square()
    left = squares.flip(0).cumsum(0).flip(0)  # from each place on
    return int((left > error**2 * squares.sum()).sum())


def _decomposed(weights: ModuleWeights, matrix: torch.Tensor, most: int, within: float) -> Decomposed:
    """See AdapterKind.svd, for a delta of any type."""
    kind: Any = ADAPTERS[weights.kind]
    short: Decomposed | None = kind.svd(weights.factors, weights.scale, most) if hasattr(kind, "svd") else None
    if short is not None:
        return short
    if within >= COARSE:
        return _by_gram(matrix, most)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _by_gram(matrix: torch.Tensor, most: int) -> Decomposed:
    """By the eigenvectors of M M^T of the smaller side: half the time of the whole decomposition, and less.

    What is kept is as near as it can be but for rounding, as it is M projected on orthogonal vectors. Values below 1e-8 of
    the largest are lost in the squares' rounding, so that no rank is to be read from them.
    """
    flipped = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if flipped else matrix
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values, left = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)[:, :most]
    held = values[:most].clamp_min(torch.finfo(values.dtype).tiny)
    right = (left.T @ wide) / held[:, None]
    return (right.T, values, left.T) if flipped else (left, values, right)
