"""Low rank by addition (Su Jianlin, kexue.fm/archives/9590): W = W0 + s (A I_wide + I_tall B), of rank up to 2 r.

A is (out, r) and B (r, in), as many numbers as of a LoRA; I_wide (r, in) and I_tall (out, r) are identities of size r side
by side and one above the other, the last one cut where r does not divide the width. The delta is linear in both factors,
so both start at zero and both learn from the first step on. Their gradients are block sums of dL/dW, which is never formed:
A I_wide x needs the block sums of x, and I_tall B x is B x repeated. A is called `up` and B `down`.

Its file is a plain LoRA of twice the rank with the identities among its factors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from trainers.adapters.base import Factors, Started, Weight, apply_weight, product, scaled
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch


class AdditiveSettings(LowRankSettings):
    """Low rank by addition: as many numbers as LoRA, twice its rank, linear in them."""

    type: Literal["additive"] = "additive"
    """Kind of adapter."""

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        return ADDITIVE


class Additive:
    """See base.Trained."""

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """down (r, in[, kh, kw]) and up (out, r[, 1, 1])."""
        out, *inner = weight
        return {"down": (rank, *inner), "up": (out, rank, *(1 for _ in inner[1:]))}

    def native_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """A plain LoRA's of twice the rank, or of the most that the weight can have."""
        return self.factor_shapes(weight, min(2 * rank, weight[0], math.prod(weight[1:])))

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """All zero."""
        import torch

        return Started({name: torch.zeros(size) for name, size in self.factor_shapes(shape, rank).items()}, scale)

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """s (A (block sums of x) + (B x repeated)): (B, ..., in) -> (B, ..., out); of pictures by convolutions."""
        import torch.nn.functional as F

        up, down = factors["up"].to(x.dtype), factors["down"].to(x.dtype)
        out, rank = up.shape[:2]
        times = -(-out // rank)
        if down.dim() == 4:
            sums = apply_weight(frozen, x, _wide_identity(down))
            repeated = apply_weight(frozen, x, down).repeat(1, times, 1, 1)[:, :out]
            return scaled(F.conv2d(sums, up) + repeated, scale)
        blocks = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank))  # type: ignore[no-untyped-call]
        repeated = F.linear(x, down).repeat(*(1 for _ in x.shape[1:]), times)[..., :out]
        return scaled(F.linear(blocks.sum(-2), up) + repeated, scale)

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update in float64."""
        joined = self.exported({name: factor.double() for name, factor in factors.items()}, scale)[1]
        return scale * product(joined["up"], joined["down"])

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """A plain LoRA [A, I_tall] [I_wide; B]."""
        import torch

        up, down = factors["up"], factors["down"]
        tall = torch.eye(up.shape[1], dtype=up.dtype).repeat(-(-up.shape[0] // up.shape[1]), 1)[: up.shape[0]]
        joined = torch.cat([up, tall.reshape(up.shape).to(up.device)], dim=1)
        return "lora", {"down": torch.cat([_wide_identity(down), down]), "up": joined}, scale

    def file_rank(self, rank: int) -> int:
        """Twice its own."""
        return 2 * rank


def _wide_identity(down: torch.Tensor) -> torch.Tensor:
    """I_wide in the form of `down` (r, in[, kh, kw])."""
    import torch

    rank, width = down.shape[0], down[0].numel()
    eye = torch.eye(rank, dtype=down.dtype, device=down.device)
    return eye.repeat(1, -(-width // rank))[:, :width].reshape(down.shape)


ADDITIVE = Additive()
