"""The suffix table: which part of which kind of adapter a key names, whoever wrote it. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Scheme = Literal["kohya", "peft", "diffusers"]

# suffix -> (kind, part, scheme). An empty kind goes with any kind, an empty scheme with any scheme.
SUFFIXES: dict[str, tuple[str, str, str]] = {
    ".lora_down.weight": ("lora", "down", "kohya"),
    ".lora_up.weight": ("lora", "up", "kohya"),
    ".lora_mid.weight": ("lora", "mid", "kohya"),
    ".lora_A.weight": ("lora", "down", "peft"),
    ".lora_B.weight": ("lora", "up", "peft"),
    ".lora_A.default.weight": ("lora", "down", "peft"),
    ".lora_B.default.weight": ("lora", "up", "peft"),
    ".lora.down.weight": ("lora", "down", "diffusers"),
    ".lora.up.weight": ("lora", "up", "diffusers"),
    "_lora.down.weight": ("lora", "down", "diffusers"),
    "_lora.up.weight": ("lora", "up", "diffusers"),
    ".lora_linear_layer.down.weight": ("lora", "down", "diffusers"),
    ".lora_linear_layer.up.weight": ("lora", "up", "diffusers"),
    ".alpha": ("", "alpha", ""),
    ".scale": ("", "scale", ""),
    ".dora_scale": ("dora", "dora_scale", ""),
    ".lora_magnitude_vector": ("dora", "dora_scale", "peft"),
    ".lora_magnitude_vector.weight": ("dora", "dora_scale", "peft"),
    ".lora_magnitude_vector.default.weight": ("dora", "dora_scale", "peft"),
    **{f".hada_{part}": ("loha", part, "kohya") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": ("lokr", part, "kohya") for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{part}": ("full", part, "kohya") for part in ("diff", "diff_b", "w_norm", "b_norm")},
    ".oft_blocks": ("oft", "oft_blocks", "kohya"),
}


def suffix_of(part: str, kind: str) -> str:
    """How kohya's and LyCORIS' files end the key of a part of an adapter of `kind` (an entry of ADAPTERS)."""
    kinds = {*kind.split(" and "), "" if part == "alpha" else "lora"}
    return next(suffix for suffix, (k, p, scheme) in SUFFIXES.items() if p == part and k in kinds and scheme in ("kohya", ""))


# Beginnings of key prefixes that only one family has.
FAMILY_NAMES = {
    "lora_te2_": "sdxl",
    "text_encoder_2.": "sdxl",
    "lora_unet_input_blocks_": "sdxl",
    "lora_unet_output_blocks_": "sdxl",
    "lora_unet_double_blocks_": "flux",
    "lora_unet_single_blocks_": "flux",
    "lora_unet_joint_blocks_": "sd3",
    "lora_te3_": "sd3",
    "transformer.": "flux or sd3",
    "lora_transformer_": "flux or sd3",
}


@dataclass
class KeyGroup:
    """The keys of one module in a file: `parts` maps a part ("down", "alpha", ...) to the tensor's full name."""

    prefix: str
    parts: dict[str, str] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    schemes: set[str] = field(default_factory=set)
    twins: list[str] = field(default_factory=list)
    """Keys that give a part a second time."""

    @property
    def kind(self) -> str:
        """lora, dora, loha, lokr, full, oft; "lora and loha" for a mixture; "" when only an alpha is there."""
        # A DoRA is a LoRA with a magnitude on top.
        kinds = self.kinds - {"lora"} if "dora" in self.kinds else self.kinds
        return " and ".join(sorted(kinds))


def split_key(key: str) -> tuple[str, str, str, str] | None:
    """'lora_unet_x.lora_down.weight' -> ('lora_unet_x', 'lora', 'down', 'kohya'); None for a key of no adapter."""
    for suffix in _BY_LENGTH:
        if key.endswith(suffix) and len(key) > len(suffix):
            kind, part, scheme = SUFFIXES[suffix]
            return key[: -len(suffix)], kind, part, scheme
    return None


# The longest suffix wins: one may be another's end.
_BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)


def group_keys(keys: Iterable[str]) -> tuple[list[KeyGroup], list[str]]:
    """(one KeyGroup for each prefix in the order of the file, keys that no adapter kind knows)."""
    groups: dict[str, KeyGroup] = {}
    foreign: list[str] = []
    for key in keys:
        found = split_key(key)
        if found is None:
            foreign.append(key)
            continue
        prefix, kind, part, scheme = found
        group = groups.setdefault(prefix, KeyGroup(prefix))
        if part in group.parts:
            group.twins.append(key)
        group.parts[part] = key
        group.kinds |= {kind} - {""}
        group.schemes |= {scheme} - {""}
    return list(groups.values()), foreign


def family_by_name(prefixes: Iterable[str]) -> tuple[str, str]:
    """(family, the beginning that gave it away) of the first prefix that only one family has; ("", "") otherwise."""
    for prefix in prefixes:
        for start, family in FAMILY_NAMES.items():
            if prefix.startswith(start):
                return family, start
    return "", ""
