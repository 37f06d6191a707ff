"""A file of one family on a base of another: refused in words that name both, before anything is loaded in part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.command_line import impasto
from tests.formats.examples import random_lora
from trainers.errors import AdapterFileError
from trainers.formats import read_adapter, write_adapter

BLOCK = "transformer_blocks.0.attn2.to_k"
# Layers that the families share in name, with the width that each reads.
CROSS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


def layers_of(family: str) -> dict[str, tuple[int, ...]]:
    width = CROSS[family]
    layers: dict[str, tuple[int, ...]] = {
        f"unet.down_blocks.1.attentions.0.{BLOCK}": (64, width),
        TEXT: (1024, 1024) if family == "sd2" else (768, 768),
    }
    if family == "sdxl":
        layers["text_encoder_2.encoder.layers.0.self_attn.q_proj"] = (64, 64)
    return layers


def save_plain(path: Path, prefix: str, out: int, width: int) -> Path:
    save_file({f"{prefix}.lora_down.weight": torch.ones(2, width), f"{prefix}.lora_up.weight": torch.ones(out, 2)}, path)
    return path


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize("base", CROSS)
@pytest.mark.parametrize("made_for", CROSS)
def test_only_a_file_of_the_bases_family_is_read(tmp_path: Path, made_for: str, base: str, form: str) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(layers_of(made_for)), {}, "fp32", form, made_for)  # type: ignore[arg-type]
    known = layers_of(base)
    if made_for == base:
        assert read_adapter(tmp_path / "a.safetensors", known, known, base).modules.keys() == known.keys()
        return
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(tmp_path / "a.safetensors", known, known, base)
    assert f"made for {TITLES[made_for]}" in caught.value.what and f"the base model is {TITLES[base]}" in caught.value.what
    assert caught.value.hint == f"Choose a base model of {TITLES[made_for]}, or a LoRA made for {TITLES[base]}."


def test_an_sdxl_file_with_diffusers_names_and_the_unet_alone_is_told_by_its_second_block(tmp_path: Path) -> None:
    name = "down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"
    path = save_plain(tmp_path / "a.safetensors", f"lora_unet_{name}", 64, 64)
    with pytest.raises(AdapterFileError, match="made for Stable Diffusion XL"):
        read_adapter(path, layers_of("sd1"), None, "sd1")
    known = ["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"]
    assert list(read_adapter(path, known, None, "sdxl").modules) == known


@pytest.mark.parametrize(
    ("prefix", "fits"), [("lora_te1_text_model_", True), ("text_encoder.text_model.", True), ("lora_te_text_model_", False)]
)
def test_sdxls_first_text_encoder_alone_is_told_from_sd1s_by_its_prefix(tmp_path: Path, prefix: str, fits: bool) -> None:
    separator = "." if "." in prefix else "_"
    path = save_plain(
        tmp_path / "a.safetensors", prefix + separator.join(("encoder", "layers", "0", "self_attn", "q_proj")), 768, 768
    )
    if fits:
        assert list(read_adapter(path, layers_of("sdxl"), None, "sdxl").modules) == [TEXT]
    else:
        with pytest.raises(AdapterFileError, match=r"made for Stable Diffusion 1\.x"):
            read_adapter(path, layers_of("sdxl"), None, "sdxl")
    assert list(read_adapter(path, layers_of("sd1"), None, "sd1").modules) == [TEXT]


def test_a_flux_file_is_refused_by_name(tmp_path: Path) -> None:
    path = save_plain(tmp_path / "a.safetensors", "lora_unet_double_blocks_0_img_attn_proj", 64, 64)
    with pytest.raises(AdapterFileError, match=r"made for FLUX .*double_blocks"):
        read_adapter(path, layers_of("sdxl"), None, "sdxl")


def test_kohyas_and_diffusers_names_for_sdxl_are_the_same_modules_and_both_at_once_are_refused(tmp_path: Path) -> None:
    known = [f"unet.down_blocks.1.attentions.0.{BLOCK}"]
    ldm, diffusers = (
        f"lora_unet_{place}_transformer_blocks_0_attn2_to_k" for place in ("input_blocks_4_1", "down_blocks_1_attentions_0")
    )
    for name in (ldm, diffusers):
        assert list(read_adapter(save_plain(tmp_path / "a.safetensors", name, 64, 2048), known, None, "sdxl").modules) == known
    made = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for name in (ldm, diffusers) for side in ("down", "up")}
    save_file(made, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="twice"):
        read_adapter(tmp_path / "a.safetensors", known, None, "sdxl")


def test_onetrainers_mixture_is_read(tmp_path: Path) -> None:
    """diffusers' names in kohya's form for SDXL, lora_te1_ and lora_te2_, more layers than kohya's, DoRA magnitudes."""
    layers = {
        "lora_unet_conv_in": ("unet.conv_in", (8, 4, 3, 3)),
        "lora_unet_time_embedding_linear_1": ("unet.time_embedding.linear_1", (8, 4)),
        "lora_unet_down_blocks_1_attentions_0_proj_in": ("unet.down_blocks.1.attentions.0.proj_in", (8, 4)),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder.encoder.layers.0.mlp.fc1", (8, 4)),
        "lora_te2_text_projection": ("text_encoder_2.text_projection", (8, 4)),
    }
    tensors = {}
    for prefix, (_, shape) in layers.items():
        tensors[f"{prefix}.lora_down.weight"] = torch.ones(2, *shape[1:])
        tensors[f"{prefix}.lora_up.weight"] = torch.ones(8, 2, *(1 for _ in shape[2:]))
        tensors[f"{prefix}.alpha"] = torch.tensor(1.0)
        tensors[f"{prefix}.dora_scale"] = torch.ones(8, *(1 for _ in shape[1:]))
    save_file(tensors | {"bundle_emb.mine.clip_l": torch.ones(1)}, tmp_path / "a.safetensors")
    shapes = dict(layers.values())
    file = read_adapter(tmp_path / "a.safetensors", shapes, shapes, "sdxl")
    assert file.modules.keys() == shapes.keys() and {module.kind for module in file.modules.values()} == {"dora"}
    assert file.unmatched == ("bundle_emb.mine.clip_l",)


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_file_of_another_family_is_refused_before_the_base_is_read(
    command: str, tiny_sdxl_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base of real size takes from seconds to minutes to read."""
    path = tmp_path / "a.safetensors"
    write_adapter(path, random_lora(layers_of("sd1")), {}, "fp32", "kohya", "sd1")

    def load(*_: object) -> None:
        raise AssertionError("the base was read")

    monkeypatch.setattr("trainers.families.load_family", load)
    monkeypatch.setattr("trainers.tools.verify_file.load_family", load)
    words = {"generate": ("--lora", path, "-p", "x", "-o", tmp_path / "x.png"), "inspect": (path, "--verify")}[command]
    assert impasto(command, *words, "--base", tiny_sdxl_base) != 0
    said = capsys.readouterr().err
    assert f"made for {TITLES['sd1']}" in said and f"the base model is {TITLES['sdxl']}" in said
