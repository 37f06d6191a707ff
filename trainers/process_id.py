"""Tells one process from another: ids are used again, the pair of id and time since boot is not."""

from __future__ import annotations


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
