"""Batches: the same for the same (seed, step) in any order, dealt out to processes, fixed for the held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch

from trainers.dataset.batches import Batch, BatchMaker, pixels_of
from trainers.dataset.cache import ContentCache
from trainers.dataset.pictures import load_pixels
from trainers.device import Device
from trainers.setup import Training

RANDOM = ("dataset.flip=true", "dataset.caption_shuffle=true", "dataset.caption_dropout=0.3", "train.noise_offset=0.05")
TENSORS = ("latents", "noise", "timesteps", "weights")


def maker(training: Training, model: Any = None, warn: Callable[[str], None] = print, **device: int) -> BatchMaker:
    """A fresh maker for the run, as if in process `index` of `count`, with nothing in its cache."""
    config, data = training.config, training.data
    here: Device = replace(training.device, **device)  # type: ignore[arg-type]
    return BatchMaker(model or training.model, config, data.training, data.plan, ContentCache(None), here, warn)


def same(first: Batch, second: Batch) -> bool:
    tensors = all(torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS)
    return tensors and first.captions == second.captions


def rows(batches: list[Batch]) -> list[tuple[bytes, bytes, int, str, float]]:
    """Each example of the batches by its bits."""
    return [
        (latents.numpy().tobytes(), noise.numpy().tobytes(), int(timestep), caption, float(weight))
        for batch in batches
        for latents, noise, timestep, caption, weight in zip(
            batch.latents, batch.noise, batch.timesteps, batch.captions, batch.weights, strict=True
        )
    ]


def test_a_step_gives_the_same_batches_in_any_order_of_asking(start: Any) -> None:
    training = start("train.batch_size=2", "train.seed=3", *RANDOM)
    forwards, backwards = maker(training), maker(training)
    there = {step: list(forwards.step(step)) for step in range(9)}
    back = {step: list(backwards.step(step)) for step in reversed(range(9))}
    for step, batches in there.items():
        assert len(batches) == len(back[step]) > 0
        assert all(same(a, b) for a, b in zip(batches, back[step], strict=True)), step


def test_drawing_a_batch_does_not_depend_on_torchs_own_generator(start: Any) -> None:
    training = start(*RANDOM)
    torch.manual_seed(1)
    (first,) = maker(training).step(4)
    torch.manual_seed(2)
    (second,) = maker(training).step(4)
    assert same(first, second)


def test_another_seed_and_another_step_give_other_noise_and_timesteps(start: Any) -> None:
    (first,) = start("train.batch_size=6").batches.step(0)
    (other_seed,) = start("train.batch_size=6", "train.seed=1").batches.step(0)
    (other_step,) = start("train.batch_size=6").batches.step(1)
    for other in (other_seed, other_step):
        assert not torch.equal(first.noise, other.noise)
        assert first.timesteps.tolist() != other.timesteps.tolist()


def test_a_picture_shown_twice_in_a_step_gets_its_own_noise_each_time(start: Any) -> None:
    training = start("dataset.repeats=2", "train.batch_size=12")
    (batch,) = training.batches.step(0)
    assert len(set(batch.captions)) == 6
    assert len({noise.numpy().tobytes() for noise in batch.noise}) == 12


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_two_processes_together_see_exactly_the_slots_of_one(start: Any, batch_size: int) -> None:
    training = start(f"train.batch_size={batch_size}", f"train.accumulation={4 // batch_size}", *RANDOM)
    for step in range(4):  # steps of 4 and of 2 pictures
        alone = rows(list(maker(training).step(step)))
        first, second = (rows(list(maker(training, index=index, count=2).step(step))) for index in (0, 1))
        assert sorted(first + second) == sorted(alone)
        assert abs(len(first) - len(second)) <= 1


def test_a_process_without_a_slot_gets_no_batch(start: Any) -> None:
    training = start("train.batch_size=1")
    assert len(list(maker(training, index=0, count=2).step(0))) == 1
    assert list(maker(training, index=1, count=2).step(0)) == []


def test_the_weights_of_a_step_add_up_to_one_however_many_pictures_it_holds(start: Any) -> None:
    training = start("train.batch_size=2", "train.accumulation=2")
    sizes = []
    for step in range(2):
        weights = torch.cat([batch.weights for batch in training.batches.step(step)])
        sizes.append(weights.numel())
        assert float(weights.sum()) == pytest.approx(1.0)
    assert sorted(sizes) == [2, 4]


def test_micro_batches_hold_at_most_the_batch_size(start: Any) -> None:
    training = start("train.batch_size=2", "train.accumulation=3")
    assert [len(batch.captions) for batch in training.batches.step(0)] == [2, 2, 2]


def test_shapes_and_dtypes_are_those_promised(start: Any) -> None:
    (batch,) = start("train.batch_size=6").batches.step(0)
    assert batch.latents.shape == batch.noise.shape == (6, 4, 8, 8)
    assert batch.latents.dtype == batch.noise.dtype == batch.weights.dtype == torch.float32
    assert batch.timesteps.dtype == torch.int64
    assert batch.timesteps.ge(0).all() and batch.timesteps.lt(1000).all()


def test_one_epoch_shows_every_picture_once_with_its_own_caption(start: Any) -> None:
    training = start("train.batch_size=4")
    seen = [caption for step in range(2) for batch in training.batches.step(step) for caption in batch.captions]
    assert sorted(seen) == sorted(prepared.example.caption for prepared in training.data.training)


def test_latents_are_a_scaled_draw_from_the_vaes_distribution_of_the_picture(start: Any) -> None:
    training = start("dataset.resolution=64", "train.batch_size=1")
    training.model.vae.double()
    for step in range(6):
        (index,) = training.data.plan.indices(step)
        example = training.data.training[index].example
        if (example.width, example.height) != (64, 64):
            continue
        pixels = torch.from_numpy(numpy.array(load_pixels(example.path))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = training.model.vae.encode(pixels.double()).latent_dist
        (batch,) = maker(training).step(step)
        z = (batch.latents / training.model.vae.config.scaling_factor - expected.mean) / expected.std
        n = z.numel()  # 1024 numbers that should be standard normal
        assert abs(float(z.mean())) < 5 / n**0.5
        assert abs(float(z.var()) - 1) < 5 * (2 / n) ** 0.5
        return
    raise AssertionError("no picture of 64x64 was shown")


def test_pixels_run_from_minus_one_to_one_with_channels_first() -> None:
    image = numpy.zeros((2, 3, 3), numpy.uint8)
    image[0, 2] = (255, 0, 51)
    pixels = pixels_of(image)
    assert pixels.shape == (1, 3, 2, 3) and pixels.dtype == torch.float32
    assert pixels[0, :, 0, 2].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert float(pixels[0, :, 1].max()) == -1.0


def test_held_out_batches_are_the_same_each_time_and_spread_over_the_schedule(start: Any) -> None:
    training = start("dataset.holdout=0.4")
    held_out = training.data.held_out
    assert len(held_out) == 2
    first, second = list(training.batches.held_out(held_out)), list(maker(training).held_out(held_out))
    assert len(first) == 2 and all(same(a, b) for a, b in zip(first, second, strict=True))
    for batch, prepared in zip(first, held_out, strict=True):
        assert batch.timesteps.tolist() == [125, 375, 625, 875]
        assert batch.captions == (prepared.example.caption,) * 4
    assert float(sum(batch.weights.sum() for batch in first)) == pytest.approx(1.0)


def test_held_out_pictures_are_never_trained_on(start: Any) -> None:
    training = start("dataset.holdout=0.4", "train.batch_size=2")
    trained = {caption for step in range(4) for batch in training.batches.step(step) for caption in batch.captions}
    assert len(trained) == 4
    assert trained.isdisjoint(prepared.example.caption for prepared in training.data.held_out)


def test_pictures_that_vanish_before_their_turn_are_not_missed(start: Any) -> None:
    training = start("dataset.flip=true", "train.batch_size=2")
    expected = [rows(list(maker(training).step(step))) for step in range(12)]
    told: list[str] = []
    made = maker(training, warn=told.append)
    assert made.hold_pictures(()) == 12, "six, and their mirror images"
    for prepared in training.data.training:
        prepared.example.path.unlink()
    assert [rows(list(made.step(step))) for step in range(12)] == expected and told == []


def test_a_file_is_kept_until_it_is_encoded_and_none_of_a_large_folder(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start()
    made = maker(training)
    made.hold_pictures(())
    assert len(made._files) == 6
    for step in range(training.data.plan.steps_per_epoch):
        list(made.step(step))
    assert made._files == {}
    monkeypatch.setattr("trainers.dataset.batches.HELD_BYTES", 100)
    told: list[str] = []
    made = maker(training, warn=told.append)
    made.hold_pictures(())
    assert made._files == {}
    (gone, *_) = training.data.training
    gone.example.path.unlink()
    for step in range(training.data.plan.steps_per_epoch):
        assert list(made.step(step))
    assert len(told) == 1 and f"({gone.example.name}). It is left out" in told[0]


def test_the_time_of_encoding_is_counted_apart(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = maker(start())
    made.hold_pictures(())
    assert made.seconds_to_encode(100) == 0, "not known yet"
    clock = iter(range(100))
    monkeypatch.setattr("trainers.dataset.batches.time.monotonic", lambda: float(next(clock)))
    list(made.step(0))
    assert made.seconds_encoding == 1
    assert (made.seconds_to_encode(100), made.seconds_to_encode(2)) == (5, 2)
    list(made.step(0))
    assert made.seconds_encoding == 1


def test_a_large_vae_encodes_in_bf16_in_a_bf16_run_on_a_cpu(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = start("train.precision=bf16").model
    monkeypatch.setattr("trainers.families.latent_diffusion._LARGE_ENCODER", 1000)
    assert start("train.precision=fp32").model.encodes_in == plain.encodes_in == "float32"
    training = start("train.precision=bf16")
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert training.model.encodes_in == "bfloat16"
    for half, whole in zip(training.model.encode_pixels(pixels), plain.encode_pixels(pixels), strict=True):
        assert half.dtype == torch.float32 and not torch.equal(half, whole)
        assert (half - whole).norm() < 0.03 * whole.norm()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(training.model.decode_latents(latents), plain.decode_latents(latents))
    assert training.model.fingerprint("vae") == plain.fingerprint("vae")
    (one, *_) = training.data.training
    names = {maker(training)._name(one, False), maker(training, plain)._name(one, False)}
    assert len(names) == 2


def test_a_step_made_ahead_is_the_same_and_is_made_once(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start("train.batch_size=2", *RANDOM)
    plain, ahead = maker(training), maker(training)
    assert not ahead.ahead, "on a CPU there is nothing to wait for"
    ahead.ahead = True
    made: list[int] = []
    make = ahead._make

    def making(step: int) -> Iterator[Batch]:
        made.append(step)
        return make(step)

    monkeypatch.setattr(ahead, "_make", making)
    for number in range(3):
        pairs = zip(ahead.step(number), plain.step(number), strict=True)
        assert all([same(ours, theirs) for ours, theirs in pairs])
        ahead.make_ready(number + 1)
    assert made == [0, 1, 2, 3]
    list(ahead.step(1))  # another one than was made ready, as after going back
    assert made[-1] == 1
    ahead.at_once = 1  # as after memory was too small: what was made ready has the wrong size
    assert all(len(batch.captions) == 1 for batch in ahead.step(3))
