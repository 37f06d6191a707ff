"""Adapters in a model's parts: the one flat buffer, canonical names, and a base that never changes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from tests.tiny_models import tiny_text_encoder, tiny_unet
from trainers.adapters.flat import FlatParameters
from trainers.adapters.inject import TRAINED, adapt_layers, find_layers, inject_trainable, set_strength
from trainers.adapters.layer import AdaptedLayer
from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan

# Denoiser and text encoder mixed, so that grouping has something to do.
PLANS = [
    LayerPlan("unet.first", 2, 1.0, "unet"),
    LayerPlan("text_encoder.words", 3, 0.5, "text_encoder"),
    LayerPlan("unet.second", 4, 2.0, "unet"),
]


class Chain(nn.Module):
    """Its layers one after the other."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def make_parts() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "unet": Chain(first=nn.Conv2d(3, 4, 3, padding=1), shape=nn.Flatten(1), second=nn.Linear(64, 5)),
            "text_encoder": Chain(words=nn.Linear(6, 3)),
        }


def inject(parts: Mapping[str, nn.Module]) -> FlatParameters:
    return inject_trainable(parts, PLANS, LORA, 0, torch.device("cpu"))


def loss_of(parts: Mapping[str, nn.Module]) -> torch.Tensor:
    pictures, words = torch.linspace(-1, 1, 96).view(2, 3, 4, 4), torch.linspace(-1, 1, 12).view(2, 6)
    total: torch.Tensor = parts["unet"](pictures).square().sum() + parts["text_encoder"](words).square().sum()
    return total


def base_bytes(parts: Mapping[str, nn.Module]) -> str:
    digest = hashlib.sha256()
    for module in parts.values():
        for tensor in module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_a_write_to_the_buffer_is_seen_in_the_view_and_the_other_way_round() -> None:
    flat = inject(make_parts())
    view = flat.views["unet.second"]["up"]
    place = flat.shapes["unet.second"]["up"][1]
    flat.weights[place] = torch.arange(float(view.numel()))
    assert torch.equal(view.detach().flatten(), torch.arange(float(view.numel())))
    with torch.no_grad():
        view.fill_(3.0)
    assert torch.equal(flat.weights[place], torch.full((view.numel(),), 3.0))


def test_the_layers_compute_with_the_buffers_memory() -> None:
    parts = make_parts()
    flat = inject(parts)
    before = loss_of(parts).detach()
    flat.weights.add_(0.1)
    assert not torch.equal(loss_of(parts).detach(), before)


def test_backward_lands_in_the_flat_gradient_and_adds_up() -> None:
    parts = make_parts()
    flat = inject(parts)
    flat.weights.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    views = [view for factors in flat.views.values() for view in factors.values()]
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss_of(parts), views)])
    for _ in range(2):
        loss_of(parts).backward()  # type: ignore[no-untyped-call]
    assert expected.ne(0).all()
    torch.testing.assert_close(flat.gradient, 2 * expected)


def test_groups_are_contiguous_and_disjoint_and_cover_everything() -> None:
    flat = inject(make_parts())
    assert flat.groups["unet"].start == 0
    assert flat.groups["unet"].stop == flat.groups["text_encoder"].start
    assert flat.groups["text_encoder"].stop == flat.weights.numel()
    places = sorted((place.start, place.stop) for factors in flat.shapes.values() for _, place, _ in factors.values())
    assert places[0][0] == 0 and places[-1][1] == flat.weights.numel()
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(places))


def test_each_layer_lies_in_its_own_group() -> None:
    flat = inject(make_parts())
    for plan in PLANS:
        for _, place, _ in flat.shapes[plan.name].values():
            assert flat.groups[plan.group].start <= place.start < place.stop <= flat.groups[plan.group].stop


@pytest.mark.parametrize("group", ["unet", "text_encoder"])
def test_matrices_and_flat_parameter_of_a_group_are_the_same_memory(group: str) -> None:
    flat = inject(make_parts())
    (whole,), matrices = flat.parameters(group, as_views=False), flat.parameters(group, as_views=True)
    assert sum(matrix.numel() for matrix in matrices) == whole.numel()
    assert {matrix.dim() for matrix in matrices} <= {2, 4}
    assert whole.grad is not None
    with torch.no_grad():
        whole.copy_(torch.arange(float(whole.numel())))
        whole.grad.copy_(torch.arange(float(whole.numel())) + 0.5)
    joined = torch.cat([matrix.detach().flatten() for matrix in matrices])
    gradients = torch.cat([matrix.grad.flatten() for matrix in matrices if matrix.grad is not None])
    assert torch.equal(joined, torch.arange(float(whole.numel())))
    assert torch.equal(gradients, joined + 0.5)
    assert torch.equal(flat.weights[flat.groups[group]], joined)


def test_split_cuts_another_flat_tensor_like_the_views() -> None:
    flat = inject(make_parts())
    pieces = flat.split(flat.weights * 2)
    assert pieces.keys() == flat.views.keys()
    for layer, factors in flat.views.items():
        for factor, view in factors.items():
            assert torch.equal(pieces[layer][factor], view.detach() * 2)


def test_training_changes_no_byte_of_the_frozen_base_and_gives_it_no_gradient() -> None:
    parts = make_parts()
    before = base_bytes(parts)
    flat = inject(parts)
    optimizer = torch.optim.AdamW(flat.parameters("unet", False) + flat.parameters("text_encoder", False), lr=0.1)
    first = loss_of(parts).detach()
    for _ in range(3):
        flat.gradient.zero_()
        loss_of(parts).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss_of(parts).detach() < first
    assert base_bytes(parts) == before
    for module in parts.values():
        for parameter in module.parameters():
            assert not parameter.requires_grad and parameter.grad is None


def test_factors_are_no_parameters_of_the_model() -> None:
    parts = make_parts()
    before = sum(parameter.numel() for module in parts.values() for parameter in module.parameters())
    inject(parts)
    assert sum(parameter.numel() for module in parts.values() for parameter in module.parameters()) == before


def test_factors_are_float32_over_a_bfloat16_base() -> None:
    parts = {name: module.to(torch.bfloat16) for name, module in make_parts().items()}
    flat = inject(parts)
    assert flat.weights.dtype == flat.gradient.dtype == torch.float32
    assert {view.dtype for factors in flat.views.values() for view in factors.values()} == {torch.float32}


def test_layers_of_the_text_encoder_are_named_without_text_model() -> None:
    inner = Chain(encoder=Chain(q_proj=nn.Linear(2, 2)))
    old, new = {"text_encoder": Chain(text_model=inner)}, {"text_encoder": inner}
    assert list(find_layers(old)) == list(find_layers(new)) == ["text_encoder.encoder.q_proj"]
    adapted = adapt_layers(old, ["text_encoder.encoder.q_proj"])
    assert inner.get_submodule("encoder.q_proj") is adapted["text_encoder.encoder.q_proj"]


def test_a_real_models_layers_carry_the_names_that_files_use() -> None:
    found = find_layers({"unet": tiny_unet(), "text_encoder": tiny_text_encoder()})
    for name in (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "unet.down_blocks.0.attentions.0.proj_in",
        "unet.down_blocks.0.resnets.0.conv1",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        "text_encoder.encoder.layers.1.mlp.fc2",
    ):
        assert isinstance(found[name], nn.Linear | nn.Conv2d), name


def test_the_same_layers_are_found_after_adapting() -> None:
    parts = make_parts()
    before = list(find_layers(parts))
    inject(parts)
    found = find_layers(parts)
    assert list(found) == before
    assert all(isinstance(found[plan.name], AdaptedLayer) for plan in PLANS)


def test_adapting_a_layer_again_keeps_what_is_on_it() -> None:
    parts = make_parts()
    inject(parts)
    layer = adapt_layers(parts, ["unet.first"])["unet.first"]
    assert TRAINED in layer.adapters and not isinstance(layer.frozen, AdaptedLayer)


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(KeyError, match=r"unet\.third"):
        adapt_layers(make_parts(), ["unet.third"])


def test_strength_is_set_on_every_layer_of_the_given_parts_only() -> None:
    parts = make_parts()
    inject(parts)
    set_strength({"unet": parts["unet"]}, TRAINED, 0.25)
    strengths = {
        name: layer.strengths[TRAINED] for name, layer in find_layers(parts).items() if isinstance(layer, AdaptedLayer)
    }
    assert strengths == {"unet.first": 0.25, "unet.second": 0.25, "text_encoder.words": 1.0}
