"""The finished base: a folder in diffusers layout, float16, no file over 20 MiB, as it lies in assets/pocket."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from assets.pocket.build.unet import noise_schedule
from trainers.errors import TrainingError
from trainers.families.parts import read_tokenizer
from trainers.files import write_atomically

SHARD = "14MB"
"""Largest file of a part; the token table is one tensor of 18.1 MiB and cannot be split."""
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: Path) -> None:
    """Writes the four parts, the scheduler and the tokenizer into `folder`; parts that stand there are replaced.

    The modules come back in float16. tokenizer: a folder with vocab.json, merges.txt and tokenizer_config.json, copied.
    """
    for part in ("vae", "text_encoder", "unet", "scheduler", "tokenizer"):
        shutil.rmtree(folder / part, ignore_errors=True)
    vae.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    text_encoder.to("cpu", torch.float16).save_pretrained(folder / "text_encoder", max_shard_size=SHARD)
    unet.to("cpu", torch.float16).save_pretrained(folder / "unet", max_shard_size=SHARD)
    noise_schedule().save_pretrained(folder / "scheduler")
    shutil.copytree(tokenizer, folder / "tokenizer")
    for part in ("vae", "unet"):
        forget_origin(folder / part / "config.json")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    write_atomically(folder / "model_index.json", (json.dumps(INDEX, indent=2, sort_keys=True) + "\n").encode())


def forget_origin(path: Path) -> None:
    """Takes the folder that the part was loaded from out of its config: it belongs to the machine that built it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    write_atomically(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def load_part(folder: Path, part: str) -> AutoencoderKL | UNet2DConditionModel | CLIPTextModel:
    """One part of a base folder in float32, without a network; its own dtype would make the text encoder float16.

    Raises TrainingError when the part is not there.
    """
    if not (folder / part / "config.json").is_file():
        raise TrainingError(
            "A part of the base is missing", where=str(folder / part), hint="Run the stages before this one first."
        )
    kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    return kinds[part].from_pretrained(folder / part, torch_dtype=torch.float32, local_files_only=True)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a base folder, without a network."""
    tokenizer: CLIPTokenizer = read_tokenizer(folder / "tokenizer")
    return tokenizer
