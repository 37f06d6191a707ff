"""Every kind of adapter beside a frozen layer, in float64: against LyCORIS, against peft, and against its own delta."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.adapters.kinds import EXAMPLES, Example, frozen_weight
from trainers.adapters import ADAPTERS
from trainers.adapters.inject import attach
from trainers.adapters.layer import AdaptedLayer
from trainers.formats.keys import split_key
from trainers.formats.kohya import factors_of
from trainers.formats.weights import ModuleWeights


def weights_of(example: Example, fitted: bool = True) -> ModuleWeights:
    """The example as it is read, but in float64; `fitted` to its layer."""
    parts = {split_key("x." + key)[2]: tensor for key, tensor in example.tensors().items()}  # type: ignore[index]
    alpha = float(parts.pop("alpha"))
    down = {part: tensor for part, tensor in parts.items() if part in ("down", "up", "mid")}
    joined = factors_of(down) if "mid" in down else {}  # only a core is multiplied in, in float32
    factors = {part: tensor for part, tensor in parts.items() if part != "mid"} | {
        part: tensor.double() for part, tensor in joined.items()
    }
    if fitted:
        factors = ADAPTERS[example.kind].fit(factors, example.shape)
    return ModuleWeights(factors, alpha, example.kind)


def frozen_layer(example: Example) -> tuple[nn.Linear | nn.Conv2d, torch.Tensor]:
    """The layer of an example with bias, and an input (4, ...) for it."""
    layer: nn.Linear | nn.Conv2d
    if len(example.shape) == 2:
        layer, shape = nn.Linear(8, 12, dtype=torch.float64), (4, 5, 8)
    else:
        layer, shape = nn.Conv2d(8, 12, 3, stride=2, padding=1, dtype=torch.float64), (4, 8, 7, 6)
    with torch.no_grad():
        layer.weight.copy_(frozen_weight(example.shape))
        layer.bias.copy_(torch.linspace(-1, 1, 12))  # type: ignore[union-attr]
    return layer.requires_grad_(False), torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def adapted(example: Example) -> tuple[AdaptedLayer, torch.Tensor]:
    layer, x = frozen_layer(example)
    weights, stand_in = weights_of(example), AdaptedLayer(layer)
    attach(stand_in, "a", ADAPTERS[weights.kind], weights.factors, weights.scale)
    return stand_in, x


def apply_weight(layer: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The layer's output if its weight were `weight`."""
    if weight.dim() == 2:
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, stride=layer.stride, padding=layer.padding)


every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


def test_every_kind_has_an_example() -> None:
    assert {example.kind for example in EXAMPLES.values()} == set(ADAPTERS)


@every_example
def test_the_delta_is_that_of_lycoris(example: Example) -> None:
    delta = weights_of(example).delta(frozen_weight(example.shape))
    assert delta.dtype == torch.float64 and delta.shape == example.shape
    weighted = (delta.flatten() * torch.arange(delta.numel(), dtype=torch.float64).mul(0.3).cos()).sum()
    found = (float(delta.norm()), float(weighted), float(delta.flatten()[5]))
    # A core is multiplied in in float32, and LyCORIS adds a float32 epsilon to DoRA's norms.
    assert found == pytest.approx(example.golden, rel=2e-7, abs=1e-8)


@pytest.mark.parametrize("strength", [-0.5, 0.25, 1.0])
@every_example
def test_the_path_beside_the_layer_is_strength_times_the_delta(example: Example, strength: float) -> None:
    stand_in, x = adapted(example)
    stand_in.strengths["a"] = strength
    weight = frozen_weight(example.shape)
    expected = apply_weight(stand_in.frozen, weight + strength * weights_of(example).delta(weight), x)
    # The gains of a DoRA are kept in float32.
    torch.testing.assert_close(stand_in(x), expected, rtol=1e-6, atol=1e-6 if "dora" in example.kind else 1e-12)


@every_example
def test_a_strength_for_each_row_gives_each_row_as_if_alone(example: Example) -> None:
    stand_in, x = adapted(example)
    strengths = [0.0, 0.5, 1.0, -1.5]
    alone = []
    for row, strength in enumerate(strengths):
        stand_in.strengths["a"] = strength
        alone.append(stand_in(x[row : row + 1]))
    stand_in.strengths["a"] = torch.tensor(strengths, dtype=torch.float64)
    torch.testing.assert_close(stand_in(x), torch.cat(alone), rtol=1e-12, atol=1e-12)


@every_example
def test_a_merged_layer_gives_what_the_path_gives_and_comes_back_bit_for_bit(example: Example) -> None:
    stand_in, x = adapted(example)
    stand_in.strengths["a"] = 0.6
    before, frozen = stand_in(x), stand_in.weight.clone()
    stand_in.merge()
    torch.testing.assert_close(stand_in(x), before, rtol=1e-6, atol=1e-6)
    stand_in.merge()
    expected = frozen + 0.6 * weights_of(example).delta(frozen)
    torch.testing.assert_close(stand_in.weight, expected, rtol=1e-12, atol=1e-12)
    stand_in.unmerge()
    assert torch.equal(stand_in.weight, frozen)


@every_example
def test_at_strength_zero_the_layer_is_the_frozen_one(example: Example) -> None:
    stand_in, x = adapted(example)
    stand_in.strengths["a"] = 0.0
    assert torch.equal(stand_in(x), stand_in.frozen(x))


@every_example
def test_half_precision_gives_nearly_the_same(example: Example) -> None:
    stand_in, x = adapted(example)
    expected = stand_in(x)
    half = AdaptedLayer(stand_in.frozen.to(torch.bfloat16))
    weights = weights_of(example)
    small = {part: factor.float() for part, factor in weights.factors.items()}
    attach(half, "a", ADAPTERS[weights.kind], small, weights.scale)
    y = half(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert float((y.double() - expected).norm() / expected.norm()) < 0.02


@every_example
def test_the_norm_is_the_deltas(example: Example) -> None:
    weights = weights_of(example)
    if weights.needs_base:
        assert weights.delta_norm() is None
        with pytest.raises(ValueError, match="depends on the weight"):
            weights.delta()
    else:
        assert weights.delta_norm() == pytest.approx(float(weights.delta().norm()), rel=1e-12)


@every_example
def test_factors_of_another_layer_do_not_fit(example: Example) -> None:
    weights = weights_of(example, fitted=False)
    kind = ADAPTERS[weights.kind]
    out, *inner = example.shape
    assert kind.fit(weights.factors, (out + 1, *inner)) is None
    assert kind.fit(weights.factors, (out, inner[0] * 2, *inner[1:])) is None
    assert kind.fit(weights.factors, example.shape) is not None


def test_a_strength_between_goes_along_a_straight_line_to_the_dora() -> None:
    stand_in, x = adapted(EXAMPLES["dora"])
    outputs = []
    for strength in (0.0, 0.5, 1.0):
        stand_in.strengths["a"] = strength
        outputs.append(stand_in(x))
    torch.testing.assert_close(outputs[1], (outputs[0] + outputs[2]) / 2, rtol=1e-12, atol=1e-12)


def peft_layer(config: Any, frozen: nn.Module) -> Any:
    """peft's own layer around `frozen`, in float64."""
    peft = importlib.import_module("peft")
    return peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": frozen}))["layer"].double()


@pytest.mark.parametrize("name", ["dora", "dora convolution"])
def test_a_dora_is_that_of_peft(name: str) -> None:
    peft, example = importlib.import_module("peft"), EXAMPLES[name]
    layer, x = frozen_layer(example)
    theirs = peft_layer(peft.LoraConfig(r=3, lora_alpha=2, target_modules=["layer"], use_dora=True), layer)
    weights = weights_of(example)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(weights.factors["down"])
        theirs.lora_B["default"].weight.copy_(weights.factors["up"])
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.copy_(weights.factors["dora_scale"].reshape(magnitude.shape))
    ours, _ = adapted(example)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["loha", "loha convolution", "loha tucker"])
def test_a_loha_is_that_of_peft(name: str) -> None:
    peft, example = importlib.import_module("peft"), EXAMPLES[name]
    layer, x = frozen_layer(example)
    config = peft.LoHaConfig(r=3, alpha=2, target_modules=["layer"], use_effective_conv2d="tucker" in name)
    theirs, weights = peft_layer(config, layer), weights_of(example)
    with torch.no_grad():
        for part, factor in weights.factors.items():
            parameter = getattr(theirs, f"hada_{part}")["default"]
            parameter.copy_(factor.reshape(parameter.shape))
    ours, _ = adapted(example)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-7)  # peft keeps the scale in float32


@pytest.mark.parametrize("name", ["lokr factored", "lokr whole convolution"])
def test_a_lokr_is_that_of_peft(name: str) -> None:
    peft, example = importlib.import_module("peft"), EXAMPLES[name]
    layer, x = frozen_layer(example)
    weights = weights_of(example)
    rank = weights.rank or 8
    alpha = int(example.alpha) if weights.rank else rank
    theirs = peft_layer(peft.LoKrConfig(r=rank, alpha=alpha, target_modules=["layer"]), layer)
    with torch.no_grad():
        for part, factor in weights.factors.items():
            parameter = getattr(theirs, f"lokr_{part}")["default"]
            parameter.copy_(factor.reshape(parameter.shape))
    ours, _ = adapted(example)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
