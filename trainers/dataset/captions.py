"""Caption text: reads it from any common encoding, falls back to the file name, adds the trigger word, varies it per step."""

from __future__ import annotations

import codecs
import itertools
import random as random_module
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.errors import DatasetError
from trainers.files import open_regular

MAX_BYTES = 64 * 1024
"""A caption is read up to here; a text encoder sees about 75 tokens of it."""

# UTF-32 first: its little-endian mark begins with the one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but white space
# Zero-width and direction-changing characters: invisible, and tokens of their own to a text encoder.
# The joiners U+200C and U+200D stay: emoji and several scripts are written with them.
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
# Names that cameras, browsers and desktops give: they say nothing about the picture.
_EMPTY_NAMES = frozenset(
    {"img", "image", "mvimg", "pxl", "dsc", "dscn", "dscf", "pict", "picture", "photo", "pic", "scan", "screenshot", "untitled"}
    | {"unnamed", "download"}
)
_COPY_MARK = re.compile(r"\s*(\(\d+\)|\bcopy\b|\[\d+\])\s*$", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_HASH = re.compile(r"(?=[0-9a-f]*\d)[0-9a-f]{8,}", re.IGNORECASE)

ARTICLES = frozenset(("a", "an", "the"))
MOST_WORDS = 75
"""CLIP reads 75 tokens of a caption, and a word is one or more of them."""


@dataclass(frozen=True)
class CaptionText:
    """A caption file's cleaned text, the encoding it was read as, and what a person should know about the reading."""

    text: str
    encoding: str
    remarks: tuple[str, ...] = ()


def read_caption_file(path: Path) -> CaptionText:
    """The caption in a file as one cleaned line, with encoding and remarks; MAX_BYTES of it are read at most.

    Raises DatasetError that names the file when it cannot be read or is no text.
    """
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DatasetError(f"The caption cannot be read: {error.strerror or error}", where=str(path)) from error
    cut = len(data) > MAX_BYTES
    text, encoding = decode_caption(data[:MAX_BYTES], cut=cut)
    if _looks_binary(text):
        raise DatasetError("The caption file holds no text", where=str(path), hint="Save it as plain UTF-8 text.")
    remarks = []
    if _CONTROL.search(text):
        remarks.append("control characters are taken out of the caption")
    if encoding != "utf-8":
        remarks.append(f"the caption is {_PLAIN_NAMES[encoding]}, read as such")
    if cut:
        remarks.append(f"the caption is longer than {MAX_BYTES // 1024} KiB; the rest is left out")
    clean = clean_caption(text)
    words = clean.count(" ") + 1
    if words > MOST_WORDS and not cut:
        remarks.append(f"the caption has {words} words; only about the first 75 tokens of it are learnt")
    return CaptionText(clean, encoding, tuple(remarks))


_PLAIN_NAMES = {
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "utf-32-le": "UTF-32",
    "utf-32-be": "UTF-32",
    "cp1252": "neither UTF-8 nor UTF-16 (Latin-1)",
    "latin-1": "neither UTF-8 nor UTF-16 (Latin-1)",
}


def decode_caption(data: bytes, *, cut: bool = False) -> tuple[str, str]:
    """Bytes -> (text, encoding): by byte order mark, else UTF-16 by its zero bytes, else UTF-8, else Latin-1.

    `cut` says that the data may end within a character. Never fails: every byte string is Latin-1.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return codecs.decode(data[len(mark) :], encoding, "replace"), encoding
    candidates = ["utf-8", "cp1252"]
    if b"\0" in data:
        # ASCII in UTF-16 has its zeros in the high bytes: at odd places when little-endian, at even when big-endian.
        even, odd = data[0::2].count(0), data[1::2].count(0)
        if max(even, odd) * 4 >= len(data) // 2 and max(even, odd) > 2 * min(even, odd):
            candidates.insert(0, "utf-16-le" if odd > even else "utf-16-be")
    for encoding in candidates:
        try:
            return codecs.getincrementaldecoder(encoding)("strict").decode(data, final=not cut), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"


def _looks_binary(text: str) -> bool:
    controls = len(_CONTROL.findall(text))
    return controls > 8 and controls * 10 > len(text)


def clean_caption(text: str) -> str:
    """One line: composed Unicode (NFC), no control or zero-width characters, single spaces."""
    text = unicodedata.normalize("NFC", text).translate(_INVISIBLE)
    return " ".join(_CONTROL.sub(" ", text).split())


def with_trigger(caption: str, trigger: str) -> str:
    """Puts "trigger, " in front unless the caption has it already as a whole word, in upper or lower case."""
    trigger = clean_caption(trigger)
    if not trigger or not caption:
        return caption or trigger
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def caption_from_name(stem: str) -> str:
    """A file name without ending as a caption: "red-apple_01 (2)" -> "red apple".

    Copy marks, leading and trailing numbers, hashes and camera names go; what is left may be empty.
    """
    text = clean_caption(stem)
    while (shorter := _COPY_MARK.sub("", text)) != text:
        text = shorter
    words = re.sub(r"[-_.,+~\s]+", " ", _UUID.sub(" ", text)).split()
    words = [word for word in words if not _HASH.fullmatch(word)]
    while words and _says_nothing(words[-1]):
        words.pop()
    while words and _says_nothing(words[0]):
        words.pop(0)
    return "" if all(word.lower() in _EMPTY_NAMES for word in words) else " ".join(words)


def _says_nothing(word: str) -> bool:
    return not any(character.isalpha() or unicodedata.category(character) == "So" for character in word)


def vary_caption(caption: str, random: random_module.Random, shuffle: bool, keep: int, dropout: float) -> str:
    """The caption as one step sees it: empty in a share `dropout` of calls, else its comma-separated parts shuffled.

    The first `keep` parts stay in place. Always draws the same numbers first, so the result depends on `random` alone.
    """
    if random.random() < dropout:
        return ""
    if not shuffle:
        return caption
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    rest = parts[keep:]
    random.shuffle(rest)
    return ", ".join(parts[:keep] + rest)


def shared_words(captions: Sequence[str]) -> str:
    """What all captions hold, as a trigger: tags between commas, else the words at their beginning or end; "" for nothing."""
    tags = [[tag.strip() for tag in caption.split(",")] for caption in captions]
    common = [tag for tag in tags[0] if tag and all(tag in other for other in tags[1:])] if tags else []
    if len(captions) < 2:
        return ""
    if common:
        return ", ".join(common)
    words = [caption.split() for caption in captions]
    start = [group[0] for group in itertools.takewhile(lambda group: len(set(group)) == 1, zip(*words, strict=False))]
    end = [group[0] for group in itertools.takewhile(lambda g: len(set(g)) == 1, zip(*(w[::-1] for w in words), strict=False))][
        ::-1
    ]
    found = [part for part in (start, end) if set(part) - ARTICLES]
    return " ".join(found[0]) if found else ""


def without(caption: str, trigger: str) -> str:
    """A caption without the trigger, and without the commas that are then left over."""
    tags = {tag.strip() for tag in trigger.split(",")}
    kept = ", ".join(tag.strip() for tag in caption.split(",") if tag.strip() not in tags and tag.strip())
    if trigger:  # whole words alone: "cut" stays in "cute"
        kept = " ".join(re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", " ", kept).split())
    return kept.strip(" ,")
