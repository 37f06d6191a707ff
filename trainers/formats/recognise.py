"""Which family an adapter file was made for, told by its names and by the widths of its layers. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trainers.container import Entry, open_file, read_header
from trainers.errors import AdapterFileError
from trainers.families import FAMILIES
from trainers.formats.keys import KeyGroup, family_by_name, group_keys
from trainers.formats.kohya import read_kohya_prefix
from trainers.formats.peft import PARTS

# Width of what cross-attention reads -> family; other programs tell families apart by the same numbers.
TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_CROSS_ATTENTION = re.compile(r"attn2[._](processor\.)?to_[kv](_lora)?$")
_TEXT_ATTENTION = re.compile(r"self_attn[._](q_proj|k_proj|v_proj|to_q_lora|to_k_lora|to_v_lora)$")
# SD1 and SD2 have a single transformer block wherever they have any.
_SECOND_BLOCK = re.compile(r"^(lora_unet_|unet\.)?(down_blocks|up_blocks|mid_block)[._].*transformer_blocks[._][1-9]")


def part_of(prefix: str) -> str:
    """The part that a key prefix belongs to: unet, text_encoder, text_encoder_2, or other."""
    kohya = read_kohya_prefix(prefix)
    if kohya is not None:
        return kohya[0]
    first = prefix.partition(".")[0]
    if first in PARTS:
        return first
    return "unet" if first in ("down_blocks", "mid_block", "up_blocks", "base_model") else "other"


def input_width(group: KeyGroup, entries: Mapping[str, Entry]) -> int | None:
    """The input width of a group's layer, a convolution's kernel perhaps folded in; None where its parts do not tell."""
    shapes = {part: entries[key].shape for part, key in group.parts.items()}

    def columns(*names: str) -> int | None:
        shape = next((shapes[name] for name in names if name in shapes), ())
        return shape[1] if len(shape) > 1 else None

    if "lokr" in group.kinds:
        first, second = columns("w1", "w1_b"), columns("w2", "w2_b")
        return first * second if first and second else None
    return columns("down", "w1_b", "diff")


def guess_family(groups: Sequence[KeyGroup], entries: Mapping[str, Entry]) -> tuple[str, str]:
    """(family, why): by names that only one family has, else by the width that cross-attention reads, else the text's.

    The family is "unknown" where nothing tells.
    """
    family, start = family_by_name(group.prefix for group in groups)
    if family:
        return family, f"it has modules named {start}..."
    if any(_SECOND_BLOCK.match(group.prefix) for group in groups):
        return "sdxl", "it has levels of several transformer blocks"
    sources = (("unet", _CROSS_ATTENTION, "cross-attention reads"), ("text_encoder", _TEXT_ATTENTION, "the text encoder has"))
    for part, ending, words in sources:
        fitting = (group for group in groups if part_of(group.prefix) == part and ending.search(group.prefix))
        width = next((width for group in fitting if (width := input_width(group, entries))), None)
        if width is not None:
            family = TEXT_WIDTHS.get(width, "unknown")
            return family, f"{words} width {width}" + ("" if family != "unknown" else ", as no published family does")
    return "unknown", "it adapts neither cross-attention nor a text encoder, by which families are told apart"


def title_of(family: str) -> str:
    """A family's name for people."""
    return FAMILIES[family].title if family in FAMILIES else " or ".join(word.upper() for word in family.split(" or "))


def refuse_other_family(groups: Sequence[KeyGroup], entries: Mapping[str, Entry], family: str, path: Path) -> None:
    """Raises AdapterFileError for a file that was surely made for another family than the base's.

    SDXL's first text encoder has the names and widths of SD1's: such a file would load in part.
    """
    made_for, reason = guess_family(groups, entries)
    if made_for in ("unknown", family):
        return
    if family == "sdxl" and made_for == "sd1" and _may_be_first_encoder(group.prefix for group in groups):
        return
    what = f"This LoRA was made for {title_of(made_for)} ({reason}), and the base model is {title_of(family)}"
    hint = f"Choose a base model of {title_of(made_for)}, or a LoRA made for {title_of(family)}."
    raise AdapterFileError(what, str(path), hint)


def check_family(path: Path, family: str) -> None:
    """Raises AdapterFileError for a file of another family than the base's, or a damaged one: by its header, before gigabytes
    of base are read.
    """
    with open_file(path) as handle:
        header = read_header(handle, path)
    refuse_other_family(group_keys(header.entries)[0], header.entries, family, path)


def _may_be_first_encoder(prefixes: Iterable[str]) -> bool:
    """Whether all of a file may be SDXL's first text encoder; in kohya form lora_te_ says that it is SD1's."""
    return all(part_of(prefix) in ("text_encoder", "other") and not prefix.startswith("lora_te_") for prefix in prefixes)
