"""Which layers each group of targets names, as paths inside a part of a Stable Diffusion. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trainers.families.facts import BaseModelFacts

_TEXT = {
    "attention": r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$",
    "mlp": r"\.mlp\.(fc1|fc2)$",
}

TARGETS: dict[str, dict[str, str]] = {
    "unet": {
        "attention": r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$",
        "self_attention": r"\.attn1\.(to_q|to_k|to_v|to_out\.0)$",
        "cross_attention": r"\.attn2\.(to_q|to_k|to_v|to_out\.0)$",
        "feed_forward": r"\.ff\.net\.(0\.proj|2)$",
        "projections": r"\.attentions\.\d+\.proj_(in|out)$",
        "convolutions": r"(\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|samplers\.0\.conv)$",
    },
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
}

_PROJECTIONS = {"q": "to_q|q_proj", "k": "to_k|k_proj", "v": "to_v|v_proj", "out": r"to_out\.0|out_proj"}
"""Last parts of the paths of the attention's matrices, in a denoiser and in a text encoder."""


def without_projections(paths: Iterable[str], learning: Sequence[str]) -> list[str]:
    """`paths` without those of attention's matrices that are not among `learning` (q, k, v, out).

    A checkpoint that stores q, k and v as one matrix, as OpenCLIP's text encoders do, is read as three: see ldm.py. Of a
    folder that diffusers saved with its projections fused the three are trained that lie beside to_qkv.
    """
    still = [names for projection, names in _PROJECTIONS.items() if projection not in learning]
    pattern = re.compile(rf"\.({'|'.join(still)})$")
    return [path for path in paths if not (still and pattern.search("." + path))]


def trainable_paths(base: BaseModelFacts, part: str, targets: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Those of `paths` that `targets` name and that can learn: layers of a text encoder that nothing reads are left out."""
    found = match_targets(part, targets, paths)
    if part == "unet":
        return found
    read = base.layers_read(part)
    return [path for path in found if int(path.partition("encoder.layers.")[2].partition(".")[0]) < read]


def match_targets(part: str, targets: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Those of `paths` that the groups `targets` name, in their order. Raises KeyError for an unknown part or group."""
    pattern = re.compile("|".join(TARGETS[part][target] for target in targets))
    return [path for path in paths if pattern.search("." + path)]
