"""Every type that is trained, beside a frozen layer in float64: path against delta, start, gradients, file, strength."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainers.adapters import ADAPTERS, AdapterConfig
from trainers.adapters.base import Started
from trainers.adapters.inject import inject_trainable
from trainers.adapters.layer import AdaptedLayer, Adapter
from trainers.adapters.lora import LoraSettings
from trainers.adapters.plan import LayerPlan
from trainers.formats.plain import to_lora
from trainers.formats.weights import ModuleWeights
from trainers.objective import generator_for

RANK, SCALE = 3, 0.5
KINDS: dict[str, Any] = {
    f"{settings.model_fields['type'].default} {init}".strip(): settings(rank=RANK, **({"init": init} if init else {})).trained
    for settings in get_args(get_args(AdapterConfig)[0])
    for init in (("gaussian", "symmetric", "pissa", "olora") if "init" in settings.model_fields else ("",))
}
KINDS["lora grow"] = LoraSettings(rank=RANK, rank_schedule="grow", grow_from=2).trained
SHAPES = {"linear": (12, 8), "uneven linear": (11, 7), "wide linear": (56, 64), "convolution": (12, 8, 3, 3)}

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def test_all_types_are_here() -> None:
    types = "lora dora loha lokr additive full random_projection restart pivotal"
    assert {name.split()[0] for name in KINDS} == set(types.split())


def frozen_layer(shape: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
    """A layer with bias and an input (4, ...) for it, float64."""
    generator = torch.Generator().manual_seed(5)
    layer: Any
    if len(shape) == 2:
        layer, size = nn.Linear(shape[1], shape[0]), (4, 5, shape[1])
    else:
        layer, size = nn.Conv2d(shape[1], shape[0], 3, stride=2, padding=1), (4, shape[1], 7, 6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return layer.double().requires_grad_(False), torch.randn(size, generator=generator, dtype=torch.float64)


def begin(kind: Any, layer: Any, dtype: torch.dtype = torch.float64) -> Started:
    shape = tuple(layer.weight.shape)
    started: Started = kind.start(shape, RANK, SCALE, generator_for(0, "x"), lambda: layer.weight.detach().float())
    assert {name: tuple(factor.shape) for name, factor in started.factors.items()} == kind.factor_shapes(shape, RANK)
    constants = {name: tensor if tensor.dim() == 0 else tensor.to(dtype) for name, tensor in started.constants.items()}
    return Started({name: factor.to(dtype) for name, factor in started.factors.items()}, started.scale, constants)


def learnt(kind: Any, layer: Any) -> Started:
    """As if it had learnt; a type that goes in periods, in three of them."""
    started = shaken(begin(kind, layer))
    for number in (1, 2) if hasattr(kind, "turn") else ():
        known = {name: tensor.double() for name, tensor in {**started.factors, **started.constants}.items()}
        turn = kind.turn(known, generator_for(0, "turn", number))
        same = {name: factor.to(known[name].dtype) for name, factor in {**known, **turn.constants, **turn.factors}.items()}
        torch.testing.assert_close(kind.delta(same, SCALE), kind.delta(known, SCALE), rtol=1e-12, atol=1e-12)
        factors, constants = ({name: same[name] for name in names} for names in (started.factors, started.constants))
        started = shaken(Started(factors, started.scale, constants), seed=1 + number)
    return started


def shaken(started: Started, size: float = 0.3, seed: int = 1) -> Started:
    """As if it had learnt."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: factor + size * torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
        for name, factor in started.factors.items()
    }
    return Started(moved, started.scale, started.constants)


def beside(layer: Any, kind: Any, started: Started, strength: float = 1.0) -> AdaptedLayer:
    stand_in = AdaptedLayer(layer)
    stand_in.adapters["a"] = Adapter(kind, {**started.factors, **started.constants}, started.scale)
    stand_in.strengths["a"] = strength
    return stand_in


def apply_weight(layer: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The layer's output if its weight were `weight`."""
    if weight.dim() == 2:
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, stride=layer.stride, padding=layer.padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_shape
@every_kind
def test_step_zero_is_the_base_bit_for_bit(kind: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x = frozen_layer(shape)
    layer, x = layer.to(dtype), x.to(dtype)
    stand_in = beside(layer, kind, begin(kind, layer, torch.float32))
    assert torch.equal(stand_in(x), layer(x))


@pytest.mark.parametrize("strength", [-0.5, 1.0])
@every_shape
@every_kind
def test_the_path_is_strength_times_the_delta(kind: Any, shape: tuple[int, ...], strength: float) -> None:
    layer, x = frozen_layer(shape)
    started = learnt(kind, layer)
    delta = kind.delta({**started.factors, **started.constants}, SCALE, layer.weight)
    assert delta.shape == shape and float(delta.norm()) > 0.1
    found = beside(layer, kind, started, strength)(x)
    torch.testing.assert_close(found, apply_weight(layer, layer.weight + strength * delta, x), rtol=1e-10, atol=1e-10)


@every_kind
def test_a_strength_for_each_row(kind: Any) -> None:
    layer, x = frozen_layer(SHAPES["linear"])
    started, strengths = learnt(kind, layer), [0.0, 0.5, 1.0, -1.5]
    alone = [beside(layer, kind, started, strength)(x[row : row + 1]) for row, strength in enumerate(strengths)]
    together = beside(layer, kind, started)
    together.strengths["a"] = torch.tensor(strengths, dtype=torch.float64)
    torch.testing.assert_close(together(x), torch.cat(alone), rtol=1e-10, atol=1e-10)


@every_shape
@every_kind
def test_gradients_are_those_of_the_delta_and_of_finite_differences(kind: Any, shape: tuple[int, ...]) -> None:
    """dL/dW = dL/d(delta), projected by the factors: what the optimizer sees. A DoRA's norm takes no part in it."""
    layer, x = frozen_layer(shape)
    started = learnt(kind, layer)
    factors = {name: factor.clone().requires_grad_() for name, factor in started.factors.items()}
    given = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(at: dict[str, torch.Tensor]) -> torch.Tensor:
        return (beside(layer, kind, Started(at, started.scale, started.constants))(x) * given).sum()

    loss(factors).backward()  # type: ignore[no-untyped-call]
    weight = layer.weight.clone().requires_grad_()
    (apply_weight(layer, weight, x) * given).sum().backward()
    assert weight.grad is not None
    through = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
    if "dora_scale" in through:
        up, down, magnitude = (through[name] for name in ("up", "down", "dora_scale"))
        direction = layer.weight + SCALE * (up.flatten(1) @ down.flatten(1)).reshape(shape)
        norm = direction.detach().flatten(1).norm(dim=1).reshape(magnitude.shape)
        delta = magnitude / norm * direction - layer.weight
    else:
        delta = kind.delta({**through, **started.constants}, SCALE, layer.weight)
    (delta * weight.grad).sum().backward()
    for name, factor in factors.items():
        torch.testing.assert_close(factor.grad, through[name].grad, rtol=1e-9, atol=1e-9)
        if "dora_scale" in factors and name != "dora_scale":
            continue  # the norm moves with them, and is left out of the gradient
        step = 1e-6 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        with torch.no_grad():
            more, less = (loss({**factors, name: factor + sign * step}) for sign in (1, -1))
        assert factor.grad is not None
        assert float(more - less) / 2 == pytest.approx(float((factor.grad * step).sum()), rel=1e-5, abs=1e-10)


@every_shape
@every_kind
def test_its_file_holds_its_delta(kind: Any, shape: tuple[int, ...]) -> None:
    layer, _ = frozen_layer(shape)
    started = learnt(kind, layer)
    known = {**started.factors, **started.constants}
    name, factors, scale = kind.exported(known, SCALE)
    assert not ADAPTERS[name].fault(factors) and set(factors) <= set(ADAPTERS[name].parts)
    module = ModuleWeights(factors, scale * (ADAPTERS[name].rank(factors) or 1), name)
    wanted = kind.delta(known, SCALE, layer.weight)
    found = module.delta(layer.weight if module.needs_base else None)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    rank = kind.file_rank(RANK)
    plain, error = to_lora("x", module, rank or 64, layer.weight if module.needs_base else None)
    assert error < 1e-6 and plain.rank <= (rank or min(shape[0], wanted[0].numel()))


# Growing: see test_grow.py. Pivotal: it is the vectors beside a LoRA.
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("lora gaussian", "lora grow", "pivotal")])
def test_it_reaches_what_a_lora_of_the_same_rank_does_not_or_starts_elsewhere(name: str) -> None:
    """No type is LoRA renamed: its delta has a higher rank, or, of a LoRA with another start, both factors learn at once."""
    kind, (layer, x) = KINDS[name], frozen_layer(SHAPES["linear"])
    if name.startswith("lora "):
        started = begin(kind, layer)
        factors = {part: factor.clone().requires_grad_() for part, factor in started.factors.items()}
        beside(layer, kind, Started(factors, started.scale, started.constants))(x).square().sum().backward()
        assert all(factor.grad is not None and float(factor.grad.norm()) > 1e-3 for factor in factors.values())
        return
    started = learnt(kind, layer)
    values = torch.linalg.svdvals(kind.delta({**started.factors, **started.constants}, SCALE, layer.weight))
    assert int((values > 1e-9).sum()) > RANK


def test_pissa_starts_from_the_best_approximation_and_olora_from_the_first_columns_of_q() -> None:
    layer, _ = frozen_layer(SHAPES["linear"])
    started = begin(KINDS["lora pissa"], layer)
    left, values, right = torch.linalg.svd(layer.weight.detach())
    best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    torch.testing.assert_close(SCALE * started.factors["up"] @ started.factors["down"], best, rtol=1e-5, atol=1e-6)
    ortho = begin(KINDS["lora olora"], layer).factors
    torch.testing.assert_close(ortho["up"].T @ ortho["up"], torch.eye(RANK, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    q, r = torch.linalg.qr(layer.weight.detach())
    torch.testing.assert_close(ortho["up"] @ ortho["down"], q[:, :RANK] @ r[:RANK], rtol=1e-5, atol=1e-6)


def test_an_additive_delta_is_the_articles_sum() -> None:
    layer, _ = frozen_layer(SHAPES["uneven linear"])
    factors = learnt(KINDS["additive"], layer).factors
    wide = torch.zeros(RANK, 7, dtype=torch.float64)
    tall = torch.zeros(11, RANK, dtype=torch.float64)
    for column in range(7):
        wide[column % RANK, column] = 1
    for row in range(11):
        tall[row, row % RANK] = 1
    wanted = SCALE * (factors["up"] @ wide + tall @ factors["down"])
    torch.testing.assert_close(KINDS["additive"].delta(factors, SCALE), wanted, rtol=1e-12, atol=1e-12)


@every_kind
def test_over_a_base_in_16_bits_small_changes_are_learnt(kind: Any) -> None:
    """What is added to a bfloat16 layer after a small step is right to a few per cent of itself, and nothing before it."""
    layer, _ = frozen_layer(SHAPES["wide linear"])
    layer = layer.to(torch.bfloat16)
    root = nn.ModuleDict({"layer": layer})
    plans = [LayerPlan("unet.layer", RANK, SCALE, "unet")]
    flat = inject_trainable({"unet": root}, plans, kind, 0, torch.device("cpu"))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    stand_in: Any = root["layer"]
    with flat.working(torch.bfloat16), torch.no_grad():
        assert torch.equal(stand_in(x), layer(x))
    with torch.no_grad():
        flat.weights.add_(1e-3 * torch.randn(flat.weights.shape, generator=torch.Generator().manual_seed(3)))
    known = {**{part: view.detach() for part, view in flat.views["unet.layer"].items()}, **flat.constants["unet.layer"]}
    wanted = x.double() @ kind.delta(known, SCALE, layer.weight).T
    with flat.working(torch.bfloat16), torch.no_grad():
        found = kind.forward(layer, x, flat.used["unet.layer"], stand_in.adapters["trained"].scale).double()
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
