"""Looks over a project's pictures in the background, one at a time, and remembers what it measured by their bytes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from app.planning import config_of
from app.projects import Project
from app.scanning import Look
from trainers.dataset.folder import Example
from trainers.dataset.prepare import place_examples
from trainers.dataset.quality import Kind, Quality, find_flaws, measure_picture
from trainers.errors import DatasetError
from trainers.files import open_regular, write_atomically

MOST = 5000
"""Pictures of a folder that are looked at: some minutes. The others are told."""
_MAX_BYTES = 64 << 20
_UNREADABLE = Quality(0.0, 0.0, 0.0, b"")
_VERSION = 1  # to be raised when the same picture measures otherwise


class FlawAnswer(BaseModel):
    """What may be wrong with these pictures, and which of them to leave out if it is."""

    kind: Kind
    pictures: list[str]
    reason: str


class InspectionAnswer(BaseModel):
    """GET /api/projects/{id}/inspection: how far it is, and what was found until now among the pictures not left out."""

    done: int
    total: int
    left: int
    """Pictures that are not looked at, because there are too many."""
    flaws: list[FlawAnswer]


class Inspector:
    """Measures the pictures of the project that was asked for last, in one thread. May be called from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Quality] = {}
        self._loaded: set[Path] = set()
        self._waiting: list[Example] = []
        self._at = ""  # sha256 of the picture that is being measured
        self._file = Path()
        self._thread: threading.Thread | None = None

    def look(self, project: Project, look: Look) -> InspectionAnswer:
        """What is known now; what is not is measured from here on. Asked again, it goes on where it is."""
        used = [example for example in look.scan.examples if example.name not in look.edits.excluded]
        with self._lock:
            file = project.folder / "quality.json"
            if file not in self._loaded:
                self._loaded.add(file)
                self._known |= _read(file)
            waiting = {example.sha256: example for example in used[:MOST] if example.sha256 not in self._known}
            waiting.pop(self._at, None)
            self._waiting, self._file = list(waiting.values())[::-1], file
            if waiting and self._thread is None:
                self._thread = threading.Thread(target=self._measure, daemon=True, name="look over pictures")
                self._thread.start()
            qualities = [self._known.get(example.sha256) for example in used]
        found = config_of(project)
        flaws = find_flaws(used, _measured(qualities), place_examples(*found, used) if found else [])
        return InspectionAnswer(
            done=sum(quality is not None for quality in qualities[:MOST]),
            total=len(used[:MOST]),
            left=len(used[MOST:]),
            flaws=[FlawAnswer(kind=flaw.kind, pictures=list(flaw.pictures), reason=flaw.reason) for flaw in flaws],
        )

    def close(self) -> None:
        """Ends after the picture that it is at; what was measured is kept."""
        with self._lock:
            self._waiting = []
            thread = self._thread
        if thread:
            thread.join(5)

    def _measure(self) -> None:
        fresh: dict[Path, dict[str, Quality]] = {}
        while True:
            with self._lock:
                example, file = self._waiting.pop() if self._waiting else None, self._file
                self._at = example.sha256 if example else ""
                if example is None and not fresh:
                    self._thread = None  # under the lock: whoever asks from now on starts another
                    return
            if example is None:
                for place, measured in fresh.items():
                    _add(place, measured)
                fresh = {}
                continue
            try:
                quality = measure_picture(example.path)
            except DatasetError:  # the scan tells it, or the training will
                quality = _UNREADABLE
            with self._lock:
                self._known[example.sha256] = quality
            fresh.setdefault(file, {})[example.sha256] = quality
            if len(fresh[file]) >= 500:
                _add(file, fresh.pop(file))


def _measured(qualities: Sequence[Quality | None]) -> list[Quality | None]:
    return [None if quality == _UNREADABLE else quality for quality in qualities]


def _add(file: Path, measured: dict[str, Quality]) -> None:
    """Writes more into a project's file. One that cannot be written is only measured again some day."""
    with contextlib.suppress(OSError):
        if not file.parent.is_dir():  # the project was removed meanwhile
            return
        values: dict[str, Any] = {
            sha256: [quality.sharpness, quality.dark, quality.bright, quality.look.hex()]
            for sha256, quality in (_read(file) | measured).items()
        }
        write_atomically(file, json.dumps({"version": _VERSION, "pictures": values}).encode(), fsync=False)


def _read(file: Path) -> dict[str, Quality]:
    """What a project's file holds; nothing where it is missing, damaged or of another version."""
    try:
        with open_regular(file) as opened:
            values = json.loads(opened.read(_MAX_BYTES))
        if values["version"] != _VERSION:
            return {}
        return {
            sha256: Quality(float(sharpness), float(dark), float(bright), bytes.fromhex(look))
            for sha256, (sharpness, dark, bright, look) in values["pictures"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
