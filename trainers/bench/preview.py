"""Trying a LoRA in the studio: changing its strength and swapping it, against the calls that diffusers has for both."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainers.adapters.inject import find_layers, set_strength
from trainers.adapters.plan import LayerPlan
from trainers.bench.contestants import Plan, synchroniser
from trainers.bench.reference import load_parts, share
from trainers.bench.rounds import Rounds, Step, Took, run_rounds
from trainers.families import recognise_base
from trainers.families.base import Conditioning, DiffusionModel
from trainers.formats import ModuleWeights, write_adapter
from trainers.objective import generator_for
from trainers.warm import KEPT_LORAS, Warm, lora_mark

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
FUSES = 10
"""How often a LoRA is fused and unfused before the base is looked at."""


@dataclass(frozen=True)
class Preview:
    """Seconds of each way, what drawing with a LoRA costs, and what strength 0 leaves of the base.

    `drawing` has one call of the denoiser, with the LoRA at strength 1 and without. `drift` is the share of the adapted
    weights that differ from the base's after FUSES times fuse_lora and unfuse_lora.
    """

    rounds: Rounds
    exact_at_zero: bool
    drift: float


def measure_preview(plan: Plan, rounds: int, told: Callable[[int, int], None]) -> Preview:
    """Runs both ways of both in turn, on the base in the number format that the studio takes for it."""
    facts = recognise_base(plan.base)
    warm = Warm()
    model = warm.model(facts, lambda event: None)
    parts = load_parts(plan.folder, next(model.parts()["unet"].parameters()).dtype, _device(model))
    paths = _paths(model)
    shapes = {path: tuple(parts.unet.get_submodule(path).weight.shape) for path in paths}
    # One more than the studio keeps: each is read anew.
    files = [_write_lora(plan, shapes, number, facts.family.name) for number in range(KEPT_LORAS + 1)]
    predict = _predictor(model)
    before = predict()
    names = {"now": warm.adapter(model, _mark(files[0]), lambda event: None)}
    set_strength(model.parts(), names["now"], 0.0)
    exact = torch.equal(predict(), before)
    fused, swapped = share(parts.unet), parts.unet
    kept = {path: fused.get_submodule(path).weight.clone() for path in paths}
    for unet in (fused, swapped):
        _load(unet, files[0], "lora-0")

    def strength(number: int) -> Took:
        begun = time.perf_counter()
        for value in STRENGTHS:  # several, as one is too short for a clock
            set_strength(model.parts(), names["now"], value)
        return Took((time.perf_counter() - begun) / len(STRENGTHS))

    def fuse(number: int) -> None:
        fused.fuse_lora(lora_scale=STRENGTHS[number % len(STRENGTHS)])
        fused.unfuse_lora()

    def swap(number: int) -> None:
        names["now"] = warm.adapter(model, _mark(files[(number + 1) % len(files)]), lambda event: None)

    def load(number: int) -> Took:
        begun = time.perf_counter()
        _load(swapped, files[(number + 1) % len(files)], f"lora-{number + 1}")
        took = Took(time.perf_counter() - begun)
        swapped.delete_adapters(f"lora-{number}")  # not counted, and else each load would find more layers
        return took

    def draw(strength: float) -> Step:
        def run(number: int) -> None:
            set_strength(model.parts(), names["now"], strength)
            predict()

        return run

    steps: dict[str, Step] = {
        "strength, project": strength, "strength, fuse + unfuse": fuse,
        "swap, project": swap, "swap, load_lora_adapter": load,
        "drawing, LoRA": draw(1.0), "drawing, base": draw(0.0),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there are two LoRA files, yes
        found = run_rounds(steps, rounds, told, synchroniser(_device(model)))
    return Preview(found, exact, _drift(fused, kept))


def _drift(unet: Any, kept: dict[str, torch.Tensor]) -> float:
    for path, weight in kept.items():
        unet.get_submodule(path).base_layer.weight.data.copy_(weight)
    for _ in range(FUSES):
        unet.fuse_lora()
        unet.unfuse_lora()
    moved = sum(int((unet.get_submodule(path).base_layer.weight != weight).sum()) for path, weight in kept.items())
    return moved / sum(weight.numel() for weight in kept.values())


def _paths(model: DiffusionModel) -> list[str]:
    return model.find_targets("unet", ["attention"])


def _write_lora(plan: Plan, shapes: dict[str, tuple[int, ...]], number: int, family: str) -> Path:
    """A random LoRA as strong as a trained one, in diffusers' own form, which it reads the fastest."""
    modules = {}
    for path, (out, inner) in shapes.items():
        generator = generator_for("preview", number, path)
        down = torch.randn(plan.rank, inner, generator=generator) / inner**0.5
        up = torch.randn(out, plan.rank, generator=generator) * 0.01
        layer = LayerPlan(f"unet.{path}", plan.rank, 1.0, "unet")
        modules[layer.name] = ModuleWeights({"down": down, "up": up}, float(plan.rank))
    file = plan.work / f"preview-{number}.safetensors"
    write_adapter(file, modules, {}, "fp16", "peft", family)
    return file


def _load(unet: Any, path: Path, name: str) -> None:
    importlib.import_module("peft")
    unet.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="unet", adapter_name=name, local_files_only=True)


def _mark(path: Path) -> Any:
    return lora_mark(str(path))


def _device(model: DiffusionModel) -> torch.device:
    layer: Any = next(iter(find_layers(model.parts()).values()))
    device: torch.device = layer.weight.device
    return device


def _predictor(model: DiffusionModel) -> Callable[[], torch.Tensor]:
    """One call of the denoiser on fixed numbers, at the base's own size."""
    facts, device = model.facts, _device(model)
    side = facts.resolution // facts.pixels_per_latent
    latents = torch.randn(1, facts.latent_channels, side, side, generator=generator_for("preview", "latents")).to(device)
    with torch.no_grad():
        conditioning: Conditioning = model.encode_captions(["a pattern of coloured fields"])
    framing = torch.tensor([[facts.resolution, facts.resolution, 0, 0, facts.resolution, facts.resolution]], device=device)

    @torch.no_grad()
    def predict() -> torch.Tensor:
        return model.predict(latents, torch.tensor([500], device=device), conditioning, framing.float())

    return predict
