"""Pieces of a denoiser as one autograd node each: the same numbers, with less kept for the backward pass.

Between a frozen layer and the next nothing needs its input again, so what is cheap to compute again is not kept.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

KEPT = 1 << 20
"""Numbers of attention's probabilities up to which they are kept; above they are made anew, for a fifth of its time."""
FEW = 64
"""Pixels up to which a GroupNorm's way back is as fast in channels-last form."""
_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward


@functools.cache
def _triton_kernels() -> Any:
    """The module of kernels for NVIDIA GPUs; None where there is no Triton, as on Windows, or where it cannot make them.

    It needs a C compiler and a GPU that it knows: a first small one is made to see.
    """
    try:
        kernels = importlib.import_module("trainers.fused_gpu")
        kernels.gate(torch.zeros(1, 2, device="cuda"))
    except Exception as error:  # whatever it is, PyTorch's own operations do as well
        logging.getLogger("impasto").info("no kernels by Triton: %s", str(error).splitlines()[:1])
        return None
    return kernels


def gpu_kernels(states: torch.Tensor) -> Any:
    """What computes these states in one or two kernels; None where PyTorch's own operations do, or its compiler sees them."""
    if not states.is_cuda or states.dtype == torch.float64 or torch.compiler.is_compiling():
        return None
    return _triton_kernels()


class NormSilu(nn.Module):
    """SiLU after a frozen GroupNorm: (B, C, H, W) -> the same. Only the input is kept; the norm's answer is made anew.

    Without `silu` the norm alone, for a GPU, where this one does not turn channels-last states.
    """

    def __init__(self, norm: nn.GroupNorm, silu: bool = True) -> None:
        super().__init__()
        self.weight, self.bias, self.num_groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps
        self.silu = silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """silu(norm(x))."""
        y: torch.Tensor = _NormSilu.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: NormSilu) -> torch.Tensor:
        kernels = gpu_kernels(x)
        if kernels is not None:
            y, mean, rstd = kernels.normalise(x, norm.weight, norm.bias, norm.num_groups, norm.eps, norm.silu)
        else:
            y, mean, rstd = _group_norm(x, norm)
            y = F.silu(y, inplace=True) if norm.silu else y
        ctx.norm = norm
        ctx.save_for_backward(x, mean, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        norm, kernels = ctx.norm, gpu_kernels(x)
        if kernels is not None:
            return kernels.normalise_backward(gradient, x, norm.weight, norm.bias, mean, rstd, norm.silu), None
        if norm.silu:
            gradient = torch.ops.aten.silu_backward(gradient, _group_norm(x, norm)[0])
        batch, channels, *size = x.shape
        pixels = size[0] * size[1]
        # On a CPU the kernel is up to ten times as fast in plain form as in channels-last; both must lie alike. A GPU's
        # refuses the latter.
        alike = all(states.is_contiguous(memory_format=torch.channels_last) for states in (x, gradient))
        if not alike or pixels > FEW or x.device.type != "cpu":
            x, gradient = x.contiguous(), gradient.contiguous()
        wanted = [True, False, False]
        to_x = _GROUP_NORM_BACKWARD(gradient, x, mean, rstd, norm.weight, batch, channels, pixels, norm.num_groups, wanted)[0]
        return to_x, None


def _group_norm(x: torch.Tensor, norm: NormSilu) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels, height, width = x.shape
    if x.device.type != "cpu":
        x = x.contiguous()  # a GPU's kernel refuses any other form
    return torch.native_group_norm(x, norm.weight, norm.bias, batch, channels, height * width, norm.num_groups, norm.eps)


class SiluOfVectors(nn.Module):
    """SiLU of time embeddings (B, C); pixels (B, C, H, W), whose norm has applied it already, pass.

    One for all blocks of a denoiser, as all are asked for the same embedding, whose answer it keeps where no graph needs it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        if x.dim() != 2:
            return x
        if x.requires_grad:
            return F.silu(x)
        if self._last is None or self._last[0] is not x:
            self._last = x, F.silu(x)
        return self._last[1]


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
        kernels = gpu_kernels(both)
        if kernels is not None:
            return kernels.gate(both)  # type: ignore[no-any-return]
        value, gate = both.chunk(2, dim=-1)
        return F.gelu(gate.contiguous()).mul_(value)  # of a half that lies apart it is twice as fast

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        kernels = gpu_kernels(both)
        if kernels is not None:
            return kernels.gate_backward(gradient, both)  # type: ignore[no-any-return]
        value, gate = both.chunk(2, dim=-1)
        gate = gate.contiguous()
        to_both = torch.empty_like(both)
        to_value, to_gate = to_both.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=to_value)
        to_gate.copy_(torch.ops.aten.gelu_backward(gradient * value, gate))
        return to_both


def attend(parts: Sequence[torch.Tensor], heads: int, by_products: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: queries (B, n, C), keys and values (B, m, C) -> (B, n, C).

    `parts` hold the three one behind the other in their last dimension: each by itself, or some of them in one tensor.
    """
    if by_products:
        answer: torch.Tensor = _Products.apply(heads, *parts)  # type: ignore[no-untyped-call]
        return answer
    query, key, value = (_of_heads(states, heads) for states in _cut(parts))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _cut(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values, each (B, tokens, C), as views."""
    width = sum(part.shape[-1] for part in parts) // 3
    return [states for part in parts for states in part.split(width, dim=-1)]  # type: ignore[no-untyped-call]


def _of_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, tokens, C) -> (B, heads, tokens, d), a view."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]


class _Products(torch.autograd.Function):
    """Attention by plain products; keeps the probabilities where few tokens make them small."""

    @staticmethod
    def forward(ctx: Any, heads: int, *parts: torch.Tensor) -> torch.Tensor:
        query, key, value = (_of_heads(states, heads).flatten(0, 1) for states in _cut(parts))
        probabilities = _probabilities(query, key)
        kept = (probabilities,) if probabilities.numel() <= KEPT else ()
        ctx.save_for_backward(*kept, *parts)
        ctx.heads = heads
        first = parts[0]
        answer = first.new_empty((*first.shape[:2], value.shape[-1] * heads))
        _multiply_into(_of_heads(answer, heads), probabilities, value)
        return answer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        heads, number = ctx.heads, len(ctx.needs_input_grad) - 1
        saved = ctx.saved_tensors  # read once, as with checkpointing each reading would compute all anew
        parts = saved[-number:]
        query, key, value = (_of_heads(states, heads).flatten(0, 1) for states in _cut(parts))
        probabilities = saved[0] if len(saved) > number else _probabilities(query, key)
        gradient = _of_heads(gradient, heads).flatten(0, 1)
        to_scores = torch.bmm(gradient, value.transpose(1, 2))
        to_scores = torch._softmax_backward_data(to_scores, probabilities, -1, probabilities.dtype)
        to_parts = [
            torch.empty_like(part) if wanted else None for part, wanted in zip(parts, ctx.needs_input_grad[1:], strict=True)
        ]
        wanted = [states for part, to in zip(parts, to_parts, strict=True) for states in _cut_or_none(to, part, query, heads)]
        scale = query.shape[-1] ** -0.5
        products = (
            (to_scores, key, scale),
            (to_scores.transpose(1, 2), query, scale),
            (probabilities.transpose(1, 2), gradient, 1.0),
        )
        for to, product in zip(wanted, products, strict=True):
            if to is not None:
                _multiply_into(_of_heads(to, heads), *product)
        return None, *to_parts


def _cut_or_none(to: torch.Tensor | None, part: torch.Tensor, query: torch.Tensor, heads: int) -> list[torch.Tensor | None]:
    width = query.shape[-1] * heads
    number = part.shape[-1] // width
    return [None] * number if to is None else list(to.split(width, dim=-1))  # type: ignore[no-untyped-call]


def _multiply_into(to: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """scale * left @ right, (B heads, n, k) and (B heads, k, d), into `to` (B, heads, n, d), however that lies in memory."""
    if to.shape[0] == 1:
        torch.baddbmm(to[0], left, right, beta=0, alpha=scale, out=to[0])
    else:
        to.copy_(torch.baddbmm(_nothing(left), left, right, beta=0, alpha=scale).view(to.shape))


def _probabilities(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5
    return torch.softmax(torch.baddbmm(_nothing(query), query, key.transpose(1, 2), beta=0, alpha=scale), -1)


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """What beta = 0 leaves out of a sum."""
    return like.new_empty(()).expand(1, 1, 1)
