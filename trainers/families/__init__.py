"""The model families: a table of facts, and recognising a base model from its small JSON files. Imports no torch."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.errors import BaseModelError, SettingError

if TYPE_CHECKING:
    from trainers.families.base import DiffusionModel

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class FamilyFacts:
    """What is true of every model of a family. `context` is the width of the text states that the denoiser reads."""

    name: str
    title: str
    context: int
    trainable: bool


FAMILIES: dict[str, FamilyFacts] = {
    "sd1": FamilyFacts("sd1", "Stable Diffusion 1.x", 768, True),
    "sd2": FamilyFacts("sd2", "Stable Diffusion 2.x", 1024, False),
    "sdxl": FamilyFacts("sdxl", "Stable Diffusion XL", 2048, False),
}
LARGEST_SIDE = 4096
"""Of a picture to draw, in pixels."""
# What diffusers and transformers call the weights of each part. A variant (fp16, non_ema) is never loaded, so never counted.
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass(frozen=True)
class BaseModelFacts:
    """What a base model says about itself before any weight is read.

    Sizes in pixels. `step` divides every side of a training bucket; a picture to draw is only held to `pixels_per_latent`.
    """

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


@functools.cache  # a run asks for its base several times, and each answer of the hub takes a second
def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]
    for part, stem in _WEIGHTS.items():
        names = ("config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-?????-of-?????.safetensors")
        wanted += [f"{part}/{name}" for name in names]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
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
    for part in _WEIGHTS:
        weight_files(folder, part)
    if not any((folder / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise BaseModelError(
            "The base model has no tokenizer", where=str(folder / "tokenizer"), hint="Add vocab.json and merges.txt."
        )
    channels = _whole(folder, "vae/config.json", vae, "latent_channels")
    if _whole(folder, "unet/config.json", unet, "in_channels") != channels:
        raise BaseModelError(
            "This is an inpainting or other special model", where=str(folder), hint="Use a plain text-to-image model."
        )
    context = _whole(folder, "unet/config.json", unet, "cross_attention_dim")
    width = _whole(folder, "text_encoder/config.json", text, "hidden_size")
    family = next((f for f in FAMILIES.values() if f.context == context), FAMILIES["sd1"])
    if context != width and family.name != "sdxl":
        raise BaseModelError(
            f"The denoiser reads text states of width {context}, the text encoder gives {width}",
            where=str(folder),
            hint="UNet and text encoder come from different models.",
        )
    pixels_per_latent = 2 ** (_levels(folder, "vae/config.json", vae) - 1)
    # The denoiser halves its input once for each block but the last. It pads odd sides, but learns best without.
    step = pixels_per_latent * 2 ** (_levels(folder, "unet/config.json", unet) - 1)
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if not isinstance(prediction_type, str):
        raise _wrong(folder, "scheduler/scheduler_config.json", "prediction_type", "is not a word")
    return BaseModelFacts(
        name="pocket" if model == "pocket" else _name_of(folder),
        folder=folder,
        family=family,
        prediction_type=prediction_type,
        resolution=_whole(folder, "unet/config.json", unet, "sample_size") * pixels_per_latent,
        latent_channels=channels,
        pixels_per_latent=pixels_per_latent,
        step=step,
        is_pocket=model == "pocket",
    )


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files that hold a part's weights (unet, vae, text_encoder) in a base's folder: one, or its pieces in order.

    Raises BaseModelError naming the part where there is none, or a piece is missing.
    """
    name = f"{_WEIGHTS[part]}.safetensors"
    index = f"{part}/{name}.index.json"
    if not (folder / index).is_file():
        names = [name]
    else:
        pieces = _read_json(folder, index).get("weight_map")
        names = list(pieces.values()) if isinstance(pieces, dict) else []
        if not names or not all(isinstance(piece, str) and piece == Path(piece).name != "" for piece in names):
            raise _wrong(folder, index, "weight_map", "names no files beside it")
        names = sorted(set(names))
    missing = [piece for piece in names if not (folder / part / piece).is_file()]
    if missing:
        what = f"The base model has no weights for {part}" + (f": {missing[0]} is missing" if len(names) > 1 else "")
        raise BaseModelError(what, where=str(folder / part), hint=f"Expected the file {missing[0]}; variants are not used.")
    return [folder / part / piece for piece in names]


def check_size(base: BaseModelFacts, height: int, width: int) -> None:
    """Raises SettingError when the base cannot draw a picture of this size in pixels."""
    unit = base.pixels_per_latent  # diffusers' denoisers pad and cut latents whose sides do not halve
    if any(side % unit or not unit <= side <= LARGEST_SIDE for side in (height, width)):
        hint = f"Both sides must be multiples of {unit}, up to {LARGEST_SIDE}."
        raise SettingError(f"This base cannot draw {width}x{height}", hint=hint)


def _name_of(folder: Path) -> str:
    """A folder's name; in the hub's cache, where that is a hash, the repository's."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def _whole(folder: Path, file: str, config: dict[str, Any], name: str) -> int:
    """A setting that is a whole number from 1 to 65536."""
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= 65536:
        raise _wrong(folder, file, name, "is missing" if value is None else "is no size")
    return value


def _levels(folder: Path, file: str, config: dict[str, Any]) -> int:
    """How many resolutions a part works at: its widths, one for each."""
    widths = config.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 8:
        raise _wrong(folder, file, "block_out_channels", "is no list of widths")
    for width in widths:
        _whole(folder, file, {"block_out_channels": width}, "block_out_channels")
    return len(widths)


def _wrong(folder: Path, file: str, name: str, what: str) -> BaseModelError:
    hint = "Download that file again; a base that is not Stable Diffusion has other settings."
    return BaseModelError(f"{file} of the base model: {name} {what}", where=str(folder), hint=hint)


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
    except (OSError, ValueError, RecursionError) as error:
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
