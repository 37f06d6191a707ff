"""The kohya form, which every program reads: its key names, and one module's tensors in it. Torch-free at import."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trainers.errors import AdapterFileError
from trainers.families.ldm import SDXL_UNET, inverse, translate
from trainers.formats.keys import suffix_of
from trainers.formats.peft import PROJECTION
from trainers.formats.weights import ModuleWeights

if TYPE_CHECKING:
    import torch

# SDXL has two text encoders, and its U-Net is named as in a single-file checkpoint.
_TEXT = {
    "sd1": {"text_encoder": "lora_te_"},
    "sd2": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
# What is understood on reading; some programs write lora_te1_ for SD1 as well.
_READ = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


def kohya_name(canonical: str, family: str = "sd1") -> str:
    """'text_encoder.encoder.layers.0.mlp.fc1' -> 'lora_te_text_model_encoder_layers_0_mlp_fc1'.

    Raises AdapterFileError for a module that the family's kohya form has no name for.
    """
    part, _, path = canonical.partition(".")
    if part == "unet" and path:
        named = translate(path, SDXL_UNET) if family == "sdxl" else path
        if named is not None:
            return "lora_unet_" + named.replace(".", "_")
    elif part in _TEXT[family] and path:
        # Newer transformers have no "text_model." in the text encoder's own paths, yet every reader of these files asks for it.
        return _TEXT[family][part] + ("" if path == PROJECTION else "text_model_") + path.replace(".", "_")
    raise AdapterFileError(f"{canonical!r} has no name in kohya form", hint=f"Known parts: unet, {', '.join(_TEXT[family])}.")


def flat_name(canonical: str) -> tuple[str, str]:
    """(part, path with underscores), the common spelling in which file names and canonical names are compared."""
    part, _, path = canonical.partition(".")
    return part, path.replace(".", "_")


def flat_names(canonical: str, family: str) -> list[tuple[str, str]]:
    """As `flat_name`, with every further spelling that files of the family use: SDXL's U-Net has LDM names too."""
    part, flat = flat_name(canonical)
    ldm = translate(canonical.partition(".")[2], SDXL_UNET) if family == "sdxl" and part == "unet" else None
    return [(part, flat)] if ldm is None else [(part, flat), (part, ldm.replace(".", "_"))]


@functools.cache
def from_ldm(path: str) -> str | None:
    """A dotted path in SDXL's U-Net by its LDM name -> by its diffusers name; None for a name of neither."""
    return translate(path, inverse(SDXL_UNET))


def read_kohya_prefix(prefix: str) -> tuple[str, str] | None:
    """A key prefix in kohya form -> its flat name, without text_model; None when it is not in that form."""
    for start, part in _READ.items():
        if prefix.startswith(start):
            return part, prefix.removeprefix(start).removeprefix("text_model_")
    return None


def module_tensors(canonical: str, weights: ModuleWeights, family: str = "sd1") -> dict[str, torch.Tensor]:
    """One module's tensors by key: its factors in the layout of their makers, and alpha as a float32 scalar."""
    import torch

    name = kohya_name(canonical, family)
    tensors = {name + suffix_of(part, weights.kind): _stored(part, factor) for part, factor in weights.factors.items()}
    if weights.kind != "full":
        # float32: half precision loses digits of an odd alpha.
        tensors[f"{name}.alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
    return tensors


def _stored(part: str, factor: torch.Tensor) -> torch.Tensor:
    """LoHa and LoKr keep the kernel of a convolution folded into a factor's input width."""
    return factor.flatten(1) if part in ("w1_b", "w2_b") else factor


def factors_of(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by part, as a file has them -> the factors of ModuleWeights, float32.

    A Tucker core of a LoRA ("mid", (r, q, kh, kw) between 1x1 factors) is multiplied into `down`, which changes nothing else.
    """
    import torch

    factors = {part: tensor.to(torch.float32).contiguous() for part, tensor in parts.items()}
    if "down" in factors and "up" in factors:
        _join_core(factors)
        down, up = factors["down"], factors["up"]
        # Linear files of 1x1 convolutions and the reverse: `up` follows `down`.
        if down.ndim == 4 and up.ndim == 2:
            factors["up"] = up[:, :, None, None]
        elif down.ndim == 2 and up.ndim == 4 and up.shape[2:] == (1, 1):
            factors["up"] = up.flatten(1)
    return factors


def _join_core(factors: dict[str, torch.Tensor]) -> None:
    import torch

    mid, down = factors.pop("mid", None), factors["down"]
    if mid is None:
        return
    if mid.ndim != 4 or mid.shape[1] != down.shape[0]:
        raise AdapterFileError(f"lora_mid {tuple(mid.shape)} does not fit lora_down {tuple(down.shape)}")
    factors["down"] = torch.einsum("pqhw,qi->pihw", mid.double(), down.double().flatten(1)).float()
