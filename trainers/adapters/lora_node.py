"""LoRA beside a frozen matrix as one autograd node: two products more on the way there, four on the way back.

With h = A x and g = dL/dy:  y = W x + b + s B h,  dL/dB = s g h^T,  dL/dA = s (B^T g) x^T,  dL/dx = W^T g + s A^T B^T g.
Each sum goes into the product before it, in place, and only x and h are kept: W + s B A is never formed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trainers.frozen import answer_of, input_gradient_of


def lora_beside(frozen: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """x (B, ..., in), down (r, in), up (out, r) -> (B, ..., out)."""
    answer: torch.Tensor = _LoraNode.apply(x, down, up, frozen, scale)  # type: ignore[no-untyped-call]
    return answer


class _LoraNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, frozen: Any, scale: float) -> torch.Tensor:
        answer = answer_of(frozen, x)
        inner = F.linear(x, down)
        _rows(answer).addmm_(_rows(inner), up.t(), alpha=scale)
        ctx.save_for_backward(x, down, up, inner)
        ctx.frozen, ctx.scale = frozen, scale
        return answer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, down, up, inner = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_inner = rows @ up
        to_up = _scaled_product(rows.t(), _rows(inner), ctx.scale)
        to_down = _scaled_product(to_inner.t(), x.reshape(-1, x.shape[-1]), ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = input_gradient_of(ctx.frozen, gradient, x.shape)
            _rows(to_x).addmm_(to_inner, down, alpha=ctx.scale)
        return to_x, to_down, to_up, None, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (m, n), the same memory."""
    return tensor.view(-1, tensor.shape[-1])


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left @ right in one operation: beta = 0 leaves the sum's other side out."""
    return torch.addmm(left.new_empty(()).expand(1, 1), left, right, beta=0, alpha=scale)
