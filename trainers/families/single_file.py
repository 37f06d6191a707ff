"""Recognising a single-file checkpoint (LDM layout) by the names and shapes in its header. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.container import Entry
from trainers.errors import BaseModelError
from trainers.families.configuration import FILES, is_sdxl, read_configs, read_sizes
from trainers.families.facts import ASSETS, FAMILIES
from trainers.families.ldm import part_layouts
from trainers.families.stored import entries_of, metadata_of

CONFIGURATION = "impasto.configuration"
"""Metadata in which a file that this program wrote carries its parts' configurations, so that any size can be read."""
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Of a schedule that ends in pure noise; it has to be drawn from that end too (arXiv 2305.08891, section 3.3)."""
_UNET = "model.diffusion_model."
_PLAIN = "Use a plain text-to-image model of Stable Diffusion 1.x, 2.x or XL."
# Names that only other architectures have -> what they are.
_OTHERS = {
    "double_blocks.0.": "a Flux model", "joint_blocks.0.": "a Stable Diffusion 3 model", "caption_projection.": "a DiT model",
    "lora_unet_": "a LoRA, not a base model", "lora_te": "a LoRA, not a base model", ".lora_A.": "a LoRA, not a base model",
    ".lora_down.": "a LoRA, not a base model", "control_model.": "a ControlNet, not a base model",
    "emb_params": "a textual inversion, not a base model", "string_to_param": "a textual inversion, not a base model",
}  # fmt: skip
# Marks of models with another noise schedule (Playground 2.5, CosXL), which look like SDXL otherwise.
_EDM = {"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
_INPUTS = {9: "an inpainting model", 5: "a depth model", 8: "a model that edits pictures", 7: "an upscaler"}


def recognise_file(path: Path, own_vae: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """(configurations of all parts, a sentence about what was guessed or ""). `own_vae`: the file need not have one.

    Raises BaseModelError that says in words what the file is instead, or which part it lacks.
    """
    entries = entries_of(path)
    family = _family(entries, path)
    metadata = metadata_of(path)
    configs, guessed = _carried(metadata, path), ""
    if configs is None:
        configs = read_configs(ASSETS / "families" / family)
        guessed = _predicts(configs, family, entries, metadata)
    elif is_sdxl(configs["unet"]) != (family == "sdxl"):
        raise BaseModelError("The file's own configuration is that of another family", where=str(path))
    read_sizes(configs, path)
    _check_parts(family, configs, entries, path, own_vae)
    return configs, guessed


def _family(entries: Mapping[str, Entry], path: Path) -> str:
    """sd1, sd2 or sdxl. Raises BaseModelError for anything else."""
    first = entries.get(f"{_UNET}input_blocks.0.0.weight")
    if first is None:
        raise _no_checkpoint(entries, path)
    channels = first.shape[1] if len(first.shape) == 4 else 0
    if channels in _INPUTS:
        raise BaseModelError(f"This is {_INPUTS[channels]}: its denoiser reads {channels} channels", str(path), _PLAIN)
    if _EDM & entries.keys():
        raise BaseModelError("This is a model with the EDM noise schedule, which cannot be trained here", str(path), _PLAIN)
    if f"{_UNET}label_emb.0.0.weight" in entries:
        if any(name.startswith("conditioner.embedders.0.model.") for name in entries):
            what = "This is SDXL's refiner, which only finishes the pictures of another model"
            raise BaseModelError(what, where=str(path), hint="Train on the SDXL base model.")
        return "sdxl"
    if any(name.startswith("cond_stage_model.model.") for name in entries):
        return "sd2"
    matrices = (entry.shape for name, entry in entries.items() if name.endswith("attn2.to_k.weight") and len(entry.shape) == 2)
    width = next((shape[1] for shape in matrices), 0)
    return "sd2" if width == FAMILIES["sd2"].context else "sd1"


def _no_checkpoint(entries: Mapping[str, Entry], path: Path) -> BaseModelError:
    names = list(entries)
    for mark, what in _OTHERS.items():
        if any(mark in name for name in names):
            return BaseModelError(f"This is {what}", str(path), _PLAIN)
    if any(name.startswith(("input_blocks.", "down_blocks.")) for name in names):
        what = "This file holds a denoiser only: text encoder and VAE are missing"
        return BaseModelError(what, str(path), "Take the whole checkpoint (for Stable Diffusion 1.5 some 2 or 4 GB).")
    if any(name.startswith(("encoder.down", "first_stage_model.")) for name in names):
        return BaseModelError("This file holds a VAE only", str(path), "Give it as base.vae, beside a base model.")
    shown = ", ".join(name[:60] for name in names[:3]) or "nothing"
    return BaseModelError(f"This is no Stable Diffusion checkpoint (it holds {shown})", str(path), _PLAIN)


def _carried(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]] | None:
    """The configurations that a file of our own carries; None where it has none."""
    raw = metadata.get(CONFIGURATION)
    if raw is None:
        return None
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"The metadata {CONFIGURATION} is not JSON", where=str(path)) from error
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise BaseModelError(f"The metadata {CONFIGURATION} holds no settings", where=str(path))
    needed = {"unet", "vae", "text_encoder", "scheduler", *(["text_encoder_2"] if is_sdxl(values.get("unet", {})) else [])}
    if needed - values.keys():
        raise BaseModelError(f"The metadata {CONFIGURATION} lacks {', '.join(needed - values.keys())}", where=str(path))
    return {part: values[part] for part in FILES if part in needed}


def _predicts(
    configs: dict[str, dict[str, Any]], family: str, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> str:
    """Sets what the denoiser predicts, by the file's marks; returns a sentence where it had to be assumed.

    Marks: the empty tensors `v_pred` and `ztsnr`, by which ComfyUI and others know such models, and modelspec.
    """
    said = metadata.get("modelspec.prediction_type", "")
    scheduler = configs["scheduler"]
    if "v_pred" in entries or said.startswith("v"):
        scheduler["prediction_type"] = "v_prediction"
        if "ztsnr" in entries:
            scheduler |= ZERO_TERMINAL
        return ""
    if said == "epsilon":
        set_epsilon(configs, family)
        return ""
    if family != "sd2":
        return ""
    return (
        "The file does not say what it predicts; v-prediction was assumed, as of Stable Diffusion 2.x at 768 px. "
        "If it is a 512 px model, set base.prediction_type=epsilon."
    )


def set_epsilon(configs: dict[str, dict[str, Any]], family: str) -> None:
    """Stable Diffusion 2.x comes as v-prediction at 768 px and as epsilon at 512 px; the latter here."""
    configs["scheduler"]["prediction_type"] = "epsilon"
    if family == "sd2" and configs["unet"].get("sample_size") == 96:
        configs["unet"]["sample_size"] = 64


def _check_parts(
    family: str, configs: Mapping[str, dict[str, Any]], entries: Mapping[str, Entry], path: Path, own_vae: bool
) -> None:
    missing = [
        part.replace("_", " ")
        for part, layout in part_layouts(family, configs).items()
        if not any(name.startswith(layout.starts) for name in entries) and not (part == "vae" and own_vae)
    ]
    if missing:
        hint = "Take the whole checkpoint" + (", or set base.vae." if missing == ["vae"] else ".")
        raise BaseModelError(f"The checkpoint has no {' and no '.join(missing)}", where=str(path), hint=hint)
