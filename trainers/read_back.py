"""A LoRA file as diffusers reads it beside a loaded base, and one picture drawn with it, by diffusers and by this program."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainers.adapters.inject import restore_layers
from trainers.adapters.plan import canonical_name
from trainers.attach import attach_files
from trainers.errors import is_out_of_memory
from trainers.families.base import DiffusionModel
from trainers.formats import ModuleWeights
from trainers.generate import Picture, RenderSettings, render_latents
from trainers.quantised import stand_in

SIDE = 256
"""Largest side in pixels of the picture that is drawn both ways."""
STEPS = 4
Drawn = TypeVar("Drawn")


def read_by_diffusers(
    model: DiffusionModel, path: Path, prompt: str, problems: list[str]
) -> tuple[dict[str, ModuleWeights], torch.Tensor | None]:
    """(the LoRA of every layer that diffusers put one on, by canonical name, its picture). Faults go to `problems`.

    Layers kept in few bits are beyond peft: beside stand-ins without weights the LoRA is read all the same, but not drawn.
    """
    packed = stand_in(model.parts())
    pipeline = model.pipeline()
    import diffusers

    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # what it says before it raises is told below
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
        modules = _peft_modules(model)
        picture = None
        if modules and not packed:
            picture = _unless_too_large(lambda: _drawn_by(pipeline, model, prompt))
        return modules, picture
    except Exception as error:  # whatever it is, diffusers does not read the file
        first = " ".join((str(error) or type(error).__name__).split())[:300]
        problems.append(f"diffusers does not load the file: {first}")
        return {}, None
    finally:
        diffusers.utils.logging.set_verbosity_error()
        pipeline.unload_lora_weights()
        for parent, leaf, layer in packed:
            setattr(parent, leaf, layer)


def _peft_modules(model: DiffusionModel) -> dict[str, ModuleWeights]:
    """The factors of every layer that peft has put in. Only those are kept: all deltas of an SD 1.5 would take 3 GB."""
    modules = {}
    for part, module in model.parts().items():
        for path, layer in module.named_modules():
            if not hasattr(layer, "lora_A") or not hasattr(layer, "base_layer"):
                continue
            for name in layer.lora_A:
                down, up = (side[name].weight.detach().cpu() for side in (layer.lora_A, layer.lora_B))
                factors = {"down": down, "up": up}
                modules[canonical_name(part, path)] = ModuleWeights(factors, layer.scaling[name] * down.shape[0])
    return modules


def drawn_here(model: DiffusionModel, path: Path, prompt: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Our own pictures (the base's, with the file at strength 1), each (3, H, W) in [-1, 1].

    None where the memory does not hold them.
    """

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        (name,) = attach_files(model, [path])
        side = _side(model)
        settings = RenderSettings(side, side, STEPS, guidance=1.0, scheduler="ddim")
        base, changed = (
            model.decode_latents(render_latents(model, [Picture(prompt, 0, {name: strength})], settings))[0]
            for strength in (0.0, 1.0)
        )
        return base, changed

    try:
        return _unless_too_large(draw)
    finally:
        restore_layers(model.parts())


def _unless_too_large(draw: Callable[[], Drawn]) -> Drawn | None:
    """What `draw` gives; None where the memory does not hold it, which says nothing about the file."""
    try:
        with _whole_numbers_of_float32():
            return draw()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


@contextmanager
def _whole_numbers_of_float32() -> Iterator[None]:
    """NVIDIA's convolutions round to 10 bits (TF32) unless they are told not to, each algorithm in its own way."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _drawn_by(pipeline: Any, model: DiffusionModel, prompt: str) -> torch.Tensor:
    """The same picture by diffusers' pipeline, whose text encoders have its adapters too."""
    side, conditioning = _side(model), model.encode_captions([prompt])
    pooled = {"pooled_prompt_embeds": conditioning.extras["pooled"]} if "pooled" in conditioning.extras else {}
    latents = pipeline(
        prompt_embeds=conditioning.hidden_states.to(pipeline.unet.dtype), **pooled, height=side, width=side,
        num_inference_steps=STEPS, guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip
    return model.decode_latents(latents.float())[0]


def _side(model: DiffusionModel) -> int:
    step = model.facts.step
    return max(step, min(model.facts.resolution, SIDE) // step * step)
