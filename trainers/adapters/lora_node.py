"""LoRA beside frozen matrices as one autograd node: two products more on the way there, four on the way back.

With h = A x and g = dL/dy:  y = W x + b + s B h,  dL/dB = s g h^T,  dL/dA = s (B^T g) x^T,  dL/dx = W^T g + s A^T B^T g.
Each sum goes into the product before it, in place, and only x and h are kept: W + s B A is never formed. Layers that read
the same x, as query, key and value do, are one node: their W and their A lie one above the other, so that x is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trainers.frozen import answer_of, input_gradient_of

Pair = tuple[torch.Tensor, torch.Tensor, float]
"""down (r, in), up (out, r) and scale of one layer."""


def lora_beside(frozen: Any, x: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """x (B, ..., in) -> (B, ..., out), where `frozen` answers for all layers of `pairs`, one behind the other in `out`."""
    factors = [factor for down, up, _ in pairs for factor in (down, up)]
    answer: torch.Tensor = _LoraNode.apply(x, frozen, tuple(scale for *_, scale in pairs), *factors)  # type: ignore[no-untyped-call]
    return answer


class _LoraNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Any, scales: tuple[float, ...], *factors: torch.Tensor) -> torch.Tensor:
        downs, ups = factors[::2], factors[1::2]
        answer = answer_of(frozen, x)
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        inner = F.linear(x, down)
        for part, rows, up, scale in zip(*_cut(_rows(answer), _rows(inner), ups), ups, scales, strict=True):
            part.addmm_(rows, up.t(), alpha=scale)
        ctx.save_for_backward(x, inner, down, *ups)
        ctx.frozen, ctx.scales = frozen, scales
        return answer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, down, *ups = ctx.saved_tensors
        gradient = gradient.contiguous()  # once, and not in each product
        parts, inners = _cut(_rows(gradient), _rows(inner), ups)
        to_ups = [_product(part.t(), rows, scale) for part, rows, scale in zip(parts, inners, ctx.scales, strict=True)]
        to_inners = [_product(part, up, scale) for part, up, scale in zip(parts, ups, ctx.scales, strict=True)]
        to_inner = to_inners[0] if len(ups) == 1 else torch.cat(to_inners, dim=1)
        to_downs = (to_inner.t() @ _rows(x)).split([up.shape[1] for up in ups])  # type: ignore[no-untyped-call]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = input_gradient_of(ctx.frozen, gradient, x.shape)
            _rows(to_x).addmm_(to_inner, down)
        return to_x, None, None, *(factor for pair in zip(to_downs, to_ups, strict=True) for factor in pair)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (m, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _cut(outer: torch.Tensor, inner: torch.Tensor, ups: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], ...]:
    """(m, sum of out) and (m, sum of r), each cut into its layers' columns."""
    if len(ups) == 1:
        return (outer,), (inner,)
    return outer.split([up.shape[0] for up in ups], dim=1), inner.split([up.shape[1] for up in ups], dim=1)  # type: ignore[no-untyped-call]


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left @ right in one operation: beta = 0 leaves the sum's other side out."""
    if scale == 1.0:
        return left @ right
    return torch.addmm(left.new_empty(()).expand(1, 1), left, right, beta=0, alpha=scale)
