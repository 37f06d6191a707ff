"""LoRA+ (arXiv 2402.12354): the up side at a rate of its own, against peft's optimizer, and in runs that are gone on with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.adapters.test_inject import PLANS, make_parts
from tests.tiny_runs import shake, update_from
from trainers.adapters.flat import UP
from trainers.adapters.inject import inject_trainable
from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan
from trainers.config import build_config
from trainers.errors import SettingError


def test_ups_lie_together_behind_the_downs_of_their_group() -> None:
    flat = inject_trainable(make_parts(), PLANS, LORA, 0, torch.device("cpu"), None, ("up",))
    assert list(flat.groups) == ["unet", "unet up", "text_encoder", "text_encoder up"]
    bounds = [(part.start, part.stop) for part in flat.groups.values()]
    assert bounds[0][0] == 0 and bounds[-1][1] == flat.weights.numel()
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    for layer, factor, place, _ in flat.in_order():
        (group,) = [name for name, part in flat.groups.items() if part.start <= place.start < part.stop]
        assert group.endswith(UP) == (factor == "up") and group.startswith(layer.partition(".")[0])


def test_the_layout_changes_no_start_and_no_copy_in_16_bits() -> None:
    plain = inject_trainable(make_parts(), PLANS, LORA, 0, torch.device("cpu"))
    apart = inject_trainable(make_parts(), PLANS, LORA, 0, torch.device("cpu"), None, ("up",))
    plain.weights.add_(1.0), apart.weights.add_(1.0)
    with plain.working(torch.bfloat16), apart.working(torch.bfloat16):
        for layer, factors in plain.used.items():
            for factor, value in factors.items():
                assert torch.equal(value, apart.used[layer][factor]) and value.dtype == torch.bfloat16


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_steps_are_those_of_pefts_loraplus_optimizer(ratio: float) -> None:
    """The same factors, gradients and AdamW: every factor after three updates."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    inputs, wanted = (torch.randn(5, size, generator=torch.Generator().manual_seed(size)) for size in (8, 6))
    theirs: Any = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    )
    layer: Any = theirs.base_model.model.get_submodule("0")
    ours = nn.ModuleDict({"0": nn.Linear(8, 6)})
    ours["0"].load_state_dict(layer.base_layer.state_dict())
    plans = [LayerPlan("unet.0", 2, 1.0, "unet")]
    flat = inject_trainable({"unet": ours}, plans, LORA, 0, torch.device("cpu"), None, ("up",) if ratio != 1 else ())
    with torch.no_grad():
        flat.views["unet.0"]["down"].copy_(layer.lora_A["default"].weight)
        flat.views["unet.0"]["up"].copy_(layer.lora_B["default"].weight)
    adapter = {"loraplus_lr_ratio": ratio}
    config = build_config({"adapter": adapter, "optimizer": {"learning_rate": 2e-3}})
    groups = [{"params": flat.parameters(group, False), "lr": config.rate_of(group)} for group in flat.groups]
    assert len(groups) == (1 if ratio == 1 else 2) and all(len(group["params"]) == 1 for group in groups)
    mine = config.optimizer.build(groups)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.01, betas=(0.9, 0.99)
    )
    for _ in range(3):
        for model, optimizer in ((ours["0"], mine), (theirs, reference)):
            flat.gradient.zero_()
            reference.zero_grad()
            (model(inputs) - wanted).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(flat.views["unet.0"]["down"], layer.lora_A["default"].weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat.views["unet.0"]["up"], layer.lora_B["default"].weight, rtol=1e-5, atol=1e-6)


def test_ratio_one_is_as_if_there_were_no_ratio(start: Any) -> None:
    usual, one = start(), start("adapter.loraplus_lr_ratio=1")
    assert list(one.flat.groups) == list(usual.flat.groups)
    assert torch.equal(update_from(usual, 2), update_from(one, 2))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_run_moves_its_ups_faster_and_its_downs_as_before(optimizer: str, start: Any) -> None:
    moved = {}
    for ratio in (1, 8):
        training = start(
            f"adapter.loraplus_lr_ratio={ratio}",
            f"optimizer.type={optimizer}",
            "optimizer.learning_rate=1e-3",
            "train.max_grad_norm=0",
        )
        shaken = {layer: dict(factors) for layer, factors in training.flat.views.items()}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # the same numbers in either layout
            for factors in shaken.values():
                for view in factors.values():
                    view.normal_(0.0, 0.05, generator=generator)
        before = {layer: {name: view.detach().clone() for name, view in own.items()} for layer, own in shaken.items()}
        update_from(training, 1)
        moved[ratio] = {
            (layer, name): view.detach() - before[layer][name] for layer, own in shaken.items() for name, view in own.items()
        }
    for (layer, name), usual in moved[1].items():
        faster = 8 if name == "up" else 1
        assert float(usual.abs().max()) > 0
        torch.testing.assert_close(moved[8][layer, name], faster * usual, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": {"type": "loha", "loraplus_lr_ratio": 4}}, "only an adapter of type lora or dora"),
        ({"adapter": {"type": "additive", "loraplus_lr_ratio": 4}}, "only an adapter of type lora or dora"),
        ({"adapter": {"loraplus_lr_ratio": 4}, "optimizer": {"type": "prodigy"}}, "prodigy finds one rate"),
        ({"adapter": {"loraplus_lr_ratio": 100}, "optimizer": {"learning_rate": 1e-3}}, "0.1 for the up side"),
    ],
)
def test_where_it_cannot_be_it_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        build_config(settings)


def test_a_layout_of_another_order_is_another_layout(start: Any, tmp_path: Path) -> None:
    """A state of one must not be read into the other, although all shapes agree."""
    from trainers.recovery import _layout

    one, other = start(), start("adapter.loraplus_lr_ratio=2")
    shake(one)
    assert _layout(one) != _layout(other) and _layout(start()) == _layout(one)
