"""A person's edits of a folder that stay out of it: captions before those beside the pictures, what is left out, crops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.errors import DatasetError, Problem
from trainers.files import open_regular

MAX_BYTES = 64 << 20
"""A larger file is refused unread: a thousand long captions need one of these megabytes."""


@dataclass(frozen=True)
class Edits:
    """What is to be read instead of a folder's own captions. Names are those of a scan: posix, relative to the folder."""

    captions: Mapping[str, str] = field(default_factory=dict)
    """Name of a picture -> its caption, without trigger word. An empty one counts as an empty caption file."""
    excluded: frozenset[str] = frozenset()
    """Names of pictures that are left out."""
    crops: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a picture -> where its crop lies, from left and from top, each in [0, 1]; all others have 0.5, the middle."""

    def told_of(self, names: Sequence[str]) -> list[Problem]:
        """That those of `names` are left out which are excluded: each by its name, or many in one line."""
        out = [name for name in names if name in self.excluded]
        if len(out) > 3:
            return [Problem("note", f"Excluded by you: {len(out)} pictures ({', '.join(out[:3])}, ...); left out")]
        return [Problem("note", "Excluded by you; left out", name) for name in out]


def read_edits(path: Path) -> Edits:
    """Reads `{"captions": {NAME: TEXT}, "excluded": [NAME], "crops": {NAME: [X, Y]}}`; any part may be missing.

    Raises DatasetError naming the file when it is missing, unreadable, or holds anything else: training on captions that
    a person believes to have changed is worse than not training.
    """
    where = str(path)
    hint = 'Expected {"captions": {"cat.png": "a cat"}, "excluded": ["dog.png"]}; or leave dataset.edits empty.'
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise DatasetError("The file with edited captions is missing", where, "Put it back, or start a new run.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DatasetError(f"The file with edited captions cannot be read: {reason}", where, "Check the path.") from error
    if len(data) > MAX_BYTES:
        raise DatasetError(f"The file with edited captions is larger than {MAX_BYTES >> 20} MiB", where, hint)
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"The file with edited captions is not JSON: {error}", where, hint) from error
    return _checked(values, where, hint)


def write_edits(edits: Edits) -> bytes:
    """The file's content, in a fixed order, ready to be written whole."""
    values: dict[str, Any] = {"captions": dict(sorted(edits.captions.items())), "excluded": sorted(edits.excluded)}
    if edits.crops:
        values["crops"] = {name: list(crop) for name, crop in sorted(edits.crops.items())}
    return json.dumps(values, ensure_ascii=False, indent=1).encode("utf-8", "replace")


def _checked(values: Any, where: str, hint: str) -> Edits:
    if not isinstance(values, dict):
        raise DatasetError("The file with edited captions holds no names", where, hint)
    unknown = sorted(values.keys() - {"captions", "excluded", "crops"})
    if unknown:
        raise DatasetError(f"The file with edited captions holds the unknown part {unknown[0]!r}", where, hint)
    captions, excluded, crops = values.get("captions", {}), values.get("excluded", []), values.get("crops", {})
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise DatasetError("In the file with edited captions, `captions` is not text by name", where, hint)
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise DatasetError("In the file with edited captions, `excluded` is not a list of names", where, hint)
    if not isinstance(crops, dict) or not all(_is_crop(crop) for crop in crops.values()):
        raise DatasetError("In the file with edited captions, `crops` is not two numbers from 0 to 1 by name", where, hint)
    return Edits(captions, frozenset(excluded), {name: (float(x), float(y)) for name, (x, y) in crops.items()})


def _is_crop(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(part, int | float) and not isinstance(part, bool) and 0 <= part <= 1 for part in value)
