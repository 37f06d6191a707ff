"""One change of many captions at once: text before or behind, replaced; tags added, removed, sorted. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from trainers.dataset.captions import MAX_BYTES, clean_caption
from trainers.dataset.patterns import replace_pattern
from trainers.errors import DatasetError

Kind = Literal["prepend", "append", "replace", "add", "remove", "sort", "unique"]
"""prepend, append: text in front or behind. replace: each place of a text. add, remove: tags. sort: tags. unique: each once."""
_OPENS = tuple(",.;:!?)]}'")
"""What stands behind a word without a space."""


@dataclass(frozen=True)
class Operation:
    """What to do to every caption. A tag is what stands between commas; tags are the same in upper and lower case."""

    kind: Kind
    text: str = ""
    """What is put, sought, or the tags, separated by commas."""
    into: str = ""
    """What takes the place of `text`; with a pattern it may name groups, as \\1."""
    pattern: bool = False
    """Whether `text` is a regular expression, in the form of Python's `re`."""
    match_case: bool = True
    """Whether upper and lower case differ in what is sought."""
    front: bool = False
    """Whether added tags go in front."""
    by: Literal["name", "frequency"] = "name"
    """Sort by the alphabet, or the tags first that most captions have."""
    keep: int = 0
    """How many leading tags stay in their places when the rest is sorted, >= 0."""


def split_tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption, without empty ones."""
    return [tag for part in caption.split(",") if (tag := clean_caption(part))]


def count_tags(captions: Iterable[str]) -> dict[str, int]:
    """Tag -> how many captions have it, the commonest first; told in the form that is met first."""
    counts: Counter[str] = Counter()
    forms: dict[str, str] = {}
    for caption in captions:
        for tag in {one.casefold(): one for one in reversed(split_tags(caption))}.values():
            counts[tag.casefold()] += 1
            forms.setdefault(tag.casefold(), tag)
    return {forms[key]: count for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def change_captions(captions: Mapping[str, str], operation: Operation, names: Iterable[str] | None = None) -> dict[str, str]:
    """Name -> new caption, of those alone that the operation changes. `names`: only these; what is frequent is told by all.

    Captions are cleaned as they are read. Raises DatasetError for an operation without its text, a pattern that is none
    or takes too long, and a caption that would become longer than is read.
    """
    names = list(captions if names is None else dict.fromkeys(names))
    _check(operation)
    chosen = {name: captions[name] for name in names}
    if operation.kind == "replace" and operation.pattern:
        changed = replace_pattern(chosen, operation.text, operation.into, match_case=operation.match_case)
    else:
        ranks = {tag.casefold(): rank for rank, tag in enumerate(count_tags(captions.values()))} if _ranks(operation) else {}
        changed = {name: change_caption(text, operation, ranks) for name, text in chosen.items()}
    changed = {name: clean_caption(text) for name, text in changed.items()}
    for name, text in changed.items():
        if len(text.encode("utf-8", "replace")) > MAX_BYTES:
            hint = "Only about 75 tokens of it are read. Put in less."
            raise DatasetError(f"The caption would be longer than {MAX_BYTES // 1024} KiB", name, hint)
    return {name: text for name, text in changed.items() if text != captions[name]}


def change_caption(caption: str, operation: Operation, ranks: Mapping[str, int] | None = None) -> str:
    """One caption changed; without regular expressions. `ranks`: tag in lower case -> its place when sorted by frequency."""
    text = operation.text
    match operation.kind:
        case "prepend":
            return clean_caption(f"{text} {caption}")
        case "append":
            between = "" if not caption or clean_caption(text).startswith(_OPENS) else " "
            return clean_caption(f"{caption}{between}{clean_caption(text)}")
        case "replace":
            return clean_caption(_replaced(caption, operation))
    return ", ".join(_changed_tags(split_tags(caption), operation, ranks or {}))


def _changed_tags(tags: list[str], operation: Operation, ranks: Mapping[str, int]) -> list[str]:
    given = split_tags(operation.text)
    match operation.kind:
        case "add":
            there = {tag.casefold() for tag in tags}
            new = [tag for tag in _each_once(given) if tag.casefold() not in there]
            return new + tags if operation.front else tags + new
        case "remove":
            unwanted = {tag.casefold() for tag in given}
            return [tag for tag in tags if tag.casefold() not in unwanted]
        case "unique":
            return _each_once(tags)
    kept, rest = tags[: operation.keep], tags[operation.keep :]
    last = len(ranks)
    by_name = operation.by == "name"
    return kept + sorted(rest, key=lambda tag: (0 if by_name else ranks.get(tag.casefold(), last), tag.casefold(), tag))


def _replaced(caption: str, operation: Operation) -> str:
    if operation.match_case:
        return caption.replace(operation.text, operation.into)
    return re.sub(re.escape(operation.text), lambda _: operation.into, caption, flags=re.IGNORECASE)


def _each_once(tags: list[str]) -> list[str]:
    """Each tag where it is met first: an early one, as the trigger, counts most."""
    first: dict[str, str] = {}
    for tag in tags:
        first.setdefault(tag.casefold(), tag)
    return list(first.values())


def _ranks(operation: Operation) -> bool:
    return operation.kind == "sort" and operation.by == "frequency"


def _check(operation: Operation) -> None:
    """A search for nothing would be met everywhere, and text of blanks changes nothing."""
    if operation.kind in ("sort", "unique"):
        return
    if not operation.text if operation.kind == "replace" else not clean_caption(operation.text):
        wanted = {"replace": "what is to be replaced", "add": "the tag", "remove": "the tag"}.get(operation.kind, "the text")
        raise DatasetError(f"Type {wanted} first", "text")
