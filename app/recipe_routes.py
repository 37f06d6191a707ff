"""The part of the REST API that the recipe is made from: settings, presets, and the base models used so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from app.desk import TheDesk
from app.form import SettingAnswer, describe_settings
from app.planning import base_of
from app.projects import list_projects
from trainers.presets import list_presets, preset_summary, read_preset


class PresetAnswer(BaseModel):
    """A preset: its header comment, and the family of base models that it is for (empty: any)."""

    name: str
    summary: list[str]
    """For whom, how long, how much memory."""
    family: str


class RecipeAnswer(BaseModel):
    """GET /api/settings: everything the form is drawn from."""

    settings: list[SettingAnswer]
    presets: list[PresetAnswer]
    bases: list[str]
    """pocket, then those of the projects so far."""


def get_settings(desk: TheDesk) -> RecipeAnswer:
    """All settings with their help, all presets, and the base models used so far."""
    bases = dict.fromkeys(["pocket", *(base_of(project) for project in list_projects(desk.home))])
    return RecipeAnswer(settings=describe_settings(), presets=[_preset(name) for name in list_presets()], bases=list(bases))


def _preset(name: str) -> PresetAnswer:
    family = read_preset(name).get("base", {}).get("family", "")
    return PresetAnswer(name=name, summary=preset_summary(name), family=str(family))


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (("GET", "/settings", get_settings),)
