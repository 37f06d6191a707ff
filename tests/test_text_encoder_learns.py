"""The text encoder learns where its rate is above zero, and is left out altogether where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_runs import exported, first_loss, shake
from trainers.adapters.inject import find_layers
from trainers.adapters.layer import AdaptedLayer
from trainers.export import export_adapter
from trainers.train import training_step

FREEZE_TEXT = "text_encoder.learning_rate=0"


@pytest.mark.parametrize("factor", ["down", "up"])
def test_changing_one_adapter_weight_of_the_text_encoder_changes_the_loss(start: Any, factor: str) -> None:
    training = start("train.batch_size=4")
    shake(training)
    before = first_loss(training).detach()
    name = next(name for name in training.flat.views if name.startswith("text_encoder.") and "v_proj" in name)
    with torch.no_grad():
        training.flat.views[name][factor][0, 0] += 5.0
    after = first_loss(training).detach()
    assert (after - before).abs() > 1e-6 * before


def test_every_text_encoder_module_has_a_gradient_on_the_zero_initialised_side_at_once(start: Any) -> None:
    training = start("train.batch_size=4")
    first_loss(training).backward()  # type: ignore[no-untyped-call]
    modules = {name: factors for name, factors in training.flat.views.items() if name.startswith("text_encoder.")}
    assert len(modules) == 2 * 6  # two layers of q, k, v, out, fc1, fc2
    for name, factors in modules.items():
        assert factors["up"].grad is not None and factors["up"].grad.norm() > 0, name
        assert factors["down"].grad is not None and factors["down"].grad.norm() == 0, name


def test_every_module_of_both_parts_has_a_gradient_on_both_sides_after_the_start(start: Any) -> None:
    training = start("train.batch_size=4")
    shake(training)
    first_loss(training).backward()  # type: ignore[no-untyped-call]
    for name, factors in training.flat.views.items():
        for factor, view in factors.items():
            assert view.grad is not None and view.grad.norm() > 0, f"{name} {factor}"


def test_the_text_encoders_gradient_is_the_slope_of_the_loss(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.setup.make_fast", lambda parts, kernels: [])  # so that all becomes float64
    training = start("train.batch_size=4")
    for part in training.model.parts().values():
        part.double()
    shake(training)
    batch = next(iter(training.batches.step(0)))

    def loss() -> torch.Tensor:
        return training_step(training.model, batch, training.condition, None)

    loss().backward()  # type: ignore[no-untyped-call]
    place = training.flat.groups["text_encoder"]
    direction = torch.zeros_like(training.flat.weights)
    direction[place] = training.flat.gradient[place] / training.flat.gradient[place].norm()
    size, values = 0.02, []
    with torch.no_grad():
        for sign in (1, -2, 1):  # out to one side, over to the other, and back
            training.flat.weights.add_(direction, alpha=sign * size)
            values.append(float(loss()))
    slope = (values[0] - values[1]) / (2 * size)
    assert slope == pytest.approx(float(training.flat.gradient[place].norm()), rel=0.02)


def test_with_rate_zero_nothing_of_the_text_encoder_is_injected_or_exported(start: Any, tmp_path: Path) -> None:
    training = start(FREEZE_TEXT)
    assert set(training.flat.groups) == {"unet"}
    assert all(name.startswith("unet.") for name in training.flat.views)
    layers = find_layers({"text_encoder": training.model.parts()["text_encoder"]}).values()
    assert layers and not any(isinstance(layer, AdaptedLayer) for layer in layers)
    shake(training)
    export_adapter(
        tmp_path / "out.safetensors",
        exported(training),
        training.config,
        {},
    )
    keys = load_file(tmp_path / "out.safetensors").keys()
    assert keys and all(key.startswith("lora_unet_") for key in keys)


def test_both_parts_are_exported_when_both_learn(start: Any, tmp_path: Path) -> None:
    training = start()
    shake(training)
    export_adapter(
        tmp_path / "out.safetensors",
        exported(training),
        training.config,
        {},
    )
    keys = load_file(tmp_path / "out.safetensors").keys()
    modules = {key.split(".")[0] for key in keys}
    assert len([module for module in modules if module.startswith("lora_te_")]) == 12
    assert len(modules) == len(training.plans)


def test_a_frozen_text_encoder_gives_the_loss_of_a_learning_one_at_step_zero(start: Any) -> None:
    assert torch.equal(first_loss(start(FREEZE_TEXT)), first_loss(start()))
