"""Versions of a project's dataset: each run pins the one it trains on; all can be compared, and gone back to.

They lie in the project as dataset/versions/HASH.json, and each run keeps its own as dataset.json. Going back changes
captions, crops and what is left out, never a picture: one that has gone stays away, one that is new is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.history import change
from app.planning import take_edits
from app.projects import Project
from app.refusals import NOT_FOUND, Refusal
from app.scanning import Scanner
from trainers.dataset.edits import Edits
from trainers.dataset.versions import Changes, Version, compare_versions, name_version, read_version, write_version
from trainers.errors import DatasetError
from trainers.files import write_atomically
from trainers.run_folder import RunFolder


@dataclass(frozen=True)
class Pinned:
    """A version of a project, and what it changed against the one that was pinned before it."""

    name: str
    pinned: float
    """When it was first pinned, in seconds since 1970."""
    version: Version
    changes: Changes | None
    """None of the first one."""
    runs: tuple[str, ...]
    """Those that trained on it, oldest first."""


def pin(project: Project, scanner: Scanner, edits: Edits | None = None) -> bytes:
    """Writes down the dataset as it is, once for each content, `edits` being those of `take_edits`. Returns the bytes."""
    data = _present(project, scanner, edits)
    path = _folder(project) / f"{name_version(data)}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return data


def present_name(project: Project, scanner: Scanner) -> str:
    """The name of the version that the dataset is now, pinned or not."""
    return name_version(_present(project, scanner))


def list_versions(project: Project, runs: Sequence[RunFolder]) -> list[Pinned]:
    """All versions, the newest first; `runs` are the project's. One that is damaged is left out."""
    used: dict[str, list[str]] = {}
    for run in runs:
        if run.dataset.is_file():
            used.setdefault(name_version(run.dataset.read_bytes()), []).append(run.path.name)
    found: list[Pinned] = []
    files = [path for path in _folder(project).glob("*.json") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name)):
        try:
            version = read_version(path)
        except DatasetError:
            continue
        changes = compare_versions(found[-1].version, version) if found else None
        found.append(Pinned(path.stem, path.stat().st_mtime, version, changes, tuple(used.get(path.stem, ()))))
    return found[::-1]


@dataclass(frozen=True)
class WentBack:
    """What going back came to."""

    before: str
    """The version that the dataset was, now pinned too: going back to it undoes this."""
    gone: tuple[str, ...]
    """Pictures of the version that are not there any more, or not as they were."""
    left_out: tuple[str, ...]
    """Pictures that the version did not have."""


def go_back(project: Project, scanner: Scanner, name: str) -> WentBack:
    """Makes captions, crops and exclusions those of a version. Raises Refusal when there is none of that name."""
    path = _folder(project) / f"{name}.json"
    if not re.fullmatch(r"[0-9a-f]{64}", name) or not path.is_file():
        raise Refusal("There is no such version of this dataset", name[:80], "Load the page again.", status=NOT_FOUND)
    version = read_version(path)
    before = name_version(pin(project, scanner))
    look = scanner.look(project)
    there = look.examples.keys()
    own = sorted(version.pictures.keys() & there)
    excluded = set(version.edits.get("excluded", ())) | (there - version.pictures.keys())
    crops = version.edits.get("crops") or {}
    now = {name: one.caption if one.caption_source == "file" else "" for name, one in look.examples.items()}
    captions: dict[str, str | None] = {name: text for name in own if now[name] != (text := version.captions.get(name, ""))}
    if not project.is_own:  # where a file beside the picture says the same, no edit is left
        beside = scanner.beside(project)
        captions |= {name: None for name in own if beside.get(name) == version.captions.get(name, "")}
    change(  # one step, as all that a person does to pictures, so that it is taken back among them
        project,
        scanner,
        "back to a version",
        captions=captions,
        excluded={name: name in excluded for name in there},
        crops={name: tuple(crops[name]) if name in crops else None for name in there},
    )
    same = {name for name in own if look.examples[name].sha256 == version.pictures[name]}
    new = there - version.pictures.keys() - look.edits.excluded
    return WentBack(before, tuple(sorted(version.pictures.keys() - same)), tuple(sorted(new)))


def _present(project: Project, scanner: Scanner, edits: Edits | None = None) -> bytes:
    look = scanner.look(project)
    pictures = {name: one.sha256 for name, one in look.examples.items() if name not in look.edits.excluded}
    return write_version(pictures, edits or take_edits(project, scanner))


def _folder(project: Project) -> Path:
    """Where they lie; those of another folder of pictures apart, as its edits are."""
    source = "" if project.is_own else hashlib.sha256(project.source.encode("utf-8", "replace")).hexdigest()[:12]
    return project.folder / "dataset" / "versions" / source
