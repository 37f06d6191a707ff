"""Files of ours in diffusers and files of diffusers in ours: the same modules, the same weight changes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.examples import leaf_shapes, random_lora
from tests.tiny_models import save_tiny_pipeline
from trainers.formats import ModuleWeights, read_adapter, write_adapter


def diffusers() -> Any:
    return importlib.import_module("diffusers")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))
    return diffusers().StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@pytest.fixture
def clean(pipeline: Any) -> Iterator[Any]:
    yield pipeline
    pipeline.unload_lora_weights()


def all_shapes(pipeline: Any) -> dict[str, tuple[int, ...]]:
    return leaf_shapes("unet", pipeline.unet) | leaf_shapes("text_encoder", pipeline.text_encoder)


def loaded_deltas(pipeline: Any) -> dict[str, torch.Tensor]:
    """Canonical name -> scaling * B @ A of every peft layer in the pipeline, float64."""
    from peft.tuners.lora import LoraLayer

    deltas = {}
    for part in ("unet", "text_encoder"):
        for path, layer in getattr(pipeline, part).named_modules():
            if isinstance(layer, LoraLayer):
                (name,) = layer.lora_A
                factors: list[Any] = [layer.lora_A[name].weight, layer.lora_B[name].weight]
                down, up = (factor.detach().double() for factor in factors)
                delta = layer.scaling[name] * (up.flatten(1) @ down.flatten(1))
                deltas[f"{part}.{path}"] = delta.reshape(up.shape[0], *down.shape[1:])
    return deltas


def worst_error(deltas: dict[str, torch.Tensor], modules: dict[str, ModuleWeights]) -> float:
    """Largest relative error over all modules; asserts that both sides have the same ones."""
    assert deltas.keys() == modules.keys()
    return max(float((deltas[name] - ours.delta()).norm() / ours.delta().norm()) for name, ours in modules.items())


def test_diffusers_loads_every_module_of_a_bfloat16_file(clean: Any, tmp_path: Path) -> None:
    modules = random_lora(all_shapes(clean))
    assert len({module.rank for module in modules.values()}) > 1
    write_adapter(tmp_path / "ours.safetensors", modules, {"ss_v2": "False"}, "bf16")
    clean.load_lora_weights(tmp_path, weight_name="ours.safetensors", local_files_only=True)
    assert worst_error(loaded_deltas(clean), modules) < 1e-2


def test_diffusers_loads_a_file_of_the_text_encoder_alone(clean: Any, tmp_path: Path) -> None:
    modules = random_lora(leaf_shapes("text_encoder", clean.text_encoder))
    write_adapter(tmp_path / "ours.safetensors", modules, {}, "fp32")
    clean.load_lora_weights(tmp_path, weight_name="ours.safetensors", local_files_only=True)
    assert worst_error(loaded_deltas(clean), modules) < 1e-6


def save_with_diffusers(pipeline: Any, folder: Path, **config: Any) -> Path:
    """A fresh peft LoRA with random numbers on both parts, saved by diffusers with its metadata."""
    from peft import LoraConfig, get_peft_model_state_dict

    targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"], "text_encoder": ["q_proj", "fc1"]}
    arguments: dict[str, Any] = {}
    for part, names in targets.items():
        model = getattr(pipeline, part)
        model.add_adapter(LoraConfig(target_modules=names, init_lora_weights=False, **config))
        arguments[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        arguments[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    diffusers().StableDiffusionPipeline.save_lora_weights(folder, weight_name="theirs.safetensors", **arguments)
    return folder / "theirs.safetensors"


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 10},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 7, "mlp.fc1": 3}},
    ],
    ids=["alpha is rank", "alpha is not rank", "rslora", "patterns"],
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # Each pattern names layers of one part only.
def test_a_file_that_diffusers_wrote_is_read_with_its_weight_changes(
    clean: Any, tmp_path: Path, config: dict[str, Any]
) -> None:
    path = save_with_diffusers(clean, tmp_path, **config)
    expected = loaded_deltas(clean)
    shapes = {name.replace(".base_layer", ""): shape for name, shape in all_shapes(clean).items()}
    adapter = read_adapter(path, shapes, shapes)
    assert adapter.unmatched == ()
    assert worst_error(expected, adapter.modules) < 1e-6


def test_the_form_that_diffusers_wrote_before_peft_is_read(clean: Any, tmp_path: Path) -> None:
    path = save_with_diffusers(clean, tmp_path, r=4, lora_alpha=4)
    expected = loaded_deltas(clean)
    converted = diffusers().utils.convert_state_dict_to_diffusers(load_file(path))
    assert any(".lora.down.weight" in key or "_lora.down.weight" in key for key in converted)
    save_file({key: value.contiguous() for key, value in converted.items()}, tmp_path / "old.safetensors")
    known = {name.replace(".base_layer", "") for name in all_shapes(clean)}
    adapter = read_adapter(tmp_path / "old.safetensors", known)
    assert adapter.unmatched == ()
    assert worst_error(expected, adapter.modules) < 1e-6


def test_attention_processor_names_of_the_first_diffusers_form_are_read(tmp_path: Path) -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    keys = [f"unet.{block}.processor.to_out_lora", "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"]
    tensors = {f"{key}.{side}.weight": torch.ones(3, 3) for key in keys for side in ("down", "up")}
    save_file(tensors, tmp_path / "first.safetensors")
    known = [f"unet.{block}.to_out.0", "text_encoder.encoder.layers.0.self_attn.q_proj"]
    assert sorted(read_adapter(tmp_path / "first.safetensors", known).modules) == sorted(known)
