"""The names of a single-file checkpoint (LDM layout) and those of diffusers: one table for both ways. Imports no torch.

A table maps dotted beginnings, diffusers' -> LDM's. It follows from how the two lay out a U-Net: LDM counts
`input_blocks` through all levels, with a level's downsampler as the last one, where diffusers counts within each level.
Checked against diffusers' own conversion (loaders/single_file_utils.py) in tests, name by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Table = Mapping[str, str]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_THIRDS = ("q_proj", "k_proj", "v_proj")


def translate(name: str, table: Table) -> str | None:
    """`name` with its longest beginning that the table knows replaced; None when it knows none."""
    pieces = name.split(".")
    for length in range(len(pieces), 0, -1):
        start = table.get(".".join(pieces[:length]))
        if start is not None:
            return ".".join([start, *pieces[length:]])
    return None


def inverse(table: Table) -> dict[str, str]:
    """The table the other way round; no two entries share a value."""
    return {ldm: diffusers for diffusers, ldm in table.items()}


def unet_table(up_attention: Sequence[bool], layers: int) -> dict[str, str]:
    """Of a UNet2DConditionModel with `layers` resnets a level; `up_attention` says for each up block whether it attends."""
    levels = len(up_attention)
    table = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
    }  # fmt: skip
    blocks = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        for layer in range(layers):
            number = 1 + level * (layers + 1) + layer
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        for layer in range(layers + 1):
            number = level * (layers + 1) + layer
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        last, place = level * (layers + 1) + layers, 2 if up_attention[level] else 1
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{last}.{place}.conv"
    return table | _with_leaves(blocks, _RESNET)


def vae_table(levels: int, layers: int) -> dict[str, str]:
    """Of an AutoencoderKL with `layers` resnets a level in the encoder and one more in the decoder."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    blocks: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table |= _with_leaves({f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}, _VAE_ATTENTION)
        blocks |= {f"{half}.mid_block.resnets.{n}": f"{half}.mid.block_{n + 1}" for n in (0, 1)}
    for level in range(levels):
        up = levels - 1 - level
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
        blocks |= {f"encoder.down_blocks.{level}.resnets.{n}": f"encoder.down.{level}.block.{n}" for n in range(layers)}
        blocks |= {f"decoder.up_blocks.{level}.resnets.{n}": f"decoder.up.{up}.block.{n}" for n in range(layers + 1)}
    return table | _with_leaves(blocks, _VAE_RESNET)


def open_clip_table(layers: int) -> dict[str, str]:
    """Of a CLIP text encoder in OpenCLIP's layout but for q, k and v, which lie there in one tensor (see `Place`)."""
    table = {
        "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final", "text_projection.weight": "text_projection",
    }  # fmt: skip
    return table | _with_leaves({f"encoder.layers.{n}": f"transformer.resblocks.{n}" for n in range(layers)}, _TEXT_LAYER)


def clip_table(layers: int) -> dict[str, str]:
    """Of a CLIP text encoder in transformers' layout."""
    names = ("embeddings", "final_layer_norm", *(f"encoder.layers.{n}" for n in range(layers)))
    return {name: name for name in names}


def _with_leaves(blocks: Table, leaves: Table) -> dict[str, str]:
    return {f"{block}.{leaf}": f"{blocks[block]}.{leaves[leaf]}" for block in blocks for leaf in leaves}


@dataclass(frozen=True)
class Place:
    """Where a tensor of diffusers' layout stands in a single file: a key, and which third of its rows; -1 for all.

    `transposed`: OpenCLIP multiplies its projection from the other side.
    """

    key: str
    third: int = -1
    transposed: bool = False


@dataclass(frozen=True)
class PartLayout:
    """One part of a base in a single file: its keys' beginnings (written: the first; read: any), and its table."""

    starts: tuple[str, ...]
    table: Table
    fused: bool = False
    """q, k and v lie in one tensor, as in OpenCLIP."""

    def place(self, name: str) -> Place | None:
        """Where the tensor `name` (diffusers' name, without text_model) is written; None for one that has no place."""
        path, _, leaf = name.rpartition(".")
        layer, _, last = path.rpartition(".")
        if self.fused and last in _THIRDS and layer.endswith(".self_attn"):
            block = translate(layer.removesuffix(".self_attn") + ".layer_norm1", self.table)
            if block is None:
                return None
            return Place(f"{self.starts[0]}{block.removesuffix('.ln_1')}.attn.in_proj_{leaf}", _THIRDS.index(last))
        ldm = translate(name, self.table)
        return None if ldm is None else Place(self.starts[0] + ldm, transposed=self.fused and ldm == "text_projection")

    def names(self, key: str) -> list[tuple[str, Place]]:
        """What a key of a single file holds: (diffusers' name, place), three for fused ones, none for a foreign key."""
        start = next((start for start in self.starts if key.startswith(start)), None)
        if start is None:
            return []
        rest = key.removeprefix(start)
        block, found, leaf = rest.rpartition(".attn.in_proj_")
        if self.fused and found:
            layer = translate(block + ".ln_1", self._back)
            if layer is None:
                return []
            path = layer.removesuffix(".layer_norm1")
            return [(f"{path}.self_attn.{third}.{leaf}", Place(key, n)) for n, third in enumerate(_THIRDS)]
        name = translate(rest, self._back)
        return [] if name is None else [(name, Place(key, transposed=self.fused and rest == "text_projection"))]

    @functools.cached_property
    def _back(self) -> Table:
        return inverse(self.table)


def part_layouts(family: str, configs: Mapping[str, dict[str, Any]]) -> dict[str, PartLayout]:
    """Part -> its layout in a single file, for a base of `family` whose parts have these configurations."""
    unet, vae = configs["unet"], configs["vae"]
    attention = [kind.startswith("CrossAttn") for kind in unet["up_block_types"]]
    first = configs["text_encoder"]["num_hidden_layers"]
    text = {
        "sd1": lambda: {"text_encoder": PartLayout(_under("cond_stage_model.transformer."), clip_table(first))},
        "sd2": lambda: {"text_encoder": PartLayout(("cond_stage_model.model.",), open_clip_table(first), fused=True)},
        "sdxl": lambda: {
            "text_encoder": PartLayout(_under("conditioner.embedders.0.transformer."), clip_table(first)),
            "text_encoder_2": PartLayout(
                ("conditioner.embedders.1.model.",),
                open_clip_table(configs["text_encoder_2"]["num_hidden_layers"]),
                fused=True,
            ),
        },
    }[family]()
    return {
        "unet": PartLayout(("model.diffusion_model.",), unet_table(attention, unet["layers_per_block"])),
        "vae": PartLayout(("first_stage_model.",), vae_table(len(vae["block_out_channels"]), vae["layers_per_block"])),
        **text,
    }


def _under(start: str) -> tuple[str, str]:
    """Newer programs leave out `text_model.`; all readers want it, so it is written."""
    return start + "text_model.", start


SDXL_UNET = unet_table((True, True, False), layers=2)
"""The one U-Net whose LDM names a LoRA file in kohya form has too."""
