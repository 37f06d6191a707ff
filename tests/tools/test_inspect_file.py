"""Looking into LoRA files without a base: what is found, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.examples import random_lora, random_weights
from trainers.errors import AdapterFileError
from trainers.formats import ModuleWeights, write_adapter
from trainers.tools.inspect_file import Inspection, describe, inspect_file

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def write_uniform(path: Path, metadata: dict[str, str] | None = None, inner: int = 768) -> dict[str, ModuleWeights]:
    shapes = {TO_K: (32, inner), "text_encoder.encoder.layers.0.mlp.fc1": (48, 24)}
    modules = {name: random_weights(shape, 4, 6.0, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    write_adapter(path, modules, {"ss_v2": "False"} if metadata is None else metadata, "fp32")
    return modules


def said(inspection: Inspection, severity: str) -> str:
    return "\n".join(str(problem) for problem in inspection.problems if problem.severity == severity)


def test_a_sound_file_has_no_problems_and_its_numbers_are_right(tmp_path: Path) -> None:
    modules = write_uniform(tmp_path / "a.safetensors")
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert inspection.problems == ()
    assert (inspection.family, inspection.schemes, inspection.kinds) == ("sd1", ("kohya",), ("lora",))
    assert inspection.parts == {"unet": 1, "text_encoder": 1} and inspection.dtypes == ("F32",)
    for module in inspection.modules:
        weights = modules[TO_K if module.part == "unet" else "text_encoder.encoder.layers.0.mlp.fc1"]
        assert (module.rank, module.alpha, module.scale) == (4, 6.0, 1.5)
        assert module.norm == pytest.approx(float(weights.delta().norm()), rel=1e-9)
    assert inspection.part_norm("unet") == pytest.approx(float(modules[TO_K].delta().norm()))


def test_the_hash_shown_is_the_one_that_the_file_states(tmp_path: Path) -> None:
    write_uniform(tmp_path / "a.safetensors")
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert inspection.metadata["sshs_model_hash"].startswith(inspection.hashes.autov3)


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (192, "unknown")])
def test_the_family_is_told_by_the_width_of_cross_attention(tmp_path: Path, width: int, family: str) -> None:
    write_uniform(tmp_path / "a.safetensors", inner=width)
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert inspection.family == family and str(width) in inspection.family_reason


def resave(path: Path, change: dict[str, torch.Tensor | None], metadata: dict[str, str] | None = None) -> Inspection:
    """The uniform file with tensors replaced, added, or (None) taken away."""
    write_uniform(path)
    tensors = load_file(path) | {key: value for key, value in change.items() if value is not None}
    kept = {key: value for key, value in tensors.items() if change.get(key, value) is not None}
    save_file(kept, path, metadata)
    return inspect_file(path)


def test_a_family_that_the_metadata_contradict_is_a_warning(tmp_path: Path) -> None:
    write_uniform(tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    assert "says sdxl_base_v1-0, the tensors are those of sd1" in said(inspect_file(tmp_path / "a.safetensors"), "warning")


def test_a_nan_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    inspection = resave(tmp_path / "a.safetensors", {f"{KEY}.lora_up.weight": torch.full((32, 4), float("nan"))})
    assert f"Module {KEY}: 128 of 128 numbers" in said(inspection, "error")
    assert len([module for module in inspection.modules if module.norm is not None]) == 1


def test_a_missing_factor_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    inspection = resave(tmp_path / "a.safetensors", {f"{KEY}.lora_up.weight": None})
    assert f"Module {KEY} has no up factor" in said(inspection, "error")


def test_swapped_factors_are_an_error(tmp_path: Path) -> None:
    swapped: dict[str, torch.Tensor | None] = {
        f"{KEY}.lora_up.weight": torch.ones(4, 768),
        f"{KEY}.lora_down.weight": torch.ones(32, 4),
    }
    assert "do not fit each other" in said(resave(tmp_path / "a.safetensors", swapped), "error")


def test_a_part_that_changes_nothing_is_a_warning(tmp_path: Path) -> None:
    inspection = resave(tmp_path / "a.safetensors", {f"{KEY}.lora_up.weight": torch.zeros(32, 4)})
    assert inspection.zero_modules == (KEY,)
    assert "All 1 modules of the unet change nothing" in said(inspection, "warning")


def test_a_missing_alpha_is_noted_and_shown_as_not_said(tmp_path: Path) -> None:
    inspection = resave(tmp_path / "a.safetensors", {f"{KEY}.alpha": None})
    assert "store no alpha" in said(inspection, "note")
    assert "not said" in describe(inspection)


def test_text_names_without_text_model_are_a_warning(tmp_path: Path) -> None:
    names = {f"lora_te_encoder_layers_0_mlp_fc1.lora_{side}.weight": torch.ones(3, 3) for side in ("up", "down")}
    save_file(names, tmp_path / "a.safetensors")
    assert "lack text_model" in said(inspect_file(tmp_path / "a.safetensors"), "warning")


def test_numbered_text_names_in_a_file_with_one_encoder_are_a_warning(tmp_path: Path) -> None:
    names = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{side}.weight": torch.ones(3, 3) for side in ("up", "down")}
    save_file(names, tmp_path / "a.safetensors")
    assert "begin with lora_te1_" in said(inspect_file(tmp_path / "a.safetensors"), "warning")


def test_the_peft_form_is_a_warning_and_its_alpha_comes_from_the_configuration(tmp_path: Path) -> None:
    tensors = {f"{TO_K}.lora_A.weight": torch.ones(4, 768), f"{TO_K}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 2}'})
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert inspection.schemes == ("peft",) and inspection.modules[0].scale == 0.5
    assert "A1111, Forge and kohya's scripts load nothing" in said(inspection, "warning")


def test_several_alphas_in_one_part_are_a_warning(tmp_path: Path) -> None:
    other = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 5),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(5, 2),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    assert "has 2 alphas" in said(resave(tmp_path / "a.safetensors", dict(other)), "warning")


def test_a_kind_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    save_file({f"{KEY}.oft_blocks": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert inspection.kinds == ("oft",)
    assert "of kind oft, which cannot be loaded here" in said(inspection, "warning")


def test_a_convolution_larger_than_1x1_is_a_locon(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(), {})
    assert inspect_file(tmp_path / "a.safetensors").kinds == ("locon", "lora")


def test_a_hash_that_is_not_that_of_the_tensors_is_a_warning(tmp_path: Path) -> None:
    inspection = resave(tmp_path / "a.safetensors", {}, {"sshs_model_hash": "0" * 64})
    assert "sshs_model_hash is 000000000" in said(inspection, "warning")


def test_hostile_metadata_are_stripped_and_cut(tmp_path: Path) -> None:
    hostile = {"ss_output_name": "\x1b[31mred\u202e" + "x" * 100_000, "thumb\x07": "[bold]<script>\n\nalert(1)"}
    write_uniform(tmp_path / "a.safetensors", hostile)
    text = describe(inspect_file(tmp_path / "a.safetensors"))
    assert not [char for char in text if ord(char) < 32 and char != "\n"] and "\u202e" not in text
    assert max(len(line) for line in text.splitlines()) < 400
    assert "[bold]<script> alert(1)" in text


def test_the_description_says_what_a_person_asks_first(tmp_path: Path) -> None:
    write_uniform(tmp_path / "a.safetensors")
    text = describe(inspect_file(tmp_path / "a.safetensors"))
    for words in ("a.safetensors", "sd1", "2: 1 unet, 1 text_encoder", "rank        4", "alpha       6", "1.5", "none found"):
        assert words in text


def test_a_file_without_any_adapter_is_refused(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="base model, not a LoRA"):
        inspect_file(tmp_path / "a.safetensors")
