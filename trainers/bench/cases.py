"""What can be measured: a base, a size of picture and number formats, and the recipe that all contestants follow. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config import TrainConfig, build_config
from trainers.errors import SettingError
from trainers.settings import merge

PICTURES = 16
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """`base` names a synthetic base, or pocket; `resolution` in pixels; `precisions` are measured one after another."""

    name: str
    base: str
    resolution: int
    precisions: tuple[str, ...]
    goals: Mapping[str, tuple[str, float, float]]
    """Name of a ratio -> ("<=" or ">=", what it must be, what is gone for)."""
    against_fp32: bool = True
    """Whether the reference is measured in fp32 too; SDXL's would not fit beside the others."""


_SD15 = {
    "reference fp32 / project bf16": (">=", 3.5, 5.0),
    "reference bf16 / project bf16": (">=", 1.8, 2.6),
    "reference fp32 / project fp32": (">=", 2.0, 2.4),
    "project bf16 / limit bf16": ("<=", 0.80, 0.60),
    "project fp32 / limit fp32": ("<=", 0.80, 0.60),
    "saved activations fp32, project / reference": ("<=", 0.50, 0.40),
    "saved activations bf16, project / reference": ("<=", 1.0, 0.8),
    "operations fp32, project / reference, gradients in place": ("<=", 0.80, 0.65),
    "operations bf16, project / reference, gradients in place": ("<=", 0.80, 0.65),
    "peak memory, project bf16 / reference fp32": ("<=", 0.70, 0.50),
    "start to end of first step, project bf16 / reference fp32": ("<=", 0.75, 0.40),
    "strength, project / fuse + unfuse": ("<=", 1 / 9, 1 / 12),
    "swap, project / load_lora_adapter": ("<=", 1 / 30, 1 / 60),
    "rank 16 / no adapters": ("<=", 1.06, 1.02),
    "rank 128 / rank 1": ("<=", 1.05, 1.03),
    "memory, 10000 pictures / 100": ("<=", 1.2, 1.2),
    "pictures scanned a second, 10000": (">=", 2000, 2000),
}
_POCKET = {
    "reference fp32 / project fp32": (">=", 1.4, 2.5),
    "memory, 10000 pictures / 100": ("<=", 1.2, 1.2),
    "pictures scanned a second, 10000": (">=", 2000, 2000),
}
CASES = {
    case.name: case
    for case in (
        Case("pocket", "pocket", 64, ("fp32",), _POCKET),
        Case("tiny", "tiny", 128, ("fp32",), {}),
        Case("sd15-256", "sd15", 256, ("bf16", "fp32"), _SD15),
        Case("sd15-512", "sd15", 512, ("bf16", "fp32"), {}),
        Case("sdxl", "sdxl", 1024, ("bf16",), {}, against_fp32=False),
        Case("smallest", "smallest", 32, ("fp32",), {}),  # of seconds, for tests
    )
}
FROZEN_RATIO = {"sd15-256": (1.35, 1.65)}
"""What `reference fp32` over `limit fp32` must come out at, near 1.49, or the reference is not the usual loop."""


def find_case(name: str) -> Case:
    """Raises SettingError naming those that there are."""
    if name not in CASES:
        named = ", ".join(known for known in CASES if known != "smallest")
        raise SettingError(f"There is no case {name!r}", "--case", f"One of {named}.")
    return CASES[name]


def recipe(case: Case, base: str, images: Path, precision: str, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """What all contestants do: rank 16 on the denoiser's attention projections, AdamW as scripts set it, a plain mean of
    squares, nothing kept aside. `changes` go on top, nested as in a preset."""
    values: dict[str, Any] = {
        "base": {"model": base},
        "dataset": {"images": str(images), "resolution": case.resolution, "holdout": 0.0, "buckets": False},
        "adapter": {"type": "lora", "rank": 16, "targets": ["attention"]},
        "text_encoder": {"learning_rate": 0.0},
        "optimizer": {"type": "adamw", "learning_rate": LEARNING_RATE, "beta2": 0.999},
        "schedule": {"type": "constant"},
        "train": {"steps": 100_000, "batch_size": 1, "precision": precision, "min_snr_gamma": 0.0},
        "samples": {"every": 0},
    }
    return build_config(merge(values, dict(changes or {})))
