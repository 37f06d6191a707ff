"""Captions with learned words in them -> tokens: a word's vectors stand in them as negative numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds any of `words` standing alone, in any case, the first that fits: a match's lastindex, from 1."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(f'({re.escape(word)})' for word in words)})(?!\w)", re.IGNORECASE)


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone, without marks, all of them."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text.strip() else []


def tokens_with_words(tokenizer: Any, caption: str, words: Mapping[str, int], length: int) -> list[int]:
    """Exactly `length` numbers: begin, the caption cut to what fits, end, padding.

    `words`: learned word -> how many vectors it has; they are numbered word after word. The longest word counts.
    """
    numbers: dict[str, list[int]] = {}
    first = 1
    for word, count in words.items():
        numbers[word] = [-number for number in range(first, first + count)]
        first += count
    longest = sorted(words, key=lambda word: (-len(word), word))
    inside: list[int] = []
    place = 0
    for match in word_pattern(longest).finditer(caption):
        inside += plain_tokens(tokenizer, caption[place : match.start()])
        inside += numbers[longest[(match.lastindex or 1) - 1]]
        place = match.end()
    inside += plain_tokens(tokenizer, caption[place:])
    whole = [tokenizer.bos_token_id, *inside[: length - 2], tokenizer.eos_token_id]
    return whole + [tokenizer.pad_token_id] * (length - len(whole))
