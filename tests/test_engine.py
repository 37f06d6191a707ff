"""A base made fast computes what it computed, in both directions, and becomes plain again to the bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import WIDTH, WIDTH_2, tiny_sd2_unet, tiny_sdxl_unet, tiny_text_encoder, tiny_unet
from trainers import fused
from trainers.attention import Attend
from trainers.blocked import BlockedLayer, can_be_blocked, spread, turned
from trainers.engine import compile_blocks, make_fast, make_plain
from trainers.frozen import FrozenLayer, KeptLayer, is_pointwise
from trainers.fused import Gated, NormSilu, attend
from trainers.kernels import Kernels
from trainers.upsampled import Upsampled, quarters_of

ALL = Kernels(blocked=True, matrices=True, products=1 << 20)
UNETS = {"sd1": tiny_unet, "sd2": tiny_sd2_unet, "sdxl": tiny_sdxl_unet}
CHOICES = [Kernels(), ALL, Kernels(blocked=True)]


def both_ways(unet: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction (2, 4, 12, 16) and the gradient that comes back to the noisy latents."""
    draw = torch.Generator().manual_seed(4)
    noisy, back = (torch.randn(2, 4, 12, 16, generator=draw).to(dtype) for _ in range(2))
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=draw).to(dtype)
    sdxl = unet.config.cross_attention_dim > WIDTH
    extra = {"text_embeds": torch.randn(2, WIDTH_2, generator=draw).to(dtype), "time_ids": torch.ones(2, 6).to(dtype)}
    noisy.requires_grad_()
    steps = torch.tensor([3, 500])
    answer = unet(noisy, steps, encoder_hidden_states=text, return_dict=False, added_cond_kwargs=extra if sdxl else None)[0]
    answer.backward(back)
    assert noisy.grad is not None
    return answer.detach(), noisy.grad


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("kernels", CHOICES, ids=["kept", "all", "convolutions"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", UNETS)
def test_a_fast_base_answers_as_the_plain_one_and_is_put_back(
    family: str, dtype: torch.dtype, limit: float, kernels: Kernels
) -> None:
    unet = UNETS[family]().requires_grad_(False).to(dtype)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    kinds = {name: type(module) for name, module in unet.named_modules()}
    plain = both_ways(unet, dtype)
    undo = make_fast({"unet": unet}, kernels)
    assert not any(isinstance(module, nn.Linear | nn.Conv2d) for module in unet.modules())
    for found, wanted in zip(both_ways(unet, dtype), plain, strict=True):
        assert apart(found, wanted) < limit
    make_plain({"unet": unet}, undo)
    assert {name: type(module) for name, module in unet.named_modules()} == kinds
    assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(both_ways(unet, dtype), plain, strict=True))


@pytest.mark.parametrize("family", UNETS)
def test_in_bfloat16_it_is_no_further_from_float64_than_the_plain_base(family: str) -> None:
    exact = both_ways(UNETS[family]().requires_grad_(False).to(torch.bfloat16).to(torch.float64), torch.float64)
    unet = UNETS[family]().requires_grad_(False).to(torch.bfloat16)
    plain = both_ways(unet, torch.bfloat16)
    make_fast({"unet": unet}, ALL)
    for found, wanted, usual in zip(both_ways(unet, torch.bfloat16), exact, plain, strict=True):
        assert apart(found, wanted) < 1.25 * apart(usual, wanted)


def test_a_text_encoder_is_made_fast_too() -> None:
    encoder = tiny_text_encoder().requires_grad_(False)
    ids = torch.tensor([[49406, 320, 1125, 49407]])
    plain = encoder(ids).last_hidden_state
    undo = make_fast({"text_encoder": encoder}, ALL)
    assert apart(encoder(ids).last_hidden_state, plain) < 1e-6
    make_plain({"text_encoder": encoder}, undo)
    assert torch.equal(encoder(ids).last_hidden_state, plain)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(256, 272), (2, 9, 256)),
    "without bias": (lambda: nn.Linear(320, 256, bias=False), (7, 320)),
    "3x3": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
    "strided": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 8)),
    "strided, even": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (1, 16, 8, 8)),
    "strided, unpadded": (lambda: nn.Conv2d(16, 24, 3, stride=2), (1, 16, 8, 9)),
    "1x1": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 8, 6)),
    "1x1 strided": (lambda: nn.Conv2d(16, 24, 1, stride=2), (2, 16, 8, 6)),
    "2x2": (lambda: nn.Conv2d(16, 24, 2, padding=1), (2, 16, 5, 6)),
    "few channels": (lambda: nn.Conv2d(4, 64, 3, padding=1), (1, 4, 8, 8)),
}


@pytest.mark.parametrize("kind", [BlockedLayer, KeptLayer])
@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_layer_is_its_layer_in_both_directions(name: str, kind: type[FrozenLayer]) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(3)
    plain = make().requires_grad_(False)
    assert can_be_blocked(plain)
    frozen, x = kind(plain), torch.randn(shape)
    answers, gradients, back = [], [], None
    for layer in (plain, frozen):
        own = x.clone().requires_grad_()
        answer = layer(own)
        back = torch.randn_like(answer) if back is None else back
        answer.backward(back)
        assert own.grad is not None
        answers.append(answer.detach())
        gradients.append(own.grad)
    assert apart(answers[1], answers[0]) < 1e-6
    assert apart(gradients[1], gradients[0]) < 1e-6
    assert torch.equal(frozen.weight, plain.weight), "read back to the bit"
    with torch.no_grad():
        assert apart(frozen(x), answers[0]) < 1e-6


def test_a_kernel_lies_once_for_sizes_that_want_the_same_blocks() -> None:
    layer = BlockedLayer(nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False))
    for size in ((8, 8), (8, 8), (16, 16)):
        layer(torch.randn(1, 16, *size))
    kept = {id(tensor) for tensor in layer._forth.values()}
    assert len(layer._forth) == 2 and len(kept) <= 2
    assert layer._plain is None and not layer._back, "no plain copy, and nothing for a direction that was not asked for"


def test_what_cannot_be_blocked_is_kept() -> None:
    assert not can_be_blocked(nn.Conv2d(8, 8, 3, groups=2))
    assert not can_be_blocked(nn.Conv2d(8, 8, 3, padding_mode="circular"))
    assert not can_be_blocked(nn.Linear(8, 8).double())
    assert not can_be_blocked(nn.LayerNorm(8))


def test_the_adjoint_of_a_strided_convolution_by_its_definition() -> None:
    """<K x, g> = <x, K^T g>, in float64."""
    draw = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 2, 3, 3, generator=draw, dtype=torch.float64)
    x = torch.randn(1, 2, 7, 8, generator=draw, dtype=torch.float64)
    answer = torch.conv2d(x, kernel, None, 2, 1)
    g = torch.randn(answer.shape, generator=draw, dtype=torch.float64)
    adjoint = torch.conv2d(spread(g, (2, 2), (7, 8)), turned(kernel), None, 1, 1)
    assert adjoint.shape == x.shape
    assert float((answer * g).sum()) == pytest.approx(float((x * adjoint).sum()), rel=1e-12)


def test_gradients_against_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
    norm = nn.GroupNorm(4, 8).double().requires_grad_(False)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    assert torch.autograd.gradcheck(NormSilu(norm), x)
    assert torch.autograd.gradcheck(Gated(nn.Identity()), torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True))
    upsampled = Upsampled(nn.Conv2d(8, 4, 3, padding=1).double().requires_grad_(False))
    upsampled.quarters = KeptLayer(upsampled.quarters)  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(upsampled, x)
    states = [torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 3, 3)]
    for by_products in (True, False):
        assert torch.autograd.gradcheck(lambda *given, how=by_products: attend(given, 2, how), states)


def test_attention_by_products_keeps_or_remakes_its_probabilities_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kept in (0, 1 << 20):
        monkeypatch.setattr("trainers.fused.KEPT", kept)
        draw = torch.Generator().manual_seed(0)
        states = [torch.randn(2, 16, 32, generator=draw).requires_grad_() for _ in range(3)]
        answer = attend(states, 4, True)
        answer.backward(torch.ones_like(answer))
        found.append([answer.detach(), *(state.grad for state in states)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("by_products", [True, False])
def test_queries_keys_and_values_may_lie_in_one_tensor(batch: int, by_products: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(batch, 6, 16, generator=draw, dtype=torch.float64) for _ in range(3)]
    back = torch.randn(batch, 6, 16, generator=draw, dtype=torch.float64)
    found = []
    for layout in ([[0], [1], [2]], [[0], [1, 2]], [[0, 1, 2]]):
        parts = [torch.cat([states[number] for number in part], dim=-1).requires_grad_() for part in layout]
        answer = attend(parts, 4, by_products)
        answer.backward(back)
        gradients = [part.grad for part in parts]
        found.append((answer.detach(), torch.cat([gradient for gradient in gradients if gradient is not None], dim=-1)))
    own = [state.clone().unflatten(-1, (4, 4)).transpose(1, 2).requires_grad_() for state in states]
    wanted = torch.softmax(own[0] @ own[1].transpose(-1, -2) / 2, -1) @ own[2]  # 2: the root of a head's width
    for answer, gradient in found:
        assert apart(answer, wanted.detach().transpose(1, 2).flatten(2)) < 1e-12
        assert apart(gradient, found[0][1]) < 1e-12
    gradients = torch.autograd.grad(wanted.transpose(1, 2).flatten(2), own, back)
    assert apart(found[0][1], torch.cat([part.transpose(1, 2).flatten(2) for part in gradients], dim=-1)) < 1e-12


def test_the_four_quarters_are_sums_of_the_kernels_taps() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(1.0, 10.0).view(1, 1, 3, 3))
    top_left, _, _, bottom_right = quarters_of(conv).weight[:, 0].tolist()
    assert top_left == [[1, 2 + 3], [4 + 7, 5 + 6 + 8 + 9]]
    assert bottom_right == [[1 + 2 + 4 + 5, 3 + 6], [7 + 8, 9]]


def test_an_adapter_beside_an_upsamplers_convolution_takes_the_long_way() -> None:
    unet = tiny_unet().requires_grad_(False)
    make_fast({"unet": unet}, ALL)
    upsampled = next(module for module in unet.modules() if isinstance(module, Upsampled))
    x = torch.randn(1, upsampled.conv.shape[1], 4, 6)
    short = upsampled(x)
    upsampled.conv = nn.Sequential(upsampled.conv)  # as an AdaptedLayer is: no frozen layer itself
    assert apart(upsampled(x), short) < 1e-6
    assert upsampled(x, (9, 12)).shape[2:] == (9, 12)


def test_only_plain_attention_gets_another_processor() -> None:
    unet = tiny_unet()
    odd = next(module for module in unet.modules() if type(module).__name__ == "Attention")
    odd.rescale_output_factor = 2.0
    make_fast({"unet": unet}, Kernels())
    processors = {id(module): module.processor for module in unet.modules() if type(module).__name__ == "Attention"}
    assert not isinstance(processors.pop(id(odd)), Attend)
    assert processors and all(isinstance(processor, Attend) for processor in processors.values())


def test_a_gpus_norm_reads_plain_form_whatever_the_convolution_before_it_answers_in(monkeypatch: pytest.MonkeyPatch) -> None:
    forms, real, real_backward = [], torch.native_group_norm, fused._GROUP_NORM_BACKWARD

    def kernel(x: torch.Tensor, *words: Any) -> Any:
        forms.append(x.is_contiguous())
        return real(x, *words)

    def backward(gradient: torch.Tensor, x: torch.Tensor, *words: Any) -> Any:
        forms.extend([gradient.is_contiguous(), x.is_contiguous()])
        return real_backward(gradient, x, *words)

    monkeypatch.setattr(torch, "native_group_norm", kernel)
    monkeypatch.setattr(fused, "_GROUP_NORM_BACKWARD", backward)
    norm = NormSilu(nn.GroupNorm(2, 8).requires_grad_(False)).to("meta")
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last).requires_grad_()
    norm(x).backward(torch.empty_like(x))
    assert forms == [True, True, True, True]


def test_on_a_gpu_a_kernel_of_one_pixel_is_a_matrix_and_nothing_is_turned() -> None:
    plain = nn.Conv2d(6, 5, 1).requires_grad_(False).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    given = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(plain(x), x, given)
    kept = KeptLayer(plain)
    assert not kept.is_matrix, "a CPU's convolution does as well"
    kept.is_matrix = True
    y = kept(x)
    (found,) = torch.autograd.grad(y, x, given.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(found, wanted)
    assert all(states.is_contiguous(memory_format=torch.channels_last) for states in (y, found))
    others = (nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 1, stride=2), nn.Conv2d(6, 6, 1, padding=1), nn.Conv2d(6, 6, 3))
    assert is_pointwise(plain) and not any(is_pointwise(layer) for layer in others)


def test_compiled_blocks_compute_alike_and_become_plain_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plain, other = tiny_unet().requires_grad_(False), tiny_unet().requires_grad_(False)
    make_fast({"unet": plain}, Kernels())
    undo = make_fast({"unet": other}, Kernels())
    compile_blocks({"unet": other, "text_encoder": tiny_text_encoder()}, tmp_path, undo, "aot_eager")
    blocks = [module for module in other.modules() if module._compiled_call_impl is not None]
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"} and len(blocks) > 1
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    for found, wanted in zip(both_ways(other, torch.float32), both_ways(plain, torch.float32), strict=True):
        assert apart(found, wanted) < 1e-5
    make_plain({"unet": other}, undo)
    assert not [module for module in other.modules() if module._compiled_call_impl is not None]
    again, usual = (both_ways(unet, torch.float32) for unet in (other, tiny_unet()))
    assert all(torch.equal(found, wanted) for found, wanted in zip(again, usual, strict=True))
