"""The packed base: its weights, its gradient and what it keeps, against plain layers; and runs over it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.adapters.test_lora import LAYERS, adapted, make_layer
from tests.tiny_models import tiny_unet
from tests.tiny_runs import shake, tiny_config
from trainers.adapters.inject import find_layers
from trainers.checks import check_settings
from trainers.errors import SettingError
from trainers.families import recognise_base
from trainers.quantised import LEVELS, PackedLayer, can_be_packed, check_can_pack, pack, quantise, unpack
from trainers.train import fill_gradient, update

CPU = torch.device("cpu")


def packed_and_plain(name: str, kind: str = "int8") -> tuple[PackedLayer, nn.Linear | nn.Conv2d, torch.Tensor]:
    """A packed layer, a plain one with the weights that it computes with, and an input for both, in float64."""
    layer, x = make_layer(name)
    packed, reference = PackedLayer(layer, kind), copy.deepcopy(layer)
    reference.weight.copy_(packed.weight)
    return packed, reference, x.requires_grad_()


@pytest.mark.parametrize("shape", [(40, 24), (32, 12, 3, 3)])
def test_int8_is_off_by_half_a_step_of_its_channel_at_most(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight *= torch.logspace(-6, 3, shape[0]).view(-1, *(1 for _ in shape[1:]))
    weight[5] = 0  # a channel that does nothing
    packed = pack(weight, "int8")
    assert packed[0].dtype == torch.int8 and int(packed[0].abs().max()) == LEVELS
    error = (unpack(packed, "int8", weight.shape, torch.float32) - weight).abs().flatten(1).amax(1)
    step = weight.abs().flatten(1).amax(1) / LEVELS
    assert bool((error <= step / 2 * (1 + 1e-4)).all())
    assert float((error / step.clamp(min=1e-30)).max()) > 0.4, "the bound is nearly met, so it is of this many levels"
    assert torch.equal(pack(-weight, "int8")[0], -packed[0])


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradient_are_those_of_a_plain_layer_with_the_same_weights(name: str) -> None:
    packed, reference, x = packed_and_plain(name)
    torch.testing.assert_close(packed(x), reference(x), rtol=1e-14, atol=1e-14)
    found, wanted = (torch.autograd.grad(layer(x).sin().sum(), x)[0] for layer in (packed, reference))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(packed, (x[:1].detach().requires_grad_(),)), "finite differences"


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_learns_beside_a_packed_layer_as_beside_a_plain_one(name: str) -> None:
    gradients = []
    *layers, x = packed_and_plain(name)
    for layer in layers:
        stand_in = adapted(layer, 0.6)
        inputs = [x, *(factor.requires_grad_() for factor in stand_in.adapters["a"].factors.values())]
        gradients.append(torch.autograd.grad(stand_in(x).sin().sum(), inputs))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_kept_for_the_backward_pass(name: str) -> None:
    kept: list[list[torch.Tensor]] = []
    *layers, x = packed_and_plain(name)
    for layer in layers:
        saved: list[torch.Tensor] = []
        kept.append(saved)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda t: t):
            layer(x).sum().backward()
    ours, plain = ([tensor.nbytes for tensor in saved if tensor.data_ptr() != x.data_ptr()] for saved in kept)
    weight = layers[1].weight
    assert weight.nbytes in plain
    assert ours == []


def test_merging_into_packed_weights_is_refused_in_words() -> None:
    stand_in = adapted(PackedLayer(make_layer("linear")[0], "int8"), 1.0)
    with pytest.raises(SettingError, match="merged into weights kept in int8"):
        stand_in.merge()


def test_a_packed_part_keeps_its_layers_names_and_takes_a_third_of_the_bytes() -> None:
    unet = tiny_unet()
    names = list(find_layers({"unet": unet}))
    before, after = quantise(unet, "int8", CPU)
    assert list(find_layers({"unet": unet})) == names
    assert before == sum(parameter.nbytes for parameter in tiny_unet().parameters())
    assert after < before / 3  # a quarter, and what stays: norms, biases, scales
    plain = {path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert plain == {"conv_in", "conv_out"}
    assert unet.dtype == torch.float32


def test_a_convolution_that_repeats_its_edge_is_left_as_it_is() -> None:
    assert can_be_packed(nn.Conv2d(32, 32, 3))
    assert not can_be_packed(nn.Conv2d(32, 32, 3, padding_mode="circular"))
    assert not can_be_packed(nn.Embedding(32, 32))


def test_a_run_over_packed_weights_is_near_one_over_plain_and_changes_none(start: Any) -> None:
    gradients = []
    for kind in ("full", "int8"):
        training = start(f"train.base_weights={kind}", "train.batch_size=4")
        shake(training)
        fill_gradient(training)
        gradients.append(training.flat.gradient.double())
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert 1e-4 < error < 0.1
    before = {name: tensor.clone() for name, tensor in training.model.unet.state_dict().items()}
    assert any(tensor.dtype == torch.int8 for tensor in before.values())
    update(training)
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.unet.state_dict().items())


def test_recomputing_activations_over_packed_weights_gives_the_same_gradient(start: Any) -> None:
    gradients = []
    for checkpointing in ("false", "true"):
        training = start("train.base_weights=int8", f"train.checkpointing={checkpointing}")
        shake(training)
        fill_gradient(training)
        gradients.append(training.flat.gradient)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_four_bits_without_their_package_or_a_gpu_are_refused_before_weights_load(
    tiny_base: Path, pictures: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match=r"nf4 needs an NVIDIA GPU.*int8"):
        start("train.base_weights=nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problems = check_settings(tiny_config(tiny_base, pictures, "train.base_weights=nf4"), recognise_base(str(tiny_base)))
    (problem,) = (problem for problem in problems if problem.where == "train.base_weights")
    assert problem.severity == "error" and "pip install bitsandbytes" in problem.hint
    with pytest.raises(SettingError, match="pip install bitsandbytes"):
        check_can_pack("nf4", torch.device("cuda"))


def test_four_bits_by_bitsandbytes_are_computed_with_in_both_passes() -> None:
    """Where the package is installed: on a CPU it packs too, only slowly."""
    pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.Linear(64, 32).requires_grad_(False)
    packed, reference = PackedLayer(layer, "nf4"), copy.deepcopy(layer)
    reference.weight.copy_(packed.weight)
    assert 0.03 < float((packed.weight - layer.weight).norm() / layer.weight.norm()) < 0.12
    assert packed.packed[0].nbytes == layer.weight.numel() // 2
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.testing.assert_close(packed(x), reference(x))
    found, wanted = (torch.autograd.grad(layer(x).sin().sum(), x)[0] for layer in (packed, reference))
    torch.testing.assert_close(found, wanted)
