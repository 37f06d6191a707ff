"""The key names of full-size models in each form, against lists written down from what other programs write."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from trainers.adapters.inject import find_layers
from trainers.families.targets import match_targets
from trainers.formats import ModuleWeights
from trainers.formats.kohya import flat_names, kohya_name, module_tensors, read_kohya_prefix
from trainers.formats.names import canonical_of, kernel_of
from trainers.formats.peft import peft_tensors, read_dotted_prefix

SIZES = (320, 640, 1280)
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (*SIZES, 1280), "cross_attention_dim": 768},
    "sd2": {"block_out_channels": (*SIZES, 1280), "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": SIZES,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# part -> (class, width, layers)
TEXT = {
    "sd1": {"text_encoder": ("CLIPTextModel", 768, 12)},
    "sd2": {"text_encoder": ("CLIPTextModel", 1024, 23)},
    "sdxl": {"text_encoder": ("CLIPTextModel", 768, 12), "text_encoder_2": ("CLIPTextModelWithProjection", 1280, 32)},
}
COUNTS = {"sd1": (192, 72), "sd2": (192, 138), "sdxl": (722, 72 + 192)}

# The layers of one transformer, of one block in it, and of one layer of a text encoder, as in kohya's own log and files.
PROJECTIONS = ("proj_in", "proj_out")
BLOCK = [f"attn{n}_to_{x}" for n in "12" for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
TEXT_LAYER = [f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
# Place of every transformer in the U-Net -> its blocks.
SD1_PLACES = {
    **{f"down_blocks_{level}_attentions_{n}": 1 for level in (0, 1, 2) for n in (0, 1)},
    "mid_block_attentions_0": 1,
    **{f"up_blocks_{level}_attentions_{n}": 1 for level in (1, 2, 3) for n in (0, 1, 2)},
}
SDXL_PLACES = {
    "input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10, "middle_block_1": 10,
    "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10,
    "output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2,
}  # fmt: skip


def expected_names(family: str) -> set[str]:
    """kohya's default set for a family."""
    names = set()
    for place, blocks in (SDXL_PLACES if family == "sdxl" else SD1_PLACES).items():
        names |= {f"lora_unet_{place}_{name}" for name in PROJECTIONS}
        names |= {f"lora_unet_{place}_transformer_blocks_{n}_{name}" for n in range(blocks) for name in BLOCK}
    starts = {"sd1": {"lora_te": 12}, "sd2": {"lora_te": 23}, "sdxl": {"lora_te1": 12, "lora_te2": 32}}[family]
    for start, layers in starts.items():
        names |= {f"{start}_text_model_encoder_layers_{n}_{name}" for n in range(layers) for name in TEXT_LAYER}
    return names


@pytest.fixture(scope="module", params=UNETS)
def layers(request: pytest.FixtureRequest) -> tuple[str, dict[str, tuple[int, ...]]]:
    """(family, canonical name -> weight shape of every Linear and Conv2d) of a full-size model without memory."""
    family, transformers = request.param, importlib.import_module("transformers")
    with torch.device("meta"):
        parts = {"unet": importlib.import_module("diffusers").UNet2DConditionModel(**UNETS[family])}
        for part, (kind, width, depth) in TEXT[family].items():
            sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
            config = transformers.CLIPTextConfig(**sizes, num_hidden_layers=depth, num_attention_heads=width // 64)
            parts[part] = getattr(transformers, kind)(config)
    return family, {name: tuple(layer.weight.shape) for name, layer in find_layers(parts).items()}  # type: ignore[arg-type]


def default_set(names: Iterable[str]) -> list[str]:
    """What kohya trains unless told otherwise."""
    chosen = []
    for name in names:
        part = name.partition(".")[0]
        targets = ("attention", "feed_forward", "projections") if part == "unet" else ("attention", "mlp")
        chosen += match_targets("unet" if part == "unet" else "text_encoder", targets, [name])
    return chosen


def test_kohyas_names_are_the_golden_ones(layers: tuple[str, dict[str, tuple[int, ...]]]) -> None:
    family, shapes = layers
    names = [kohya_name(name, family) for name in default_set(shapes)]
    unet = sum(name.startswith("lora_unet_") for name in names)
    assert (unet, len(names) - unet) == COUNTS[family]
    assert len(set(names)) == len(names) and set(names) == expected_names(family)


def test_pefts_names_are_dotted_with_text_model_in_the_text_encoders(layers: tuple[str, dict[str, tuple[int, ...]]]) -> None:
    family, shapes = layers
    weights = ModuleWeights({"down": torch.ones(1, 1), "up": torch.ones(1, 1)}, 1.0)
    keys = {key for name in default_set(shapes) for key in peft_tensors(name, weights)}
    assert len(keys) == 2 * sum(COUNTS[family])
    block = "up_blocks.1.attentions.2.transformer_blocks.0"
    assert {f"unet.{block}.attn2.to_out.0.lora_A.weight", f"unet.{block}.ff.net.0.proj.lora_B.weight"} <= keys
    for part, (_, _, depth) in TEXT[family].items():
        assert f"{part}.text_model.encoder.layers.{depth - 1}.self_attn.out_proj.lora_B.weight" in keys


def test_every_layers_name_is_found_again_in_each_spelling(layers: tuple[str, dict[str, tuple[int, ...]]]) -> None:
    family, shapes = layers
    table = {flat: name for name in shapes for flat in flat_names(name, family)}
    assert len(table) == sum(len(flat_names(name, family)) for name in shapes)
    for name in shapes:
        part, _, path = name.partition(".")
        spellings = [kohya_name(name, family), name]
        if part == "unet":
            spellings.append("lora_unet_" + path.replace(".", "_"))
        else:
            spellings.append(f"{part}.text_model.{path}")
        for spelling in spellings:
            flat = read_kohya_prefix(spelling)
            meanings = [flat] if flat else read_dotted_prefix(spelling)
            assert [table[meaning] for meaning in meanings if meaning in table] == [name]
            assert canonical_of(spelling, family) == name


def test_the_kernel_that_a_name_tells_is_the_layers(layers: tuple[str, dict[str, tuple[int, ...]]]) -> None:
    family, shapes = layers
    assert {name: kernel_of(name, family) for name in shapes} == {name: shape[2:] for name, shape in shapes.items()}


def test_names_of_nothing_are_told_apart() -> None:
    for prefix in (
        "lora_unet_elsewhere",
        "lora_te_encoder_layers",
        "bundle_emb.x",
        "lora_unet_Down_blocks_0_attentions_0_proj_in",
    ):
        assert canonical_of(prefix, "sd1") is None
    assert canonical_of("lora_te2_text_model_encoder_layers_0_mlp_fc1", "sd1") is None


def test_each_kohya_module_has_down_up_and_alpha() -> None:
    weights = ModuleWeights({"down": torch.ones(1, 1), "up": torch.ones(1, 1)}, 1.0)
    name = "unet.mid_block.attentions.0.proj_in"
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert list(module_tensors(name, weights, "sdxl")) == [f"lora_unet_middle_block_1_proj_in.{part}" for part in parts]
