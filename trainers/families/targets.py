"""Which layers each group of targets names, as paths inside a part of a Stable Diffusion. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

TARGETS: dict[str, dict[str, str]] = {
    "unet": {
        "attention": r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$",
        "self_attention": r"\.attn1\.(to_q|to_k|to_v|to_out\.0)$",
        "cross_attention": r"\.attn2\.(to_q|to_k|to_v|to_out\.0)$",
        "feed_forward": r"\.ff\.net\.(0\.proj|2)$",
        "projections": r"\.attentions\.\d+\.proj_(in|out)$",
        "convolutions": r"(\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|samplers\.0\.conv)$",
    },
    "text_encoder": {
        "attention": r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$",
        "mlp": r"\.mlp\.(fc1|fc2)$",
    },
}


def match_targets(part: str, targets: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Those of `paths` that the groups `targets` name, in their order. Raises KeyError for an unknown part or group."""
    pattern = re.compile("|".join(TARGETS[part][target] for target in targets))
    return [path for path in paths if pattern.search("." + path)]
