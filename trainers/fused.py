"""Pieces of a denoiser as one autograd node each: the same numbers, with less kept for the backward pass.

Between a frozen layer and the next nothing needs its input again, so what is cheap to compute again is not kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

KEPT = 1 << 20
"""Numbers of attention's probabilities up to which they are kept; above they are made anew, for a fifth of its time."""
_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward


class NormSilu(nn.Module):
    """SiLU after a frozen GroupNorm: (B, C, H, W) -> the same. Only the input is kept; the norm's answer is made anew."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.num_groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """silu(norm(x))."""
        y: torch.Tensor = _NormSilu.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: NormSilu) -> torch.Tensor:
        y, mean, rstd = _group_norm(x, norm)
        ctx.norm = norm
        ctx.save_for_backward(x, mean, rstd)
        return F.silu(y, inplace=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        norm = ctx.norm
        gradient = torch.ops.aten.silu_backward(gradient, _group_norm(x, norm)[0])
        batch, channels, *size = x.shape
        # On a CPU the kernel is up to ten times as fast in plain form as in channels-last.
        x, gradient = x.contiguous(), gradient.contiguous()
        pixels = size[0] * size[1]
        wanted = [True, False, False]
        to_x = _GROUP_NORM_BACKWARD(gradient, x, mean, rstd, norm.weight, batch, channels, pixels, norm.num_groups, wanted)[0]
        return to_x, None


def _group_norm(x: torch.Tensor, norm: NormSilu) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels, height, width = x.shape
    if x.device.type != "cpu":
        x = x.contiguous()  # a GPU's kernel refuses any other form
    return torch.native_group_norm(x, norm.weight, norm.bias, batch, channels, height * width, norm.num_groups, norm.eps)


class SiluOfVectors(nn.Module):
    """SiLU of time embeddings (B, C); pixels (B, C, H, W), whose norm has applied it already, pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return F.silu(x) if x.dim() == 2 else x


class Gated(nn.Module):
    """GEGLU (arXiv 2002.05202): value * gelu(gate), both halves of one projection. Only the projection's answer is kept."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out / 2)."""
        y: torch.Tensor = _Gated.apply(self.proj(x))  # type: ignore[no-untyped-call]
        return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        value, gate = both.chunk(2, dim=-1)
        return F.gelu(gate.contiguous()).mul_(value)  # of a half that lies apart it is twice as fast

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        value, gate = both.chunk(2, dim=-1)
        gate = gate.contiguous()
        to_both = torch.empty_like(both)
        to_value, to_gate = to_both.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=to_value)
        to_gate.copy_(torch.ops.aten.gelu_backward(gradient * value, gate))
        return to_both


class Attend:
    """A diffusers attention processor for plain attention: softmax(q k^T / sqrt(d)) v.

    By plain products where a head has at most `products` scores, else by PyTorch's kernel.
    """

    def __init__(self, products: int) -> None:
        self._products = products

    def __call__(
        self, attention: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """hidden_states (B, n, C), encoder_hidden_states (B, m, W) -> (B, n, C)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attention.to_q(hidden_states), attention.to_k(context), attention.to_v(context)
        answer = attend(query, key, value, attention.heads, query.shape[1] * key.shape[1] <= self._products)
        for layer in attention.to_out:
            answer = layer(answer)
        return answer


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, by_products: bool) -> torch.Tensor:
    """(B, n, C), (B, m, C), (B, m, C) -> (B, n, C)."""
    batch, tokens, channels = query.shape
    width = channels // heads
    if by_products:
        parts = [
            tensor.view(batch, -1, heads, width).transpose(1, 2).reshape(batch * heads, -1, width)
            for tensor in (query, key, value)
        ]
        answer: torch.Tensor = _Products.apply(*parts)  # type: ignore[no-untyped-call]
        answer = answer.view(batch, heads, tokens, width)
    else:
        query, key, value = (tensor.view(batch, -1, heads, width).transpose(1, 2) for tensor in (query, key, value))
        answer = F.scaled_dot_product_attention(query, key, value)
    return answer.transpose(1, 2).reshape(batch, tokens, channels)


class _Products(torch.autograd.Function):
    """Attention of (B heads, n, d) by plain products; keeps the probabilities where few tokens make them small."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        probabilities = _probabilities(query, key)
        kept = (probabilities,) if probabilities.numel() <= KEPT else ()
        ctx.save_for_backward(query, key, value, *kept)
        return torch.bmm(probabilities, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        probabilities = kept[0] if kept else _probabilities(query, key)
        to_value = torch.bmm(probabilities.transpose(1, 2), gradient) if ctx.needs_input_grad[2] else None
        to_scores = torch.bmm(gradient, value.transpose(1, 2))
        to_scores = torch._softmax_backward_data(to_scores, probabilities, -1, probabilities.dtype)
        nothing, scale = _nothing(query), query.shape[-1] ** -0.5
        to_query = torch.baddbmm(nothing, to_scores, key, beta=0, alpha=scale)
        to_key = (
            torch.baddbmm(nothing, to_scores.transpose(1, 2), query, beta=0, alpha=scale) if ctx.needs_input_grad[1] else None
        )
        return to_query, to_key, to_value


def _probabilities(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5
    return torch.softmax(torch.baddbmm(_nothing(query), query, key.transpose(1, 2), beta=0, alpha=scale), -1)


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """What beta = 0 leaves out of a sum."""
    return like.new_empty(()).expand(1, 1, 1)
