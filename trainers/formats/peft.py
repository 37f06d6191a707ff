"""Files with dotted names: what diffusers writes today (peft form) and what it wrote before. Torch-free at import."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainers.adapters.dora import MAGNITUDE
from trainers.errors import AdapterFileError
from trainers.formats.weights import ModuleWeights
from trainers.text import printable

if TYPE_CHECKING:
    import torch

PROJECTION = "text_projection"
"""The one layer of a text encoder that does not lie under text_model."""
METADATA_KEY = "lora_adapter_metadata"
PARTS = ("unet", "text_encoder", "text_encoder_2")
# The old form names a text encoder's projections as the UNet's, and the UNet's to_out without its index.
_OLD_NAMES = {"_to_q": "_q_proj", "_to_k": "_k_proj", "_to_v": "_v_proj", "_to_out": "_out_proj"}


@dataclass(frozen=True)
class PeftScaling:
    """How one part of a peft-form file is scaled: alpha / r, with exceptions by module path."""

    alpha: float | None = None
    exceptions: Mapping[str, float] = field(default_factory=dict)
    root: bool = False
    """rsLoRA: alpha / sqrt(r)."""

    def alpha_of(self, path: str, rank: int) -> float | None:
        """Alpha for `path` (dotted, without part and text_model) so that the scale is alpha / rank; None if unsaid."""
        fits = (value for name, value in self.exceptions.items() if path == name or path.endswith("." + name))
        alpha = next(fits, self.alpha)
        return alpha if alpha is None or not self.root else alpha * math.sqrt(rank)


def read_dotted_prefix(prefix: str) -> list[tuple[str, str]]:
    """A dotted key prefix -> the flat names that it may mean, likeliest first. A file without parts is a UNet's."""
    part, path = split_part(prefix)
    flat = path.replace(".processor.", ".").replace(".", "_")
    names = [flat]
    if part == "unet" and flat.endswith("_to_out"):
        names.append(flat + "_0")
    elif part != "unet":
        names += [flat.removesuffix(old) + new for old, new in _OLD_NAMES.items() if flat.endswith(old)]
    return [(part, name) for name in names]


def split_part(prefix: str) -> tuple[str, str]:
    """'text_encoder.text_model.encoder.x' -> ('text_encoder', 'encoder.x'): part and path without text_model."""
    part, _, path = prefix.removeprefix("base_model.model.").partition(".")
    if part not in PARTS:
        part, path = "unet", prefix
    return part, path.removeprefix("base_model.model.").removeprefix("text_model.")


def read_scaling(metadata: Mapping[str, str], where: str = "") -> dict[str, PeftScaling]:
    """The scaling of each part from the file's own configuration; {} when there is none (then alpha = rank).

    Raises AdapterFileError where it is there and cannot be followed: a wrong scale would go unnoticed.
    """
    raw = metadata.get(METADATA_KEY)
    if raw is None:
        return {}
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"The metadata {METADATA_KEY} is not JSON", where, "Export the file again.") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"The metadata {METADATA_KEY} is not a JSON object", where, "Export the file again.")
    return {
        part: PeftScaling(
            alpha=_number(values.get(f"{part}.lora_alpha"), where),
            exceptions=_exceptions(values.get(f"{part}.alpha_pattern"), where),
            root=bool(values.get(f"{part}.use_rslora", False)),
        )
        for part in PARTS
        if any(str(key).startswith(f"{part}.") for key in values)
    }


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        shown = printable(str(value), 40)
        raise AdapterFileError(f"The file's alpha {shown!r} is not a number", where, "Export the file again.")
    return float(value)


def _exceptions(value: Any, where: str) -> dict[str, float]:
    """alpha_pattern as plain names. peft takes the keys as regular expressions; those of others are not run here."""
    result: dict[str, float] = {}
    for pattern, alpha in value.items() if isinstance(value, dict) else ():
        name = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix("text_model.")
        number = _number(alpha, where)
        if set(name) & set("*+?[](){}|\\^$") or number is None:
            what = f"alpha_pattern {printable(str(pattern))!r} is more than a module's name"
            raise AdapterFileError(what, where, "Export it in kohya form, which writes alpha on every module.")
        result[name] = number
    return result


# ---- writing ----

_KEYS = {"down": "lora_A.weight", "up": "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
_OTHERWISE = "Write it in kohya form, or convert it to a plain LoRA first (--plain-lora RANK)."


def peft_tensors(canonical: str, weights: ModuleWeights) -> dict[str, torch.Tensor]:
    """One module's tensors by key. The text encoders get their text_model back, which readers want or take off.

    Raises AdapterFileError for what the form cannot hold: other kinds than LoRA and DoRA, a magnitude for each input.
    """
    part, _, path = canonical.partition(".")
    if part not in PARTS:
        raise AdapterFileError(f"{canonical!r} has no name in peft form", hint=f"Known parts: {', '.join(PARTS)}.")
    tensors = dict(weights.factors)
    if weights.kind not in ("lora", "dora") or (weights.kind == "dora" and tensors[MAGNITUDE].shape[0] != weights.shape[0]):
        what = f"{canonical} is a {weights.kind} that the peft form of diffusers does not hold"
        raise AdapterFileError(what, hint=_OTHERWISE)
    if MAGNITUDE in tensors:  # a list for a Linear, (1, out, 1, 1) for a convolution
        convolution = tensors["down"].ndim == 4
        tensors[MAGNITUDE] = tensors[MAGNITUDE].reshape((1, -1, 1, 1) if convolution else (-1,))
    middle = "" if part == "unet" or path == PROJECTION else "text_model."
    return {f"{part}.{middle}{path}.{_KEYS[name]}": tensor for name, tensor in tensors.items()}


def peft_metadata(modules: Mapping[str, ModuleWeights]) -> str:
    """The configuration that diffusers hands to peft (LoraConfig), part by part: the commonest rank, and exceptions.

    Raises AdapterFileError for a part with LoRA and DoRA side by side, which peft would all take for DoRA.
    """
    values: dict[str, Any] = {}
    for part in PARTS:
        mine = {name.partition(".")[2]: weights for name, weights in modules.items() if name.partition(".")[0] == part}
        if not mine:
            continue
        kinds = {weights.kind for weights in mine.values()}
        if len(kinds) > 1:
            what = f"The {part} holds {' and '.join(sorted(kinds))} side by side, which the peft form cannot say"
            raise AdapterFileError(what, hint=_OTHERWISE)
        rank = Counter(weights.rank for weights in mine.values()).most_common(1)[0][0]
        # Of the denoiser ^ marks a whole path. A text encoder's may lie under text_model or not, so its end must do.
        start = "^" if part == "unet" else ""
        ranks = {start + path: weights.rank for path, weights in sorted(mine.items()) if weights.rank != rank}
        values |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": rank,
            f"{part}.rank_pattern": ranks,
            f"{part}.alpha_pattern": ranks,
            f"{part}.target_modules": sorted(mine),
            f"{part}.use_dora": kinds == {"dora"},
        }
    return json.dumps(values)
