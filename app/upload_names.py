"""Names of uploaded files: made safe for every disk, and kept apart without a caption losing its picture."""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainers.dataset.files import CAPTION_ENDINGS
from trainers.dataset.pictures import PICTURE_ENDINGS

MAX_DEPTH = 4
"""Folders around a file, at most."""
MAX_NAME_BYTES = 200
"""Of a folder's name, or a file's without its ending, as UTF-8; disks allow 255, and " (12).jpg.txt" may be added."""
# What desktops and archives put beside pictures; the trainer passes over it, and so is it here, without a word.
_LITTER = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"))
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")


class NameRefused(ValueError):
    """A file cannot be stored under its name; the text says why."""


@dataclass(frozen=True)
class CleanName:
    """A safe relative name: folders, and the file's stem and tail. A caption's tail may hold a picture's ending too."""

    folders: tuple[str, ...]
    stem: str
    tail: str

    @property
    def is_caption(self) -> bool:
        """Whether the file is a caption rather than a picture."""
        return self.tail.lower().endswith(CAPTION_ENDINGS)


@dataclass(frozen=True)
class Arrived:
    """A received and checked file: what it was called, its safe name, and where it lies until it has its place."""

    given: str
    name: CleanName
    path: Path


def is_litter(given: str) -> bool:
    """Whether a path is a hidden or system file, or lies in a hidden or system folder."""
    parts = [part for part in re.split(r"[\\/]", given) if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in _LITTER for part in parts)


def clean_name(given: str, more: tuple[str, ...] = ()) -> CleanName:
    """A path from a browser or a zip made safe: always inside, no control characters, good on Windows too.

    Leading slashes, drives and ".." are dropped. `more` are endings that are taken beside those of pictures and captions.
    Raises NameRefused for a kind of file that is not read, for one under more than MAX_DEPTH folders, and for a name of
    which nothing is left.
    """
    path = given.replace("\\", "/")
    if _DRIVE.match(path):
        path = path[2:]
    parts = [part for part in map(_clean_part, path.split("/")) if part]
    if not parts:
        raise NameRefused("It has no usable name")
    *folders, file = parts
    stem, tail = split_tail(file, more)
    if not tail:
        ending = os.path.splitext(file)[1].lower()
        known = ", ".join(known[1:] for known in (*more, *PICTURE_ENDINGS, *CAPTION_ENDINGS))
        raise NameRefused(f"{f'{ending} files are' if ending else 'A file without an ending is'} not read; use {known}")
    if len(folders) > MAX_DEPTH:
        raise NameRefused(f"It lies more than {MAX_DEPTH} folders deep")
    return CleanName(tuple(map(_shorten, folders)), _shorten(stem), tail)


def split_tail(file: str, more: tuple[str, ...] = ()) -> tuple[str, str]:
    """ "cat.jpg" -> ("cat", ".jpg"), "cat.jpg.txt" -> ("cat", ".jpg.txt"); no tail when the kind is not read."""
    stem, ending = os.path.splitext(file)
    if ending.lower() in (*PICTURE_ENDINGS, *more):
        return stem, ending
    if ending.lower() not in CAPTION_ENDINGS:
        return file, ""
    inner, second = os.path.splitext(stem)
    return (inner, second + ending) if second.lower() in PICTURE_ENDINGS else (stem, ending)


def _clean_part(part: str) -> str:
    """One folder or file name; empty when it leads nowhere or nothing is left."""
    if part.strip() in ("", ".", ".."):
        return ""
    text = "".join(c for c in unicodedata.normalize("NFC", part) if not _is_invisible(c))
    # A name may not end in a dot or space on Windows, nor begin with a dot, which would hide it.
    text = re.sub(r'[<>:"|?*]', "_", text).strip().rstrip(". ").lstrip(". ")
    return _not_reserved(text)


def _is_invisible(character: str) -> bool:
    """Control, direction-changing and broken characters. The joiners stay: several scripts are written with them."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def _not_reserved(text: str) -> str:
    """Windows gives some names to devices, with any ending: CON, nul.txt, com1.png."""
    return f"_{text}" if _RESERVED.match(text) else text


def _shorten(text: str) -> str:
    """Cut to MAX_NAME_BYTES. What is cut off leaves a hash, so that pairs stay pairs and others differ."""
    whole = text.encode()
    if len(whole) <= MAX_NAME_BYTES:
        return text
    return f"{whole[: MAX_NAME_BYTES - 9].decode(errors='ignore').rstrip('. ')}-{hashlib.sha256(whole).hexdigest()[:8]}"


class Places:
    """Puts arrived files into a folder. Nothing there is ever overwritten; the same file again is not stored again.

    A picture whose name is taken by another picture becomes "name (2)", and the caption that came with it too. The
    k-th caption of a name belongs to the k-th picture of that name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[str, tuple[Path, dict[str, str]]] = {}

    def put(self, files: Iterable[Arrived]) -> Iterator[tuple[Arrived, str, str]]:
        """Moves each file into place: yields (file, name relative to the folder, "") or (file, "", why not).

        Raises OSError when the disk refuses; files yielded before are in place.
        """
        for group in _group(files):
            folders = group[0].name.folders
            try:
                parent, listed = self._list(folders)
            except (FileExistsError, NotADirectoryError):
                yield from ((file, "", f"{'/'.join(folders)} is a file, not a folder") for file in group)
                continue
            except NameRefused as error:
                yield from ((file, "", str(error)) for file in group)
                continue
            stem = _find_stem(group, parent, listed)
            for file in group:
                name = stem + file.name.tail
                there = listed.get(_fold(name))
                if there is None:
                    os.replace(file.path, parent / name)
                    listed[_fold(name)] = there = name
                elif not _same(file, parent / there):
                    yield file, "", "A different caption for this picture is there already; that one stays"
                    continue
                yield file, (parent / there).relative_to(self.folder).as_posix(), ""

    def _list(self, folders: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
        """The folder, made when missing, and its names by their folded form: some disks hold Cat.png and cat.png as one."""
        key = _fold("/".join(folders))
        if key not in self._listed:
            parent = self.folder.joinpath(*folders)
            if not parent.resolve().is_relative_to(self.folder.resolve()):
                raise NameRefused("A link leads out of the folder there")
            parent.mkdir(parents=True, exist_ok=True)
            self._listed[key] = parent, {_fold(name): name for name in os.listdir(parent)}
        return self._listed[key]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _group(files: Iterable[Arrived]) -> Iterator[list[Arrived]]:
    """Files that belong together: same folder, same stem, and the same number among those of exactly their name."""
    groups: dict[tuple[str, int], list[Arrived]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for file in files:
        stem = _fold("/".join((*file.name.folders, file.name.stem)))
        counts[stem, _fold(file.name.tail)] += 1
        groups.setdefault((stem, counts[stem, _fold(file.name.tail)]), []).append(file)
    yield from groups.values()


def _find_stem(group: list[Arrived], parent: Path, listed: dict[str, str]) -> str:
    """The group's own stem or "stem (2)", "stem (3)", ...: the first where all fit; its own when captions fit nowhere."""
    own = group[0].name.stem
    only_captions = all(file.name.is_caption for file in group)
    for number in range(1, len(listed) + 2):
        stem = own if number == 1 else f"{own} ({number})"
        free = {file: _fold(stem + file.name.tail) not in listed for file in group}
        same = {file: not free[file] and _same(file, parent / listed[_fold(stem + file.name.tail)]) for file in group}
        has_picture = any(_fold(stem + ending) in listed for ending in PICTURE_ENDINGS)
        if only_captions:
            if number > 1 and not has_picture:
                return own
            if all(free[file] or same[file] for file in group):
                return stem
            continue
        pictures = [file for file in group if not file.name.is_caption]
        if all(same[file] for file in pictures):
            return stem  # sent again; a caption that was edited here since then stays
        # Beside "name (2)" of another picture the two would share one caption.
        fits = all(free[file] or same[file] for file in group)
        if fits and (number == 1 or not has_picture):
            return stem
    return f"{own} ({len(listed) + 2})"


def _same(file: Arrived, there: Path) -> bool:
    return there.is_file() and filecmp.cmp(file.path, there, shallow=False)
