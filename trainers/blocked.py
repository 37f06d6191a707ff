"""Frozen weights in oneDNN's blocked format, by the operators that PyTorch's own compiler calls on a CPU.

Which blocks are right depends on the layer, the number format and, for some widths, the size of the picture: a kernel in
other blocks than an input asks for is turned at each call, a hundred times as slow. So a kernel is laid out when a size
first comes by, and laid out alike for two sizes it lies there once.
"""

from __future__ import annotations

import torch
from torch import nn

from trainers.frozen import FrozenLayer

SMALL = 1 << 16
"""Numbers of a matrix below which a call costs more than blocks save, in float32."""

_KERNELS = torch.ops.mkldnn
_Pair = tuple[int, int]


class BlockedLayer(FrozenLayer):
    """A frozen Linear or Conv2d on a CPU: one blocked weight for each direction, and no plain one beside them.

    Convolutions read and answer in channels-last form, in which oneDNN is fastest; they bring their input there.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(layer)
        self._plain: torch.Tensor | None = layer.weight.detach()
        self._forth: dict[tuple[int, ...], torch.Tensor] = {}  # by the height and width that it reads; () for a matrix
        self._back: dict[tuple[int, ...], torch.Tensor] = {}
        # A 1x1 convolution of channels-last pixels is a product of matrices.
        self._is_product = self.shape[2:].numel() == 1 and (len(self.shape) == 2 or self.stride == (1, 1))
        if not self._is_product:
            self._pad: _Pair = (int(self.padding[0]), int(self.padding[1]))
            self._pad_back: _Pair = (self.shape[2] - 1 - self._pad[0], self.shape[3] - 1 - self._pad[1])

    @property
    def weight(self) -> torch.Tensor:
        """Read back from its blocks, to the bit."""
        if self._plain is not None:
            return self._plain
        return next(iter(self._forth.values())).to_dense().view(self.shape)

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        """See FrozenLayer.answer."""
        if self._is_product:
            return self._over_channels(x, self._forth_for(x), self.bias)
        return _convolve(x, self._forth_for(x), self.bias, self.stride, self._pad)

    def to_input(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """See FrozenLayer.to_input: the adjoint of a convolution is a convolution too."""
        if self._is_product:
            return self._over_channels(gradient, self._back_for(()), None)
        if self.stride != (1, 1):
            gradient = spread(
                gradient,
                self.stride,
                tuple(side + pad - back for side, pad, back in zip(shape[2:], self._pad, self._pad_back, strict=True)),
            )
        return _convolve(gradient, self._back_for(tuple(gradient.shape[2:])), None, (1, 1), self._pad_back)

    def _over_channels(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x through a blocked matrix, whose channels come last in a Linear's input and second in a convolution's."""
        if len(self.shape) == 2:
            return _multiply(x, matrix, bias)
        return _multiply(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)

    def _forth_for(self, x: torch.Tensor) -> torch.Tensor:
        size = () if self._is_product else tuple(x.shape[2:])
        if size not in self._forth:
            weight = self.weight
            blocked = _block_matrix(weight.flatten(1)) if size == () else _block_kernel(weight, self.stride, self._pad, size)
            _add(self._forth, size, blocked)
            if not x.requires_grad:  # else it is laid out the other way soon, and need not be read back for that
                self._plain = None
        return self._forth[size]

    def _back_for(self, size: tuple[int, ...]) -> torch.Tensor:
        if size not in self._back:  # the weight may be a copy, so nothing holds it any longer than it is needed
            _add(
                self._back,
                size,
                _block_matrix(self.weight.flatten(1).t())
                if size == ()
                else _block_kernel(turned(self.weight), (1, 1), self._pad_back, size),
            )
            if self._forth:
                self._plain = None
        return self._back[size]


def turned(kernel: torch.Tensor) -> torch.Tensor:
    """(out, in, kh, kw) -> (in, out, kh, kw), turned by 180 degrees: the kernel of the adjoint of a convolution."""
    out, inputs, height, width = kernel.shape
    return kernel.reshape(out * inputs, height * width).flip(1).view(kernel.shape).transpose(0, 1)


def spread(gradient: torch.Tensor, stride: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    """(B, C, h, w) with zeros between, (B, C, *size): the gradient of all the places that a stride of 1 would answer at."""
    wide = gradient.new_zeros((*gradient.shape[:2], *size)).contiguous(memory_format=torch.channels_last)
    wide[:, :, :: stride[0], :: stride[1]] = gradient
    return wide


def can_be_blocked(layer: nn.Module) -> bool:
    """Whether oneDNN computes it, and is worth its call: float32 or bfloat16 on a CPU, plain sums, one group."""
    if (
        not isinstance(layer, nn.Linear | nn.Conv2d)
        or layer.weight.device.type != "cpu"
        or not hasattr(_KERNELS, "_linear_pointwise")
    ):
        return False
    if layer.weight.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if layer.weight.dtype == torch.bfloat16 and not _KERNELS._is_mkldnn_bf16_supported():
        return False  # oneDNN's operators refuse it on an older processor, where PyTorch's plain ones compute all the same
    if isinstance(layer, nn.Linear):
        return layer.weight.dtype == torch.bfloat16 or layer.weight.numel() >= SMALL
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.groups != 1 or layer.dilation != (1, 1):
        return False
    return all(int(pad) < size for pad, size in zip(layer.padding, layer.kernel_size, strict=True))


def _add(table: dict[tuple[int, ...], torch.Tensor], size: tuple[int, ...], blocked: torch.Tensor) -> None:
    """Keeps `blocked` for `size`, or what lies there in the same blocks already."""
    layout = _KERNELS._get_mkldnn_serialized_md
    same = (other for other in table.values() if torch.equal(layout(other), layout(blocked)))
    table[size] = next(same, blocked)


def _block_matrix(weight: torch.Tensor) -> torch.Tensor:
    return _KERNELS._reorder_linear_weight(weight.contiguous())  # type: ignore[no-any-return]


def _block_kernel(kernel: torch.Tensor, stride: tuple[int, ...], padding: _Pair, size: tuple[int, ...]) -> torch.Tensor:
    return _KERNELS._reorder_convolution_weight(kernel, padding, stride, [1, 1], 1, [1, kernel.shape[1], *size])  # type: ignore[no-any-return]


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(..., in) -> (..., out)."""
    return _KERNELS._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _convolve(
    x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, ...], padding: _Pair
) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return _KERNELS._convolution_pointwise(x, kernel, bias, padding, stride, [1, 1], 1, "none", [], "")  # type: ignore[no-any-return]
