"""A LoRA whose rank grows: what it starts from, which layers grow, that nothing jumps, and what the file and a resume keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainers.adapters.grow import Growing, rank_in_use
from trainers.adapters.layer import AdaptedLayer, Adapter
from trainers.adapters.lora import LORA, LoraSettings
from trainers.config import build_config
from trainers.formats.weights import ModuleWeights
from trainers.objective import generator_for

SHAPES = {"linear": (24, 20), "convolution": (24, 16, 3, 3)}
KIND = Growing(LORA, first=2, every=3, share=0.01)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def learnt(shape: tuple[int, ...], values: list[float], rank: int = 8) -> dict[str, torch.Tensor]:
    """Factors (rank, ...) whose update has these singular values, the rest not in use; float64."""
    generator, used = torch.Generator().manual_seed(4), len(values)
    factors = {name: torch.zeros(size, dtype=torch.float64) for name, size in LORA.factor_shapes(shape, rank).items()}
    inner = factors["down"][0].numel()
    left = torch.linalg.qr(torch.randn(shape[0], used, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(inner, used, generator=generator, dtype=torch.float64)).Q
    factors["down"][:used] = right.T.reshape(used, *factors["down"].shape[1:])
    factors["up"][:, :used] = (left * torch.tensor(values, dtype=torch.float64)).reshape(factors["up"][:, :used].shape)
    return factors


def turned(factors: dict[str, torch.Tensor], kind: Growing = KIND, number: int = 1) -> Any:
    return kind.turn(factors, generator_for(7, "turn", number, "layer"))


@every_shape
def test_it_starts_as_a_lora_of_the_low_rank(shape: tuple[int, ...]) -> None:
    started = KIND.start(shape, 8, 0.5, generator_for(3, "x"), lambda: torch.zeros(shape))
    low = LORA.start(shape, 2, 0.5, generator_for(3, "x"), lambda: torch.zeros(shape))
    assert {name: tuple(factor.shape) for name, factor in started.factors.items()} == LORA.factor_shapes(shape, 8)
    assert rank_in_use(started.factors) == 2 and started.scale == 0.5
    assert torch.equal(started.factors["down"][:2], low.factors["down"])
    assert not bool(started.factors["up"].any()) and not bool(started.factors["down"][2:].any())
    assert rank_in_use(KIND.start(shape, 1, 0.5, generator_for(3, "x"), lambda: torch.zeros(shape)).factors) == 1


@every_shape
def test_a_growth_changes_no_answer_by_a_bit(shape: tuple[int, ...]) -> None:
    layer: Any = nn.Linear(20, 24) if len(shape) == 2 else nn.Conv2d(16, 24, 3, padding=1)
    x = torch.randn(5, 20) if len(shape) == 2 else torch.randn(2, 16, 6, 5)
    before = learnt(shape, [2.0, 1.0])
    after = turned(before).factors
    assert rank_in_use(before) == 2 and rank_in_use(after) == 4
    answers = []
    for factors in (before, after):
        stand_in = AdaptedLayer(layer)
        stand_in.adapters["a"] = Adapter(KIND, {name: factor.float() for name, factor in factors.items()}, 0.3)  # type: ignore[arg-type]
        stand_in.strengths["a"] = 1.0
        answers.append(stand_in(x))
    assert torch.equal(*answers) and not torch.equal(answers[0], layer(x))
    assert torch.equal(KIND.delta(before, 0.3), KIND.delta(after, 0.3))


@every_shape
def test_components_of_its_rank_are_dropped_as_a_loras(shape: tuple[int, ...]) -> None:
    layer: Any = nn.Linear(20, 24) if len(shape) == 2 else nn.Conv2d(16, 24, 3, padding=1)
    x = torch.randn(2, 20) if len(shape) == 2 else torch.randn(2, 16, 6, 5)
    factors = {name: factor.float() for name, factor in learnt(shape, [2.0, 1.0]).items()}
    dropped = torch.zeros(2, 8, dtype=torch.bool)
    dropped[0, 1] = True
    found = KIND.forward(layer, x, factors, 0.5, dropped)
    assert torch.equal(found, LORA.forward(layer, x, factors, 0.5, dropped))
    assert not torch.equal(found, KIND.forward(layer, x, factors, 0.5))


@every_shape
def test_new_rows_are_gaussian_and_follow_from_the_seed_alone(shape: tuple[int, ...]) -> None:
    before = learnt(shape, [1.0] * 4, rank=16)
    kind = Growing(LORA, first=8, every=3, share=0.01)
    down = turned(before, kind).factors["down"]
    rows = down[4:12].flatten(1)
    assert float(rows.norm(dim=1).mean()) == pytest.approx(1.0, rel=0.1)
    assert abs(float(rows.mean())) < 3 / rows.numel() ** 0.5 / rows.shape[1] ** 0.5
    assert torch.equal(down, turned(before, kind).factors["down"])
    assert not torch.equal(down, turned(before, kind, number=2).factors["down"])
    assert torch.equal(down[:4], before["down"][:4]) and not bool(down[12:].any())


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0, 1.0], 4),  # both are used
        ([1.0, 0.11], 4),  # 1.2 % of the squared norm
        ([1.0, 0.09], 2),  # 0.8 %
        ([1.0, 0.0], 2),  # one is enough
        ([0.0, 0.0], 2),  # nothing was learnt
        ([1.0] * 7, 8),  # no more than the most
        ([1.0] * 8, 8),
        ([float("nan"), 1.0], 2),
    ],
)
def test_only_a_layer_that_uses_all_its_ranks_grows(values: list[float], rank: int) -> None:
    assert rank_in_use(turned(learnt((24, 20), values)).factors) == rank


def test_a_layer_that_has_just_grown_does_not_grow_again() -> None:
    first = turned(learnt((24, 20), [1.0, 1.0]))
    again = turned(first.factors, number=2)
    assert torch.equal(again.factors["down"], first.factors["down"]) and (first.changed, again.changed) == (True, False)


def test_a_layer_has_no_more_ranks_than_its_smaller_side_uses() -> None:
    assert rank_in_use(turned(learnt((24, 3), [1.0, 1.0, 1.0], rank=8)).factors) == 5
    assert rank_in_use(turned(turned(learnt((24, 3), [1.0] * 3, rank=8)).factors).factors) == 5


def test_new_parts_take_over_the_mean_of_the_squared_gradients() -> None:
    carry = turned(learnt((24, 20), [1.0, 1.0])).carry
    generator = torch.Generator().manual_seed(0)
    for name, shape, axis in (("down", (8, 20), 0), ("up", (24, 8), 1)):
        mean = torch.zeros(shape)
        mean.narrow(axis, 0, 2).copy_(torch.rand(mean.narrow(axis, 0, 2).shape, generator=generator))
        assert torch.equal(carry("mean", name, mean), mean)
        found = carry("square", name, mean)
        wanted = mean.narrow(axis, 0, 2).mean(axis)
        assert torch.equal(found.select(axis, 2), wanted) and torch.equal(found.select(axis, 3), wanted)
        assert torch.equal(found.narrow(axis, 0, 2), mean.narrow(axis, 0, 2)) and not bool(found.narrow(axis, 4, 4).any())
    assert torch.equal(carry("square", "down", torch.ones(1, 20)), torch.ones(1, 20))  # a mean over the rows


@every_shape
def test_the_file_has_the_rank_in_use_and_the_scale_stays(shape: tuple[int, ...]) -> None:
    factors = learnt(shape, [2.0, 1.0, 0.5])
    name, own, scale = KIND.exported(factors, 0.75)
    module = ModuleWeights(own, scale * LORA.rank(own), name)
    assert (name, module.rank, module.scale) == ("lora", 3, 0.75)
    torch.testing.assert_close(module.delta(), KIND.delta(factors, 0.75), rtol=1e-14, atol=1e-14)
    assert KIND.exported({part: torch.zeros_like(factor) for part, factor in factors.items()}, 1.0)[1]["down"].shape[0] == 1


def test_the_settings_say_where_growing_makes_no_sense() -> None:
    def refused(**adapter: Any) -> str:
        with pytest.raises(Exception, match=r"\w") as caught:
            build_config({"adapter": {"rank_schedule": "grow", **adapter}})
        return str(caught.value)

    assert "adapter.start_from must be empty" in refused(start_from="old.safetensors")
    assert "adapter.init = pissa cannot" in refused(init="pissa")
    assert "adapter.grow_from = 4 up to adapter.rank = 2, which is lower" in refused(rank=2)
    assert "There is no adapter.rank_schedule with adapter.type = dora" in refused(type="dora")
    with pytest.raises(Exception, match=r"train\.ema = 0\.9 must be 0 with adapter\.rank_schedule = grow"):
        build_config({"adapter": {"rank_schedule": "grow"}, "train": {"ema": 0.9}})
    config = build_config({"adapter": {"rank_schedule": "grow", "rank": 12, "alpha": 6}})
    assert config.adapter.scale_of(config.adapter.effective_alpha, config.adapter.rank) == 0.5
    assert isinstance(config.adapter.trained, Growing) and LoraSettings().trained is LORA
