"""A frozen 3x3 convolution of a picture made twice as large by repeating pixels, computed on the small picture.

Where each pixel stands four times, neighbouring taps of the kernel read the same number: each of the four places of a
2x2 square sees a kernel of 2x2 whose taps are sums. 16 products in place of 36, for the same sums in another order. The
four kernels are one convolution with four times the channels, whose answers are dealt out to the four places; padded by
one pixel on each side it reads one row and one column too many, which those places leave out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainers.frozen import FrozenLayer, answer_of, input_gradient_of

PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Row and column of the four places in a 2x2 square, in the order of the channels."""
STRIP = 16
"""Answer's channels whose taps are summed at once: few enough to stay in a processor's cache, a tenth of the time."""


class Upsampled(nn.Module):
    """Stands in for diffusers' Upsample2D with a 3x3 convolution: (B, C, h, w) -> (B, out, 2h, 2w)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv: nn.Module = conv
        self.quarters: nn.Module = quarters_of(conv)

    def forward(self, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """As diffusers; an adapter that has come beside the convolution, or another size, goes the long way."""
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=output_size, mode="nearest"))  # type: ignore[no-any-return]
        if not isinstance(self.conv, FrozenLayer | nn.Conv2d):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
        y: torch.Tensor = _Upsampled.apply(x, self.quarters)  # type: ignore[no-untyped-call]
        return y


def can_be_upsampled(conv: nn.Module) -> bool:
    """Whether it is a plain 3x3 convolution that keeps its picture's size."""
    wanted = {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
    }
    return isinstance(conv, nn.Conv2d) and all(getattr(conv, name) == value for name, value in wanted.items())


def quarters_of(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution (C -> 4 out, 2x2, padding 1) on the small picture; its weights are summed in float64 and rounded once."""
    weight = conv.weight.detach()
    kernels = weight.new_empty((len(PLACES), *weight.shape[:2], 2, 2))
    for first in range(0, weight.shape[0], STRIP):
        taps = weight[first : first + STRIP].permute(2, 3, 0, 1).to(torch.float64, memory_format=torch.contiguous_format)
        for number, (row, column) in enumerate(PLACES):
            for y, line in enumerate(_merged(taps, row)):
                for x, tap in enumerate(_merged(line, column)):
                    kernels[number, first : first + STRIP, :, y, x] = tap
    with torch.device("meta"):
        made = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1)
    made.weight = nn.Parameter(kernels.flatten(0, 1), requires_grad=False)
    made.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)
    return made


def _merged(taps: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three taps in a row as the two that a place sees: the first or the last two of them read the same pixel."""
    return (taps[0] + taps[1], taps[2]) if place else (taps[0], taps[1] + taps[2])


class _Upsampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quarters: Any) -> torch.Tensor:
        ctx.quarters, ctx.shape = quarters, x.shape
        batch, _, height, width = x.shape
        answers = answer_of(quarters, x).chunk(4, dim=1)
        large = torch.empty(
            (batch, answers[0].shape[1], 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for (row, column), answer in zip(PLACES, answers, strict=True):
            large[:, :, row::2, column::2] = answer[:, :, row : row + height, column : column + width]
        return large

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        batch, _, height, width = ctx.shape
        channels = gradient.shape[1]
        dealt = gradient.new_zeros((batch, height + 1, width + 1, 4 * channels)).permute(0, 3, 1, 2)
        for (row, column), place in zip(PLACES, dealt.chunk(4, dim=1), strict=True):
            place[:, :, row : row + height, column : column + width] = gradient[:, :, row::2, column::2]
        return input_gradient_of(ctx.quarters, dealt, ctx.shape), None
