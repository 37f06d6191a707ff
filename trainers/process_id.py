"""Tells one process from another: by its place in a training; by its id and the time it was made, as ids are used again."""

from __future__ import annotations

import os

# (index, count) as torchrun and accelerate set them, then as the kinds of mpirun do that accelerate can start.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)


def place() -> tuple[int, int]:
    """(index, count): which one this process is of how many that train together, as their launcher says; else (0, 1)."""
    for index, count in _LAUNCHERS:
        if index in os.environ and count in os.environ:
            return int(os.environ[index]), int(os.environ[count])
    return 0, 1


def made_at(pid: int) -> float | None:
    """Seconds from the machine's start to that of the process; None when there is none, or it only waits to be buried.

    Not a time of day: setting the clock changes none of it.
    """
    import psutil

    try:
        booted = psutil.boot_time()  # first: it follows the clock, and so does what is asked next
        found = psutil.Process(pid)
        return None if found.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else float(found.create_time()) - booted
    except (psutil.Error, OSError, OverflowError, ValueError):
        return None


def is_same(pid: int, made: float) -> bool:
    """Whether the process that had this id at `made` (of `made_at`) still runs."""
    now = made_at(pid)
    return now is not None and abs(now - made) < 2
