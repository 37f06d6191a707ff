"""What a LoRA file says about itself: the ss_ names that galleries and programs read, and modelspec 1.0.1. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from trainers.errors import AdapterFileError, SettingError

# base version -> modelspec's architecture; A1111 hides a LoRA whose version is not the loaded base's.
ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1/lora",
    "sd_v2": "stable-diffusion-v2-512/lora",
    "sd_v2_v": "stable-diffusion-v2-768-v/lora",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora",
}
_SDXL_SOURCE = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True)
class RunFacts:
    """What is worth telling about a run. Plain values; None and empty text are left out of the file.

    Names are names and not paths: whatever stands before a slash is dropped. `text_encoder_*` are None where only the
    UNet was trained. `dataset_dirs` maps a folder's name to (repeats, pictures); `buckets` lists (width, height,
    pictures). `tag_frequency` tells everybody the captions, so give it only when the person asked for that.
    """

    output_name: str
    base_name: str
    rank: int
    alpha: float
    resolution: tuple[int, int]
    """(width, height) in pixels."""
    started_at: float
    """Seconds since 1970; SOURCE_DATE_EPOCH in the environment goes before it."""
    seed: int
    steps: int
    base_version: str = "sd_v1"
    v2: bool = False
    base_hash_old: str | None = None
    base_hash_new: str | None = None
    text_encoder_rank: int | None = None
    text_encoder_alpha: float | None = None
    network_args: Mapping[str, Any] = field(default_factory=dict)
    buckets: tuple[tuple[int, int, int], ...] = ()
    dataset_dirs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] | None = None
    learning_rate: float | None = None
    text_encoder_learning_rate: float | None = None
    optimizer: str = ""
    scheduler: str = ""
    warmup_steps: int = 0
    planned_steps: int | None = None
    epochs: int = 0
    batch_size: int = 1
    accumulation: int = 1
    num_images: int = 0
    clip_skip: int | None = None
    noise_offset: float = 0.0
    min_snr_gamma: float | None = None
    precision: str = ""
    trigger: str = ""
    prediction_type: str = "epsilon"
    title: str = ""
    author: str = ""
    description: str = ""
    session_id: str = ""
    """Empty: derived from name, seed and date, so that the same run names itself the same."""


def build_metadata(facts: RunFacts) -> dict[str, str]:
    """RunFacts -> the metadata of its file, in a fixed order. Hashes of the tensors are added by write_adapter."""
    date = source_date()
    started = facts.started_at if date is None else date
    values = _ss_values(facts, started) | _modelspec_values(facts, started)
    return {key: _text(value) for key, value in values.items() if value is not None and value != ""}


def source_date() -> float | None:
    """SOURCE_DATE_EPOCH in seconds since 1970, where it is set. Raises SettingError when it is no number."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "").strip()
    if not epoch:
        return None
    if not re.fullmatch(r"\d{1,11}", epoch):
        raise SettingError(f"SOURCE_DATE_EPOCH is {epoch!r}, not a number of seconds", hint="Correct or unset it.")
    return float(epoch)


def _ss_values(facts: RunFacts, started: float) -> dict[str, Any]:
    name = _only_name(facts.output_name)
    session = facts.session_id or hashlib.sha256(f"{name} {facts.seed} {started}".encode("utf-8", "replace")).hexdigest()[:16]
    return {
        "ss_v2": facts.v2,
        "ss_base_model_version": facts.base_version.removesuffix("_v"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(facts.rank, facts.text_encoder_rank),
        "ss_network_alpha": _common(facts.alpha, facts.text_encoder_alpha),
        "ss_network_args": json.dumps(dict(facts.network_args)),
        "ss_output_name": name,
        "ss_sd_model_name": _only_name(facts.base_name),
        "ss_sd_model_hash": facts.base_hash_old,
        "ss_new_sd_model_hash": facts.base_hash_new,
        "ss_clip_skip": facts.clip_skip,
        "ss_training_started_at": started,
        "ss_resolution": f"({facts.resolution[0]}, {facts.resolution[1]})",
        "ss_bucket_info": _bucket_info(facts),
        "ss_dataset_dirs": _dataset_dirs(facts),
        "ss_tag_frequency": _tag_frequency(facts),
        "ss_num_train_images": facts.num_images,
        "ss_num_epochs": facts.epochs,
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.planned_steps or facts.steps,
        "ss_batch_size_per_device": facts.batch_size,
        "ss_total_batch_size": facts.batch_size * facts.accumulation,
        "ss_gradient_accumulation_steps": facts.accumulation,
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.learning_rate,
        "ss_text_encoder_lr": facts.text_encoder_learning_rate,
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.scheduler,
        "ss_lr_warmup_steps": facts.warmup_steps,
        "ss_mixed_precision": facts.precision,
        "ss_noise_offset": facts.noise_offset or None,
        "ss_min_snr_gamma": facts.min_snr_gamma,
        "ss_seed": facts.seed,
        "ss_session_id": session,
        "ss_training_comment": facts.description,
    }


def _modelspec_values(facts: RunFacts, started: float) -> dict[str, Any]:
    sdxl = facts.base_version.startswith("sdxl_")
    version = "sd_v2_v" if facts.base_version == "sd_v2" and facts.prediction_type == "v_prediction" else facts.base_version
    hints = []
    if facts.prediction_type == "v_prediction":
        hints.append("Trained on a v-prediction base.")
    if facts.clip_skip is not None and facts.clip_skip > 1:
        hints.append(f"Trained with clip skip {facts.clip_skip}.")
    if version not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise AdapterFileError(f"There is no modelspec architecture for {version!r}", hint=f"Known: {known}.")
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[version],
        "modelspec.implementation": _SDXL_SOURCE if sdxl else "diffusers",
        "modelspec.title": facts.title or _only_name(facts.output_name),
        "modelspec.resolution": f"{facts.resolution[0]}x{facts.resolution[1]}",
        "modelspec.description": facts.description,
        "modelspec.author": facts.author,
        "modelspec.date": datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.trigger_phrase": facts.trigger,
        "modelspec.usage_hint": " ".join(hints),
        "modelspec.prediction_type": "v" if facts.prediction_type == "v_prediction" else facts.prediction_type,
        "modelspec.encoder_layer": facts.clip_skip,
    }


def _common(unet: float, text_encoder: float | None) -> Any:
    """The number both parts share, or kohya's word for parts that differ."""
    return unet if text_encoder is None or text_encoder == unet else "Dynamic"


def _bucket_info(facts: RunFacts) -> str | None:
    buckets = {str(i): {"resolution": [w, h], "count": count} for i, (w, h, count) in enumerate(facts.buckets)}
    return json.dumps({"buckets": buckets}) if buckets else None


def _dataset_dirs(facts: RunFacts) -> str | None:
    folders: dict[str, dict[str, int]] = {}
    for path, (repeats, count) in sorted(facts.dataset_dirs.items()):
        name = _only_name(path)
        while name in folders:  # Two folders of one name in different places: readers add up the counts.
            name += "_"
        folders[name] = {"n_repeats": repeats, "img_count": count}
    return json.dumps(folders) if folders else None


def _tag_frequency(facts: RunFacts) -> str | None:
    if facts.tag_frequency is None:
        return None
    merged: dict[str, dict[str, int]] = {}
    for path, tags in sorted(facts.tag_frequency.items()):
        counts = merged.setdefault(_only_name(path), {})
        for tag, count in tags.items():
            counts[tag] = counts.get(tag, 0) + count
    return json.dumps(merged)


def _only_name(name: str) -> str:
    """The last part of what may be a path of any system: a file must not tell where its maker's folders are."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _text(value: Any) -> str:
    """kohya's spelling: Python's own words for numbers and truth, whole floats as they are ("8.0")."""
    return value if isinstance(value, str) else str(value)
