"""Walks a person's folder without being led out of it, into a loop, or into anything but regular files."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainers.errors import DatasetError, Problem

CAPTION_ENDINGS = (".txt", ".caption")
"""Endings of caption files, the preferred one first."""
MAX_REPEATS = 1000
"""The largest number that a folder's `10_name` prefix may ask for."""
# A folder with these files in it is a run of this program: its samples are drawn, not a person's pictures.
_RUN_SIGNS = ({"config.toml", "events.jsonl"}, {"config.toml", "state"})
_PREFIX = re.compile(r"(-?[0-9]+)_")
# What desktops, archives and network disks leave behind, never a person's picture.
_LITTER = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"))


@dataclass(frozen=True)
class FoundFile:
    """A regular file: where it is, its printable posix name relative to the folder, and the repeats of its folder."""

    path: Path
    name: str
    repeats: int


@dataclass
class Walk:
    """What a walk has seen so far: files in order of name, what was left out and why, and how much litter."""

    root: Path
    files: list[FoundFile] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    hidden: int = 0

    def leave_out(self, what: str, where: str, hint: str = "") -> None:
        """Records something that is not read, and why."""
        self.problems.append(Problem("note", what, where, hint))


def printable_name(path: Path, root: Path) -> str:
    """The posix path relative to root; bytes that are no text and control characters are written as escapes."""
    return printable_text(path.relative_to(root).as_posix())


def printable_text(text: str) -> str:
    """A name as it can be shown and stored: lone surrogates and control characters as escapes."""
    # Lone surrogates stand for bytes that are no UTF-8; they and control characters cannot be printed or stored.
    return "".join(c if c >= " " and c != "\x7f" and not "\ud800" <= c <= "\udfff" else ascii(c)[1:-1] for c in text)


def walk_folder(root: Path) -> Walk:
    """All regular files under root, sorted by name. Raises DatasetError when root itself cannot be listed."""
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise DatasetError("This is not a folder", where=str(root), hint="Give the folder that holds the pictures.")
        os.scandir(root).close()
    except (FileNotFoundError, ValueError) as error:
        raise DatasetError("There is no such folder", where=str(root), hint="Check the path to the pictures.") from error
    except OSError as error:
        what = f"The folder cannot be read: {error.strerror or error}"
        raise DatasetError(what, where=str(root), hint="Check the path and its permissions.") from error
    walk = Walk(root)
    links: list[FoundFile] = []
    seen: set[tuple[int, int]] = set()
    waiting = [(root, 1)]
    while waiting:
        folder, repeats = waiting.pop()
        for entry in _list_folder(walk, folder, seen):
            path = folder / entry.name
            kind = _kind(entry)
            if kind == "link":
                links += _check_link(walk, path, repeats)
            elif kind == "folder":
                inner = _folder_repeats(walk, path, entry.name, repeats)
                if inner:
                    waiting.append((path, inner))
            elif kind == "file":
                walk.files.append(FoundFile(path, printable_name(path, root), repeats))
            else:
                walk.leave_out(kind, printable_name(path, root))
    _add_links(walk, links)
    walk.files.sort(key=lambda file: file.name)
    return walk


def _list_folder(walk: Walk, folder: Path, seen: set[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """Entries of a folder without litter; none of a run folder, or of one met twice (a mount or junction that loops)."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            walk.leave_out("The same folder is met a second time; not read again", printable_name(folder, walk.root))
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
            names = {entry.name for entry in listed}
    except OSError as error:
        what = f"The folder cannot be read: {error.strerror or error}; left out"
        walk.leave_out(what, printable_name(folder, walk.root), "Check its permissions.")
        return
    if any(signs <= names for signs in _RUN_SIGNS):
        walk.leave_out("A run folder of this program; passed over", printable_name(folder, walk.root))
        return
    for entry in listed:
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            walk.hidden += 1
        else:
            yield entry


def _kind(entry: os.DirEntry[str]) -> str:
    """ "link", "folder", "file", or a sentence on why it is none of them."""
    try:
        # Windows junctions are links of another kind; Python 3.11 cannot tell, and walks them once.
        if entry.is_symlink() or getattr(entry, "is_junction", bool)():
            return "link"
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError as error:
        return f"It cannot be read: {error.strerror or error}; left out"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    return f"A {'named pipe' if stat.S_ISFIFO(mode) else 'socket' if stat.S_ISSOCK(mode) else 'device'}, not a file; not opened"


def _folder_repeats(walk: Walk, path: Path, name: str, outer: int) -> int:
    """Repeats of a folder by its `10_name` prefix, else those of the folder around it; 0 leaves it out."""
    match = _PREFIX.match(name)
    if not match:
        return outer
    repeats = int(match[1])
    where = printable_name(path, walk.root)
    hint = f"Name it 1_... to {MAX_REPEATS}_..., the number being how often its pictures are shown in one epoch."
    if repeats == 0:
        walk.leave_out("The folder's name asks for 0 repeats; its pictures are left out", where, hint)
        return 0
    if 1 <= repeats <= MAX_REPEATS:
        return repeats
    what = f"The folder's name asks for {repeats} repeats, outside 1 to {MAX_REPEATS}; read with 1"
    walk.problems.append(Problem("warning", what, where, hint))
    return 1


def _check_link(walk: Walk, path: Path, repeats: int) -> list[FoundFile]:
    """The link as a file when it leads to a regular file inside the folder; anything else is named and not followed."""
    name = printable_name(path, walk.root)
    try:
        target = Path(os.path.realpath(path, strict=True))
        mode = os.stat(target).st_mode
    except OSError as error:
        # A loop and a missing target differ by errno only on POSIX; both are links to nothing.
        reason = "leads nowhere" if isinstance(error, FileNotFoundError) else f"cannot be followed ({error.strerror or error})"
        walk.leave_out(f"A link that {reason}; not followed", name)
        return []
    root = Path(os.path.realpath(walk.root))
    if not target.is_relative_to(root):
        walk.leave_out("A link that leaves the folder; not followed", name, "Copy the pictures into the folder.")
    elif stat.S_ISDIR(mode):
        loop = path.parent.resolve().is_relative_to(target)
        what = "A link that loops back to a folder around it" if loop else "A link to a folder that is read where it stands"
        walk.leave_out(f"{what}; not followed", name)
    elif not stat.S_ISREG(mode):
        walk.leave_out("A link to a named pipe, socket or device; not opened", name)
    else:
        return [FoundFile(path, name, repeats)]
    return []


def _add_links(walk: Walk, links: list[FoundFile]) -> None:
    """Links to files inside count where the file itself was not read; a picture is never counted twice by its link."""
    read = {os.path.realpath(file.path) for file in walk.files} if links else set()
    for link in sorted(links, key=lambda file: file.name):
        target = os.path.realpath(link.path)
        # One caption may serve many pictures by links, so a linked caption is always taken.
        if target in read and link.path.suffix.lower() not in CAPTION_ENDINGS:
            walk.leave_out("A link to a file that is read where it stands; not counted again", link.name)
            continue
        read.add(target)
        walk.files.append(link)
