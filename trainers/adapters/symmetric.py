"""A LoRA whose factors both start non-zero (Su Jianlin, kexue.fm/archives/9590): W = W0 + s (B A - B0 A0).

The start's own part is taken away again, so that step 0 is the base; it is computed by the differences to the start, so
that this is so to the bit, and W0 is never rewritten. Both factors learn from the first step on, where plain LoRA's A has
no gradient yet.

symmetric  A0 and B0 Gaussian, of variance 1 / in and 1 / out
pissa      s B0 A0 is the best approximation of W0 of this rank (arXiv 2404.02948)
olora      B0 A0 are the first columns of Q and rows of R in W0 = Q R (arXiv 2406.01775)

Its file is a plain LoRA of twice the rank, factored anew in float64: stored as it is, the difference of two large parts
would lose per cents of the update in 16 bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainers.adapters.base import Factors, Started, Weight, apply_weight, product, scaled

if TYPE_CHECKING:
    import torch


class Symmetric:
    """See base.Trained. `init` is symmetric, pissa or olora."""

    exact = ("down", "up")
    """The path is a difference of two large parts, which in 16 bits would be mostly rounding: it is taken in float32."""
    kept = ("down0", "up0")

    def __init__(self, init: str) -> None:
        self.init = init

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """down (r, in[, kh, kw]) and up (out, r[, 1, 1]), as LoRA's."""
        out, *inner = weight
        return {"down": (rank, *inner), "up": (out, rank, *(1 for _ in inner[1:]))}

    def native_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """A plain LoRA's of twice the rank, or of the most that the weight can have."""
        return self.factor_shapes(weight, min(2 * rank, weight[0], math.prod(weight[1:])))

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """Both factors, and the same once more as the constants down0 and up0."""
        sizes = self.factor_shapes(shape, rank)
        down, up = _random(shape, rank, generator) if self.init == "symmetric" else _of_weight(self.init, weight(), rank, scale)
        factors = {"down": down.float().reshape(sizes["down"]), "up": up.float().reshape(sizes["up"])}
        return Started(factors, scale, {f"{name}0": factor.clone() for name, factor in factors.items()})

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """s (B A - B0 A0) x = s ((B - B0) A x + B0 (A - A0) x): (B, ..., in) -> (B, ..., out), or of pictures."""
        down, up, down0, up0 = (factors[name] for name in ("down", "up", "down0", "up0"))
        return scaled(_path(frozen, x, down, up - up0) + _path(frozen, x, down - down0, up0), scale)

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """s (B A - B0 A0) in float64."""
        down, up, down0, up0 = (factors[name].double() for name in ("down", "up", "down0", "up0"))
        return scale * (product(up, down) - product(up0, down0))

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """A plain LoRA [B, -B0] [A; A0] of twice the rank."""
        import torch

        down = torch.cat([factors["down"], factors["down0"]])
        return "lora", {"down": down, "up": torch.cat([factors["up"], -factors["up0"]], dim=1)}, scale

    def file_rank(self, rank: int) -> int:
        """Twice its own."""
        return 2 * rank


def _path(frozen: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    inner, up = apply_weight(frozen, x, down), up.to(x.dtype)
    return F.conv2d(inner, up) if up.dim() == 4 else F.linear(inner, up)


def _random(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    inner = math.prod(shape[1:])
    down = torch.randn(rank, inner, generator=generator) / math.sqrt(inner)
    return down, torch.randn(shape[0], rank, generator=generator) / math.sqrt(shape[0])


def _of_weight(init: str, weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """down (r, in) and up (out, r) in float64. A rank above the weight's own leaves the rest at zero."""
    import torch

    matrix = weight.double().flatten(1)
    if init == "pissa":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        roots = (values / scale).sqrt()
        up, down = left * roots, roots[:, None] * right
    else:
        up, down = torch.linalg.qr(matrix)
    kept = min(rank, down.shape[0])
    missing = rank - kept
    up = torch.cat([up[:, :kept], up.new_zeros(up.shape[0], missing)], dim=1)
    return torch.cat([down[:kept], down.new_zeros(missing, down.shape[1])]), up
