"""LoKr (LyCORIS, arXiv 2309.14859, section 3.4): dW = s W1 (x) W2, a Kronecker product of two small matrices.

Each of W1 (o1, i1) and W2 (o2, i2[, kh, kw]) is stored whole or as a product of two factors; W2 of a convolution perhaps
with a core t2 (r, r, kh, kw) between w2_a (r, o2) and w2_b (r, i2). The scale is alpha / r, and 1 where both are whole.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from trainers.adapters.base import (
    Decomposed,
    Factors,
    Started,
    Weight,
    apply_weight,
    product,
    same_layer,
    scaled,
    svd_of_product,
    unfolded,
    wide,
)
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch


class LokrSettings(LowRankSettings):
    """LoKr: a Kronecker product of two small matrices, of a high rank for few numbers."""

    type: Literal["lokr"] = "lokr"
    """Kind of adapter."""
    factor: int = Field(default=8, ge=2, le=64)
    """Both widths of a layer are divided by about this much: larger is fewer numbers in the large half, more in the small."""

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        return TrainedLoKr(self.factor)


class LoKr:
    """The mathematics of LoKr; no state. See adapters.base.AdapterKind for the meaning of each method."""

    parts = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    pairs = (("w1_b", "w1_a"), ("w2_b", "w2_a"))

    @staticmethod
    def fault(factors: Factors) -> str:
        """Each half whole or in two factors of one rank; never both."""
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        for half in ("w1", "w2"):
            pair = {f"{half}_a", f"{half}_b"}
            if half in shapes and shapes.keys() & pair:
                return f"has {half} both whole and in factors"
            if half not in shapes and pair - shapes.keys():
                return f"has no {half} factor"
        if "t2" in shapes and "w2" in shapes:
            return "has a core t2 beside a whole w2"
        sound = all(len(shape) == 2 for name, shape in shapes.items() if name in ("w1", "w1_a", "w1_b", "w2_a"))
        sound = sound and all(len(shapes[name]) in (2, 4) for name in ("w2", "w2_b") if name in shapes)
        if sound and "w1_a" in shapes:
            sound = shapes["w1_a"][1] == shapes["w1_b"][0]
        if sound and "t2" in shapes:
            core = shapes["t2"]
            sound = len(core) == 4 and len(shapes["w2_b"]) == 2 and core[:2] == (shapes["w2_a"][0], shapes["w2_b"][0])
        elif sound and "w2_a" in shapes:
            sound = shapes["w2_a"][1] == shapes["w2_b"][0]
        return "" if sound else f"has LoKr factors that do not fit each other: {shapes}"

    @staticmethod
    def rank(factors: Factors) -> int:
        """r of the half that is in factors; 0 where both are whole, as no alpha then applies."""
        inner = factors.get("w1_b", factors.get("w2_b"))
        return 0 if inner is None else int(inner.shape[0])

    @staticmethod
    def shape(factors: Factors) -> tuple[int, ...]:
        """(o1 * o2, i1 * i2[, kh, kw]); with the kernel folded into i2 where w2_b was not fitted to its layer."""
        (out_1, in_1), (out_2, in_2, *kernel) = _shape_of_w1(factors), _shape_of_w2(factors)
        return (out_1 * out_2, in_1 * in_2, *kernel)

    @staticmethod
    def fit(factors: Factors, shape: tuple[int, ...]) -> dict[str, torch.Tensor] | None:
        """w2, or w2_b, takes the layer's kernel."""
        made = LOKR.shape(factors)
        in_2 = shape[1] // _shape_of_w1(factors)[1]
        if "t2" in factors:
            return dict(factors) if made == tuple(shape) else None
        if "w2_b" in factors and unfolded(made, shape):
            return {**factors, "w2_b": factors["w2_b"].reshape(-1, in_2, *shape[2:])}
        if "w2" in factors and same_layer(made, shape):
            return {**factors, "w2": factors["w2"].reshape(-1, in_2, *shape[2:])}
        return None

    @staticmethod
    def prepare(factors: Factors, scale: float, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """As they are."""
        return dict(factors), scale

    @staticmethod
    def forward(frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """(W1 (x) W2) x without the product: the channels as (i1, i2) pass through W2 and then through W1."""
        import torch

        factors = wide(factors, x.dtype)
        w1, w2 = _w1(factors).to(x.dtype), _w2(factors)
        in_1 = w1.shape[1]
        if w2.dim() == 4:
            inner = apply_weight(frozen, x.reshape(-1, x.shape[1] // in_1, *x.shape[2:]), w2)
            inner = inner.reshape(x.shape[0], in_1, *inner.shape[1:])
            return scaled(torch.einsum("bichw,oi->bochw", inner, w1).flatten(1, 2), scale)
        inner = apply_weight(frozen, x.reshape(*x.shape[:-1], in_1, -1), w2)
        return scaled(torch.einsum("...ic,oi->...oc", inner, w1).flatten(-2), scale)

    @staticmethod
    def delta(factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The change in float64, of the shape that `shape` tells."""
        import torch

        factors = {name: factor.double() for name, factor in factors.items()}
        w1, w2 = _w1(factors), _w2(factors)
        return scale * torch.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2.contiguous())

    @staticmethod
    def norm(factors: Factors, scale: float) -> float:
        """The product of the halves' norms."""
        factors = {name: factor.double() for name, factor in factors.items()}
        return abs(scale) * math.prod(float(half.norm()) for half in (_w1(factors), _w2(factors)))

    @staticmethod
    def singular_values(factors: Factors, scale: float) -> torch.Tensor:
        """All products of one half's with the other's."""
        import torch

        factors = {name: factor.double() for name, factor in factors.items()}
        first, second = (torch.linalg.svdvals(half.flatten(1)) for half in (_w1(factors), _w2(factors)))
        return abs(scale) * torch.outer(first, second).flatten().sort(descending=True).values

    @staticmethod
    def svd(factors: Factors, scale: float, most: int) -> Decomposed:
        """From those of the halves: values are products of values, and vectors Kronecker products of vectors."""
        import torch

        factors = {name: factor.double() for name, factor in factors.items()}
        small, large = torch.linalg.svd(_w1(factors), full_matrices=False), _svd_of_w2(factors)
        values, order = (abs(scale) * torch.outer(small[1], large[1])).flatten().sort(descending=True, stable=True)
        first, second = order[:most] // len(large[1]), order[:most] % len(large[1])
        left = (small[0][:, None, first] * large[0][None, :, second]).flatten(0, 1)
        right = (small[2][first][:, :, None] * large[2][second][:, None, :]).flatten(1)
        return math.copysign(1.0, scale) * left, values, right


class TrainedLoKr:
    """See base.Trained: w1 (o1, i1) whole, with o1 and i1 the largest divisors of the widths up to `factor`; w2 in two
    factors of the rank, or whole where that is less. Where both are whole there is no alpha, and the scale is 1."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """w1, and w2 or w2_a and w2_b."""
        out, inner, *kernel = weight
        out_1, in_1 = (max(n for n in range(1, self.factor + 1) if width % n == 0) for width in (out, inner))
        out_2, rest = out // out_1, (inner // in_1, *kernel)
        if rank * (out_2 + math.prod(rest)) >= out_2 * math.prod(rest):
            return {"w1": (out_1, in_1), "w2": (out_2, *rest)}
        return {"w1": (out_1, in_1), "w2_a": (out_2, rank), "w2_b": (rank, *rest)}

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """w1 and w2_b Gaussian of variance 1 / width; w2_a, or the whole w2, zero, so that step 0 is the base."""
        import torch

        made = {}
        for name, size in self.factor_shapes(shape, rank).items():
            deviation = 0.0 if name in ("w2", "w2_a") else 1 / math.sqrt(math.prod(size[1:]))
            made[name] = deviation * torch.randn(size, generator=generator)
        return Started(made, scale if "w2_a" in made else 1.0)

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """See LoKr."""
        return LOKR.forward(frozen, x, factors, scale)

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """See LoKr."""
        return LOKR.delta(factors, self.exported(factors, scale)[2])

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """As it is."""
        return "lokr", factors, scale if "w2_a" in factors else 1.0

    def file_rank(self, rank: int) -> None:
        """Its rank is that of one half times the other's."""
        return None


def _shape_of_w1(factors: Factors) -> tuple[int, int]:
    rows = factors["w1"] if "w1" in factors else factors["w1_a"]
    columns = factors["w1"] if "w1" in factors else factors["w1_b"]
    return rows.shape[0], columns.shape[1]


def _shape_of_w2(factors: Factors) -> tuple[int, ...]:
    if "w2" in factors:
        return tuple(factors["w2"].shape)
    if "t2" in factors:
        return (factors["w2_a"].shape[1], factors["w2_b"].shape[1], *factors["t2"].shape[2:])
    return (factors["w2_a"].shape[0], *factors["w2_b"].shape[1:])


def _w1(factors: Factors) -> torch.Tensor:
    return factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]


def _w2(factors: Factors) -> torch.Tensor:
    import torch

    if "w2" in factors:
        return factors["w2"]
    if "t2" in factors:
        return torch.einsum("pqhw,po,qi->oihw", factors["t2"], factors["w2_a"], factors["w2_b"])
    return product(factors["w2_a"], factors["w2_b"])


def _svd_of_w2(factors: Factors) -> Decomposed:
    import torch

    if "w2_a" in factors and "t2" not in factors:
        short = svd_of_product(factors["w2_a"], factors["w2_b"], 1.0, factors["w2_a"].shape[1])
        if short is not None:
            return short
    left, values, right = torch.linalg.svd(_w2(factors).flatten(1), full_matrices=False)
    return left, values, right


LOKR = LoKr()
