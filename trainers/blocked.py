"""Frozen weights in oneDNN's blocked format, by the operators that PyTorch's own compiler calls on a CPU."""

from __future__ import annotations

import torch
from torch import nn

from trainers.frozen import FrozenLayer

_KERNELS = torch.ops.mkldnn


class BlockedLayer(FrozenLayer):
    """A frozen Linear or Conv2d on a CPU: one blocked weight for each direction, and no plain one beside them.

    Convolutions read and answer in channels-last form, in which oneDNN is fastest; they bring their input there.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(layer)
        weight = layer.weight.detach()
        # A 1x1 convolution of channels-last pixels is a product of matrices.
        self._is_product = weight[0, 0].numel() == 1 and getattr(layer, "stride", (1, 1)) == (1, 1)
        if self._is_product:
            matrix = weight.flatten(1)
            self._forth, self._back = _block_matrix(matrix), _block_matrix(matrix.t())
        else:
            self._padding = (int(self.padding[0]), int(self.padding[1]))
            self._forth, self._back = _block_kernel(weight, self.stride), _block_kernel(turned(weight), (1, 1))

    @property
    def weight(self) -> torch.Tensor:
        """Read back from its blocks, to the bit."""
        return self._forth.to_dense().view(self.shape)

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        """See FrozenLayer.answer."""
        if self._is_product:
            return self._over_channels(x, self._forth, self.bias)
        return _convolve(x, self._forth, self.bias, self.stride, self._padding)

    def to_input(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """See FrozenLayer.to_input: the adjoint of a convolution is a convolution too."""
        if self._is_product:
            return self._over_channels(gradient, self._back, None)
        height, width = self.shape[2:]
        top, left = self._padding
        if self.stride != (1, 1):
            gradient = spread(gradient, self.stride, (shape[2] + 2 * top - height + 1, shape[3] + 2 * left - width + 1))
        return _convolve(gradient, self._back, None, (1, 1), (height - 1 - top, width - 1 - left))

    def _over_channels(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x through a blocked matrix, whose channels come last in a Linear's input and second in a convolution's."""
        if len(self.shape) == 2:
            return _multiply(x, matrix, bias)
        return _multiply(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)


def turned(kernel: torch.Tensor) -> torch.Tensor:
    """(out, in, kh, kw) -> (in, out, kh, kw), turned by 180 degrees: the kernel of the adjoint of a convolution."""
    out, inputs, height, width = kernel.shape
    return kernel.reshape(out * inputs, height * width).flip(1).view(kernel.shape).transpose(0, 1)


def spread(gradient: torch.Tensor, stride: tuple[int, ...], size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) with zeros between, (B, C, *size): the gradient of all the places that a stride of 1 would answer at."""
    wide = gradient.new_zeros((*gradient.shape[:2], *size)).contiguous(memory_format=torch.channels_last)
    wide[:, :, :: stride[0], :: stride[1]] = gradient
    return wide


def can_be_blocked(layer: nn.Module) -> bool:
    """Whether oneDNN's operators compute it: float32 or bfloat16 on a CPU, sums that are plain, one group."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.device.type != "cpu":
        return False
    if layer.weight.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if isinstance(layer, nn.Linear):
        return True
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.groups != 1 or layer.dilation != (1, 1):
        return False
    return all(int(pad) < size for pad, size in zip(layer.padding, layer.kernel_size, strict=True))


def _block_matrix(weight: torch.Tensor) -> torch.Tensor:
    return _KERNELS._reorder_linear_weight(weight.contiguous())  # type: ignore[no-any-return]


def _block_kernel(kernel: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    padding = [size // 2 for size in kernel.shape[2:]]
    return _KERNELS._reorder_convolution_weight(kernel, padding, list(stride), [1, 1], 1)  # type: ignore[no-any-return]


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(..., in) -> (..., out)."""
    return _KERNELS._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _convolve(
    x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return _KERNELS._convolution_pointwise(x, kernel, bias, padding, stride, [1, 1], 1, "none", [], "")  # type: ignore[no-any-return]
