"""A LoRA file as diffusers reads it: the change of every layer's weight, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainers.adapters.inject import find_layers
from trainers.adapters.plan import canonical_name
from trainers.families.base import DiffusionModel
from trainers.quantised import PackedLayer, standing_in

SIDE = 256
"""Largest side in pixels of the picture that is drawn."""
STEPS = 4


def read_by_diffusers(
    model: DiffusionModel, path: Path, prompt: str, problems: list[str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """(change of every layer that diffusers put a LoRA on, float64 by canonical name, its picture). Faults go to `problems`.

    peft rounds what it reads to the number format of the layer beside it, which says nothing of the file: unless the
    base computes in float32, the changes are read beside float32 stand-ins. Layers kept in few bits are beyond peft, so
    of such a base no picture is drawn.
    """
    packed = any(isinstance(layer, PackedLayer) for layer in find_layers(model.parts()).values())
    plain = computes_in_float32(model) and not packed
    deltas: dict[str, torch.Tensor] = {}
    try:
        if not plain:
            with standing_in(model.parts()), _loaded(model, path):
                deltas = peft_deltas(model)
        if packed:
            return deltas, None
        with _loaded(model, path) as pipeline:
            deltas = deltas or peft_deltas(model)
            return deltas, _drawn_by(pipeline, model, prompt) if deltas else None
    except Exception as error:  # whatever it is, diffusers does not read the file
        first = (str(error) or type(error).__name__).splitlines()[0][:300]
        problems.append(f"diffusers does not load the file: {first}")
        return {}, None


@contextmanager
def _loaded(model: DiffusionModel, path: Path) -> Iterator[Any]:
    """diffusers' pipeline around the model, with the file in it; afterwards the model is as it was."""
    pipeline = model.pipeline()
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


def peft_deltas(model: DiffusionModel) -> dict[str, torch.Tensor]:
    """scaling * B @ A of every layer that peft has put in, (out, in) or (out, in, kh, kw), float64 on the CPU."""
    deltas = {}
    for part, module in model.parts().items():
        for path, layer in module.named_modules():
            if not hasattr(layer, "lora_A") or not hasattr(layer, "base_layer"):
                continue
            for name in layer.lora_A:
                # To the CPU first: Apple's GPUs have no float64.
                down, up = (side[name].weight.detach().cpu().double() for side in (layer.lora_A, layer.lora_B))
                delta = layer.scaling[name] * (up.flatten(1) @ down.flatten(1))
                deltas[canonical_name(part, path)] = delta.reshape(up.shape[0], *down.shape[1:])
    return deltas


def _drawn_by(pipeline: Any, model: DiffusionModel, prompt: str) -> torch.Tensor:
    """A picture (3, H, W) in [-1, 1] by diffusers' pipeline, whose text encoders have its adapters too."""
    side, conditioning = side_of(model), model.encode_captions([prompt])
    pooled = {"pooled_prompt_embeds": conditioning.extras["pooled"]} if "pooled" in conditioning.extras else {}
    latents = pipeline(
        prompt_embeds=conditioning.hidden_states.to(pipeline.unet.dtype), **pooled, height=side, width=side,
        num_inference_steps=STEPS, guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip
    return model.decode_latents(latents.float())[0]


def side_of(model: DiffusionModel) -> int:
    """Side in pixels of the square picture that both readers draw."""
    step = model.facts.step
    return max(step, min(model.facts.resolution, SIDE) // step * step)


def computes_in_float32(model: DiffusionModel) -> bool:
    """Whether the denoiser's numbers are float32, so that two readers draw alike."""
    return next(model.parts()["unet"].parameters()).dtype == torch.float32
