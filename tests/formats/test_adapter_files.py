"""Writing and reading our own files: exact, deterministic, hashed, balanced, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from tests.formats.examples import SHAPES, random_lora, random_weights, split_file
from trainers.errors import AdapterFileError
from trainers.formats import ModuleWeights, read_adapter, write_adapter
from trainers.formats.hashes import file_hashes
from trainers.formats.kohya import kohya_name
from trainers.formats.writing import balance

KEYS = [
    "lora_unet_down_blocks_0_attentions_0_proj_in",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
]
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def uniform_lora() -> dict[str, ModuleWeights]:
    """Ranks differ, alpha does not: what a run of this program makes."""
    return {name: ModuleWeights(weights.factors, 3.0) for name, weights in random_lora().items()}


def test_importing_formats_and_metadata_loads_no_torch() -> None:
    program = "import sys, trainers.formats.metadata, trainers.formats.kohya; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_keys_are_the_golden_ones_with_three_tensors_each(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(), {}, "fp16")
    expected = {f"{key}.{part}" for key in KEYS for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert set(load_file(tmp_path / "a.safetensors")) == expected


def test_a_name_of_an_unknown_part_is_refused() -> None:
    with pytest.raises(AdapterFileError, match="no name in kohya form"):
        kohya_name("vae.decoder.conv_in")


def test_a_float32_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    modules = uniform_lora()
    write_adapter(tmp_path / "a.safetensors", modules, {}, "fp32")
    back = read_adapter(tmp_path / "a.safetensors", SHAPES, SHAPES)
    assert back.modules.keys() == modules.keys() and back.unmatched == ()
    for name, weights in modules.items():
        assert back.modules[name].alpha == weights.alpha
        assert all(torch.equal(back.modules[name].factors[part], weights.factors[part]) for part in ("down", "up"))


def test_several_alphas_in_a_part_become_one_with_the_same_weight_change(tmp_path: Path) -> None:
    modules = random_lora()
    write_adapter(tmp_path / "a.safetensors", modules, {}, "fp32")
    back = read_adapter(tmp_path / "a.safetensors", SHAPES)
    assert len({weights.alpha for name, weights in back.modules.items() if name.startswith("unet.")}) == 1
    for name, weights in modules.items():
        torch.testing.assert_close(back.modules[name].delta(), weights.delta(), rtol=1e-6, atol=1e-9)


def test_delta_and_its_norm_are_the_formula() -> None:
    weights = random_weights((48, 32, 3, 3), rank=4, alpha=6.0, seed=1)
    up, down = weights.factors["up"].double(), weights.factors["down"].double()
    expected = 6.0 / 4 * torch.einsum("orij,rchw->ochw", up, down)
    torch.testing.assert_close(weights.delta(), expected, rtol=1e-12, atol=1e-14)
    assert weights.delta_norm() == pytest.approx(float(expected.norm()), rel=1e-12)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    facts = {f"ss_{i}": str(i) for i in range(20)}
    write_adapter(tmp_path / "a.safetensors", random_lora(), facts, "fp16")
    # Another order of the modules is the same file.
    write_adapter(tmp_path / "b.safetensors", dict(reversed(random_lora().items())), facts, "fp16")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_header_begins_with_metadata_in_the_given_order(tmp_path: Path) -> None:
    facts = {"ss_z": "1", "ss_a": "2", "modelspec.title": 'q"\u00fc\n{'}
    complete = write_adapter(tmp_path / "a.safetensors", random_lora(), facts)
    assert (tmp_path / "a.safetensors").read_bytes()[8:10] == b'{"'
    header, _ = split_file(tmp_path / "a.safetensors")
    assert next(iter(header)) == "__metadata__"
    assert list(header["__metadata__"].items()) == list(complete.items())
    assert list(complete)[:3] == list(facts)


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", uniform_lora(), {}, "fp16")
    header, data = split_file(tmp_path / "a.safetensors")
    header.pop("__metadata__")  # Theirs come in any order.
    theirs = save(load_file(tmp_path / "a.safetensors"))
    length = int.from_bytes(theirs[:8], "little")
    assert json.loads(theirs[8 : 8 + length]) == header
    assert theirs[8 + length :] == data


def test_the_hashes_in_the_file_are_those_of_its_bytes(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(), {"ss_v2": "False"}, "bf16")
    header, data = split_file(tmp_path / "a.safetensors")
    digest = hashlib.sha256(data).hexdigest()
    assert header["__metadata__"]["sshs_model_hash"] == digest
    assert header["__metadata__"]["modelspec.hash_sha256"] == "0x" + digest
    assert header["__metadata__"]["sshs_legacy_hash"] == "e3b0c442"  # Under 1 MiB: the hash of nothing.


def test_the_legacy_hash_of_a_large_file_covers_the_bytes_behind_one_mebibyte(tmp_path: Path) -> None:
    shape = {"unet.mid_block.attentions.0.proj_in": (4096, 96)}
    modules = random_lora(shape) | {"unet.mid_block.attentions.0.proj_out": random_weights((2048, 96), 130, 1.5, seed=3)}
    facts = {"ss_v2": "False", "modelspec.title": "not part of it"}
    complete = write_adapter(tmp_path / "a.safetensors", modules, facts, "fp32")
    tensors = load_file(tmp_path / "a.safetensors")
    theirs = save(tensors, {"ss_v2": "False"})
    assert len(theirs) > 0x100000
    assert complete["sshs_legacy_hash"] == hashlib.sha256(theirs[0x100000:0x110000]).hexdigest()[:8] != "e3b0c442"


def test_file_hashes_are_taken_over_chunks_as_over_the_whole(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 5000  # 1.28 MB: more than one chunk
    (tmp_path / "x.bin").write_bytes(raw)
    hashes = file_hashes(tmp_path / "x.bin", data_start=100)
    assert hashes.whole == hashlib.sha256(raw).hexdigest() and hashes.data == hashlib.sha256(raw[100:]).hexdigest()
    assert hashes.legacy == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert (len(hashes.autov2), len(hashes.autov3)) == (10, 12)


def test_balancing_keeps_the_product_bit_for_bit() -> None:
    weights = random_weights((40, 30), rank=5, alpha=2.0, seed=3)
    up = weights.factors["up"] * torch.tensor([1e-7, 1e-3, 1.0, 1e3, 0.0])
    weights = ModuleWeights({"down": weights.factors["down"], "up": up}, 2.0)
    balanced = balance(weights)
    for rank in range(5):
        product = up[:, rank, None] * weights.factors["down"][rank]
        assert torch.equal(balanced.factors["up"][:, rank, None] * balanced.factors["down"][rank], product)
    assert torch.equal(balanced.delta(), weights.delta())


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_half_precision_keeps_factors_that_would_vanish_or_overflow(tmp_path: Path, size: float) -> None:
    weights = random_weights((40, 24), rank=4, alpha=4.0, seed=3)
    weights = ModuleWeights({"down": weights.factors["down"], "up": weights.factors["up"] * size}, 4.0)
    write_adapter(tmp_path / "a.safetensors", {LAYER: weights}, {}, "fp16")
    back = read_adapter(tmp_path / "a.safetensors", [LAYER]).modules[LAYER]
    assert float((back.delta() - weights.delta()).norm() / weights.delta().norm()) < 2e-3


def test_alpha_is_stored_in_float32_beside_half_precision_factors(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", {LAYER: random_weights((32, 24), 4, 2049.125, seed=1)}, {}, "fp16")
    tensors = load_file(tmp_path / "a.safetensors")
    alpha = next(tensor for key, tensor in tensors.items() if key.endswith(".alpha"))
    assert (alpha.dtype, alpha.shape, alpha.item()) == (torch.float32, (), 2049.125)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path: Path, value: float) -> None:
    modules = random_lora()
    modules[LAYER].factors["up"][0, 0] = value
    with pytest.raises(AdapterFileError, match=r"1 of .* NaN or infinite"):
        write_adapter(tmp_path / "a.safetensors", modules, {})
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    huge = ModuleWeights({"down": torch.full((2, 24), 1e7), "up": torch.full((32, 2), 1e7)}, 2.0)
    with pytest.raises(AdapterFileError, match="too large for the file's dtype"):
        write_adapter(tmp_path / "a.safetensors", {LAYER: huge}, {}, "fp16")


def test_no_modules_or_another_ending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no layer was adapted"):
        write_adapter(tmp_path / "a.safetensors", {}, {})
    with pytest.raises(AdapterFileError, match=r"ends in \.safetensors"):
        write_adapter(tmp_path / "a.pt", random_lora(), {})


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    seen: list[str] = []

    def no_space(handle: int) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(AdapterFileError, match="No space left"):
        write_adapter(target, random_lora(), {})
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    assert [name for name in seen if name.endswith(".safetensors")] == ["a.safetensors"]


def test_a_missing_folder_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="could not be written"):
        write_adapter(tmp_path / "none" / "a.safetensors", random_lora(), {})


def test_text_that_utf8_cannot_hold_still_makes_a_file_that_loads(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora(), {"ss_output_name": "a\udcffb"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["ss_output_name"] == "a?b"


def test_metadata_for_diffusers_own_form_are_not_written_into_a_kohya_file(tmp_path: Path) -> None:
    assert "lora_adapter_metadata" not in write_adapter(
        tmp_path / "a.safetensors", random_lora(), {"lora_adapter_metadata": "{}"}
    )


# ---- reading what others write ----


def save_keys(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def plain(prefix: str, out: int = 6, inner: int = 5, rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}.lora_down.weight": torch.randn(rank, inner, generator=generator),
        f"{prefix}.lora_up.weight": torch.randn(out, rank, generator=generator),
    }


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "lora_te1_text_model_", "lora_te_"])
def test_every_spelling_of_the_text_encoder_is_read(tmp_path: Path, prefix: str) -> None:
    path = save_keys(tmp_path / "a.safetensors", plain(f"{prefix}encoder_layers_0_mlp_fc1"))
    name = "text_encoder.encoder.layers.0.mlp.fc1"
    assert list(read_adapter(path, [name]).modules) == [name]


def test_without_alpha_the_scale_is_one(tmp_path: Path) -> None:
    path = save_keys(tmp_path / "a.safetensors", plain(kohya_name(LAYER)))
    assert read_adapter(path, [LAYER]).modules[LAYER].scale == 1.0


def test_alpha_may_be_a_whole_number_of_any_shape_with_one_element(tmp_path: Path) -> None:
    tensors = plain(kohya_name(LAYER)) | {f"{kohya_name(LAYER)}.alpha": torch.tensor([8])}
    assert read_adapter(save_keys(tmp_path / "a.safetensors", tensors), [LAYER]).modules[LAYER].alpha == 8.0


def test_a_stored_scale_goes_before_alpha(tmp_path: Path) -> None:
    key = kohya_name(LAYER)
    tensors = plain(key) | {f"{key}.alpha": torch.tensor(8.0), f"{key}.scale": torch.tensor(0.25)}
    assert read_adapter(save_keys(tmp_path / "a.safetensors", tensors), [LAYER]).modules[LAYER].scale == 0.25


def test_two_dimensional_factors_of_a_1x1_convolution_take_the_layers_form(tmp_path: Path) -> None:
    path = save_keys(tmp_path / "a.safetensors", plain(kohya_name(LAYER)))
    weights = read_adapter(path, [LAYER], {LAYER: (6, 5, 1, 1)}).modules[LAYER]
    assert weights.factors["down"].shape == (2, 5, 1, 1) and weights.factors["up"].shape == (6, 2, 1, 1)
    assert weights.delta().shape == (6, 5, 1, 1)


def test_four_dimensional_factors_of_a_linear_layer_take_the_layers_form(tmp_path: Path) -> None:
    tensors = {name: tensor[:, :, None, None] for name, tensor in plain(kohya_name(LAYER)).items()}
    path = save_keys(tmp_path / "a.safetensors", tensors)
    assert read_adapter(path, [LAYER], {LAYER: (6, 5)}).modules[LAYER].delta().shape == (6, 5)


def test_a_tucker_core_is_multiplied_in(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {"down": (3, 5, 1, 1), "mid": (3, 3, 3, 3), "up": (6, 3, 1, 1)}
    made = {part: torch.randn(shape, generator=generator) for part, shape in parts.items()}
    tensors = {f"{kohya_name(LAYER)}.lora_{part}.weight": tensor for part, tensor in made.items()}
    weights = read_adapter(save_keys(tmp_path / "a.safetensors", tensors), [LAYER], {LAYER: (6, 5, 3, 3)}).modules[LAYER]
    up, mid, down = (made[part].double() for part in ("up", "mid", "down"))
    expected = torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))
    torch.testing.assert_close(weights.delta(), expected, rtol=1e-5, atol=1e-6)


def test_prefixes_that_match_nothing_are_listed(tmp_path: Path) -> None:
    tensors: dict[str, Any] = plain(kohya_name(LAYER)) | plain("lora_unet_elsewhere") | {"emb": torch.ones(1)}
    adapter = read_adapter(save_keys(tmp_path / "a.safetensors", tensors), [LAYER])
    assert adapter.unmatched == ("lora_unet_elsewhere", "emb")
