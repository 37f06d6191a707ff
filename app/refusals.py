"""What the window refuses: the same three sentences as every error here, with an HTTP status and the fields they are about."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from pydantic import ValidationError

from trainers.config import known_settings
from trainers.errors import BaseModelError, DatasetError, Problem, TrainingError
from trainers.settings import explain_each

NOT_FOUND, CONFLICT, INVALID, FULL = 404, 409, 422, 507


class Refusal(TrainingError):
    """A request that is not done. `problems` says it again for each setting; `status` is the HTTP status."""

    def __init__(
        self, what: str, where: str = "", hint: str = "", *, status: int = INVALID, problems: Iterable[Problem] = ()
    ) -> None:
        super().__init__(what, where, hint)
        self.status, self.problems = status, tuple(problems)


def refuse_settings(problems: Iterable[Problem]) -> Refusal:
    """The refusal of settings: the first problem in words, all of them as a list."""
    listed = tuple(problems)
    return Refusal(listed[0].what, listed[0].where, listed[0].hint, problems=listed)


def setting_problems(error: TrainingError) -> list[Problem]:
    """An error about settings as problems whose `where` is the setting's dotted name, where one can be named."""
    if isinstance(error, Refusal) and error.problems:
        return list(error.problems)
    if isinstance(error.__cause__, ValidationError):
        return explain_each(error.__cause__, known_settings())
    field = error.where
    if isinstance(error, BaseModelError):
        field = "base.model"
    elif isinstance(error, DatasetError):
        field = "dataset.images"
    what = error.what if field == error.where or not error.where else f"{error.what} ({error.where})"
    return [Problem("error", what, field, error.hint)]


def disk_refusal(error: OSError) -> Refusal:
    """An error of the disk."""
    name = str(error.filename or "")
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # no quotas on Windows
        return Refusal("The disk is full", name, "Free some space and try again; nothing else was changed.", status=FULL)
    return Refusal(f"The disk refused: {error.strerror or error}", name, "Check the folder and its permissions.", status=500)
