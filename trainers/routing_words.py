"""Routing: which LoRAs a prompt brings in by the trigger words that it holds. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
_SHORTEST = 2
"""Letters or digits that a trigger word has at least; a single one would be met everywhere."""


@dataclass(frozen=True)
class Routed:
    """A LoRA, by its key, that a prompt brings in, and the word by which it does, as the prompt spells it."""

    key: str
    word: str


def trigger_words(text: str) -> tuple[str, ...]:
    """'zorbo, "black cut, flat"' -> ('zorbo', 'black cut, flat'): parted by commas, a phrase in quotes whole."""
    phrases = [" ".join((first or second).split()) for first, second in _QUOTED.findall(text)]
    plain = [" ".join(word.split()) for word in re.split(r"[,;\n]", _QUOTED.sub(",", text))]
    long_enough = (word for word in phrases + plain if sum(char.isalnum() for char in word) >= _SHORTEST)
    return tuple(dict.fromkeys(long_enough))


def route(prompt: str, triggers: Mapping[str, Sequence[str]]) -> list[Routed]:
    """The LoRAs that a prompt brings in, in the order of their words in it, each once.

    triggers: a LoRA's key -> its trigger words. A word is met whole, in any case, with any space between the words of a
    phrase. Where several overlap the longest counts alone, and of LoRAs with one word the first.
    """
    owner: dict[str, str] = {}
    for key, words in triggers.items():
        for word in words:
            owner.setdefault(word.casefold(), key)
    taken: list[tuple[int, int]] = []
    found: list[tuple[int, Routed]] = []
    for word in sorted(owner, key=len, reverse=True):
        # A hyphen joins words: "non-zorbo" is another one. An apostrophe ends one: "zorbo's".
        pattern = r"(?<![\w-])" + r"\s+".join(map(re.escape, word.split())) + r"(?![\w-])"
        for match in re.finditer(pattern, prompt, re.IGNORECASE):
            start, end = match.span()
            if all(end <= first or start >= last for first, last in taken):
                taken.append((start, end))
                found.append((start, Routed(owner[word], match[0])))
    first_word: dict[str, Routed] = {}
    for _, routed in sorted(found, key=lambda pair: pair[0]):
        first_word.setdefault(routed.key, routed)
    return list(first_word.values())
