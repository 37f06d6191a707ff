"""The training step and the update, for real, on the tiny base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_runs import exported, first_loss, shake, tiny_config, tiny_training
from trainers.errors import DivergedError, SettingError
from trainers.export import export_adapter
from trainers.schedule import rate_factor
from trainers.setup import Training
from trainers.train import held_out_loss, training_step, update


def gradient_after_update(training: Training) -> torch.Tensor:
    """The gradient of the first step, everywhere non-zero, as update() leaves it after clipping."""
    shake(training)
    update(training)
    return training.flat.gradient.clone()


def loss_on_pictures(training: Training) -> float:
    """Mean loss over all training pictures at fixed noises and timesteps."""
    with torch.no_grad():
        batches = training.batches.held_out(training.data.training, draws=2)
        return float(sum(training_step(training.model, batch, training.condition, None) for batch in batches))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_a_batch_of_four_gives_the_gradient_of_two_times_two_accumulated(start: Any) -> None:
    whole = gradient_after_update(start("train.batch_size=4", "train.max_grad_norm=0"))
    parts = gradient_after_update(start("train.batch_size=2", "train.accumulation=2", "train.max_grad_norm=0"))
    assert float(whole.norm()) > 1e-4
    assert (whole - parts).abs().max() < 1e-6
    assert relative_error(parts, whole) < 1e-6


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_cut(start: Any) -> None:
    losses = [update(start(f"train.batch_size={size}", f"train.accumulation={4 // size}"))[0] for size in (4, 2, 1)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_an_incomplete_step_weights_by_examples(start: Any, pictures: Path) -> None:
    folder = pictures / "2_twice"  # 7 showings in steps of 4: one step is left with 3
    folder.mkdir()
    for name in ("00.png", "00.txt"):
        shutil.move(pictures / name, folder / name)
    gradients = []
    for cut in (("train.batch_size=4",), ("train.batch_size=2", "train.accumulation=2")):
        training = start(*cut, "train.max_grad_norm=0")
        training.step = next(step for step in range(2) if len(training.data.plan.indices(step)) == 3)
        sizes = [(len(batch.captions), batch.weights.tolist()) for batch in training.batches.step(training.step)]
        assert sum(size for size, _ in sizes) == 3
        assert all(weight == pytest.approx(1 / 3) for _, weights in sizes for weight in weights)
        gradients.append(gradient_after_update(training))
    assert relative_error(gradients[1], gradients[0]) < 1e-6


def test_clipping_shortens_the_gradient_and_keeps_its_direction(start: Any) -> None:
    free = start("train.batch_size=2", "train.max_grad_norm=0")
    shake(free)
    norm = update(free)[1]
    limit = norm / 10
    clipped = start("train.batch_size=2", f"train.max_grad_norm={limit}")
    shake(clipped)
    told = update(clipped)[1]
    assert told == pytest.approx(norm)  # the norm before clipping is what is told
    assert float(clipped.flat.gradient.norm()) <= limit * (1 + 1e-5)
    torch.testing.assert_close(clipped.flat.gradient, free.flat.gradient / 10, rtol=1e-4, atol=1e-9)


def test_a_gradient_below_the_limit_is_left_alone(start: Any) -> None:
    free = gradient_after_update(start("train.max_grad_norm=0"))
    limited = gradient_after_update(start(f"train.max_grad_norm={float(free.norm()) * 2}"))
    assert torch.equal(free, limited)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_untouched(start: Any) -> None:
    training = start()
    shake(training)
    before = training.flat.weights.clone()
    with torch.no_grad():
        training.model.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="step 1"):
        update(training)
    assert torch.equal(training.flat.weights, before)
    assert training.step == 0


def test_masters_and_optimizer_state_are_float32_over_a_bfloat16_base(start: Any) -> None:
    training = start("train.precision=bf16")
    update(training)
    assert {p.dtype for part in training.model.parts().values() for p in part.parameters()} == {torch.bfloat16}
    assert training.flat.weights.dtype == training.flat.gradient.dtype == torch.float32
    for state in training.optimizer.state.values():
        assert {value.dtype for value in state.values() if value.dim()} == {torch.float32}


def test_a_tiny_update_is_not_lost_over_a_bfloat16_base(start: Any, tmp_path: Path) -> None:
    # A change of 1e-6 on a weight near 0.1 is a tenth of a percent of bfloat16's spacing there.
    training = start("train.precision=bf16", "optimizer.learning_rate=1e-6", "optimizer.weight_decay=0", "output.dtype=fp32")
    shake(training)
    before = training.flat.weights.clone()
    update(training)
    change = (training.flat.weights - before).abs()
    assert change.max() < 2e-6
    assert (change > 5e-7).float().mean() > 0.9
    assert (before.bfloat16() == training.flat.weights.bfloat16()).float().mean() > 0.9
    path = tmp_path / "out.safetensors"
    export_adapter(path, exported(training), training.config, {})
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    written = load_file(path)["lora_" + name.replace(".", "_") + ".lora_down.weight"]
    assert written.dtype == torch.float32
    assert torch.equal(written, training.flat.views[name]["down"].detach())


def test_a_bfloat16_base_gives_nearly_the_gradient_of_a_float32_one(start: Any) -> None:
    exact = gradient_after_update(start("train.batch_size=4", "train.max_grad_norm=0"))
    rough = gradient_after_update(start("train.batch_size=4", "train.max_grad_norm=0", "train.precision=bf16"))
    assert 0 < relative_error(rough, exact) < 0.1


def test_the_running_mean_follows_its_formula(start: Any) -> None:
    training = start("train.ema=0.15", "optimizer.learning_rate=1e-2")
    expected = training.flat.weights.double()
    for step in range(4):
        update(training)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * training.flat.weights.double()
        torch.testing.assert_close(training.mean.double(), expected, rtol=1e-5, atol=1e-7)
    assert training.exported is training.mean
    assert relative_error(training.mean, training.flat.weights) > 1e-4


def test_the_learning_rate_follows_the_schedule(start: Any) -> None:
    training = start("train.steps=6", "schedule.warmup=2", "optimizer.learning_rate=1e-3", "text_encoder.learning_rate=2e-4")
    for step in range(6):
        update(training)
        factor = rate_factor("cosine", 2, 0.0, step, 6)
        rates = [group["lr"] for group in training.optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * factor, 2e-4 * factor])


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.type=adamw", "optimizer.learning_rate=1e-2"),
        ("optimizer.type=adafactor",),
        # From its first guess of 1e-6 the usual growth of 2 % a step would take hundreds of steps.
        ("optimizer.type=prodigy", "optimizer.growth=1000"),
    ],
    ids=["adamw", "adafactor", "prodigy"],
)
def test_every_optimizer_lowers_the_loss_within_ten_steps(start: Any, overrides: tuple[str, ...]) -> None:
    training = start(*overrides, "train.batch_size=3", "schedule.type=constant")
    before = loss_on_pictures(training)
    for _ in range(10):
        update(training)
    assert loss_on_pictures(training) < 0.9995 * before  # rounding moves it by less than a millionth


def test_prodigy_refuses_another_rate_in_the_text_encoder_before_a_run_begins(tiny_base: Path, pictures: Path) -> None:
    prodigy = ("optimizer.type=prodigy", "optimizer.learning_rate=1")
    with pytest.raises(SettingError, match=r"text_encoder\.learning_rate"):
        tiny_config(tiny_base, pictures, *prodigy, "text_encoder.learning_rate=0.5")
    for rate in ("0", "1"):
        config = tiny_config(tiny_base, pictures, *prodigy, f"text_encoder.learning_rate={rate}")
        assert config.text_encoder_rate == float(rate)


def test_min_snr_gamma_changes_the_loss(start: Any) -> None:
    batch_size = "train.batch_size=6"
    plain, weighted = (first_loss(start(batch_size, f"train.min_snr_gamma={gamma}")) for gamma in (1000, 1))
    assert weighted < 0.95 * plain


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sd2_base", "tiny_sdxl_base"])
@pytest.mark.parametrize("rate", ["0", "1e-3"], ids=["text-frozen", "text-learns"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_activations_gives_the_same_bits(
    base: str, rate: str, precision: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    words = (f"text_encoder.learning_rate={rate}", f"train.precision={precision}", "train.batch_size=2")
    words += ('adapter.targets=["attention", "feed_forward", "convolutions"]',)
    where = request.getfixturevalue(base)
    kept = tiny_training(where, pictures, tmp_path / "kept", *words)
    frugal = tiny_training(where, pictures, tmp_path / "frugal", *words, "train.checkpointing=true")
    assert frugal.model.unet.is_gradient_checkpointing
    assert saved_bytes(frugal) < 0.6 * saved_bytes(kept)
    for training in (kept, frugal):
        shake(training)
    assert [update(kept) for _ in range(2)] == [update(frugal) for _ in range(2)]
    assert torch.equal(kept.flat.gradient, frugal.flat.gradient) and float(kept.flat.gradient.norm()) > 1e-4
    assert torch.equal(kept.flat.weights, frugal.flat.weights)


def saved_bytes(training: Training) -> int:
    """What the first step keeps for its backward pass."""
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = first_loss(training)
    del loss
    return sum(held.values())


def test_the_held_out_loss_repeats_exactly(start: Any) -> None:
    training = start("dataset.holdout=0.2")
    assert len(training.data.held_out) == 1
    first = held_out_loss(training)
    assert held_out_loss(training) == first
    assert held_out_loss(start("dataset.holdout=0.2")) == first  # in a new process-like start, from the cache on disk
    before = training.flat.weights.clone()
    for _ in range(2):
        update(training)
    assert held_out_loss(training) != first
    with torch.no_grad():
        training.flat.weights.copy_(before)
    assert held_out_loss(training) == first


def test_there_is_no_held_out_loss_without_held_out_pictures(start: Any) -> None:
    assert held_out_loss(start()) is None


def test_an_update_leaves_the_base_as_it_was(start: Any) -> None:
    training = start("optimizer.learning_rate=1e-2")
    parts = {**training.model.parts(), "vae": training.model.vae}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    for _ in range(2):
        update(training)
    for name, part in parts.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items()), name
