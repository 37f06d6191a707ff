"""Every error a person can meet, as what happened, where, and what to do about it.

    TrainingError                anything that ends a command with a sentence instead of a traceback
    |-- SettingError             a setting is unknown, out of its limits, or contradicts another
    |-- DatasetError             the image folder cannot be used
    |-- BaseModelError           the base model is missing, incomplete or of another family
    |-- AdapterFileError         a LoRA file cannot be read or does not fit the base
    |-- RunFolderError           a run folder is taken, locked, missing or not a run
    |   `-- ChangedError         what went into a run is not what it was when the run began
    |-- DivergedError            the loss or a gradient is no longer a finite number
    `-- LostProcessError         one of several processes that train together is gone

`Problem` is the same three sentences as a value, for checks that list all they find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "advice", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """One thing found wrong.

    `error` ends the command; `advice` ends it too unless `--force` is given; `warning` is told and passes; `note` says
    what was done about a file.
    """

    severity: Severity
    what: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        return sentence(self.what, self.where, self.hint)


def sentence(what: str, where: str = "", hint: str = "") -> str:
    """'What happened (where). What to do.' with the empty parts left out."""
    text = what.rstrip(".") + (f" ({where})" if where else "") + "."
    return f"{text} {hint}" if hint else text


class TrainingError(Exception):
    """Base of all errors that are told to a person: `what` happened, `where`, and a `hint` on what to do."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        super().__init__(sentence(what, where, hint))
        self.what, self.where, self.hint = what, where, hint


class SettingError(TrainingError):
    """A setting is unknown, outside its limits or contradicts another. Raised before anything loads."""

    exit_code = 2


class DatasetError(TrainingError):
    """The image folder is missing, empty, or holds no picture that can be read."""

    exit_code = 2


class BaseModelError(TrainingError):
    """The base model is missing, incomplete, or of another family than asked for."""

    exit_code = 2


class AdapterFileError(TrainingError):
    """A LoRA file is damaged, is no LoRA, or does not fit the base model."""

    exit_code = 2


class RunFolderError(TrainingError):
    """A run folder already holds a run, is held by another process, or holds no run."""

    exit_code = 2


class ChangedError(RunFolderError):
    """Base, pictures, captions or settings are not what they were when the run began; `--force` goes on."""


class DivergedError(TrainingError):
    """The loss or a gradient is no longer finite; nothing non-finite is ever exported."""


class LostProcessError(TrainingError):
    """One of the processes that train together has died or failed, so that the others cannot go on."""


class NoSpaceError(OSError):
    """A file did not fit: the disk, or what this person may put on it, is full. `needed` and `free` in bytes."""

    def __init__(self, number: int, path: str, needed: int, free: int) -> None:
        super().__init__(number, "No space left", path)
        self.needed, self.free = needed, free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of its GPU was too small; torch has no error of its own for the first."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or text.endswith("could not create a primitive"):  # oneDNN's words
        return True
    return any(sign in text for sign in ("out of memory", "can't allocate memory", "can't start new thread"))
