"""The renderer against diffusers' own pipeline, and strengths: in batches, at zero, and in the text encoder."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from tests.tiny_runs import tiny_training, update_from
from trainers.adapters.flat import FlatParameters
from trainers.adapters.inject import TRAINED, find_layers, inject_trainable
from trainers.adapters.layer import AdaptedLayer
from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan, canonical_name
from trainers.errors import SettingError
from trainers.families import load_family, recognise_base
from trainers.families.base import DiffusionModel
from trainers.generate import Picture, RenderSettings, image_of, render, render_latents
from trainers.outputs import Outputs
from trainers.page import label_grid
from trainers.run_folder import RunFolder
from trainers.samplers import SAMPLERS

TARGETS: Mapping[str, list[str]] = {"unet": ["attention"], "text_encoder": ["attention", "mlp"]}
PROMPT, NEGATIVE = "a red apple on a table", "blurry"
QUICK = RenderSettings(height=32, width=48, steps=4, guidance=4.0, negative=NEGATIVE)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> DiffusionModel:
    """The base without any LoRA."""
    return load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))


def with_lora(folder: Path, *parts: str) -> tuple[DiffusionModel, FlatParameters]:
    """The same base with a strong random LoRA on the named parts."""
    model = load_family(recognise_base(str(folder)), torch.float32, torch.device("cpu"))
    paths = [(part, path) for part in parts for path in model.find_targets(part, TARGETS[part])]
    plans = [LayerPlan(canonical_name(part, path), 4, 1.0, part) for part, path in paths]
    flat = inject_trainable(model.parts(), plans, LORA, 0, torch.device("cpu"))
    flat.weights.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(3))
    return model, flat


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> DiffusionModel:
    """The base with a LoRA on both parts."""
    return with_lora(tiny_base, "unet", "text_encoder")[0]


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = importlib.import_module("diffusers").StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one(model: DiffusionModel, strength: float | None = None, how: RenderSettings = QUICK, seed: int = 5) -> torch.Tensor:
    """Latents (1, 4, h, w) of one picture."""
    return render_latents(model, [Picture(PROMPT, seed, {} if strength is None else {TRAINED: strength})], how)


def difference(first: Image.Image, second: Image.Image) -> int:
    """Largest difference of any channel of any pixel, of 255."""
    return int(numpy.abs(numpy.asarray(first).astype(int) - numpy.asarray(second).astype(int)).max())


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_latents_are_those_of_diffusers_pipeline(base: DiffusionModel, pipeline: Any, scheduler: str, guidance: float) -> None:
    how = RenderSettings(height=32, width=48, steps=6, guidance=guidance, negative=NEGATIVE, scheduler=scheduler)
    kind, extra = SAMPLERS[scheduler]
    pipeline.scheduler = getattr(importlib.import_module("diffusers"), kind).from_config(pipeline.scheduler.config, **extra)
    expected = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=32,
        width=48,
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    ours = one(base, how=how)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_picture_is_that_of_diffusers_pipeline(base: DiffusionModel, pipeline: Any) -> None:
    pipeline.scheduler = importlib.import_module("diffusers").DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        PROMPT, height=64, width=64, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(8)
    ).images[0]
    (ours,) = render(base, [Picture(PROMPT, 8, {})], RenderSettings(64, 64, steps=4, guidance=3.0, scheduler="ddim"))
    assert numpy.asarray(expected).std() > 3  # not one flat colour
    assert ours.size == expected.size == (64, 64)
    assert difference(ours, expected) <= 1


@pytest.mark.parametrize(("height", "width"), [(36, 44), (20, 52), (4, 12)])
def test_latents_that_the_denoiser_cannot_halve_are_those_of_diffusers_pipeline_too(
    base: DiffusionModel, pipeline: Any, monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    monkeypatch.setattr(pipeline, "check_inputs", lambda *given: None)  # it holds every base to multiples of 8
    pipeline.scheduler = importlib.import_module("diffusers").DDIMScheduler.from_config(pipeline.scheduler.config)
    how = RenderSettings(height, width, steps=4, guidance=3.0, scheduler="ddim")
    generator = torch.Generator().manual_seed(5)
    expected = pipeline(
        PROMPT, height=height, width=width, num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="latent"
    ).images
    assert expected.shape[2:] == (height // 4, width // 4)
    torch.testing.assert_close(one(base, how=how), expected, rtol=1e-4, atol=1e-4)
    (picture,) = render(base, [Picture(PROMPT, 5, {})], how)
    assert picture.size == (width, height)


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_every_sampler_draws_the_same_again_and_another_picture_for_another_seed(base: DiffusionModel, scheduler: str) -> None:
    how = RenderSettings(16, 16, steps=3, scheduler=scheduler)
    first = one(base, how=how)
    assert torch.isfinite(first).all()
    assert torch.equal(one(base, how=how), first)
    assert not torch.equal(one(base, how=how, seed=6), first)


@pytest.mark.parametrize("scheduler", ["dpm++", "euler-a"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_batch_with_a_strength_for_each_row_draws_what_singles_draw(
    model: DiffusionModel, guidance: float, scheduler: str
) -> None:
    how = RenderSettings(32, 32, steps=4, guidance=guidance, scheduler=scheduler)
    pictures = [Picture(PROMPT, 5, {TRAINED: strength}) for strength in (0.0, 0.5, 1.0, 1.5)]
    together = render(model, pictures, how)
    alone = [render(model, [picture], how)[0] for picture in pictures]
    assert max(difference(a, b) for a, b in zip(together, alone, strict=True)) <= 2
    assert all(difference(alone[0], image) > 4 for image in alone[1:])  # so that a mix-up of rows would be seen


def test_a_batch_of_other_prompts_and_seeds_draws_what_singles_draw(model: DiffusionModel) -> None:
    pictures = [Picture("a cat", 1, {TRAINED: 1.0}), Picture("a dog", 2, {TRAINED: 0.3}), Picture("a cat", 3, {TRAINED: 0.0})]
    together = render_latents(model, pictures, QUICK)
    alone = torch.cat([render_latents(model, [picture], QUICK) for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_pictures_of_one_batch_may_name_different_adapters_and_one_not_named_is_silent(tiny_base: Path) -> None:
    model, _ = with_lora(tiny_base, "unet", "text_encoder")
    for layer in find_layers(model.parts()).values():
        if isinstance(layer, AdaptedLayer):
            factors = {name: factor.detach().flip(0) for name, factor in layer.adapters[TRAINED].factors.items()}
            layer.adapters["other"] = replace(layer.adapters[TRAINED], factors=factors)
            layer.strengths["other"] = 1.0
    named: list[dict[str, float]] = [{}, {TRAINED: 1.0}, {"other": 1.0}, {TRAINED: 0.5, "other": 1.0}]
    pictures = [Picture(PROMPT, 5, strengths) for strengths in named]
    together = render_latents(model, pictures, QUICK)
    full = [Picture(PROMPT, 5, {TRAINED: 0.0, "other": 0.0} | strengths) for strengths in named]
    alone = torch.cat([render_latents(model, [picture], QUICK) for picture in full])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert all((alone[0] - alone[row]).abs().max() > 0.1 for row in (1, 2, 3))
    for picture, row in zip(pictures, full, strict=True):
        assert torch.equal(render_latents(model, [picture], QUICK), render_latents(model, [row], QUICK))


@pytest.mark.parametrize("parts", [("unet",), ("text_encoder",), ("unet", "text_encoder")], ids="+".join)
def test_strength_zero_is_the_base_without_any_lora_bit_for_bit(
    base: DiffusionModel, tiny_base: Path, parts: tuple[str, ...]
) -> None:
    model, _ = with_lora(tiny_base, *parts)
    assert not torch.equal(one(model, 1.0), one(base))  # also as a warm-up: strength 1 leaves no trace
    assert torch.equal(one(model, 0.0), one(base))
    (picture,) = render(model, [Picture(PROMPT, 5, {TRAINED: 0.0})], QUICK)
    (expected,) = render(base, [Picture(PROMPT, 5, {})], QUICK)
    assert picture.tobytes() == expected.tobytes()


def test_the_text_encoders_strength_acts_and_more_acts_more(tiny_base: Path) -> None:
    model, _ = with_lora(tiny_base, "text_encoder")
    free = RenderSettings(32, 32, steps=4, guidance=1.0)
    start, small, large = (one(model, strength, free) for strength in (0.0, 0.05, 0.5))
    assert 0 < float((small - start).norm()) < float((large - start).norm())


def test_the_negative_prompt_is_encoded_at_the_lora_strength_too(tiny_base: Path) -> None:
    model, _ = with_lora(tiny_base, "text_encoder")
    same = RenderSettings(16, 16, steps=2, guidance=7.0, negative=PROMPT)
    unguided = RenderSettings(16, 16, steps=2, guidance=1.0)
    # With the prompt as its own negative, guidance has nothing to push away from.
    torch.testing.assert_close(one(model, 1.0, same), one(model, 1.0, unguided), rtol=1e-4, atol=1e-4)


def test_rendering_leaves_strengths_as_they_were(model: DiffusionModel) -> None:
    layers = [layer for layer in find_layers(model.parts()).values() if isinstance(layer, AdaptedLayer)]
    assert {layer.strengths[TRAINED] for layer in layers} == {1.0}
    render(model, [Picture(PROMPT, 1, {TRAINED: 0.3}), Picture(PROMPT, 1, {TRAINED: 0.6})], QUICK)
    assert [layer.strengths[TRAINED] for layer in layers] == [1.0] * len(layers)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_sample_at_another_strength_does_not_change_how_training_goes_on(
    tiny_base: Path, pictures: Path, tmp_path: Path, strength: float
) -> None:
    weights = []
    for name, sampled in (("plain", False), ("sampled", True)):
        more = ("samples.steps=2", f"samples.strength={strength}", "optimizer.learning_rate=1e-2")
        training = tiny_training(tiny_base, pictures, tmp_path / name, *more)
        if sampled:
            Outputs(RunFolder(tmp_path / name), training, lambda event: None, 0.0).sample()
        weights.append(update_from(training, updates=2))
    assert torch.equal(*weights)


def test_a_picture_does_not_depend_on_torchs_own_generator(base: DiffusionModel) -> None:
    torch.manual_seed(1)
    first = one(base, how=RenderSettings(16, 16, steps=3, scheduler="euler-a"))
    torch.manual_seed(2)
    assert torch.equal(one(base, how=RenderSettings(16, 16, steps=3, scheduler="euler-a")), first)


def test_each_sampling_step_is_told(base: DiffusionModel) -> None:
    told: list[int] = []
    render(base, [Picture(PROMPT, 1, {})], RenderSettings(16, 16, steps=3, scheduler="ddim"), lambda: told.append(1))
    assert len(told) == 3


@pytest.mark.parametrize(("height", "width"), [(34, 32), (32, 34), (0, 32), (32, -8), (8192, 32)])
def test_a_size_that_the_base_cannot_draw_is_refused_in_words(base: DiffusionModel, height: int, width: int) -> None:
    with pytest.raises(SettingError, match=f"{width}x{height}") as caught:
        render(base, [Picture(PROMPT, 1, {})], RenderSettings(height, width))
    assert "multiples of 4" in str(caught.value)


def test_an_unknown_sampler_is_refused_with_those_there_are(base: DiffusionModel) -> None:
    with pytest.raises(SettingError, match="nonsense") as caught:
        render(base, [Picture(PROMPT, 1, {})], RenderSettings(32, 32, scheduler="nonsense"))
    assert all(name in str(caught.value) for name in SAMPLERS)


def test_pixels_become_colours_by_rounding_and_stay_in_range() -> None:
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5, 0.2]).view(1, 2, 3).expand(3, 2, 3)
    image = numpy.asarray(image_of(pixels))
    assert image.shape == (2, 3, 3)
    assert image[:, :, 0].flatten().tolist() == [0, 0, 128, 255, 255, 153]


def test_a_grid_holds_every_picture_in_its_place() -> None:
    colours = [["red", "lime"], ["blue", "yellow"], ["cyan", "magenta"]]
    images = [[Image.new("RGB", (64, 32), colour) for colour in row] for row in colours]
    page = label_grid(images, ["one", "two", "a very long prompt " * 20], ["strength 0", "strength 1"])
    seen = [colour for _, colour in sorted(page.getcolors(1 << 24) or [], reverse=True)]
    wanted = {Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for row in colours for colour in row}
    assert wanted <= set(seen[:7])  # the six pictures and the white page
    rows = {colour: _first_row(page, colour) for colour in wanted}
    assert rows[(255, 0, 0)] == rows[(0, 255, 0)] < rows[(0, 0, 255)] < rows[(0, 255, 255)]


def _first_row(page: Image.Image, colour: Any) -> int:
    return int(numpy.argwhere((numpy.asarray(page) == colour).all(axis=2))[0][0])
