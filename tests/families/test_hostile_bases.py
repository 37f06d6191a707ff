"""Bases whose settings or headers are meant to harm, or belong to relatives of Stable Diffusion: words, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.errors import BaseModelError, SettingError
from trainers.families import BaseOptions, load_family, locate, recognise_base
from trainers.formats.base_file import write_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def single(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "one.safetensors"
    write_base(recognise_base(str(tiny_base)), path)
    return path


def carried(single: Path) -> dict[str, Any]:
    """The configurations that the file carries in its metadata."""
    with single.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    values: dict[str, Any] = json.loads(header["__metadata__"]["impasto.configuration"])
    return values


def with_settings(single: Path, target: Path, part: str, **values: Any) -> Path:
    configs = carried(single)
    configs[part] |= values
    save_file(load_file(single), target, {"impasto.configuration": json.dumps(configs)})
    return target


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("unet", {"layers_per_block": 60_000}),
        ("vae", {"layers_per_block": 60_000}),
        ("text_encoder", {"num_hidden_layers": 60_000}),
        ("text_encoder", {"max_position_embeddings": 10**12}),
        ("unet", {"transformer_layers_per_block": 10**9}),
        ("unet", {"transformer_layers_per_block": [1, [1, [10**9]]]}),
    ],
)
def test_a_few_bytes_of_settings_build_no_giant(part: str, values: dict[str, Any], single: Path, tmp_path: Path) -> None:
    (name,) = values
    with pytest.raises(BaseModelError, match=f"{name} is no size"):
        recognise_base(str(with_settings(single, tmp_path / "bomb.safetensors", part, **values)))


def test_settings_that_name_code_of_the_hub_are_not_handed_on(single: Path, tmp_path: Path) -> None:
    """transformers would fetch and run a kernel for such an attention; torch's own is taken."""
    values = {"_attn_implementation": "somebody/kernel", "attn_implementation": "somebody/kernel", "auto_map": {"x": "y"}}
    facts = recognise_base(str(with_settings(single, tmp_path / "kernel.safetensors", "text_encoder", **values)))
    encoder: Any = load_family(facts, torch.float32, CPU).parts()["text_encoder"]
    assert encoder.config._attn_implementation in ("sdpa", "eager") and not hasattr(encoder.config, "auto_map")


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("scheduler", {"beta_schedule": "none such"}, "No noise schedule can be built"),
        ("scheduler", {"beta_schedule": "linear", "beta_end": -3.0}, "does not go from 1 to 0"),
        ("scheduler", {"num_train_timesteps": 10**9}, "num_train_timesteps is no size"),
        ("unet", {"out_channels": 8}, "inpainting or other special model"),
        ("text_encoder", {"max_position_embeddings": 64}, "below the 77 tokens"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is no factor"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor is no factor"),
    ],
)
def test_settings_that_cannot_be_are_told_in_words(
    part: str, values: dict[str, Any], words: str, single: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=words):
        load_family(
            recognise_base(str(with_settings(single, tmp_path / "odd.safetensors", part, **values))), torch.float32, CPU
        )


@pytest.mark.parametrize("values", [{"hidden_act": 5}, {"hidden_act": "none such"}, {"num_attention_heads": "x"}])
def test_settings_of_the_wrong_kind_are_told_in_words(values: dict[str, Any], single: Path, tmp_path: Path) -> None:
    facts = recognise_base(str(with_settings(single, tmp_path / "odd.safetensors", "text_encoder", **values)))
    with pytest.raises(BaseModelError, match="No text_encoder can be built"):
        load_family(facts, torch.float32, CPU)


def test_a_layer_without_rows_tells_no_family(single: Path, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in load_file(single).items() if not key.endswith("attn2.to_k.weight")}
    save_file({"x.attn2.to_k.weight": torch.ones(3), **tensors}, tmp_path / "flat.safetensors")
    with pytest.raises(BaseModelError):
        load_family(recognise_base(str(tmp_path / "flat.safetensors")), torch.float32, CPU)


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_single_file_of_another_noise_schedule_is_refused(mark: str, single: Path, tmp_path: Path) -> None:
    save_file(load_file(single) | {mark: torch.ones(4)}, tmp_path / "edm.safetensors")
    with pytest.raises(BaseModelError, match="EDM"):
        recognise_base(str(tmp_path / "edm.safetensors"))


@pytest.mark.parametrize(
    ("part", "values"),
    [("vae", {"latents_mean": [0.0] * 4}), ("scheduler", {"_class_name": "EDMDPMSolverMultistepScheduler"})],
)
def test_settings_of_another_scale_are_refused(part: str, values: dict[str, Any], single: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="another way"):
        recognise_base(str(with_settings(single, tmp_path / "edm.safetensors", part, **values)))


def test_a_file_put_in_the_place_of_another_is_looked_at_anew(single: Path, tmp_path: Path) -> None:
    """The window lives for days; names and metadata belong together."""
    path = with_settings(single, tmp_path / "base.safetensors", "scheduler", prediction_type="epsilon")
    assert recognise_base(str(path)).prediction_type == "epsilon"
    with_settings(single, path, "scheduler", prediction_type="v_prediction")
    os.utime(path, ns=(1, 1))
    assert recognise_base(str(path)).prediction_type == "v_prediction"


def test_a_schedule_that_ends_in_pure_noise_is_drawn_from_there(any_size: None, tiny_sdxl_base: Path, tmp_path: Path) -> None:
    """Also where the file's own mark says so, and not the person."""
    write_base(recognise_base(str(tiny_sdxl_base)), tmp_path / "plain.safetensors")
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(tmp_path / "plain.safetensors") | marks, tmp_path / "marked.safetensors")
    scheduler = recognise_base(str(tmp_path / "marked.safetensors")).configs["scheduler"]
    assert scheduler["rescale_betas_zero_snr"] and scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_weights_in_eight_bit_floats_are_read(
    any_size: None, dtype: torch.dtype, ending: str, single: Path, tmp_path: Path
) -> None:
    tensors = {key: tensor.to(dtype) if key.startswith("model.") else tensor for key, tensor in load_file(single).items()}
    path, again = tmp_path / f"small.{ending}", tmp_path / "again.safetensors"
    if ending == "ckpt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"impasto.configuration": json.dumps(carried(single))})
        load_family(recognise_base(str(path)), torch.float32, CPU)
    write_base(recognise_base(str(path)), again)
    kept = load_file(again)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(kept[key].float(), tensors[key].float())


@pytest.mark.parametrize("name", ["models/mistyped.safetensors", "models/Mistyped.CKPT"])
def test_a_mistyped_file_is_no_question_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(model: str) -> Path:
        raise AssertionError(f"the hub was asked for {model}")

    monkeypatch.setattr(locate, "_fetch_from_hub", asked)
    with pytest.raises(BaseModelError, match="no such base model"):
        recognise_base(name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/x", "missing.safetensors"])
def test_a_vae_that_is_nowhere_is_told_in_words(name: str, tiny_base: Path) -> None:
    with pytest.raises((BaseModelError, SettingError)):
        recognise_base(str(tiny_base), BaseOptions(vae=name))
