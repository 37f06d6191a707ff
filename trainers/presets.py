"""Presets: partial settings in presets/*.toml, laid over the defaults and under what a person sets."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.adapters.settings import LowRankSettings
from trainers.config import TrainConfig, build_config, parse_override
from trainers.errors import SettingError
from trainers.families import BaseModelFacts
from trainers.settings import merge
from trainers.text import name_list

FOLDER = Path(__file__).resolve().parents[1] / "presets"


def list_presets() -> list[str]:
    """Names of the presets that ship, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's settings as nested values. `name` is one that ships, or the path of a .toml file.

    Raises SettingError when there is no such preset or when it is not TOML.
    """
    try:
        return tomllib.loads(preset_text(name))
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"The preset is not readable as TOML: {error}", where=name, hint="Correct that line.") from error


def preset_text(name: str) -> str:
    """The preset's file as text, with its comments. Raises SettingError when there is none of this name."""
    path = FOLDER / f"{name}.toml"
    if name not in list_presets():
        path = Path(os.path.expanduser(name))
        if path.suffix != ".toml" or not path.is_file():
            near = difflib.get_close_matches(name, list_presets(), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(list_presets())}."
            raise SettingError(f"There is no preset {name!r}", hint=hint)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"The preset cannot be read: {error}", where=str(path), hint="Save it as UTF-8 text.") from error


def preset_summary(name: str) -> list[str]:
    """The header comment of a preset: for whom, how long, how much memory; an indented line goes on with the one above."""
    told: list[str] = []
    for line in preset_text(name).splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#  ") and told:
            told[-1] += f" {line.lstrip('# ').rstrip()}"
        else:
            told.append(line.lstrip("# ").rstrip())
    return told


def default_preset(base: BaseModelFacts) -> str:
    """The preset used when nobody names one: the base's own."""
    if base.is_pocket:
        return "pocket"
    return {"sd1": "character", "sd2": "character", "sdxl": "sdxl_character"}[base.family.name]


def resolve(preset: str, given: dict[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Defaults, then the preset, then `given` (nested values), then `--set` overrides; validated.

    Raises SettingError naming the setting, also one that is given and of which nothing would be heard. When the optimizer's
    type changes, rates meant for the other one are dropped.
    """
    layers = [read_preset(preset), given]
    own: dict[str, Any] = {}
    for text in overrides:
        own = merge(own, parse_override(text))
    layers.append(own)
    values: dict[str, Any] = {}
    for layer in layers:
        before = _optimizer_type(values)
        values = _merge_checked(values, layer)
        changed = before is not None and _optimizer_type(values) != before
        text_rate = values.get("text_encoder", {}).get("learning_rate")
        if changed and text_rate and "learning_rate" not in layer.get("text_encoder", {}):
            values["text_encoder"] = {k: v for k, v in values["text_encoder"].items() if k != "learning_rate"}
    config = build_config(values)
    _refuse_unheard(config, preset, merge(given, own))
    return config


def _refuse_unheard(config: TrainConfig, preset: str, given: Mapping[str, Any]) -> None:
    """Raises SettingError for what a person says of a LoRA where none is trained, unless the preset says the same."""
    if config.adapter.changes_layers:
        return
    usual = build_config(merge(read_preset(preset), {"adapter": {"type": config.adapter.type, "lora": False}}))
    unheard = []
    for group, known in (("adapter", LowRankSettings.model_fields.keys() - {"type"}), ("text_encoder", None)):
        own, before = getattr(config, group), getattr(usual, group)
        for name in given.get(group, {}):
            if (known is None or name in known) and getattr(own, name) not in (getattr(before, name), 0):
                unheard.append(f"{group}.{name}")
    if unheard:
        what = f"{name_list(unheard, 6)} can say nothing: adapter.lora = false trains no LoRA"
        raise SettingError(what, unheard[0], "Leave out what says something of a LoRA, or set adapter.lora=true.")


def _optimizer_type(values: dict[str, Any]) -> str | None:
    return values.get("optimizer", {}).get("type", "adamw") if values else None


def _merge_checked(values: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    for name, group in layer.items():
        if not isinstance(group, dict):
            raise SettingError(f"{name} is a group of settings, not a value", hint=f"For example {name}.… = …")
    return merge(values, layer)
