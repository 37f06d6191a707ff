"""What the recipe's form is drawn from: every setting with its kind, limits and help, out of the settings' own fields."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from trainers.config import TrainConfig
from trainers.settings import iterate_fields

Kind = Literal["whole", "number", "switch", "text", "choice", "list", "choices", "pairs"]


class SettingAnswer(BaseModel):
    """One setting. A limit that is null is none; `above` and `below` are limits that are not themselves allowed."""

    name: str
    """Dotted, as in presets: adapter.rank."""
    group: str
    label: str
    help: str
    kind: Kind
    optional: bool
    """May be unset, which leaves the choice to the program."""
    choices: list[str] = []
    types: list[str] = []
    """The types of its group, of an adapter or optimizer, that have it; empty: all, or a group without types."""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None


def describe_settings() -> list[SettingAnswer]:
    """All settings of a run, in the order of TrainConfig."""
    return [_describe(name, field) for name, field in iterate_fields(TrainConfig)]


def _types(group: str) -> list[str]:
    """The types that a group of settings comes in: adapter, optimizer."""
    annotation = TrainConfig.model_fields[group].annotation
    members = get_args(annotation) or (annotation,)
    return [str(member.model_fields["type"].default) for member in members if hasattr(member, "model_fields")]


def _types_with(name: str) -> list[str]:
    """The types of a setting's group that have it, where others have not."""
    group, _, last = name.partition(".")
    members = get_args(TrainConfig.model_fields[group].annotation)
    having = [one for one in members if last in getattr(one, "model_fields", {})]
    return [] if len(having) == len(members) else [str(one.model_fields["type"].default) for one in having]


def _describe(name: str, field: Any) -> SettingAnswer:
    kind, choices, optional = _kind(field.annotation)
    limits: dict[str, float] = {}
    for bound in field.metadata:
        for attribute, ours in (("ge", "least"), ("le", "most"), ("gt", "above"), ("lt", "below")):
            if getattr(bound, attribute, None) is not None:
                limits[ours] = float(getattr(bound, attribute))
    group, _, last = name.rpartition(".")
    if last == "type" and kind == "choice" and len(choices) == 1:
        choices = _types(group)
    return SettingAnswer(
        name=name,
        group=group,
        label=last.replace("_", " ").capitalize(),
        help=" ".join((field.description or "").replace("`", "").split()),
        kind=kind,
        optional=optional,
        choices=choices,
        types=_types_with(name),
        **limits,
    )


def _kind(annotation: Any) -> tuple[Kind, list[str], bool]:
    """(kind, choices, whether it may be unset) of a field's type."""
    parts = get_args(annotation)
    if get_origin(annotation) in (types.UnionType, Union):
        kept = [part for part in parts if part is not type(None)]
        kind, choices, _ = _kind(kept[0])
        return kind, choices, len(kept) < len(parts)
    if get_origin(annotation) is Literal:
        return "choice", [str(part) for part in parts], False
    if get_origin(annotation) is tuple:
        kind, choices, _ = _kind(parts[0])
        return ("choices", choices, False) if kind == "choice" else ("list", [], False)
    if get_origin(annotation) is dict:
        return "pairs", [], False
    simple: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number"}
    return simple.get(annotation, "text"), [], False
