"""What goes into a run and decides its result, as hashes and settings: a run that goes on is held against it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainers.config import TrainConfig
from trainers.dataset.buckets import CENTRE
from trainers.dataset.folder import Scan
from trainers.dataset.prepare import planned_prior
from trainers.device import Device
from trainers.families.base import DiffusionModel
from trainers.start_from import Start


def make_manifest(
    config: TrainConfig,
    scan: Scan,
    model: DiffusionModel,
    device: Device,
    start: Start | None = None,
    dataset: str = "",
) -> dict[str, Any]:
    """Content hashes of all that goes into a run, the name of its `dataset` version, and the settings that decide its result.

    Settings at their defaults are left out, and crops in the middle, so that a later version with one setting more can go
    on with the run; so are those that change nothing in the adapter, so that they may be changed between stop and resume.
    """
    free: dict[str, Any] = {
        "base": {"model", "vae"},
        "adapter": {"start_from"},
        "samples": True,
        "checkpoints": True,
        "output": True,
    }
    free |= {
        "dataset": {"images", "edits"},
        "prior": {"folder"},
        "train": {"save_state_seconds", "checkpointing", "recoveries", "recording", "fit"},
    }
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=free)
    for group, usual in (("adapter", "lora"), ("optimizer", "adamw")):  # a type is its own settings' default
        if (kind := getattr(config, group).type) != usual:
            settings[group] = {**settings.get(group, {}), "type": kind}
    started: dict[str, Any] = {"start_from": {"LoRA": start.sha256}} if start else {}
    if config.prior.folder:
        prior = planned_prior(config, Path(), 0)
        started["prior"] = {example.name: example.sha256 for example in prior}
        started["prior_captions"] = {one.name: hashlib.sha256(one.caption.encode()).hexdigest() for one in prior}
    masks = {example.name: example.mask.sha256 or "its alpha channel" for example in scan.examples if example.mask}
    return (
        started
        | ({"masks": masks} if masks else {})
        | {
            "dataset_version": dataset,
            "images": {example.name: example.sha256 for example in scan.examples},
            "captions": {example.name: hashlib.sha256(example.caption.encode()).hexdigest() for example in scan.examples},
            "repeats": {example.name: example.repeats for example in scan.examples},
            "crops": {example.name: list(example.crop) for example in scan.examples if example.crop != CENTRE},
            "base": {part: model.fingerprint(part) for part in (*model.parts(), "vae")},
            "configuration": {part: _digest(config) for part, config in model.facts.configs.items()},
            "settings": settings,
            "kernels": device.kernels(),
            "versions": {name: _version(name) for name in ("impasto", "torch", "diffusers", "transformers", "safetensors")},
        }
    )


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
