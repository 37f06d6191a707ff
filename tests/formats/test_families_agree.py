"""Files of every family in diffusers' own pipelines: all modules load, with our weight change, in kohya and in peft form."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.examples import leaf_shapes, random_lora
from trainers.formats import ModuleWeights, read_adapter, write_adapter

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


def test_diffusers_computes_with_a_dora_in_peft_form_what_we_compute(clean: tuple[str, Any], tmp_path: Path) -> None:
    from trainers.adapters import ADAPTERS
    from trainers.adapters.inject import adapt_layers, attach

    family, pipe = clean
    shapes = {name: shape for name, shape in shapes_of(pipe, ("unet",)).items() if ".attn" in name}
    modules = {}
    for name, weights in random_lora(shapes).items():
        norms = pipe.unet.get_submodule(name.removeprefix("unet.")).weight.detach().norm(dim=1, keepdim=True)
        factors = {**weights.factors, "dora_scale": norms * torch.linspace(0.7, 1.3, len(norms))[:, None]}
        modules[name] = ModuleWeights(factors, weights.alpha, "dora")
    write_adapter(tmp_path / "ours.safetensors", modules, {}, "fp32", "peft", family)
    width = pipe.unet.config.cross_attention_dim
    batch: dict[str, Any] = {"encoder_hidden_states": torch.linspace(-2, 2, 7 * width).sin().reshape(1, 7, width)}
    if family == "sdxl":
        batch["added_cond_kwargs"] = {"text_embeds": torch.linspace(-1, 1, 48)[None], "time_ids": torch.ones(1, 6)}
    noisy, step = torch.linspace(-9, 9, 256).cos().reshape(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        base = pipe.unet(noisy, step, **batch).sample
        pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", local_files_only=True)
        theirs = pipe.unet(noisy, step, **batch).sample
        pipe.unload_lora_weights()
        own = type(pipe.unet).from_config(pipe.unet.config)
        own.load_state_dict(pipe.unet.state_dict())
        file = read_adapter(tmp_path / "ours.safetensors", shapes, shapes, family)
        for name, layer in adapt_layers({"unet": own}, list(shapes)).items():
            attach(layer, "a", ADAPTERS["dora"], file.modules[name].factors, file.modules[name].scale)
        ours = own(noisy, step, **batch).sample
    assert float((ours - theirs).norm() / (theirs - base).norm()) < 1e-4  # of float32 sums through a whole network
