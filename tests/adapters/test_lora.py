"""LoRA on one layer, in float64: against the formula, peft and finite differences."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainers.adapters.inject import TRAINED, inject_trainable
from trainers.adapters.layer import AdaptedLayer, Adapter
from trainers.adapters.lora import LORA, LoraSettings
from trainers.adapters.plan import LayerPlan
from trainers.formats.weights import ModuleWeights
from trainers.objective import generator_for

RANK, SCALE = 3, 0.7
LAYERS = ["linear", "linear_over_tokens", "convolution", "strided_convolution", "pointwise_convolution"]


def seeded(*key: object) -> torch.Generator:
    return generator_for("test", *key)


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear | nn.Conv2d, torch.Tensor]:
    """A frozen layer with random weights and an input (4, ...) for it."""
    layer: nn.Linear | nn.Conv2d
    shape: tuple[int, ...]
    if name.startswith("linear"):
        layer, shape = nn.Linear(6, 5), (4, 7, 6) if name == "linear_over_tokens" else (4, 6)
    elif name == "convolution":
        layer, shape = nn.Conv2d(4, 5, 3, padding=1), (4, 4, 7, 6)
    elif name == "strided_convolution":
        layer, shape = nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False), (4, 4, 7, 6)
    else:
        layer, shape = nn.Conv2d(4, 5, 1), (4, 4, 5, 3)
    layer = layer.to(dtype).requires_grad_(False)
    for number, parameter in enumerate(layer.parameters()):
        parameter.normal_(0.0, 0.4, generator=seeded(name, number))
    return layer, torch.randn(shape, generator=seeded(name, "input"), dtype=dtype)


def make_factors(layer: nn.Module, key: object = 0, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Gaussian factors, both sides non-zero, in the layer's dtype."""
    weight: Any = layer.weight
    shapes = LORA.factor_shapes(tuple(weight.shape), rank)
    return {n: torch.randn(s, generator=seeded(n, s, key), dtype=weight.dtype) * 0.5 for n, s in shapes.items()}


def adapted(layer: nn.Linear | nn.Conv2d, strength: float | torch.Tensor, **more: dict[str, torch.Tensor]) -> AdaptedLayer:
    """The layer with one adapter "a" of fixed random factors, or those given by adapter name."""
    stand_in = AdaptedLayer(layer)
    for name, factors in (more or {"a": make_factors(layer)}).items():
        stand_in.adapters[name] = Adapter(LORA, factors, SCALE)
        stand_in.strengths[name] = strength
    return stand_in


def apply_weight(layer: nn.Linear | nn.Conv2d, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The layer's output if its weight were `weight`."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, stride=layer.stride, padding=layer.padding)


def delta_by_hand(factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """scale * B A, entry by entry of the kernel, without the code under test."""
    down, up = factors["down"], factors["up"]
    if down.dim() == 2:
        return SCALE * up @ down
    return SCALE * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)


@pytest.mark.parametrize("strength", [-0.5, 0.25, 1.0, 2.0])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_the_frozen_weight_plus_strength_times_delta(name: str, strength: float) -> None:
    layer, x = make_layer(name)
    expected = apply_weight(layer, layer.weight + strength * delta_by_hand(make_factors(layer)), x)
    torch.testing.assert_close(adapted(layer, strength)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_delta_is_scale_times_up_times_down_in_float64(name: str) -> None:
    layer, _ = make_layer(name, torch.float32)
    factors = make_factors(layer)
    delta = Adapter(LORA, factors, SCALE).delta()
    assert delta.dtype == torch.float64
    expected = delta_by_hand({key: value.double() for key, value in factors.items()})
    torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_at_step_zero_the_output_is_the_frozen_layers_exactly(name: str, dtype: torch.dtype) -> None:
    layer, x = make_layer(name, dtype)
    expected = layer(x)
    root = nn.ModuleDict({"layer": layer})
    inject_trainable({"unet": root}, [LayerPlan("unet.layer", RANK, SCALE, "unet")], LORA, 0, torch.device("cpu"))
    assert isinstance(root["layer"], AdaptedLayer) and TRAINED in root["layer"].adapters
    assert torch.equal(root["layer"](x), expected)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_peft(name: str, scaling: str) -> None:
    layer, x = make_layer(name)
    factors = {key: value.requires_grad_() for key, value in make_factors(layer).items()}
    settings = LoraSettings.model_validate({"rank": RANK, "alpha": 2.0, "scaling": scaling})
    ours = AdaptedLayer(layer)
    ours.adapters["a"] = Adapter(LORA, factors, settings.scale_of(settings.effective_alpha, settings.rank))
    ours.strengths["a"] = 1.0
    y = ours(x)
    y.square().sum().backward()

    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=2.0, target_modules=["layer"], use_rslora=scaling == "rslora")
    theirs = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}))["layer"].double()
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        down.copy_(factors["down"])
        up.copy_(factors["up"])
    expected = theirs(x)
    expected.square().sum().backward()

    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors["down"].grad, down.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factors["up"].grad, up.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_factors_and_input_equal_finite_differences(name: str) -> None:
    layer, x = make_layer(name)
    factors = make_factors(layer)

    def output(down: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = adapted(layer, 1.3, a={"down": down, "up": up})(x)
        return y

    inputs = tuple(tensor.requires_grad_() for tensor in (factors["down"], factors["up"], x[:2]))
    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_factored_and_materialised_forms_give_the_same_gradients(name: str) -> None:
    layer, x = make_layer(name)
    gradients = []
    for materialised in (False, True):
        factors = {key: value.requires_grad_() for key, value in make_factors(layer).items()}
        if materialised:
            y = apply_weight(layer, layer.weight + 0.8 * delta_by_hand(factors), x)
        else:
            y = adapted(layer, 0.8, a=factors)(x)
        gradients.append(torch.autograd.grad(y.sin().sum(), list(factors.values())))
    for factored, materialised_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(factored, materialised_gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_a_strength_for_each_row_gives_each_row_as_if_alone(name: str) -> None:
    layer, x = make_layer(name)
    strengths = [0.0, 0.5, 1.0, -1.5]
    together = adapted(layer, torch.tensor(strengths, dtype=torch.float64))(x)
    alone = torch.cat([adapted(layer, strength)(x[row : row + 1]) for row, strength in enumerate(strengths)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_strength_zero_is_the_frozen_layer_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    layer, x = make_layer(name, dtype)
    assert torch.equal(adapted(layer, 0.0)(x), layer(x))


def test_at_strength_zero_the_adapter_is_not_even_computed() -> None:
    layer, x = make_layer("linear")
    broken = {name: torch.full_like(factor, float("nan")) for name, factor in make_factors(layer).items()}
    assert torch.equal(adapted(layer, 0.0, a=broken)(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_merged_weights_give_what_the_factored_form_gives(name: str) -> None:
    layer, x = make_layer(name)
    stand_in = adapted(layer, 0.6)
    factored = stand_in(x)
    stand_in.merge()
    torch.testing.assert_close(stand_in(x), factored, rtol=1e-12, atol=1e-12)


def test_a_merged_weight_is_the_float64_sum_rounded_once() -> None:
    layer, _ = make_layer("linear", torch.bfloat16)
    frozen, factors = layer.weight.clone(), make_factors(layer)
    adapted(layer, 0.6, a=factors).merge()
    delta = delta_by_hand({key: value.double() for key, value in factors.items()})
    assert torch.equal(layer.weight, (frozen.double() + 0.6 * delta).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_the_exact_bits_also_after_several_merges(dtype: torch.dtype) -> None:
    layer, x = make_layer("convolution", dtype)
    frozen, stand_in = layer.weight.clone(), adapted(layer, 1.0)
    before = stand_in(x)
    for strength in (1.0, -0.3, 2.0):
        stand_in.strengths["a"] = strength
        stand_in.merge()
    assert not torch.equal(layer.weight, frozen)
    stand_in.unmerge()
    stand_in.strengths["a"] = 1.0
    assert torch.equal(layer.weight, frozen)
    assert torch.equal(stand_in(x), before)


def test_a_second_merge_replaces_the_first() -> None:
    layer, _ = make_layer("linear")
    frozen, stand_in = layer.weight.clone(), adapted(layer, 1.0)
    stand_in.merge()
    stand_in.strengths["a"] = 0.5
    stand_in.merge()
    expected = frozen + 0.5 * delta_by_hand(make_factors(layer))
    torch.testing.assert_close(layer.weight, nn.Parameter(expected, requires_grad=False), rtol=1e-12, atol=1e-12)


def test_a_strength_for_each_row_is_refused_by_merge_and_changes_nothing() -> None:
    layer, x = make_layer("linear")
    frozen, stand_in = layer.weight.clone(), adapted(layer, torch.tensor([0.0, 0.5, 1.0, 2.0]))
    before = stand_in(x)
    with pytest.raises(ValueError, match="strength per row cannot be merged"):
        stand_in.merge()
    assert torch.equal(layer.weight, frozen)
    assert torch.equal(stand_in(x), before)


def test_two_adapters_add_up_each_at_its_own_strength() -> None:
    layer, x = make_layer("convolution")
    first, second = make_factors(layer, "first", rank=2), make_factors(layer, "second", rank=4)
    stand_in = adapted(layer, 1.0, first=first, second=second)
    stand_in.strengths = {"first": 0.4, "second": -1.1}
    expected = apply_weight(layer, layer.weight + 0.4 * delta_by_hand(first) - 1.1 * delta_by_hand(second), x)
    torch.testing.assert_close(stand_in(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [(64, 400), (64, 40, 3, 3)])
def test_down_starts_gaussian_with_variance_one_over_fan_in_and_up_starts_zero(weight: tuple[int, ...]) -> None:
    factors = {name: torch.full(shape, 9.0) for name, shape in LORA.factor_shapes(weight, 64).items()}
    LORA.initialise(factors, seeded("start"))
    fan_in = math.prod(weight[1:])
    z = factors["down"].flatten().double() * math.sqrt(fan_in)
    assert torch.equal(factors["up"], torch.zeros_like(factors["up"]))
    # Moments of more than 20,000 standard normal numbers, each within five of its own standard errors.
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)


def test_a_layers_start_does_not_depend_on_which_others_are_adapted_nor_on_their_order() -> None:
    def start(names: list[str]) -> dict[str, torch.Tensor]:
        root = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
        plans = [LayerPlan(f"unet.{name}", 4, 1.0, "unet") for name in names]
        flat = inject_trainable({"unet": root}, plans, LORA, 7, torch.device("cpu"))
        return {name: factors["down"].detach().clone() for name, factors in flat.views.items()}

    alone, forwards, backwards = start(["b"]), start(["a", "b", "c"]), start(["c", "b", "a"])
    assert torch.equal(alone["unet.b"], forwards["unet.b"])
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    assert not torch.equal(forwards["unet.a"], forwards["unet.b"])


def test_another_seed_starts_elsewhere() -> None:
    def start(seed: int) -> torch.Tensor:
        root = nn.ModuleDict({"a": nn.Linear(8, 8)})
        return inject_trainable(
            {"unet": root}, [LayerPlan("unet.a", 4, 1.0, "unet")], LORA, seed, torch.device("cpu")
        ).weights.clone()

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize(("scaling", "scale"), [("standard", 8 / 16), ("rslora", 8 / 4)])
def test_the_alpha_in_a_file_gives_readers_the_scale_that_was_trained(scaling: str, scale: float) -> None:
    settings = LoraSettings.model_validate({"rank": 16, "alpha": 8, "scaling": scaling})
    ours = settings.scale_of(settings.effective_alpha, settings.rank)
    assert ours == scale
    name, factors, told = LORA.exported({"down": torch.zeros(16, 8), "up": torch.zeros(8, 16)}, ours)
    assert ModuleWeights(factors, told * settings.rank, name).scale == scale
