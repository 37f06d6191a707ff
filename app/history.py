"""What a person did to a project's pictures, step by step, to be taken back and done again: captions, left out, crops."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from app.captions import Written, check_names, find_written, lay_captions, plan_captions
from app.projects import Project, change_edits
from app.refusals import CONFLICT, Refusal
from app.scanning import Look, Scanner
from trainers.files import open_regular, write_atomically

MAX_STEPS = 200
"""Of more, the oldest can no longer be taken back."""
MAX_BYTES = 64 << 20
"""Of one step: every caption of a very large folder, before and after."""
# Two requests at once must not both take the same step back.
_stepping = threading.RLock()

Side = TypeVar("Side")
Crop = tuple[float, float]
"""Where the crop lies, from left and from top, each in [0, 1]; 0.5 is the middle."""


@dataclass(frozen=True)
class Step:
    """One thing that was done: name of a picture -> how it was before and after."""

    label: str
    captions: dict[str, tuple[Written, Written]] = field(default_factory=dict)
    excluded: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    crops: dict[str, tuple[Crop | None, Crop | None]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The pictures that it is about."""
        return {*self.captions, *self.excluded, *self.crops}


@dataclass(frozen=True)
class Standing:
    """What would be taken back, and what would be done again; "" where there is nothing. How many of each there are."""

    undo: str
    redo: str
    undos: int
    redos: int


@dataclass(frozen=True)
class Stepped:
    """What a step back or forward changed, and the pictures that had been changed elsewhere since, which stay as they are."""

    label: str
    changed: frozenset[str]
    left: frozenset[str]


def history_folder(project: Project) -> Path:
    """Where the steps lie: edits belong to a source, and so do they."""
    source = hashlib.sha256(project.source.encode("utf-8", "replace")).hexdigest()[:12]
    return project.folder / "history" / source


def find_standing(project: Project) -> Standing:
    """What can be taken back and done again."""
    with _stepping:
        at, numbers = _position(project), _numbers(project)
        before, after = [number for number in numbers if number <= at], [number for number in numbers if number > at]
        labels = [_read(project, number) if number is not None else None for number in (_last(before), _first(after))]
        undo, redo = (step.label if step else "" for step in labels)
        return Standing(undo, redo, len(before) if undo else 0, len(after) if redo else 0)


def change(
    project: Project,
    scanner: Scanner,
    label: str,
    captions: Mapping[str, str | None] | None = None,
    excluded: Mapping[str, bool] | None = None,
    crops: Mapping[str, Crop | None] | None = None,
) -> Step:
    """Changes pictures as one step, which can be taken back. What could have been done again is forgotten.

    A caption of None is the one beside the picture, without an edit, in a folder that the person named.
    Raises Refusal, with nothing changed, for a picture that is not there and a text that is no caption.
    """
    with _stepping:
        look = scanner.look(project)
        check_names(look, {**(excluded or {}), **(crops or {})})
        edits = look.edits
        step = Step(
            label[:200],
            _differing(_planned(project, look, captions or {})),
            _differing({name: (name in edits.excluded, out) for name, out in (excluded or {}).items()}),
            _differing({name: (edits.crops.get(name), crop) for name, crop in (crops or {}).items()}),
        )
        if step.names:
            at = _position(project)
            for number in _numbers(project):
                if number > at or number <= at + 1 - MAX_STEPS:
                    _file(project, number).unlink(missing_ok=True)
            # Written first: after a power cut in between, it is what can be done again.
            write_atomically(_file(project, at + 1), json.dumps(asdict(step)).encode("ascii"), fsync=False)
            _lay(project, look, step, step.names, 1)
            _set_position(project, at + 1)
        return step


def _planned(project: Project, look: Look, captions: Mapping[str, str | None]) -> dict[str, tuple[Written, Written]]:
    plain = [name for name, text in captions.items() if text is None]
    check_names(look, dict.fromkeys(plain))
    planned = plan_captions(project, look, {name: text for name, text in captions.items() if text is not None})
    for name in plain:
        before = find_written(project, look, name)
        planned[name] = before, Written(None, before.file)
    return planned


def undo(project: Project, scanner: Scanner) -> Stepped:
    """Takes the last step back. Raises Refusal when there is none."""
    return _walk(project, scanner, 0)


def redo(project: Project, scanner: Scanner) -> Stepped:
    """Does the step again that was taken back. Raises Refusal when there is none."""
    return _walk(project, scanner, 1)


def _walk(project: Project, scanner: Scanner, side: int) -> Stepped:
    """One step to the side before (0) or after (1)."""
    with _stepping:
        at, numbers = _position(project), _numbers(project)
        number = _first([n for n in numbers if n > at]) if side else _last([n for n in numbers if n <= at])
        step = _read(project, number) if number is not None else None
        if step is None or number is None:
            raise Refusal("There is nothing to do again" if side else "There is nothing to undo", status=CONFLICT)
        look = scanner.look(project)
        there = {name for name in step.names if name in look.examples}
        left = {name for name in there if not _is_as_left(project, look, step, name)}
        _lay(project, look, step, there - left, side)
        _set_position(project, number if side else number - 1)
        return Stepped(step.label, frozenset(there - left), frozenset(left | (step.names - there)))


def _is_as_left(project: Project, look: Look, step: Step, name: str) -> bool:
    """Whether a picture is as it was before or after the step; else somebody has changed it by another way."""
    edits = look.edits
    return (
        (name not in step.captions or find_written(project, look, name) in step.captions[name])
        and (name not in step.excluded or (name in edits.excluded) in step.excluded[name])
        and (name not in step.crops or edits.crops.get(name) in step.crops[name])
    )


def _lay(project: Project, look: Look, step: Step, names: set[str], side: int) -> None:
    captions = {name: sides[side] for name, sides in step.captions.items() if name in names}
    if captions:
        lay_captions(project, look, captions)
    excluded = {name: sides[side] for name, sides in step.excluded.items() if name in names}
    crops = {name: sides[side] for name, sides in step.crops.items() if name in names}
    change_edits(project, {}, excluded, crops)


def _differing(sides: Mapping[str, tuple[Side, Side]]) -> dict[str, tuple[Side, Side]]:
    return {name: pair for name, pair in sides.items() if pair[0] != pair[1]}


def _first(numbers: list[int]) -> int | None:
    return numbers[0] if numbers else None


def _last(numbers: list[int]) -> int | None:
    return numbers[-1] if numbers else None


def _file(project: Project, number: int) -> Path:
    return history_folder(project) / f"{number:08}.json"


def _numbers(project: Project) -> list[int]:
    """The steps that are there, oldest first."""
    folder = history_folder(project)
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()) if folder.is_dir() else []


def _position(project: Project) -> int:
    """The number of the last step that stands; 0 before the first."""
    with contextlib.suppress(OSError, ValueError):
        return int((history_folder(project) / "position").read_text(encoding="ascii"))
    return 0


def _set_position(project: Project, number: int) -> None:
    write_atomically(history_folder(project) / "position", b"%d" % number, fsync=False)


def _read(project: Project, number: int) -> Step | None:
    """A step from its file; None where that is damaged: what it was about then stays as it is."""
    try:
        with open_regular(_file(project, number)) as file:
            return _parsed(json.loads(file.read(MAX_BYTES)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _parsed(values: dict[str, Any]) -> Step:
    def pair(crop: list[float] | None) -> Crop | None:
        return None if crop is None else (float(crop[0]), float(crop[1]))

    captions = {name: (Written(**before), Written(**after)) for name, (before, after) in values["captions"].items()}
    crops = {name: (pair(before), pair(after)) for name, (before, after) in values["crops"].items()}
    excluded = {name: (bool(before), bool(after)) for name, (before, after) in values["excluded"].items()}
    return Step(str(values["label"]), captions, excluded, crops)
