"""What an adapter type can do, for whoever loads, blends, merges or writes it; and the steps that several types share.

A type is an object without state in the table ADAPTERS. Its factors are named as the parts in a file's keys. `fit` brings
them into their layer's own form, so that they tell its shape; until then a kernel may be folded into the input width.
Torch-free at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Factors = Mapping[str, "torch.Tensor"]
Weight = Callable[[], "torch.Tensor"]


class AdapterKind(Protocol):
    """One adapter type. Weights are (out, in) or (out, in, kh, kw); the change of a weight at strength 1 is its delta.

    A type may have `joined(frozen, x, [(factors, scale), ...])`, which gives frozen(x) and what `forward` adds to it in one
    autograd node, for one layer or for several that read the same x, some perhaps without an adapter; None where it cannot (see
    adapters/lora.py). It may have `singular_values(factors, scale)`, which gives those of the delta, float64, falling, without
    forming it, or None; and `svd(factors, scale, most)`, which gives the delta, as a matrix (out, in * kernel) in float64, as
    (left (out, k), all singular values, falling, right (k, in * kernel)) with k = `most` or all that there are, without
    decomposing the matrix, or None where it knows no shorter way.
    """

    @property
    def parts(self) -> Sequence[str]:
        """Names that its factors may have."""

    @property
    def pairs(self) -> Sequence[tuple[str, str]]:
        """Factors (down, up) whose product alone counts, where both are there: a number may move between the two."""

    def fault(self, factors: Factors) -> str:
        """What is wrong with the factors among themselves, as a phrase; "" for nothing."""

    def rank(self, factors: Factors) -> int:
        """r of the scale alpha / r; 0 where no alpha applies and the scale is 1."""

    def shape(self, factors: Factors) -> tuple[int, ...]:
        """Shape of the weight that they change, as far as they tell."""

    def fit(self, factors: Factors, shape: tuple[int, ...]) -> dict[str, torch.Tensor] | None:
        """The factors in the form of a layer with weight `shape`; None where they were made for another."""

    def prepare(self, factors: Factors, scale: float, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """(factors, scale) as `forward` and `delta` want them beside a frozen `weight`: done once, not at each step."""

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """What is added to frozen(x); linear in `scale`, which is a number or a tensor (B,), one for each row."""

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The change in float64. Only a type that looks at the frozen `weight` needs it, and raises ValueError without."""

    def norm(self, factors: Factors, scale: float) -> float | None:
        """Frobenius norm of the delta; None where that depends on the frozen weight."""


@dataclass(frozen=True)
class Started:
    """An adapter at its start: the factors that learn, the scale that `forward` gets at strength 1, and the tensors that
    `forward` needs beside the factors and that no optimizer changes, only a turn (see Trained). A run that goes on makes them
    again, the same, and takes those that are `kept` from its state."""

    factors: dict[str, torch.Tensor]
    scale: float
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


Carry = Callable[[Literal["mean", "square"], str, "torch.Tensor"], "torch.Tensor"]
"""carry(which, factor, tensor) -> the same shape: what an optimizer's running mean of a factor's gradients, or of their
squares, becomes at a turn. It has the factor's shape, or is a mean over one of its axes."""


@dataclass(frozen=True)
class Turn:
    """What comes into the place of a layer's factors and of some of its constants, all of the same shapes."""

    factors: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    carry: Carry
    changed: bool = True
    """Whether anything of the layer is another than before; where it is not, the rest counts for nothing."""


class Trained(Protocol):
    """What of a type is trained: `settings.trained`. Files know it as one of the table ADAPTERS, which `exported` names.

    `forward` and `delta` as of AdapterKind, with the constants among the factors. A type may name, as `exact`, factors that
    stay float32 over a base in 16 bits, and as `kept`, constants that a training state holds: those that are made of the
    weight, which a run that goes on may have in fewer bits, and those that change.
    `native_shapes(weight, rank)` are those of its factors in a file of its own form, where they are others.

    A type that goes in periods has their length in updates as `every`, and `turn(factors, generator) -> Turn`, which begins
    the next one: given the constants among the factors, all float64, it leaves the delta as it is. Its `warmup` says over
    how many updates the rate then rises again. See trainers/turns.py.
    """

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what learns beside a frozen weight (out, in) or (out, in, kh, kw)."""

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """At the start the delta is zero. `scale` is alpha / rank; `weight()` gives the frozen weight, float32, on the CPU."""

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """What is added to frozen(x)."""

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The change in float64."""

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """(entry of ADAPTERS, its factors, its scale), given the constants among the factors and alpha / rank."""

    def file_rank(self, rank: int) -> int | None:
        """Rank of the plain LoRA that holds the delta exactly; None where none of a low rank does."""


def scaled(y: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """y (B, ...) times a number, or each row times its own of a tensor (B,)."""
    if isinstance(scale, float):
        return y * scale
    return y * scale.to(y.dtype).view(-1, *(1 for _ in y.shape[1:]))


def apply_weight(frozen: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x through `weight` as the layer `frozen` would take it, with its stride and padding and without its bias."""
    import torch.nn.functional as F

    weight = weight.to(x.dtype)
    if weight.dim() == 4:
        return F.conv2d(x, weight, None, frozen.stride, frozen.padding, frozen.dilation)
    return F.linear(x, weight)


def wide(factors: Factors, least: torch.dtype) -> dict[str, torch.Tensor]:
    """Factors in `least` or what is wider, so that products of several are rounded once."""
    import torch

    return {name: factor.to(torch.promote_types(factor.dtype, least)) for name, factor in factors.items()}


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(out, r[, 1, 1]) times (r, in[, kh, kw]) -> (out, in[, kh, kw])."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def values_of_product(up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor | None:
    """The r singular values, falling, float64, of scale * up @ down for (out, r, ...) and (r, in, ...), by two thin QR
    decompositions and an SVD of (r, r). None where r is above a side, as the whole matrix is then the smaller one."""
    import torch

    up, down = up.double().flatten(1), down.double().flatten(1)
    if up.shape[1] > min(up.shape[0], down.shape[1]):
        return None
    upper, lower = (torch.linalg.qr(side, mode="r").R for side in (up, down.T))
    values: torch.Tensor = torch.linalg.svdvals(upper @ lower.T)
    return abs(scale) * values


Decomposed = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""left (out, k), singular values, falling, right (k, in): the first k of a matrix's singular vectors, and all values."""


def svd_of_product(up: torch.Tensor, down: torch.Tensor, scale: float, most: int) -> Decomposed | None:
    """Of scale * up @ down, as `AdapterKind.svd`; two thin QR decompositions as in `values_of_product`."""
    import torch

    up, down = up.double().flatten(1), down.double().flatten(1)
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return None
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(scale * (upper @ lower.T))
    return left @ inner_left[:, :most], values, inner_right[:most] @ right.T


def same_layer(made: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether two weight shapes are of one layer; a Linear and a 1x1 convolution count as the same."""
    return tuple(made[:2]) == tuple(shape[:2]) and _kernel(made) == _kernel(shape)


def unfolded(made: Sequence[int], shape: Sequence[int]) -> bool:
    """As `same_layer`, also where `made` is (out, in * kh * kw) of a convolution (out, in, kh, kw)."""
    return same_layer(made, shape) or (len(made) == 2 and made[0] == shape[0] and made[1] == math.prod(shape[1:]))


def _kernel(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[2:]) or (1, 1)
