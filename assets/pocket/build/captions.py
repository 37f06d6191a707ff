"""Training captions of the pocket base: what is drawn, in words that people type, and the style word."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, rand, randint

VOWELS = ("a", "e", "i", "o", "u")
CONSONANT_SOUNDS = ("eu", "one", "uni")
"""Beginnings written with a vowel and spoken with a consonant, as far as the labels of the set go."""
TAGGED, TAGS_ONLY, BARE = 0.15, 0.05, 0.1
"""Shares of captions with a tag beside the label, of two tags in place of it, and without a style word."""
FULL = 0.5
"""Share of "a {label}, {style} style", the form that sample captions and prompts have."""


def with_article(label: str) -> str:
    """The label behind "a" or "an", plurals too ("a cherries"): the rule that the captions of the sample folders follow."""
    lowered = label.lower()
    vowel = lowered.startswith(VOWELS) and not lowered.startswith(CONSONANT_SOUNDS)
    return f"{'an' if vowel else 'a'} {label}"


def caption(label: str, style: str | None, tags: Sequence[str], generator: Generator) -> str:
    """A caption of the concept `label`, drawn from five forms; the same generator state gives the same caption.

    "a {label}, {style} style" (half), "{label}, {style} style" (a fifth), "a {label}, {tag}, {style} style", "a {label}"
    alone, and seldom "{tag}, {tag}, {style} style". Forms that need more tags than there are become the first form.
    style None leaves ", {style} style" out of all of them. Draws as much from the generator whatever the form.
    """
    form = float(rand(1, generator=generator))
    first, second = (int(number) for number in randint(1 << 30, (2,), generator=generator))
    words = [tag for tag in dict.fromkeys(tags) if tag != label]
    named = f", {style} style" if style else ""
    if form < BARE:
        return with_article(label)
    if form < BARE + TAGGED and words:
        return f"{with_article(label)}, {words[first % len(words)]}{named}"
    if BARE + TAGGED <= form < BARE + TAGGED + TAGS_ONLY and len(words) > 1:
        chosen = words.pop(first % len(words))
        return f"{chosen}, {words[second % len(words)]}{named}"
    if form >= BARE + TAGGED + TAGS_ONLY + FULL:
        return f"{label}{named}"
    return f"{with_article(label)}{named}"
