"""Counts are exact: operations without views, FLOPs by formula, also of oneDNN's operators, and bytes that autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trainers.bench.contestants import count_on_meta
from trainers.bench.counts import attention_flops, count
from trainers.bench.reference import Inputs, Parts, Recipe
from trainers.families import ASSETS
from trainers.families.configuration import read_configs


def test_views_are_no_operations_and_a_product_has_its_flops() -> None:
    x, weight = torch.randn(5, 4, 8), torch.randn(6, 8)
    found = count(lambda: F.linear(x, weight).transpose(1, 2)[:, :3].unsqueeze(0).reshape(-1))
    assert found.flops == 2 * 5 * 4 * 8 * 6
    assert found.by_operation == {"aten.mm": 1, "aten.clone": 1}  # reshape of what is not contiguous copies
    assert found.operations == 2


def test_operations_inside_a_custom_function_are_counted_and_what_it_keeps() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x * 1.0)
            return x * x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * ctx.saved_tensors[0] * 2

    x = torch.ones(10, requires_grad=True)
    x.grad = torch.zeros(10)
    found = count(lambda: Square.apply(x).sum().backward())
    # x * 1, x * x, sum, sum's 1, two products and the sum into x.grad
    assert found.by_operation == {"aten.mul": 4, "aten.sum": 1, "aten.ones_like": 1, "aten.add_": 1}
    assert found.saved_bytes == 40


def test_weights_are_no_activations_and_shared_memory_counts_once() -> None:
    weight = torch.randn(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def step() -> None:
        y = x * 2.0
        (F.linear(y, weight).relu() * y.view(4, 8)).sum().backward()

    found = count(step)
    # y once, although it is kept by itself and as a view; relu's answer, kept by relu and by the product
    assert found.saved_bytes == 2 * 4 * 8 * 4


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_onednns_operators_have_the_flops_of_the_plain_ones() -> None:
    x, kernel = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    plain = count(lambda: F.conv2d(x, kernel, padding=1, stride=2))
    call = torch.ops.mkldnn._convolution_pointwise
    packed = count(lambda: call(x, kernel, None, [1, 1], [2, 2], [1, 1], 1, "none", [], ""))
    assert plain.flops == packed.flops == 2 * 2 * 5 * 4 * 4 * 3 * 9
    rows, matrix = torch.randn(2, 7, 8), torch.randn(6, 8)
    linear = count(lambda: torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], ""))
    assert linear.flops == count(lambda: F.linear(rows, matrix)).flops == 2 * 2 * 7 * 8 * 6
    assert linear.operations == packed.operations == 1


def test_attention_by_kernel_has_the_flops_of_its_products() -> None:
    query, key = torch.randn(2, 3, 32, 16), torch.randn(2, 3, 24, 16)

    def products() -> torch.Tensor:
        return torch.softmax(query @ key.transpose(-1, -2), -1) @ key

    found = count(lambda: F.scaled_dot_product_attention(query, key, key))
    assert found.flops == count(products).flops == attention_flops(query.shape, key.shape, key.shape)
    query.requires_grad_(True)
    key.requires_grad_(True)
    both = count(lambda: F.scaled_dot_product_attention(query, key, key).sum().backward())
    assert both.flops == count(lambda: products().sum().backward()).flops == 3 * found.flops


def test_stable_diffusion_counts_as_published(tmp_path: Path) -> None:
    """At 256 px: 361 GFLOP, 1,732 operations of the frozen limit and 3,255 of peft (PERFORMANCE: meta device)."""
    from accelerate import init_empty_weights
    from diffusers import DDPMScheduler, UNet2DConditionModel

    configs = read_configs(ASSETS / "families" / "sd1")
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(configs["unet"]).requires_grad_(False)
    scheduler = DDPMScheduler.from_config(configs["scheduler"])
    latents = torch.empty(1, 4, 32, 32)
    inputs = Inputs(latents, latents, torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 768), {})
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = Parts(unet, None, (), (), scheduler)
    found = count_on_meta(parts, first, inputs, Recipe((), 256, 1, 16, 1e-4), "fp32")
    limit, peft = found["limit fp32, on no device"], found["reference fp32, gradients in place, on no device"]
    assert limit.flops == pytest.approx(361e9, rel=1e-3)
    assert peft.flops / limit.flops == pytest.approx(1.0107, rel=1e-3)
    assert limit.operations == pytest.approx(1732, abs=30)
    assert peft.operations == pytest.approx(3255, abs=30)
