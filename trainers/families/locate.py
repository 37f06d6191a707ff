"""Where a base model lies: pocket, a folder, a single file, or a hub id that a person names. Imports no torch."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from trainers.errors import BaseModelError
from trainers.families.facts import ASSETS

# What diffusers and transformers call the weights of each part. A variant (fp16, non_ema) is never loaded, so never counted.
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}

_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def locate_base(model: str) -> Path:
    """Folder or file of a base model: `pocket`, a path, or an id on the model hub (fetched only when a person names one).

    Raises BaseModelError when there is none.
    """
    if model == "pocket":
        return ASSETS / "pocket"
    path = find_path(model)
    if path is not None:
        return path
    is_file = model.lower().endswith(_ENDINGS)  # mistyped: the hub is asked for what may be an id only
    if model.count("/") == 1 and not model.startswith((".", "~", "/")) and "\\" not in model and not is_file:
        return _fetch_from_hub(model)
    hint = "Give `pocket`, a folder, a .safetensors file, or a hub id (owner/name)."
    raise BaseModelError("There is no such base model", where=model, hint=hint)


def find_path(text: str) -> Path | None:
    """The file or folder that a person names, resolved; None where there is none. Raises BaseModelError for no path at all."""
    path = Path(os.path.expanduser(text))
    try:
        return path.resolve() if path.is_dir() or path.is_file() else None
    except (OSError, ValueError) as error:  # a name too long, a zero byte
        raise BaseModelError(f"This is no path: {error}", where=text[:200]) from error


@functools.cache  # a run asks for its base several times, and each answer of the hub takes a second
def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["model_index.json", "scheduler/*.json"]
    wanted += [f"{folder}/*.{ending}" for folder in ("tokenizer", "tokenizer_2") for ending in ("json", "txt")]
    for part, stem in WEIGHTS.items():
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


def name_of(path: Path) -> str:
    """A base's name: its file's without ending, its folder's; in the hub's cache, where that is a hash, the repository's."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.stem if path.is_file() else path.name
