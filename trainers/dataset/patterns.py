"""Regular expressions of a person's over many captions, in a process of their own: one that never ends is ended. No torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from trainers.errors import DatasetError

SECONDS = 5.0
"""So long a pattern may take over all captions: one like `(a+)+b` can take years over a single one."""
MAX_PATTERN = 1000
"""Characters of a pattern, and of what takes its place."""
MAX_CHARACTERS = 64 * 1024
"""A caption that grows longer is refused: a short pattern can make gigabytes of one."""


def replace_pattern(
    captions: Mapping[str, str], pattern: str, into: str, *, match_case: bool = True, seconds: float = SECONDS
) -> dict[str, str]:
    """Name -> caption with every match of `pattern` replaced by `into`, which may name groups (Python's `re`).

    Raises DatasetError when it is no pattern, when it takes longer than `seconds`, and when a caption grows too long.
    """
    if max(len(pattern), len(into)) > MAX_PATTERN:
        raise DatasetError(f"A regular expression has at most {MAX_PATTERN} characters here", "text")
    request = json.dumps({"pattern": pattern, "into": into, "match_case": match_case, "captions": dict(captions)})
    command = (sys.executable, "-P", "-m", "trainers.dataset.patterns")
    hint = "Repetitions within repetitions, as (a+)+, are the usual cause."
    try:
        done = subprocess.run(
            command,
            input=request.encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except subprocess.TimeoutExpired as error:
        raise DatasetError(f"The regular expression takes longer than {seconds:g} seconds", pattern, hint) from error
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise DatasetError(f"The regular expression could not be tried: exit code {done.returncode}", pattern, hint) from error
    if "what" in answer:
        raise DatasetError(answer["what"], answer["where"])
    changed: dict[str, str] = answer["captions"]
    return changed


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """What the process answers: `captions`, or `what` and `where` of the reason that there are none."""
    try:
        pattern = re.compile(request["pattern"], 0 if request["match_case"] else re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        return {"what": f"This is no regular expression: {error}", "where": request["pattern"]}
    changed = {}
    for name, text in request["captions"].items():
        try:
            changed[name] = _replaced(pattern, request["into"], text)
        except (re.error, IndexError) as error:
            return {"what": f"What takes its place cannot be read: {error}", "where": request["into"]}
        except OverflowError:
            return {"what": f"The caption would be longer than {MAX_CHARACTERS // 1024} KiB", "where": name}
    return {"captions": changed}


def _replaced(pattern: re.Pattern[str], into: str, text: str) -> str:
    """As `pattern.sub`, but stops as soon as it is too long. Raises OverflowError then."""
    pieces: list[str] = []
    length = at = 0
    for match in pattern.finditer(text):
        piece = match.expand(into)
        length += match.start() - at + len(piece)
        if length > MAX_CHARACTERS:
            raise OverflowError
        pieces += (text[at : match.start()], piece)
        at = match.end()
    return "".join((*pieces, text[at:]))


if __name__ == "__main__":
    # As escapes: a file name that is no Unicode goes through as it is.
    sys.stdout.write(json.dumps(answer_request(json.load(sys.stdin))))
