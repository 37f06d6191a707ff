"""Canonical names out of a file's own key prefixes, where no base is at hand to compare with. No torch.

kohya's form has _ for every dot, so down_blocks_0_attentions_1 must be told from down_blocks.0.attentions.1 by knowing
the words that have an underscore of their own. They are few, and each stands for itself wherever it occurs.
"""

from __future__ import annotations

import re

from trainers.formats.kohya import from_ldm, read_kohya_prefix
from trainers.formats.peft import PROJECTION, read_dotted_prefix

# Longer ones first where one begins another.
_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out",
    "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2",
    "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection", "time_embed",
    "label_emb", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", PROJECTION,
)  # fmt: skip
_PIECE = re.compile(rf"(?:{'|'.join(_WORDS)}|[a-z0-9]+)(?=_|$)")
_PLACES = {
    "unet": re.compile(r"(down_blocks|up_blocks)\.\d+\.\w+\.\d+\.|mid_block\.\w+\.\d+\.|(time|add)_embedding\.|conv_(in|out)$"),
    "text_encoder": re.compile(r"encoder\.layers\.\d+\."),
    "text_encoder_2": re.compile(rf"encoder\.layers\.\d+\.|{PROJECTION}$"),
}
_KERNEL_3 = re.compile(r"(^|\.)(conv1|conv2|conv_in|conv_out|conv)$")
_KERNEL_1 = re.compile(r"\.conv_shortcut$")
_PROJECTION_1 = re.compile(r"\.proj_(in|out)$")


def dotted(flat: str) -> str:
    """'down_blocks_0_resnets_1_conv1' -> 'down_blocks.0.resnets.1.conv1', by diffusers' or LDM's words."""
    return ".".join(_PIECE.findall(flat))


def canonical_of(prefix: str, family: str) -> str | None:
    """A key prefix of any scheme -> the canonical name of its module in a model of the family; None where it is none."""
    flat = read_kohya_prefix(prefix)
    part, name = flat if flat is not None else read_dotted_prefix(prefix)[-1]
    path = dotted(name)
    if path.replace(".", "_") != name or part not in _PLACES or (part == "text_encoder_2" and family != "sdxl"):
        return None
    if part == "unet" and family == "sdxl":
        path = from_ldm(path) or path
    return f"{part}.{path}" if _PLACES[part].match(path) else None


def kernel_of(canonical: str, family: str) -> tuple[int, ...]:
    """Kernel of a module's weight, told by its name: (3, 3), (1, 1), or () of a Linear. SD1 projects by convolutions."""
    part, _, path = canonical.partition(".")
    if part != "unet":
        return ()
    if _KERNEL_3.search(path):
        return (3, 3)
    return (1, 1) if _KERNEL_1.search(path) or (family == "sd1" and _PROJECTION_1.search(path)) else ()
