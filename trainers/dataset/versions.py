"""A version of a dataset: hashes of its pictures, and its captions, crops and what is left out. No picture is kept.

A version is its own content: it is known by the SHA-256 of its bytes, so two runs on the same dataset name the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.dataset.edits import Edits, write_edits
from trainers.dataset.folder import Scan
from trainers.errors import DatasetError


@dataclass(frozen=True)
class Version:
    """What a version holds."""

    pictures: Mapping[str, str]
    """Name of a picture -> SHA-256 of its file; those that are trained on."""
    edits: Mapping[str, Any]
    """As a file of edits has them: captions, excluded, and whatever else belongs to a picture by its name."""

    @property
    def captions(self) -> Mapping[str, str]:
        """Name -> caption without trigger word; a picture that is not in it is learnt by its file's name."""
        return dict(self.edits.get("captions", {}))


@dataclass(frozen=True)
class Changes:
    """What is different in a later version. All names in order."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    """Pictures whose files have other bytes under the same name."""
    captions: tuple[tuple[str, str, str], ...] = ()
    """(name, before, after); "" is none."""
    other: tuple[str, ...] = ()
    """Pictures of which something else was changed, such as the crop."""


def write_version(pictures: Mapping[str, str], edits: Edits) -> bytes:
    """A version as its file holds it, in a fixed order."""
    values = {"pictures": dict(sorted(pictures.items())), "edits": json.loads(write_edits(edits))}
    return json.dumps(values, ensure_ascii=False, indent=1).encode("utf-8", "replace")


def version_of(scan: Scan, edits: Edits | None) -> bytes:
    """The version that a run trains on whose folder was scanned, with these edits; None: the captions beside the pictures."""
    beside = {example.name: example.caption for example in scan.examples if example.caption_source == "file"}
    return write_version({example.name: example.sha256 for example in scan.examples}, edits or Edits(beside))


def name_version(data: bytes) -> str:
    """The name of a version by its bytes: SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_version(path: Path) -> Version:
    """Reads a version whose file is called by its name. Raises DatasetError when it is missing or is not what it was."""
    hint = "Choose another version."
    try:
        data = path.read_bytes()
        values = json.loads(data)
        version = Version({str(name): str(value) for name, value in values["pictures"].items()}, dict(values["edits"]))
        dict(version.captions)
    except OSError as error:
        raise DatasetError(f"This version of the dataset cannot be read: {error.strerror}", str(path), hint) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError("This version of the dataset is damaged", str(path), hint) from error
    if name_version(data) != path.stem:
        raise DatasetError("This version of the dataset was changed since it was written", str(path), hint)
    return version


def compare_versions(before: Version, now: Version) -> Changes:
    """What is different in `now`."""
    both = sorted(before.pictures.keys() & now.pictures.keys())
    told = [(name, before.captions.get(name, ""), now.captions.get(name, "")) for name in both]
    captions = tuple(one for one in told if one[1] != one[2])
    return Changes(
        added=tuple(sorted(now.pictures.keys() - before.pictures.keys())),
        removed=tuple(sorted(before.pictures.keys() - now.pictures.keys())),
        replaced=tuple(name for name in both if before.pictures[name] != now.pictures[name]),
        captions=captions,
        other=tuple(name for name in both if _others(before, name) != _others(now, name)),
    )


def _others(version: Version, name: str) -> dict[str, Any]:
    parts = version.edits.items()
    return {kind: part.get(name) for kind, part in parts if isinstance(part, dict) and kind != "captions" and name in part}
