"""`impasto convert`: the same weight changes in another file, told in one line; the input stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.adapters.kinds import EXAMPLES
from tests.formats.examples import random_lora
from trainers.cli import cli, run_cli
from trainers.errors import AdapterFileError
from trainers.formats import ModuleWeights, read_without_base, write_adapter
from trainers.formats.hashes import file_hashes
from trainers.tools.convert import convert

# Real widths where families are told apart, as no base is at hand.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "sd1": {
        "unet.down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 768),
        "unet.mid_block.resnets.0.conv1": (16, 16, 3, 3),
        "text_encoder.encoder.layers.0.mlp.fc1": (48, 24),
    },
    "sd2": {
        "unet.down_blocks.0.attentions.0.proj_in": (32, 32),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 1024),
        "text_encoder.encoder.layers.22.mlp.fc1": (48, 24),
    },
    "sdxl": {
        "unet.down_blocks.1.attentions.0.proj_in": (32, 32),
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": (32, 2048),
        "unet.up_blocks.0.upsamplers.0.conv": (16, 16, 3, 3),
        "text_encoder.encoder.layers.0.mlp.fc1": (48, 24),
        "text_encoder_2.encoder.layers.31.self_attn.out_proj": (24, 24),
    },
}
FACTS = {"ss_v2": "False", "ss_output_name": "mine", "modelspec.title": "Mine"}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def worst(found: dict[str, ModuleWeights], expected: dict[str, ModuleWeights]) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[name].delta(), weights.delta()) for name, weights in expected.items())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("family", SHAPES)
def test_there_and_back_the_weight_changes_are_the_same(tmp_path: Path, family: str) -> None:
    modules = random_lora(SHAPES[family])
    write_adapter(tmp_path / "a.safetensors", modules, FACTS, "fp32", "kohya", family)
    before = (tmp_path / "a.safetensors").read_bytes()
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft")
    back = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    assert done.family == back.family == family and done.dtype == "fp32"
    assert sum(done.parts.values()) == len(modules) and done.unmatched == ()
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in load_file(tmp_path / "b.safetensors"))
    assert load_file(tmp_path / "c.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
    for name in "bc":
        assert worst(read_without_base(tmp_path / f"{name}.safetensors").modules, modules) < 1e-6
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_metadata_are_kept_and_the_hashes_are_those_of_the_new_file(tmp_path: Path, form: Any) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(SHAPES["sd1"]), FACTS, "fp32")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", form, "bf16")
    facts = metadata_of(tmp_path / "b.safetensors")
    assert FACTS.items() <= facts.items()
    raw = (tmp_path / "b.safetensors").read_bytes()
    hashes = file_hashes(tmp_path / "b.safetensors", 8 + int.from_bytes(raw[:8], "little"))
    assert facts["sshs_model_hash"] == hashes.data != metadata_of(tmp_path / "a.safetensors")["sshs_model_hash"]
    assert ("lora_adapter_metadata" in facts) == (form == "peft")


def test_the_number_format_stays_unless_another_is_asked_for(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(SHAPES["sd1"]), {}, "bf16")
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft").dtype == "bf16"
    assert convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "peft", "fp32").dtype == "fp32"
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(tmp_path / "c.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["loha", "loha convolution", "lokr factored", "lokr convolution", "lokr tucker", "full"])
def test_another_kind_becomes_a_plain_lora_with_its_error_told(tmp_path: Path, name: str) -> None:
    example = EXAMPLES[name]
    place = "resnets_0_conv1" if len(example.shape) == 4 else "attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"lora_unet_mid_block_{place}.{part}": tensor.float() for part, tensor in example.tensors().items()}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_module": "lycoris.kohya"})
    with pytest.raises(AdapterFileError, match="--plain-lora"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft", family="sd1")
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft", plain_rank=12, family="sd1")
    assert done.converted == 1 and done.worst_error < 1e-6
    (weights,) = read_without_base(tmp_path / "b.safetensors", "sd1").modules.values()
    assert weights.kind == "lora" and weights.shape == example.shape
    assert float(weights.delta().norm()) == pytest.approx(example.golden[0], rel=1e-5)
    assert metadata_of(tmp_path / "b.safetensors")["ss_network_module"] == "networks.lora"
    less = convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohya", plain_rank=1, family="sd1")
    assert f"error of at most {less.worst_error:.2g}" in str(less)


def test_what_is_not_understood_is_named_and_left_out(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(SHAPES["sd1"]), {}, "fp32")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors |= {
        "lora_unet_elsewhere.lora_down.weight": torch.ones(2, 3),
        "lora_unet_elsewhere.lora_up.weight": torch.ones(3, 2),
    }
    save_file(tensors, tmp_path / "b.safetensors")
    said: list[Any] = []
    done = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "peft", tell=said.append)
    assert done.unmatched == ("lora_unet_elsewhere",)
    assert said == ["1 of 5 names in b.safetensors are not understood and left out: lora_unet_elsewhere."]


def test_an_output_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(SHAPES["sd1"]), {}, "fp32")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(AdapterFileError, match="such a file already"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.safetensors", "peft")
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_a_file_that_does_not_tell_its_family_asks_for_it(tmp_path: Path) -> None:
    only = {"unet.mid_block.attentions.0.proj_in": (8, 8)}
    write_adapter(tmp_path / "a.safetensors", random_lora(only), {}, "fp32")
    with pytest.raises(AdapterFileError, match="--family: sd1, sd2, sdxl"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", family="sdxl")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "b.safetensors")} == {"lora_unet_middle_block_1_proj_in"}


def test_a_dora_stays_one_or_asks_for_the_base(tmp_path: Path) -> None:
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{place}.{part}": tensor.float() for part, tensor in EXAMPLES["dora"].tensors().items()}, tmp_path / "a.safetensors"
    )
    said: list[Any] = []
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", family="sd1", tell=said.append)
    assert (
        done.converted == 0 and "1 modules are of kind dora: diffusers and kohya's scripts leave the magnitudes out" in said[0]
    )
    with pytest.raises(AdapterFileError, match="depends on the base model's weight"):
        convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohya", plain_rank=4, family="sd1")
    assert not (tmp_path / "c.safetensors").exists()


def test_the_command_says_in_one_line_what_it_did(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(SHAPES["sdxl"]), {}, "fp32", "kohya", "sdxl")
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    arguments = ["convert", paths[0], "--to", "peft", "--dtype", "fp16", "-o", paths[1]]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    expected = "5 modules (3 unet, 1 text_encoder, 1 text_encoder_2) of sdxl in peft form, fp16"
    assert result.stdout == f"{expected}: {tmp_path / 'b.safetensors'}\n"
    assert run_cli(cli, arguments) == 2  # it is there now
