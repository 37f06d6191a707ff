"""A base's configuration files, read and checked: what they say decides its family and its sizes. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.errors import BaseModelError
from trainers.families.facts import FAMILIES, FamilyFacts

Configs = Mapping[str, dict[str, Any]]
FILES = {
    "unet": "unet/config.json", "vae": "vae/config.json", "text_encoder": "text_encoder/config.json",
    "text_encoder_2": "text_encoder_2/config.json", "scheduler": "scheduler/scheduler_config.json",
}  # fmt: skip

MOST = 256
"""Layers in one place, more than any model has: a few bytes of a configuration must not keep a machine busy for hours."""


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration of every part in a folder. Raises BaseModelError naming the file that is missing or unreadable."""
    configs = {"unet": read_json(folder, FILES["unet"])}
    parts = ["vae", "text_encoder", "scheduler"]
    if is_sdxl(configs["unet"]):
        refuse_refiner(configs["unet"], folder)
        parts.append("text_encoder_2")
    return configs | {part: read_json(folder, FILES[part]) for part in parts}


def is_sdxl(unet: Mapping[str, Any]) -> bool:
    """Whether a denoiser's configuration asks for sizes beside the text, as SDXL's does."""
    return unet.get("addition_embed_type") == "text_time"


def refuse_refiner(unet: Mapping[str, Any], where: Path) -> None:
    """Raises BaseModelError for SDXL's refiner, which reads the second text encoder only."""
    if unet.get("cross_attention_dim") == 1280:
        what = "This is SDXL's refiner, which only finishes the pictures of another model"
        raise BaseModelError(what, where=str(where), hint="Train on the SDXL base model.")


@dataclass(frozen=True)
class Sizes:
    """What the configurations say of sizes; pixels as in BaseModelFacts."""

    family: FamilyFacts
    resolution: int
    latent_channels: int
    pixels_per_latent: int
    step: int


def read_sizes(configs: Configs, where: Path) -> Sizes:
    """Checks the configurations against each other. Raises BaseModelError naming the setting that is wrong or unknown."""
    unet, vae = configs["unet"], configs["vae"]
    channels = _whole(where, "vae", vae, "latent_channels")
    out = _whole(where, "unet", {"out_channels": channels, **unet}, "out_channels")
    if _whole(where, "unet", unet, "in_channels") != channels or out != channels:
        raise BaseModelError(
            "This is an inpainting or other special model", where=str(where), hint="Use a plain text-to-image model."
        )
    context = _whole(where, "unet", unet, "cross_attention_dim")
    width = sum(
        _whole(where, part, configs[part], "hidden_size") for part in ("text_encoder", "text_encoder_2") if part in configs
    )
    if context != width:
        raise BaseModelError(
            f"The denoiser reads text states of width {context}, the text encoder gives {width}",
            where=str(where),
            hint="UNet and text encoder come from different models.",
        )
    for part in ("text_encoder", "text_encoder_2"):
        if part in configs:
            _whole(where, part, configs[part], "num_hidden_layers")
            if _whole(where, part, {"max_position_embeddings": 77, **configs[part]}, "max_position_embeddings") < 77:
                raise wrong(where, FILES[part], "max_position_embeddings", "is below the 77 tokens of a caption")
    _whole(where, "vae", vae, "layers_per_block")
    _whole(where, "unet", unet, "layers_per_block")
    kinds = unet.get("up_block_types")
    if not isinstance(kinds, list) or len(kinds) != _levels(where, "unet", unet) or not all(isinstance(k, str) for k in kinds):
        raise wrong(where, FILES["unet"], "up_block_types", "does not name a block for each width")
    _check_depths(where, unet)
    _refuse_other_scales(where, configs)
    pixels_per_latent = 2 ** (_levels(where, "vae", vae) - 1)
    return Sizes(
        family=_family(configs, context),
        resolution=_whole(where, "unet", unet, "sample_size") * pixels_per_latent,
        latent_channels=channels,
        pixels_per_latent=pixels_per_latent,
        # The denoiser halves its input once for each block but the last. It pads odd sides, but learns best without.
        step=pixels_per_latent * 2 ** (_levels(where, "unet", unet) - 1),
    )


def _check_depths(where: Path, unet: Mapping[str, Any]) -> None:
    """Transformer blocks in one place: a number, or one or several for each level."""
    for name in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        left = [unet.get(name)]
        while left:
            value = left.pop()
            if isinstance(value, list):
                left += value
            elif value is not None:
                _whole(where, "unet", {name: value}, name)


def _refuse_other_scales(where: Path, configs: Configs) -> None:
    """Raises BaseModelError for SDXL's relatives with other latents or noise, such as Playground 2.5."""
    vae, scheduler = configs["vae"], str(configs["scheduler"].get("_class_name", ""))
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None or scheduler.startswith(("EDM", "FlowMatch")):
        what = "This model scales its latents or its noise in another way than Stable Diffusion, and cannot be trained here"
        raise BaseModelError(what, where=str(where), hint="Use a plain model of Stable Diffusion 1.x, 2.x or XL.")
    factor = vae.get("scaling_factor", 1.0)
    if type(factor) not in (int, float) or not 0 < factor < 1000:
        raise wrong(where, FILES["vae"], "scaling_factor", "is no factor")
    _whole(where, "scheduler", {"num_train_timesteps": 1000, **configs["scheduler"]}, "num_train_timesteps")


def _family(configs: Configs, context: int) -> FamilyFacts:
    if "text_encoder_2" in configs:
        return FAMILIES["sdxl"]
    known = next((family for family in FAMILIES.values() if family.context == context), None)
    # Where the width is nobody's, as in small models: OpenCLIP's text encoder, which SD 2.x has, uses the plain GELU.
    return known or FAMILIES["sd2" if configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"]


def prediction_type_of(configs: Configs, where: Path) -> str:
    """What the denoiser predicts, by the scheduler's configuration; epsilon where it does not say."""
    prediction_type = configs["scheduler"].get("prediction_type", "epsilon")
    if not isinstance(prediction_type, str):
        raise wrong(where, FILES["scheduler"], "prediction_type", "is not a word")
    return prediction_type


def _whole(where: Path, part: str, config: Mapping[str, Any], name: str) -> int:
    """A setting that is a whole number from 1 to 65536, or to MOST where it counts layers."""
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= (MOST if "layers" in name else 65536):
        raise wrong(where, FILES[part], name, "is missing" if value is None else "is no size")
    return value


def _levels(where: Path, part: str, config: Mapping[str, Any]) -> int:
    """How many resolutions a part works at: its widths, one for each."""
    widths = config.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 8:
        raise wrong(where, FILES[part], "block_out_channels", "is no list of widths")
    for width in widths:
        _whole(where, part, {"block_out_channels": width}, "block_out_channels")
    return len(widths)


def wrong(where: Path, file: str, name: str, what: str) -> BaseModelError:
    """The error for a setting in a configuration file that cannot be meant so."""
    hint = "Download that file again; a base that is not Stable Diffusion has other settings."
    return BaseModelError(f"{file} of the base model: {name} {what}", where=str(where), hint=hint)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a base's folder. Raises BaseModelError when it is missing or no such thing."""
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            f"The base model has no {name}",
            where=str(folder),
            hint="A folder in diffusers layout has one; is the download complete?",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{name} is not readable: {error}", where=str(folder), hint="Download that file again.") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{name} holds no settings", where=str(folder), hint="Download that file again.")
    return value
