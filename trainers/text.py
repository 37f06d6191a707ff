"""Words out of files: names and values that somebody else wrote, made safe to print. No torch."""

from __future__ import annotations

import unicodedata

# Cc controls (terminal escapes), Cf invisible and direction marks, Cs lone surrogates, Co private use, Zl/Zp line breaks.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str, limit: int = 80) -> str:
    """`text` on one line without control or direction characters, cut to `limit` characters ("..." marks a cut)."""
    if len(text) <= limit and text.isascii() and text.isprintable() and text == " ".join(text.split()):
        return text  # as nearly all are
    # Only as much is looked at as could be shown: a value may be a 50 MB picture.
    head = text[: 4 * limit + 64]
    clean = " ".join("".join(" " if char in "\t\r\n" else char for char in head if _visible(char)).split())
    if len(clean) > limit or len(head) < len(text):
        return clean[: max(limit - 3, 0)] + "..."
    return clean


def name_list(names: list[str], most: int = 3) -> str:
    """The first `most` names and how many more there are: 'a, b and 70 more'."""
    shown = ", ".join(printable(name) for name in names[:most])
    rest = len(names) - most
    return f"{shown} and {rest} more" if rest > 0 else shown


def _visible(char: str) -> bool:
    return char in "\t\r\n" or unicodedata.category(char) not in _UNPRINTABLE
