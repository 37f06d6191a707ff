"""Frozen layers: Linear and Conv2d whose weight never changes, which is what an adapter's base allows and no trainer uses.

Only the gradient to the input is ever asked for, so nothing of the input is kept for the backward pass, and the weight
may be laid out once in whatever way computes fastest, for each direction its own (blocked.py), or kept in few bits
(quantised.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input


class FrozenLayer(nn.Module):
    """Stands in for a frozen Linear or Conv2d. No gradient goes to weight or bias; subclasses say how the weight is kept."""

    kind = "a training's own form"

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.padding: Any = None
        self.shape, self.dtype, self.bias = layer.weight.shape, layer.weight.dtype, layer.bias
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups

    @property
    def weight(self) -> torch.Tensor:
        """The weight that it computes with, of `shape` and `dtype`; perhaps a copy, so writing into it may change nothing."""
        raise NotImplementedError

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        """W x + b without a graph: (B, ..., in) -> (B, ..., out), or (B, in, H, W) -> (B, out, H', W')."""
        return apply_plain(self, x, self.weight)

    def to_input(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """dL/dx of `shape` from dL/dy."""
        return gradient_to_input(self, gradient, self.weight, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `answer`, with a graph."""
        y: torch.Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class KeptLayer(FrozenLayer):
    """Keeps the weight as it is; on a GPU a kernel's in channels-last form, which its libraries read without turning it."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(layer)
        self.kept = layer.weight
        self.is_matrix = False
        if self.kept.dim() == 4 and self.kept.device.type == "cuda":
            self.kept.data = self.kept.data.contiguous(memory_format=torch.channels_last)
            self.is_matrix = is_pointwise(layer)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own."""
        return self.kept

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        """See FrozenLayer."""
        return apply_pointwise(self, x, self.kept) if self.is_matrix else super().answer(x)

    def to_input(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """See FrozenLayer."""
        if self.is_matrix:
            return (gradient.permute(0, 2, 3, 1) @ self.kept[:, :, 0, 0]).permute(0, 3, 1, 2)
        return super().to_input(gradient, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `answer`, with a graph. Of a frozen matrix PyTorch's own node keeps no input either, and costs less."""
        return apply_plain(self, x, self.kept) if self.kept.dim() == 2 else super().forward(x)


class SharedRows(FrozenLayer):
    """A matrix that lies in `whole` among others that read the same x, from row `start` on."""

    def __init__(self, layer: nn.Linear, whole: FrozenLayer, start: int) -> None:
        super().__init__(layer)
        # Not as a sub-module, so that it is no layer by a name of its own that an adapter could be put beside.
        self.start, self.__dict__["whole"] = start, whole

    whole: FrozenLayer

    @property
    def weight(self) -> torch.Tensor:
        """Its rows."""
        return self.whole.weight[self.start : self.start + self.shape[0]]


class _Frozen(torch.autograd.Function):
    """y = W x + b of a frozen layer; dx = W^T dy is all that goes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLayer) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.answer(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.layer.to_input(gradient, ctx.shape), None


def apply_plain(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x through `weight` and the layer's bias, with its stride and padding."""
    if weight.dim() == 2:
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def is_pointwise(layer: Any) -> bool:
    """Whether a convolution is a matrix for each pixel by itself."""
    return bool(layer.weight.shape[2:] == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1)


def apply_pointwise(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same as `apply_plain` of such a convolution, as the matrix product that it is, in channels-last form.

    A 1x1 kernel lies alike in either form, and a GPU's convolution then takes the other one, and turns what it is given.
    """
    pixels = x.permute(0, 2, 3, 1).contiguous()  # of any other form the bias would be a second operation
    return F.linear(pixels, weight[:, :, 0, 0], layer.bias).permute(0, 3, 1, 2)


def answer_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """W x + b of a frozen layer or of one of PyTorch's, without a graph where autograd keeps none."""
    return layer.answer(x) if isinstance(layer, FrozenLayer) else apply_plain(layer, x, layer.weight)


def input_gradient_of(layer: Any, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """dL/dx of `shape` of a frozen layer or of one of PyTorch's."""
    if isinstance(layer, FrozenLayer):
        return layer.to_input(gradient, shape)
    return gradient_to_input(layer, gradient, layer.weight, shape)


def gradient_to_input(layer: Any, gradient: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The adjoint of `apply_plain`: dL/dx of `shape`."""
    if weight.dim() == 2:
        return gradient @ weight
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    to_x: torch.Tensor = conv2d_input(shape, weight, gradient, *geometry)  # type: ignore[no-untyped-call]
    return to_x


def plain_layer(layer: FrozenLayer, weight: torch.Tensor) -> nn.Linear | nn.Conv2d:
    """A Linear or Conv2d of the form of `layer`, with `weight` and its bias, both frozen."""
    out, inputs, *kernel = layer.shape
    with torch.device("meta"):
        size: Any = tuple(kernel)
        geometry: Any = (size, layer.stride, layer.padding, layer.dilation, layer.groups) if kernel else ()
        kind: Any = nn.Conv2d if kernel else nn.Linear
        made: nn.Linear | nn.Conv2d = kind(inputs * (layer.groups if kernel else 1), out, *geometry, bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    return made
