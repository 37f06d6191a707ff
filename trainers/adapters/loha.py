"""LoHa (FedPara, arXiv 2108.06098, section 2.2): dW = s (W1a W1b) o (W2a W2b), elementwise, of rank up to r * r.

Of a convolution either W1b and W2b span in * kh * kw (proposition 2), or cores T1, T2 (r, r, kh, kw) stand between
W1a, W2a (r, out) and W1b, W2b (r, in) (proposition 3). Names and layouts are those of LyCORIS (arXiv 2309.14859).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from trainers.adapters.base import (
    Decomposed,
    Factors,
    Started,
    Weight,
    apply_weight,
    product,
    scaled,
    svd_of_product,
    unfolded,
    values_of_product,
    wide,
)
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch


class LohaSettings(LowRankSettings):
    """LoHa: the elementwise product of two low-rank matrices, of rank up to rank * rank."""

    type: Literal["loha"] = "loha"
    """Kind of adapter."""

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        return LOHA


class LoHa:
    """The mathematics of LoHa; no state. See adapters.base.AdapterKind for the meaning of each method."""

    parts = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    pairs = (("w1_b", "w1_a"), ("w2_b", "w2_a"))

    @staticmethod
    def fault(factors: Factors) -> str:
        """Four factors, with both cores or none, that agree on rank and on the weight's shape."""
        missing = [part for part in ("w1_a", "w1_b", "w2_a", "w2_b") if part not in factors]
        if ("t1" in factors) != ("t2" in factors):
            missing.append("t2" if "t1" in factors else "t1")
        if missing:
            return f"has no {' and no '.join(missing)} factor"
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        core = "t1" in factors
        sound = all(len(shapes[name]) == 2 for name in ("w1_a", "w2_a")) and all(len(shapes[f"w{n}_b"]) in (2, 4) for n in "12")
        if sound and core:
            sound = all(len(shapes[f"t{n}"]) == 4 and len(shapes[f"w{n}_b"]) == 2 for n in "12") and all(
                shapes[f"t{n}"][:2] == (shapes[f"w{n}_a"][0], shapes[f"w{n}_b"][0]) for n in "12"
            )
        elif sound:
            sound = all(shapes[f"w{n}_a"][1] == shapes[f"w{n}_b"][0] for n in "12")
        if not sound or _shape_of(factors, 1) != _shape_of(factors, 2):
            return f"has LoHa factors that do not fit each other: {shapes}"
        return ""

    @staticmethod
    def rank(factors: Factors) -> int:
        """r: the rows of w1_b."""
        return int(factors["w1_b"].shape[0])

    @staticmethod
    def shape(factors: Factors) -> tuple[int, ...]:
        """(out, in[, kh, kw]); (out, in * kh * kw) of a convolution without cores that was not fitted to its layer."""
        return _shape_of(factors, 1)

    @staticmethod
    def fit(factors: Factors, shape: tuple[int, ...]) -> dict[str, torch.Tensor] | None:
        """w1_b and w2_b take the layer's kernel, where there are no cores."""
        if "t1" in factors:
            return dict(factors) if _shape_of(factors, 1) == tuple(shape) else None
        if not unfolded(_shape_of(factors, 1), shape):
            return None
        fitted = {f"w{n}_b": factors[f"w{n}_b"].reshape(-1, *shape[1:]) for n in "12"}
        return {**factors, **fitted}

    @staticmethod
    def prepare(factors: Factors, scale: float, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """As they are."""
        return dict(factors), scale

    @staticmethod
    def forward(frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """x through the product, which is formed for this one call from the small factors."""
        return scaled(apply_weight(frozen, x, _weight(wide(factors, x.dtype))), scale)

    @staticmethod
    def factor_shapes(weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """w1_a, w2_a (out, r) and w1_b, w2_b (r, in[, kh, kw])."""
        return {
            f"w{half}_{part}": size for half in "12" for part, size in (("a", (weight[0], rank)), ("b", (rank, *weight[1:])))
        }

    @staticmethod
    def start(shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """As LyCORIS and peft: w1_a of deviation 0.1, both _b of 1, w2_a zero, so that step 0 is the base."""
        import torch

        deviations = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0}
        sizes = LOHA.factor_shapes(shape, rank)
        return Started({name: deviations[name] * torch.randn(size, generator=generator) for name, size in sizes.items()}, scale)

    @staticmethod
    def exported(factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """As it is."""
        return "loha", factors, scale

    @staticmethod
    def file_rank(rank: int) -> None:
        """Its rank is up to r * r."""
        return None

    @staticmethod
    def delta(factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The change in float64, of the shape that `shape` tells."""
        return scale * _weight({name: factor.double() for name, factor in factors.items()})

    @staticmethod
    def norm(factors: Factors, scale: float) -> float:
        """Of the whole matrix, which is formed for it."""
        return float(LOHA.delta(factors, scale).norm())

    @staticmethod
    def singular_values(factors: Factors, scale: float) -> torch.Tensor | None:
        """From the r * r products of columns and of rows, whose product it is; None with cores, and where they are many."""
        return None if "t1" in factors else values_of_product(*_as_product(factors), scale)

    @staticmethod
    def svd(factors: Factors, scale: float, most: int) -> Decomposed | None:
        """As `singular_values`."""
        return None if "t1" in factors else svd_of_product(*_as_product(factors), scale, most)


def _as_product(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """up (out, r r) and down (r r, in * kernel), float64, whose product is the elementwise one: each column of the first half
    times each of the second, and so each row (Khatri-Rao products)."""
    (up1, down1), (up2, down2) = ([factors[f"w{n}_{part}"].double().flatten(1) for part in "ab"] for n in "12")
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    return up, (down1[:, None] * down2[None, :]).flatten(0, 1)


def _shape_of(factors: Factors, half: int) -> tuple[int, ...]:
    """Shape of what one half, 1 or 2, makes."""
    up, down = factors[f"w{half}_a"], factors[f"w{half}_b"]
    if f"t{half}" in factors:
        return (up.shape[1], down.shape[1], *factors[f"t{half}"].shape[2:])
    return (up.shape[0], *down.shape[1:])


def _weight(factors: Factors) -> torch.Tensor:
    return _half(factors, 1) * _half(factors, 2)


def _half(factors: Factors, half: int) -> torch.Tensor:
    import torch

    up, down = factors[f"w{half}_a"], factors[f"w{half}_b"]
    if f"t{half}" in factors:
        return torch.einsum("pqhw,po,qi->oihw", factors[f"t{half}"], up, down)
    return product(up, down)


LOHA = LoHa()
