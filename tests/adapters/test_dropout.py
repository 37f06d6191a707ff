"""Dropout on input, rank and module: what is left out, that it comes back alike, and that nothing else is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.adapters.test_trained import KINDS, SHAPES, begin, beside, every_kind, frozen_layer, shaken
from tests.command_line import TINY, impasto, result_of, tensor_bytes
from tests.test_types import stop_after_two, words_of  # noqa: F401 - a fixture
from tests.tiny_runs import shake
from trainers.adapters.base import Started
from trainers.adapters.dropout import Dropout, Keys, _dropped, _mixed, layer_dropout
from trainers.adapters.layer import AdaptedLayer, Adapter
from trainers.config import build_config
from trainers.dataset.plan import dropout_keys
from trainers.graph import ON_CPU, Graphed
from trainers.train import fill_gradient, held_out_loss, update

KEYS = torch.tensor([dropout_keys(0, 3, slot, slot) for slot in range(4)], dtype=torch.int32)
ALL = ("adapter.dropout=0.2", "adapter.rank_dropout=0.3", "adapter.module_dropout=0.2")


def dropping(kind: Any, layer: Any, started: Started, rates: Dropout, keys: torch.Tensor | None) -> AdaptedLayer:
    stand_in = beside(layer, kind, started)
    own = layer_dropout(rates, "unet.x", Keys(keys))
    stand_in.adapters["a"] = Adapter(kind, stand_in.adapters["a"].factors, started.scale, own)
    return stand_in


def kept(keys: torch.Tensor, layer: int, rate: float, count: int) -> torch.Tensor:
    """(B, count), 1 / (1 - rate) or 0, written out number by number."""

    def mixed(number: int) -> int:
        for _ in range(2):
            number = (((number >> 16) ^ number) * 0x45D9F3B) % 2**32
        return (number >> 16) ^ number

    rows = []
    for key in keys.tolist():
        hashes = [mixed(mixed(pair) ^ mixed((key ^ layer) % 2**32)) for pair in range((count + 1) // 2)]
        halves = [half ^ 0x8000 for value in hashes for half in (value & 0xFFFF, value >> 16)]  # as a signed number's order
        rows.append([float(half >= int(rate * 65536)) / (1 - rate) for half in halves[:count]])
    return torch.tensor(rows, dtype=torch.float64)


def test_the_hash_is_one_to_one_and_spread_evenly() -> None:
    found = _mixed(torch.arange(1 << 20, dtype=torch.int32))
    assert found.unique().numel() == found.numel()
    for bit in range(32):
        assert 0.495 < float(((found >> bit) & 1).double().mean()) < 0.505


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_what_is_dropped_is_the_share_asked_for_and_differs_by_row_layer_and_step(rate: float) -> None:
    one = layer_dropout(Dropout(rate), "unet.a", Keys())
    other = layer_dropout(Dropout(rate), "unet.b", Keys())
    assert one is not None and other is not None
    first, second = (_dropped(KEYS[:, 0], drop.layer[0], rate, 40_000) for drop in (one, other))
    assert abs(float(first.double().mean()) - rate) < 0.005
    later = _dropped(torch.tensor([dropout_keys(0, 4, 0, 0)[0]], dtype=torch.int32), one.layer[0], rate, 40_000)
    both = rate * rate  # of two that have nothing to do with each other
    for a, b in ((first[0], first[1]), (first, second), (first[:1], later), (first[:, :-1], first[:, 1:])):
        assert abs(float((a & b).double().mean()) - both) < 0.01
    assert torch.equal(first, _dropped(KEYS[:, 0], one.layer[0], rate, 40_000))


@pytest.mark.parametrize("shape", [SHAPES["linear"], SHAPES["convolution"]], ids=["linear", "convolution"])
@every_kind
def test_of_every_type_the_input_is_dropped_and_scaled_and_whole_paths_are_off(kind: Any, shape: tuple[int, ...]) -> None:
    layer, x = frozen_layer(shape)
    started = shaken(begin(kind, layer))
    delta = kind.delta({**started.factors, **started.constants}, started.scale, layer.weight)

    def added(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, delta) if len(shape) == 2 else F.conv2d(x, delta, None, layer.stride, layer.padding)

    own = layer_dropout(Dropout(0.4), "unet.x", Keys())
    assert own is not None
    mask = kept(KEYS[:, 0], own.layer[0], 0.4, x[0].numel()).view(x.shape)
    found = dropping(kind, layer, started, Dropout(input=0.4), KEYS)(x)
    torch.testing.assert_close(found, layer(x) + added(x * mask), rtol=1e-9, atol=1e-9)
    off = []
    for step in range(8):
        keys = torch.tensor([dropout_keys(0, step, slot, slot) for slot in range(4)], dtype=torch.int32)
        found = dropping(kind, layer, started, Dropout(module=0.5), keys)(x)
        off.append(bool(torch.equal(found, layer(x))))
        torch.testing.assert_close(found, layer(x) + (0.0 if off[-1] else 1.0) * added(x), rtol=1e-9, atol=1e-9)
    assert 0 < sum(off) < 8


@pytest.mark.parametrize("shape", [SHAPES["linear"], SHAPES["convolution"]], ids=["linear", "convolution"])
def test_of_a_lora_components_are_dropped_for_a_whole_example(shape: tuple[int, ...]) -> None:
    kind, (layer, x) = KINDS["lora gaussian"], frozen_layer(shape)
    started = shaken(begin(kind, layer))
    own = layer_dropout(Dropout(rank=0.5), "unet.x", Keys())
    assert own is not None
    mask = kept(KEYS[:, 0], own.layer[1], 0.5, 3)
    assert 0 < int((mask > 0).sum()) < mask.numel()
    rows = []
    for row, components in zip(x, mask, strict=True):
        up = started.factors["up"] * components.view(1, -1, *(1 for _ in shape[2:]))
        delta = kind.delta({"down": started.factors["down"], "up": up}, started.scale)
        rows.append(F.linear(row, delta) if len(shape) == 2 else F.conv2d(row[None], delta, None, 2, 1)[0])
    found = dropping(kind, layer, started, Dropout(rank=0.5), KEYS)(x)
    torch.testing.assert_close(found, layer(x) + torch.stack(rows), rtol=1e-9, atol=1e-9)


def test_without_keys_nothing_is_dropped_and_the_fused_path_is_taken() -> None:
    kind, (layer, x) = KINDS["lora gaussian"], frozen_layer(SHAPES["linear"])
    started = shaken(begin(kind, layer))
    quiet = dropping(kind, layer, started, Dropout(0.5, 0.5, 0.5), None)
    assert torch.equal(quiet(x), beside(layer, kind, started)(x))
    assert layer_dropout(Dropout(), "unet.x", Keys()) is None


def test_without_dropout_a_run_has_no_keys_and_its_layers_no_dropout(start: Any) -> None:
    training = start()
    assert all(batch.keys is None for batch in training.batches.step(0))
    layers = [
        module for part in training.model.parts().values() for module in part.modules() if isinstance(module, AdaptedLayer)
    ]
    assert layers and all(layer.adapters["trained"].dropout is None for layer in layers)


def test_held_out_losses_and_samples_see_the_whole_adapter(start: Any) -> None:
    common = ("dataset.holdout=0.2", "optimizer.learning_rate=1e-2")
    usual, dropped = start(*common), start(*common, *ALL)
    for training in (usual, dropped):
        shake(training)
    assert held_out_loss(usual) == held_out_loss(dropped)
    assert fill_gradient(usual)[0] != fill_gradient(dropped)[0]


def test_recorded_and_recomputed_steps_drop_the_same(start: Any) -> None:
    common = ("train.batch_size=2", "optimizer.learning_rate=1e-2", "text_encoder.learning_rate=1e-3", *ALL)
    recorded, usual = start(*common), start(*common, "train.recording=off")
    again = start(*common, "train.recording=off", "train.checkpointing=true")
    assert isinstance(recorded.runner, Graphed)
    for step in range(ON_CPU + 3):
        assert update(recorded) == update(usual)
        if step < 2:
            update(again)
            assert torch.equal(again.flat.weights, usual.flat.weights)
    assert recorded.runner._recorded and not recorded.runner._given_up
    assert torch.equal(recorded.flat.weights, usual.flat.weights)


def test_how_a_step_is_cut_into_micro_batches_changes_only_the_rounding(start: Any) -> None:
    whole, cut = start("train.batch_size=4", *ALL), start("train.batch_size=1", "train.accumulation=4", *ALL)
    gradients = []
    for training in (whole, cut):
        shake(training)
        fill_gradient(training)
        gradients.append(training.flat.gradient.clone())
    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_several_processes_deal_out_the_keys_of_one(start: Any) -> None:
    training = start("train.batch_size=4", *ALL)
    batches, device = training.batches, training.batches._device
    whole = torch.cat([batch.keys for batch in batches.step(0)])
    shares = []
    for index in range(2):
        batches._device = replace(device, index=index, count=2)
        shares.append(torch.cat([batch.keys for batch in batches.step(0)]))
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), whole)
    assert len(whole[:, 0].unique()) == 4 and len(whole[:, 1].unique()) == 1  # an example's own, and the step's


def test_a_stopped_run_with_dropout_goes_on_to_the_bytes_of_an_unbroken_one(
    pictures: Path,
    tiny_base: Path,
    tmp_path: Path,
    stop_after_two: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    words: list[Any] = ["train", pictures, "--base", tiny_base, *TINY, "--steps", 4, *words_of(ALL)]
    assert impasto(*words, "-o", tmp_path / "run") == 3
    stop_after_two.undo()
    assert impasto("resume", tmp_path / "run") == 0
    assert impasto(*words, "-o", tmp_path / "whole") == 0
    assert impasto(*words, "--set", "adapter.dropout=0", "-o", tmp_path / "other") == 0
    whole = tensor_bytes(result_of(tmp_path / "whole"))
    assert tensor_bytes(result_of(tmp_path / "run")) == whole != tensor_bytes(result_of(tmp_path / "other"))


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"type": "dora", "rank_dropout": 0.1}, "only an adapter of type lora drops of its rank"),
        ({"init": "pissa", "rank_dropout": 0.1}, "rank_dropout must be 0"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_where_it_cannot_be_it_is_refused(adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        build_config({"adapter": adapter})
