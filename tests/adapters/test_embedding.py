"""LoRA on an Embedding, against loralib's formula and peft's layer: answer, start, gradients, delta, merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tiny_models import tiny_text_encoder
from trainers.adapters.dropout import Dropout, Keys, layer_dropout
from trainers.adapters.inject import inject_trainable
from trainers.adapters.layer import AdaptedLayer, Adapter
from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan
from trainers.objective import generator_for

WORDS, WIDTH, RANK, SCALE = 11, 6, 3, 0.5
IDS = torch.tensor([[3, 0, 3, 10], [7, 7, 1, 2]])


def table(dtype: torch.dtype = torch.float64) -> nn.Embedding:
    layer = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(1)))
    return layer.to(dtype)


def learnt(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = LORA.factor_shapes((WORDS, WIDTH), RANK)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def beside(layer: nn.Embedding, factors: dict[str, torch.Tensor], strength: Any = 1.0) -> AdaptedLayer:
    stand_in = AdaptedLayer(layer)
    stand_in.adapters["a"], stand_in.strengths["a"] = Adapter(LORA, factors, SCALE), strength
    return stand_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    layer = table(dtype)
    started = LORA.start((WORDS, WIDTH), RANK, SCALE, generator_for(0), lambda: layer.weight.float())
    found = beside(layer, started.factors)(IDS)
    assert torch.equal(found, layer(IDS)) and found.dtype == dtype
    assert float(started.factors["down"].abs().min()) > 0  # as loralib's lora_B; the rows of words are zero, as its lora_A


@pytest.mark.parametrize("strength", [-0.5, 1.0])
def test_it_adds_the_rows_of_the_delta_as_loralib_does(strength: float) -> None:
    """loralib: F.embedding(x, A^T) @ B^T * scaling with A (r, words) and B (width, r); its merged weight adds (B A)^T."""
    layer, factors = table(), learnt()
    a, b = factors["up"].T, factors["down"].T
    found = beside(layer, factors, strength)(IDS)
    torch.testing.assert_close(found, layer(IDS) + strength * SCALE * (F.embedding(IDS, a.T) @ b.T), rtol=1e-12, atol=1e-12)
    delta = LORA.delta(factors, SCALE)
    torch.testing.assert_close(delta, SCALE * (b @ a).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, F.embedding(IDS, layer.weight + strength * delta), rtol=1e-12, atol=1e-12)


def test_a_strength_for_each_row() -> None:
    layer, factors = table(), learnt()
    found = beside(layer, factors, torch.tensor([0.0, 2.0], dtype=torch.float64))(IDS)
    twice = beside(layer, factors, 2.0)(IDS)
    torch.testing.assert_close(found, torch.stack([layer(IDS)[0], twice[1]]), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_whole_table_projected_by_the_factors() -> None:
    layer = table()
    factors = {name: factor.requires_grad_() for name, factor in learnt().items()}
    given = torch.randn(*IDS.shape, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (beside(layer, factors)(IDS) * given).sum().backward()
    weight = layer.weight.clone().requires_grad_()
    (F.embedding(IDS, weight) * given).sum().backward()
    assert weight.grad is not None
    up, down = (factors[name] for name in ("up", "down"))
    torch.testing.assert_close(up.grad, SCALE * weight.grad @ down.detach().T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(down.grad, SCALE * up.detach().T @ weight.grad, rtol=1e-12, atol=1e-12)
    assert up.grad is not None and not up.grad[[4, 5, 6, 8, 9]].any()  # words that nobody read


def test_merging_is_undone_to_the_bit() -> None:
    layer, factors = table(), learnt()
    stand_in, before = beside(layer, factors, 0.75), layer.weight.clone()
    wanted = stand_in(IDS)
    stand_in.merge()
    torch.testing.assert_close(stand_in(IDS), wanted, rtol=1e-12, atol=1e-12)
    stand_in.unmerge()
    assert torch.equal(layer.weight, before) and stand_in.bias is None


def test_its_factors_turned_round_are_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    layer, factors = table(torch.float32), learnt(torch.float32)
    theirs: Any = get_peft_model(
        nn.Sequential(table(torch.float32)), LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["0"])
    )
    other: Any = theirs.base_model.model.get_submodule("0")
    with torch.no_grad():
        other.lora_embedding_A["default"].copy_(factors["up"].T)
        other.lora_embedding_B["default"].copy_(factors["down"].T)
    torch.testing.assert_close(beside(layer, factors)(IDS), theirs(IDS), rtol=1e-5, atol=1e-6)


def test_a_text_encoders_table_learns_and_diffusers_takes_it_in_pefts_form_beside_another_layer() -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    name, ids = "text_encoder.embeddings.token_embedding", torch.arange(8)[None]
    ours, theirs = tiny_text_encoder(), tiny_text_encoder()
    flat = inject_trainable({"text_encoder": ours}, [LayerPlan(name, 4, 1.0, "text_encoder")], LORA, 0, torch.device("cpu"))
    before = ours(ids)[0].detach()
    torch.testing.assert_close(before, theirs(ids)[0], rtol=0, atol=0)
    optimizer = torch.optim.SGD(flat.parameters("text_encoder", False), lr=0.1)
    for _ in range(2):
        flat.gradient.zero_()
        ours(ids)[0].square().sum().backward()
        optimizer.step()
    factors = flat.views[name]
    file = {
        f"{name}.lora_embedding_A": factors["up"].detach().T.contiguous(),
        f"{name}.lora_embedding_B": factors["down"].detach().T.contiguous(),
    }
    with pytest.raises(ValueError, match="infer"):
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(dict(file), None, tiny_text_encoder(), prefix="text_encoder")
    beside_it = "text_encoder.encoder.layers.0.self_attn.q_proj"
    width = before.shape[-1]
    file |= {f"{beside_it}.lora_A.weight": torch.zeros(4, width), f"{beside_it}.lora_B.weight": torch.zeros(width, 4)}
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(file, None, theirs, prefix="text_encoder")
    found = theirs(ids)[0].detach()
    assert float((found - before).norm()) > 1e-2
    torch.testing.assert_close(found, ours(ids)[0].detach(), rtol=1e-4, atol=1e-5)


def test_components_are_dropped_and_words_are_not() -> None:
    layer, factors = table(), learnt()
    keys = Keys(torch.tensor([[5, 0], [-9, 0]], dtype=torch.int32))
    for rates, differs in ((Dropout(input=0.5), False), (Dropout(rank=0.5), True)):
        stand_in = beside(layer, factors)
        stand_in.adapters["a"] = Adapter(LORA, factors, SCALE, layer_dropout(rates, "text_encoder.x", keys))
        assert torch.equal(stand_in(IDS), beside(layer, factors)(IDS)) != differs
