"""How the C library hands memory out and takes it back, where it is glibc's: a base's weights and a step's tensors differ.

While a base is read and laid out, each large tensor gets pages of its own, which go back as soon as it is freed: kept for
others, they would lie in the arena of the thread that read them, beside the same weights in their new form. From step to
step the same sizes are asked for again, and pages given back would be asked for, and zeroed, at every step.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

_TRIM, _MAPPED = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_OWN_PAGES = 1 << 18
_LARGEST = 32 << 20
"""The most that glibc takes for either use."""


def give_back_at_once() -> None:
    """For loading: freed tensors of 256 KB or more go back to the system."""
    _set(_MAPPED, _OWN_PAGES)


def keep_for_the_next_step() -> None:
    """For training: freed tensors of up to 32 MB stay for the next ones."""
    _set(_MAPPED, _LARGEST)
    _set(_TRIM, 1 << 30)


def _set(what: int, value: int) -> None:
    """Does nothing where there is another C library."""
    if (library := _glibc()) is not None:
        library.mallopt(what, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None
