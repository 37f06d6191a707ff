"""Files of every family in diffusers' own pipelines: all modules load, with our weight change, in kohya and in peft form."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.examples import leaf_shapes, random_lora
from trainers.formats import ModuleWeights, write_adapter

PARTS = {"sd1": ("unet", "text_encoder"), "sd2": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module", params=PARTS)
def pipeline(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """(family, diffusers pipeline of a tiny base); leaves nothing loaded."""
    family = request.param
    folder = request.getfixturevalue({"sd1": "tiny_base", "sd2": "tiny_sd2_base", "sdxl": "tiny_sdxl_base"}[family])
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    made = getattr(importlib.import_module("diffusers"), name).from_pretrained(folder, local_files_only=True)
    yield family, made


@pytest.fixture
def clean(pipeline: tuple[str, Any]) -> Iterator[tuple[str, Any]]:
    yield pipeline
    pipeline[1].unload_lora_weights()


def shapes_of(pipeline: Any, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Every Linear and Conv2d that a kohya LoRA may adapt, by canonical name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        shapes |= leaf_shapes(part, getattr(pipeline, part))
    return {name.replace(".text_model.", ".").replace(".base_layer", ""): shape for name, shape in shapes.items()}


def loaded_deltas(pipeline: Any, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Canonical name -> scaling * B @ A of every peft layer in the pipeline, float64."""
    from peft.tuners.lora import LoraLayer

    deltas = {}
    for part in parts:
        for path, layer in getattr(pipeline, part).named_modules():
            if isinstance(layer, LoraLayer) and layer.lora_A:
                (name,) = layer.lora_A
                factors: list[Any] = [layer.lora_A[name].weight, layer.lora_B[name].weight]
                down, up = (factor.detach().double() for factor in factors)
                delta = layer.scaling[name] * (up.flatten(1) @ down.flatten(1))
                deltas[f"{part}.{path}".replace(".text_model.", ".")] = delta.reshape(up.shape[0], *down.shape[1:])
    return deltas


def worst_error(deltas: dict[str, torch.Tensor], modules: dict[str, ModuleWeights]) -> float:
    """Largest relative error over all modules; asserts that both sides have the same ones."""
    assert deltas.keys() == modules.keys()
    return max(float((deltas[name] - ours.delta()).norm() / ours.delta().norm()) for name, ours in modules.items())


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-6), ("fp16", 1e-3)])
@pytest.mark.parametrize("with_text", [False, True], ids=["unet", "unet and text"])
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_loads_every_module_with_our_weight_change(
    clean: tuple[str, Any], tmp_path: Path, form: Any, with_text: bool, dtype: Any, limit: float
) -> None:
    family, pipe = clean
    parts = PARTS[family] if with_text else ("unet",)
    modules = random_lora(shapes_of(pipe, parts))
    assert all(module.alpha != module.rank for module in modules.values())
    write_adapter(tmp_path / "ours.safetensors", modules, {"ss_v2": "False"}, dtype, form, family)
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", local_files_only=True)
    assert worst_error(loaded_deltas(pipe, PARTS[family]), modules) < limit
