"""One step's loss and one picture against a reference that calls diffusers' models, schedulers and pipelines directly."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_runs import tiny_training
from trainers.dataset.batches import Batch
from trainers.families import BaseOptions, load_family, recognise_base
from trainers.generate import Picture, RenderSettings, render_latents
from trainers.train import training_step


def pipeline(folder: Path) -> Any:
    diffusers = importlib.import_module("diffusers")
    made = diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def reference_loss(pipe: Any, batch: Batch, extra: dict[str, Any], states: torch.Tensor) -> torch.Tensor:
    """Mean of squared errors by diffusers' scheduler and UNet alone, weighted as the batch says."""
    scheduler = importlib.import_module("diffusers").DDPMScheduler.from_config(pipe.scheduler.config)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = pipe.unet(noisy, batch.timesteps, states, **extra).sample
    target = batch.noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    return ((prediction - target) ** 2).mean((1, 2, 3)).mul(batch.weights).sum()


def test_a_step_of_sd2_with_v_prediction_has_the_loss_of_diffusers(tiny_sd2_base: Path, pictures: Path, tmp_path: Path) -> None:
    training = tiny_training(tiny_sd2_base, pictures, tmp_path / "run", "train.batch_size=3", "train.min_snr_gamma=0")
    (batch,) = training.batches.step(0)
    pipe = pipeline(tiny_sd2_base)
    with torch.no_grad():
        states = pipe.encode_prompt(list(batch.captions), "cpu", 1, False)[0]
        expected = reference_loss(pipe, batch, {}, states)
        loss = training_step(training.model, batch, training.condition, None)
    assert float(expected) > 0.1 and float((loss - expected).abs()) <= 1e-5 * float(expected)


def test_a_step_of_sdxl_has_the_loss_of_diffusers(tiny_sdxl_base: Path, pictures: Path, tmp_path: Path) -> None:
    """Size, crop and target are those of the pictures: 48x48, 64x48, ... scaled and cropped to 32x32."""
    overrides = ("train.batch_size=6", "train.min_snr_gamma=0", "text_encoder.learning_rate=0.001")
    training = tiny_training(tiny_sdxl_base, pictures, tmp_path / "run", *overrides)
    (batch,) = training.batches.step(0)
    pipe = pipeline(tiny_sdxl_base)
    wide = batch.framing[batch.framing[:, 1] > batch.framing[:, 0]]
    assert wide.tolist() == [[48.0, 64.0, 0.0, 5.0, 32.0, 32.0]]  # 64x48 becomes 43x32, of which 5 go on the left
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(list(batch.captions), device="cpu", do_classifier_free_guidance=False)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.framing}}
        expected = reference_loss(pipe, batch, added, states)
        loss = training_step(training.model, batch, training.condition, None)
        other = reference_loss(
            pipe, batch, {"added_cond_kwargs": added["added_cond_kwargs"] | {"time_ids": batch.framing + 9}}, states
        )
    assert float((loss - expected).abs()) <= 1e-5 * float(expected)
    assert float((other - expected).abs()) > 1e-6 * float(expected)  # the sizes matter


def test_a_mirrored_picture_tells_sdxl_its_mirrored_crop(tiny_sdxl_base: Path, pictures: Path, tmp_path: Path) -> None:
    training = tiny_training(tiny_sdxl_base, pictures, tmp_path / "run", "train.batch_size=6", "dataset.flip=true")
    lefts = {
        float(row[3])
        for step in range(8)
        for batch in training.batches.step(step)
        for row in batch.framing
        if row[1] == 64 and row[0] == 48
    }
    assert lefts == {5.0, 6.0}  # 11 pixels go in all


@pytest.mark.parametrize(("family", "skip"), [("sd1", 1), ("sd1", 2), ("sd2", 1), ("sd2", 2), ("sdxl", 1)])
def test_a_picture_is_that_of_the_pipeline(
    family: str, skip: int, tiny_base: Path, tiny_sd2_base: Path, tiny_sdxl_base: Path
) -> None:
    folder = {"sd1": tiny_base, "sd2": tiny_sd2_base, "sdxl": tiny_sdxl_base}[family]
    pipe = pipeline(folder)
    if skip == 2:  # what is skipped is cut off; the pipeline's own clip_skip fails with transformers 5.6 and later
        pipe.text_encoder.encoder.layers = pipe.text_encoder.encoder.layers[:-1]
    pipe.scheduler = importlib.import_module("diffusers").DDIMScheduler.from_config(pipe.scheduler.config)
    model = load_family(recognise_base(str(folder), BaseOptions(clip_skip=skip)), torch.float32, torch.device("cpu"))
    settings = RenderSettings(64, 64, steps=3, guidance=4.0, scheduler="ddim", negative="grey")
    ours = render_latents(model, [Picture("a red fox", 3, {})], settings)
    theirs = pipe(
        "a red fox", height=64, width=64, num_inference_steps=3, guidance_scale=4.0, negative_prompt="grey",
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_sdxl_s_clip_skip_leaves_one_layer_more_out_of_both_encoders(tmp_path: Path) -> None:
    """The pooled state stays that of the end. Unguided, as the pipeline skips nothing for a negative prompt."""
    from tests.tiny_models import save_tiny_sdxl

    pipe = pipeline(save_tiny_sdxl(tmp_path / "three", text_layers=3))
    model = load_family(recognise_base(str(tmp_path / "three"), BaseOptions(clip_skip=2)), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt("a red fox", device="cpu", do_classifier_free_guidance=False, clip_skip=1)
        ours = model.encode_captions(["a red fox"])
    assert torch.allclose(ours.hidden_states, states, atol=1e-6) and torch.allclose(ours.extras["pooled"], pooled, atol=1e-6)
    usual = load_family(recognise_base(str(tmp_path / "three")), torch.float32, torch.device("cpu"))
    assert not torch.allclose(usual.encode_captions(["a red fox"]).hidden_states, states, atol=1e-3)
