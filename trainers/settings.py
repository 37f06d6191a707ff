"""Base of all settings: unknown names refused, values frozen, help taken from the docstring under each field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from trainers.errors import Problem, SettingError


class Settings(BaseModel):
    """A group of settings. The docstring under a field is its help text in the window, the CLI and the README."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def iterate_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, pydantic FieldInfo) of every leaf setting; a union of groups yields each member's fields once."""
    seen: set[str] = set()
    for name, field in model.model_fields.items():
        groups = [part for part in (field.annotation, *get_args(field.annotation)) if _is_group(part)]
        for group in groups:
            for dotted, leaf in iterate_fields(group, f"{prefix}{name}."):
                if dotted not in seen:
                    seen.add(dotted)
                    yield dotted, leaf
        if not groups:
            yield prefix + name, field


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def explain(error: ValidationError, known: list[str]) -> SettingError:
    """The first failure of a pydantic validation as one sentence that names the dotted setting."""
    first = explain_each(error, known)[0]
    return SettingError(first.what, hint=first.hint)


def explain_each(error: ValidationError, known: list[str]) -> list[Problem]:
    """Every failure of a pydantic validation as a problem; `where` is the dotted setting, empty for a clash of several."""
    return [_explain(failure, known) for failure in error.errors()]


def _explain(first: Mapping[str, Any], known: list[str]) -> Problem:
    # A discriminated union puts the chosen type into the location: optimizer.adamw.learning_rate.
    parts = [str(part) for part in first["loc"]]
    kind = parts.pop(1) if len(parts) > 2 and f"{parts[0]}.type" in known else ""
    while len(parts) > 1 and parts[-1].isdecimal():  # the place in a list
        del parts[-1]
    where = ".".join(parts)
    if first["type"] == "extra_forbidden" and kind and where in known:
        return Problem("error", f"There is no {where} with {parts[0]}.type = {kind}", where, "Leave it out.")
    if first["type"] == "extra_forbidden":
        name = where.split(".")[-1]
        near = [k for k in known if k.split(".")[-1] == name][:1] or difflib.get_close_matches(where, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See `impasto presets`."
        return Problem("error", f"There is no setting {where!r}", where, hint)
    reason = str(first["msg"]).removeprefix("Value error, ")
    given = first.get("input")
    shown = f" = {given!r}" if isinstance(given, str | int | float) else ""
    hint = "Choose a value within these limits." if first["type"] in _LIMITS else ""
    what = f"{where}{shown}: {reason[:1].lower()}{reason[1:]}" if where else reason
    return Problem("error", what, where, hint)


_LIMITS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "literal_error", "union_tag_invalid"}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, group by group. A group whose `type` changes starts afresh: its old numbers meant another."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            same = "type" not in value or "type" not in old or value["type"] == old["type"]
            result[key] = merge(old, value) if same else dict(value)
        else:
            result[key] = value
    return result
