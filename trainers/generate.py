"""Prompts and adapters at strengths -> images. The one renderer: samples while training, the prior, the CLI."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from trainers.adapters.inject import keeping_strengths, set_row_strengths
from trainers.adapters.layer import AdaptedLayer
from trainers.adapters.plan import Strengths, strength_at
from trainers.families import check_size
from trainers.families.base import Conditioning, DiffusionModel
from trainers.samplers import SAMPLERS, check_sampler


@dataclass(frozen=True)
class RenderSettings:
    """How pictures are drawn. Size in pixels; guidance at or below 1 switches it off and halves the work."""

    height: int
    width: int
    steps: int = 20
    guidance: float = 5.0
    negative: str = ""
    scheduler: str = "dpm++"


@dataclass(frozen=True)
class Picture:
    """One picture to draw: a prompt, the seed of its noise, and strengths by adapter. One that is not named is at 0.

    A strength is a number, or several by part and block.
    """

    prompt: str
    seed: int
    strengths: Mapping[str, float | Strengths]


def render(
    model: DiffusionModel,
    pictures: Sequence[Picture],
    settings: RenderSettings,
    on_step: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """Draws `pictures` as one batch, each row at its own strengths; a single one at strength 0 is the base bit for bit.

    Starts from the noise that diffusers' pipelines draw for the same seed. Raises SettingError for an unknown scheduler
    or a size that the model cannot draw.
    """
    latents = render_latents(model, pictures, settings, on_step)
    return [image_of(model.decode_latents(row[None])[0]) for row in latents]


@torch.no_grad()
def render_latents(
    model: DiffusionModel, pictures: Sequence[Picture], settings: RenderSettings, on_step: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """The same up to the latents (B, C, h, w). The adapters' strengths are afterwards what they were before."""
    check_size(model.facts, settings.height, settings.width)
    with keeping_strengths(model.parts()):
        return _sample(model, pictures, settings, on_step)


def _adapters_in(parts: Mapping[str, nn.Module]) -> dict[str, None]:
    """Names of the adapters in any layer of the parts, in module order."""
    layers = (layer for part in parts.values() for layer in part.modules() if isinstance(layer, AdaptedLayer))
    return dict.fromkeys(name for layer in layers for name in layer.adapters)


def _sample(
    model: DiffusionModel, pictures: Sequence[Picture], settings: RenderSettings, on_step: Callable[[], None]
) -> torch.Tensor:
    scheduler = make_scheduler(settings.scheduler, model.scheduler_config)
    guided = settings.guidance > 1
    conditioning = _encode(model, pictures, settings.negative if guided else None)
    device = conditioning.hidden_states.device
    shape = (
        1,
        model.facts.latent_channels,
        settings.height // model.facts.pixels_per_latent,
        settings.width // model.facts.pixels_per_latent,
    )
    generators = [torch.Generator().manual_seed(picture.seed) for picture in pictures]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    scheduler.set_timesteps(settings.steps, device=device)
    latents: torch.Tensor = noise.to(device) * scheduler.init_noise_sigma
    rows_of_strengths = [picture.strengths for picture in pictures] * (2 if guided else 1)
    set_row_strengths({"unet": model.parts()["unet"]}, rows_of_strengths)
    # A whole picture, not cut: what SDXL is told of it.
    framing = torch.tensor([[settings.height, settings.width, 0, 0, settings.height, settings.width]], device=device).float()
    framing = framing.expand(len(pictures) * (2 if guided else 1), -1)
    draws_noise = {"generator": generators} if settings.scheduler in {"euler-a"} else {}
    for timestep in scheduler.timesteps:
        rows = torch.cat([latents, latents]) if guided else latents
        rows = scheduler.scale_model_input(rows, timestep)
        prediction = model.predict(rows, timestep.expand(len(rows)), conditioning, framing)
        if guided:
            without, with_prompt = prediction.chunk(2)
            prediction = without + settings.guidance * (with_prompt - without)
        latents = scheduler.step(prediction, timestep, latents, **draws_noise).prev_sample
        on_step()
    return latents


def _encode(model: DiffusionModel, pictures: Sequence[Picture], negative: str | None) -> Conditioning:
    """Text states of all rows (the unguided ones first), each encoded alone at its own text-encoder strengths.

    Equal ones are encoded once, as those of a ladder are whose LoRA leaves the text encoders as they are.
    """
    encoders = {part: module for part, module in model.parts().items() if part != "unet"}
    changing = _adapters_in(encoders)
    rows: dict[tuple[Any, ...], Conditioning] = {}
    wanted = []
    for text_of in ([lambda _: negative] if negative is not None else []) + [lambda picture: picture.prompt]:
        for picture in pictures:
            strengths = {name: strength_at(picture.strengths.get(name, 0.0), "text") for name in changing}
            key = (text_of(picture), tuple(strengths.values()))
            if key not in rows:
                set_row_strengths(encoders, [strengths])
                rows[key] = model.encode_captions([key[0]])
            wanted.append(rows[key])
    return Conditioning.join(wanted)


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """One of diffusers' schedulers with the base model's noise schedule. Raises SettingError for an unknown name."""
    import diffusers

    check_sampler(name)
    kind, extra = SAMPLERS[name]
    return getattr(diffusers, kind).from_config(config, **extra)


def image_of(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    array = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def png_bytes(image: Image.Image, picture: Picture, settings: RenderSettings, files: Mapping[str, str]) -> bytes:
    """A PNG that says how it was drawn, in the text chunk `parameters` as A1111 writes it and galleries read it.

    `files` gives the file name without ending of each adapter that the picture's strengths name.
    """
    loras = [f"<lora:{files[name]}:{_spelled(strength)}>" for name, strength in picture.strengths.items() if strength]
    lines = [" ".join([picture.prompt, *loras])]
    if settings.negative:
        lines.append(f"Negative prompt: {settings.negative}")
    lines.append(
        f"Steps: {settings.steps}, Sampler: {settings.scheduler}, CFG scale: {settings.guidance:g}, Seed: {picture.seed}, "
        f"Size: {settings.width}x{settings.height}"
        + "".join(_told_blocks(files[name], strength) for name, strength in picture.strengths.items())
    )
    told, data = PngInfo(), io.BytesIO()
    told.add_itxt("parameters", "\n".join(lines))
    image.save(data, "PNG", pnginfo=told)
    return data.getvalue()


def _spelled(strength: float | Strengths) -> str:
    """As A1111 reads it: one number, or the text encoders' before the denoiser's."""
    if not isinstance(strength, Strengths):
        return f"{strength:g}"
    return f"{strength.unet:g}" if strength.text == strength.unet else f"{strength.text:g}:{strength.unet:g}"


def _told_blocks(file: str, strength: float | Strengths) -> str:
    blocks = strength.blocks if isinstance(strength, Strengths) else {}
    told = " ".join(f"{block}={value:g}" for block, value in blocks.items() if value != 1)
    return f', Blocks of {file}: "{told}"' if told else ""
