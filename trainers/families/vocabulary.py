"""CLIP's vocabulary out of its merges: the base that ships leaves out vocab.json, 0.9 MB that follow from merges.txt. No torch.

CLIP's byte-pair encoding numbers the signs of all bytes, the same signs as the ends of words, what each merge makes in the
merges' order, and two marks: 49,408 words (openai/CLIP's simple_tokenizer.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = 49_408
WORDS_FILE, MERGES_FILE = "vocab.json", "merges.txt"


def byte_signs() -> list[str]:
    """A printable sign for each byte, in CLIP's order: bytes that print stand for themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [*map(chr, printable), *(chr(256 + number) for number in range(others))]


def read_merges(folder: Path) -> list[tuple[str, str]]:
    """The pairs of a tokenizer's merges.txt, in order. Raises OSError, UnicodeDecodeError, ValueError for what is none."""
    lines = (folder / MERGES_FILE).read_text(encoding="utf-8").split("\n")
    pairs = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#version"):
            first, space, second = line.partition(" ")
            if not (first and space and second):
                raise ValueError(f"line {number} of {MERGES_FILE} is no pair")
            pairs.append((first, second))
    return pairs


def number_words(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Each word of the vocabulary with its number."""
    signs = byte_signs()
    words = [*signs, *(f"{sign}</w>" for sign in signs), *(first + second for first, second in merges), START, END]
    return {word: number for number, word in enumerate(words)}


def only_merges(folder: Path) -> bool:
    """Whether a tokenizer's folder leaves its words to be told from its merges."""
    stored = ("tokenizer.json", WORDS_FILE)
    return (folder / MERGES_FILE).is_file() and not any((folder / name).is_file() for name in stored)


def write_words(folder: Path) -> None:
    """Writes the vocab.json that other programs want beside merges.txt."""
    words = json.dumps(number_words(read_merges(folder)), ensure_ascii=False, separators=(",", ":"))
    (folder / WORDS_FILE).write_text(words, encoding="utf-8")
