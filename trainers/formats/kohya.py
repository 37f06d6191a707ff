"""The kohya form, which every program reads: its key names, and one module's tensors in it. Torch-free at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.errors import AdapterFileError
from trainers.formats.weights import ModuleWeights

if TYPE_CHECKING:
    import torch

# Newer transformers have no "text_model." in the text encoder's own paths, yet every reader of these files asks for it.
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
# What is understood on reading; some programs write lora_te1_ for SD1 as well.
_READ = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


def kohya_name(canonical: str) -> str:
    """'text_encoder.encoder.layers.0.mlp.fc1' -> 'lora_te_text_model_encoder_layers_0_mlp_fc1'.

    Raises AdapterFileError for a part that SD1's kohya form has no name for.
    """
    part, _, path = canonical.partition(".")
    if part not in PREFIXES or not path:
        raise AdapterFileError(f"{canonical!r} has no name in kohya form", hint=f"Known parts: {', '.join(PREFIXES)}.")
    return PREFIXES[part] + path.replace(".", "_")


def flat_name(canonical: str) -> tuple[str, str]:
    """(part, path with underscores), the common spelling in which file names and canonical names are compared."""
    part, _, path = canonical.partition(".")
    return part, path.replace(".", "_")


def read_kohya_prefix(prefix: str) -> tuple[str, str] | None:
    """A key prefix in kohya form -> its flat name, without text_model; None when it is not in that form."""
    for start, part in _READ.items():
        if prefix.startswith(start):
            return part, prefix.removeprefix(start).removeprefix("text_model_")
    return None


def module_tensors(canonical: str, weights: ModuleWeights) -> dict[str, torch.Tensor]:
    """One module's three tensors by key: lora_down and lora_up as they are, alpha as a float32 scalar."""
    import torch

    name = kohya_name(canonical)
    return {
        f"{name}.lora_down.weight": weights.factors["down"],
        f"{name}.lora_up.weight": weights.factors["up"],
        # float32: half precision loses digits of an odd alpha.
        f"{name}.alpha": torch.tensor(weights.alpha, dtype=torch.float32),
    }


def module_weights(parts: dict[str, torch.Tensor], alpha: float | None) -> ModuleWeights:
    """Tensors by part ("down", "up", perhaps "mid") -> ModuleWeights, float32. No alpha means scale 1, as everywhere.

    A Tucker core ("mid", (r, q, kh, kw) between 1x1 factors) is multiplied into `down`, which changes nothing else.
    """
    import torch

    factors = {part: tensor.to(torch.float32).contiguous() for part, tensor in parts.items()}
    mid = factors.pop("mid", None)
    down, up = factors["down"], factors["up"]
    if mid is not None:
        if mid.ndim != 4 or mid.shape[1] != down.shape[0]:
            raise AdapterFileError(f"lora_mid {tuple(mid.shape)} does not fit lora_down {tuple(down.shape)}")
        factors["down"] = down = torch.einsum("pqhw,qi->pihw", mid.double(), down.double().flatten(1)).float()
    # Linear files of 1x1 convolutions and the reverse: `up` follows `down`.
    if down.ndim == 4 and up.ndim == 2:
        factors["up"] = up[:, :, None, None]
    elif down.ndim == 2 and up.ndim == 4 and up.shape[2:] == (1, 1):
        factors["up"] = up.flatten(1)
    return ModuleWeights(factors, float(down.shape[0]) if alpha is None else alpha)
