"""The model families: a table of facts, and recognising a base model from its small JSON files. Imports no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.errors import BaseModelError

if TYPE_CHECKING:
    from trainers.families.base import DiffusionModel

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class FamilyFacts:
    """What is true of every model of a family. `context` is the width of the text states that the denoiser reads."""

    name: str
    title: str
    context: int
    resolution: int
    trainable: bool


FAMILIES: dict[str, FamilyFacts] = {
    "sd1": FamilyFacts("sd1", "Stable Diffusion 1.x", 768, 512, True),
    "sd2": FamilyFacts("sd2", "Stable Diffusion 2.x", 1024, 768, False),
    "sdxl": FamilyFacts("sdxl", "Stable Diffusion XL", 2048, 1024, False),
}


@dataclass(frozen=True)
class BaseModelFacts:
    """What a base model says about itself before any weight is read. Sizes in pixels; `step` divides every side."""

    name: str
    folder: Path
    family: FamilyFacts
    prediction_type: str
    resolution: int
    latent_channels: int
    pixels_per_latent: int
    step: int
    is_pocket: bool


def locate_base(model: str) -> Path:
    """The folder of a base model: `pocket`, a path, or an id on the model hub (fetched only when a person names one).

    Raises BaseModelError when there is no such folder, or when a single file is given.
    """
    if model == "pocket":
        return ASSETS / "pocket"
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise BaseModelError(
            "A single-file checkpoint cannot be used as base yet",
            where=str(path),
            hint="Give a folder in diffusers layout (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/).",
        )
    if model.count("/") == 1 and not model.startswith((".", "~", "/")) and "\\" not in model:
        return _fetch_from_hub(model)
    raise BaseModelError("There is no such base model", where=model, hint="Give `pocket`, a folder, or a hub id (owner/name).")


def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            "No folder of this name, and the model hub gave none either",
            where=model,
            hint="Check the spelling, go online for the first use, or give a folder.",
        ) from error


def recognise_base(model: str) -> BaseModelFacts:
    """Reads a base model's configuration files. Raises BaseModelError naming the part that is missing or unknown."""
    folder = locate_base(model)
    unet = _read_json(folder, "unet/config.json")
    vae = _read_json(folder, "vae/config.json")
    text = _read_json(folder, "text_encoder/config.json")
    scheduler = _read_json(folder, "scheduler/scheduler_config.json")
    for part, pattern in _WEIGHTS.items():
        if not list((folder / part).glob(pattern)):
            raise BaseModelError(
                f"The base model has no weights for {part}", where=str(folder / part), hint=f"Expected a file like {pattern}."
            )
    if not any((folder / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise BaseModelError(
            "The base model has no tokenizer", where=str(folder / "tokenizer"), hint="Add vocab.json and merges.txt."
        )
    if unet.get("in_channels") != vae.get("latent_channels"):
        raise BaseModelError(
            "This is an inpainting or other special model", where=str(folder), hint="Use a plain text-to-image model."
        )
    context, width = unet.get("cross_attention_dim"), text.get("hidden_size")
    family = next((f for f in FAMILIES.values() if f.context == context), FAMILIES["sd1"])
    if context != width and family.name != "sdxl":
        raise BaseModelError(
            f"The denoiser reads text states of width {context}, the text encoder gives {width}",
            where=str(folder),
            hint="UNet and text encoder come from different models.",
        )
    pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
    # The denoiser halves its input once for each block but the last, so sides must divide by that too.
    step = pixels_per_latent * 2 ** (len(unet["block_out_channels"]) - 1)
    return BaseModelFacts(
        name="pocket" if model == "pocket" else folder.name,
        folder=folder,
        family=family,
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        resolution=int(unet["sample_size"]) * pixels_per_latent,
        latent_channels=int(vae["latent_channels"]),
        pixels_per_latent=pixels_per_latent,
        step=step,
        is_pocket=model == "pocket",
    )


_WEIGHTS = {
    "unet": "diffusion_pytorch_model*.safetensors",
    "vae": "diffusion_pytorch_model*.safetensors",
    "text_encoder": "model*.safetensors",
}


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            f"The base model has no {name}",
            where=str(folder),
            hint="A folder in diffusers layout has one; is the download complete?",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{name} is not readable: {error}", where=str(folder), hint="Download that file again.") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{name} holds no settings", where=str(folder), hint="Download that file again.")
    return value


def load_family(facts: BaseModelFacts, dtype: Any, device: Any) -> DiffusionModel:
    """Reads the weights. `dtype` is the frozen base's torch dtype. Raises BaseModelError for a family not built yet."""
    if not facts.family.trainable:
        raise BaseModelError(
            f"This is a {facts.family.title} model; this version trains Stable Diffusion 1.x only",
            where=str(facts.folder),
            hint="Use a Stable Diffusion 1.x base or `pocket`.",
        )
    from trainers.families import sd1

    return {"sd1": sd1.load}[facts.family.name](facts, dtype, device)
