"""The GPU's kernels against PyTorch's own operations, on a GPU, or where Triton is but no GPU by its interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton comes with PyTorch for NVIDIA GPUs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined
from trainers import fused_gpu  # noqa: E402

SHAPES = ((2, 32, 5, 7, 8), (1, 320, 16, 16, 32), (3, 60, 40, 24, 4), (2, 96, 1, 1, 32), (1, 8, 64, 192, 2))
"""Batch, channels, height, width and groups: less than a tile, several tiles, a single pixel."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_and_its_gradient_equal_those_of_pytorch(shape: tuple[int, ...], silu: bool) -> None:
    *size, groups = shape
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(size, generator=generator)
    weight, bias = 1 + 0.1 * torch.randn(size[1], generator=generator), torch.randn(size[1], generator=generator)
    given = torch.randn(size, generator=generator)
    exact = x.double().requires_grad_()
    normed = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
    wanted = F.silu(normed) if silu else normed
    wanted.backward(given.double())
    there = [tensor.to(DEVICE) for tensor in (x, weight, bias, given)]
    y, mean, rstd = fused_gpu.normalise(*there[:3], groups, 1e-5, silu)
    to_x = fused_gpu.normalise_backward(there[3], *there[:3], mean, rstd, silu)
    assert exact.grad is not None
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.float32
    torch.testing.assert_close(y.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(to_x.cpu().double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x = 1000 + torch.randn((1, 16, 32, 32), generator=torch.Generator().manual_seed(1))
    ones, zeros = torch.ones(16), torch.zeros(16)
    y, _, _ = fused_gpu.normalise(*(tensor.to(DEVICE) for tensor in (x, ones, zeros)), 4, 1e-5, False)
    torch.testing.assert_close(y.cpu().double(), F.group_norm(x.double(), 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(2, 5, 12), (1, 3, 2 * 1280), (7, 2 * 1030)])
def test_the_gated_unit_and_its_gradient_equal_those_of_pytorch(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    both = 2 * torch.randn(size, generator=generator)
    exact = both.double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    wanted = value * F.gelu(gate)
    given = torch.randn(wanted.shape, generator=generator)
    wanted.backward(given.double())
    assert exact.grad is not None
    y = fused_gpu.gate(both.to(DEVICE))
    to_both = fused_gpu.gate_backward(given.to(DEVICE), both.to(DEVICE))
    torch.testing.assert_close(y.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(to_both.cpu().double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.randn((2, 64, 32, 32), generator=torch.Generator().manual_seed(2)).half()
    ones, zeros = torch.ones(64).half(), torch.zeros(64).half()
    y, mean, _ = fused_gpu.normalise(*(tensor.to(DEVICE) for tensor in (x, ones, zeros)), 8, 1e-5, True)
    assert y.dtype == torch.float16 and mean.dtype == torch.float32
    wanted = F.silu(F.group_norm(x.double(), 8)).half()
    torch.testing.assert_close(y.cpu(), wanted, rtol=2e-3, atol=2e-3)
