"""Scans a folder of pictures into examples, and names everything that was left out or changed, with the reason."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainers.dataset.buckets import CENTRE
from trainers.dataset.captions import caption_from_name, clean_caption, read_caption_file, with_trigger
from trainers.dataset.edits import Edits
from trainers.dataset.files import CAPTION_ENDINGS, FoundFile, Walk, printable_text, walk_folder
from trainers.dataset.looks import find_alike
from trainers.dataset.masks import Mask, Masks, split_masks, with_masks
from trainers.dataset.pictures import PICTURE_ENDINGS, Picture, read_picture
from trainers.errors import DatasetError, Problem

MIN_SIDE = 16
"""Pictures with a shorter side than this many pixels are left out: enlarged they would teach blur."""
MOST_DECODED = 1000
"""Pictures of a folder that are decoded to prove that they can be, unless that is asked for."""
MOST_DUPLICATES = 20
"""So many are told one by one."""
# Pictures to a person, but in formats that are not read: named with the way out.
_OTHER_PICTURES = frozenset((".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw"))


@dataclass(frozen=True)
class Example:
    """One usable picture and its caption."""

    path: Path
    name: str
    """Posix path relative to the scanned folder, unique in a scan."""
    caption: str
    """One cleaned line with the trigger word in it; may be empty when there is neither caption, name nor trigger."""
    caption_source: Literal["file", "name", "trigger"]
    width: int
    """Pixels, upright by EXIF."""
    height: int
    repeats: int
    """How often the picture is shown in one epoch, >= 1."""
    sha256: str
    """Of the file's bytes, hexadecimal."""
    look: bytes = b""
    """Of `trainers.dataset.looks`, to find pictures that look alike; empty when it is not known."""
    caption_file: Path | None = None
    """The caption file that belongs to the picture, whatever it holds, and also where an edit comes before it."""
    crop: tuple[float, float] = CENTRE
    """Where its crop lies, from left and from top, each in [0, 1]."""
    mask: Mask | None = None
    """What of it is learnt; None is all."""


@dataclass(frozen=True)
class Scan:
    """A scanned folder: examples in order of name, and one problem for each thing left out or changed."""

    folder: Path
    examples: tuple[Example, ...]
    problems: tuple[Problem, ...]


@dataclass
class _Captions:
    """Caption files by the picture they stand beside, and what is to be said about them."""

    beside: dict[Path, FoundFile] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def decode_picture(path: Path) -> Picture:
    """Facts about a picture, proven by decoding it. Raises DatasetError naming the file."""
    return _read_once(path, decode=True)


def look_at_picture(path: Path) -> Picture:
    """Facts about a picture, by its header and its end alone. Raises DatasetError naming the file."""
    return _read_once(path, decode=False)


def _read_once(path: Path, decode: bool) -> Picture:
    """A command scans before its run does: what has not changed in between is not read again."""
    try:
        status = path.stat()
    except OSError:
        return read_picture(path, decode=decode)
    return _remembered(path, decode, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=20_000)  # some 10 MB
def _remembered(path: Path, decode: bool, size: int, changed: int) -> Picture:
    return read_picture(path, decode=decode)


def scan_folder(
    folder: Path,
    *,
    trigger: str = "",
    repeats: int = 1,
    edits: Edits | None = None,
    read: Callable[[Path], Picture] | None = None,
    masks: Masks = "off",
) -> Scan:
    """Reads all pictures under `folder`; never writes there. The same folder and edits always give the same Scan.

    `repeats` multiplies those of `10_name` folders. `edits` come before the captions beside the pictures. `read` gives
    the facts about a picture: left out, `decode_picture`, and in a folder of more than MOST_DECODED `look_at_picture`; one
    whose pixels are damaged is then found, told and left out when it is encoded. Raises DatasetError for a missing,
    unreadable or empty folder, or one without a usable picture, with counts and the first reasons.
    """
    folder = Path(folder)
    walk = walk_folder(folder)
    pictures, mask_files = split_masks([file for file in walk.files if file.path.suffix.lower() in PICTURE_ENDINGS])
    captions = _match_captions(pictures, [file for file in walk.files if file.path.suffix.lower() in CAPTION_ENDINGS])
    examples: list[Example] = []
    left_out: list[Problem] = []
    remarks: list[Problem] = []
    edits = edits or Edits()
    read = read or (decode_picture if len(pictures) <= MOST_DECODED else look_at_picture)
    left_out += edits.told_of([file.name for file in pictures])
    for file in pictures:
        if file.name in edits.excluded:
            continue
        example, problems = _read_example(file, captions.beside.get(file.path), edits, trigger, repeats, read)
        if example is None:
            left_out += problems
        else:
            examples.append(example)
            remarks += problems
    examples, problems = with_masks(masks, examples, mask_files)
    left_out += problems
    if not examples:
        raise _nothing_usable(folder, walk, left_out)
    named = [*walk.problems, *left_out, *remarks, *captions.problems, *_duplicates(examples)]
    named += _edits_of_nothing(edits, {file.name for file in pictures})
    named.sort(key=lambda problem: (problem.where, problem.what))
    return Scan(folder, tuple(examples), (*named, *_missing_captions(examples), *_ignored(walk)))


def _read_example(
    file: FoundFile,
    caption_file: FoundFile | None,
    edits: Edits,
    trigger: str,
    repeats: int,
    read: Callable[[Path], Picture],
) -> tuple[Example | None, list[Problem]]:
    """The example with notes on what was converted, or None with the note on why it is left out."""
    try:
        picture = read(file.path)
    except DatasetError as error:
        return None, [Problem("note", f"{error.what}; left out", file.name, error.hint)]
    if min(picture.width, picture.height) < MIN_SIDE:
        what = f"Only {picture.width}x{picture.height} pixels; a side under {MIN_SIDE} is too small to learn from; left out"
        return None, [Problem("note", what, file.name)]
    problems = [_remark(text, file.name) for text in picture.remarks]
    caption = ""
    source: Literal["file", "name", "trigger"] = "file"
    if file.name in edits.captions:
        caption = clean_caption(edits.captions[file.name])
        if not caption:
            problems.append(Problem("note", "The edited caption is empty; the picture's file name is used instead", file.name))
    elif caption_file is not None:
        caption, remarks = _read_beside(caption_file)
        problems += remarks
    if not caption:
        source = "name"
        caption = caption_from_name(file.path.stem)
    if not caption and trigger:
        source = "trigger"
    text = with_trigger(caption, trigger)
    total = file.repeats * repeats
    beside = caption_file.path if caption_file else None
    size, sha256 = (picture.width, picture.height), picture.sha256
    crop = edits.crops.get(file.name, CENTRE)
    return Example(file.path, file.name, text, source, *size, total, sha256, picture.look, beside, crop), problems


def _read_beside(file: FoundFile) -> tuple[str, list[Problem]]:
    """A caption file's text, empty when it gives none, and notes on it."""
    try:
        caption = read_caption_file(file.path)
    except DatasetError as error:
        return "", [Problem("note", f"{error.what}; the picture's file name is used instead", file.name, error.hint)]
    if not caption.text:
        return "", [Problem("note", "The caption is empty; the picture's file name is used instead", file.name)]
    return caption.text, [_remark(text, file.name) for text in caption.remarks]


def _edits_of_nothing(edits: Edits, names: set[str]) -> Iterable[Problem]:
    for name in sorted({*edits.captions, *edits.excluded, *edits.crops} - names):
        yield Problem("note", "Edited or excluded, but there is no such picture in the folder; ignored", printable_text(name))


def _remark(text: str, where: str) -> Problem:
    return Problem("note", text[:1].upper() + text[1:], where)


def _match_captions(pictures: list[FoundFile], captions: list[FoundFile]) -> _Captions:
    """Finds each picture's caption: cat.txt, cat.caption or cat.jpg.txt beside cat.jpg, in this order."""
    exact: dict[tuple[Path, str], dict[str, FoundFile]] = {}
    folded: dict[tuple[Path, str], dict[str, FoundFile]] = {}
    for file in captions:
        ending = file.path.suffix.lower()
        stem = _composed(file.path.stem)
        exact.setdefault((file.path.parent, stem), {})[ending] = file
        # Upper and lower case differ on some disks only; an exact match comes first.
        folded.setdefault((file.path.parent, stem.casefold()), {}).setdefault(ending, file)
    result = _Captions()
    used: set[Path] = set()
    for picture in pictures:
        choices: list[FoundFile] = []
        for stem in (_composed(picture.path.stem), _composed(picture.path.name)):
            parent = picture.path.parent
            found = exact.get((parent, stem)) or folded.get((parent, stem.casefold())) or {}
            choices += [found[ending] for ending in CAPTION_ENDINGS if ending in found]
        if not choices:
            continue
        result.beside[picture.path] = choices[0]
        used.update(choice.path for choice in choices)
        for other in choices[1:]:
            result.problems.append(Problem("note", f"Another caption, {choices[0].name}, comes first; ignored", other.name))
    for file in captions:
        if file.path not in used:
            result.problems.append(Problem("note", "A caption without a picture; ignored", file.name))
    return result


def _composed(text: str) -> str:
    # Archives from macOS hold decomposed names, those typed elsewhere are composed.
    return unicodedata.normalize("NFC", text)


def _duplicates(examples: list[Example]) -> Iterable[Problem]:
    """One problem for each picture that is there twice, or looks so; of many, the first and how many more."""
    first: dict[str, Example] = {}
    same: list[tuple[str, Example, Example]] = []
    for example in examples:
        original = first.setdefault(example.sha256, example)
        if original is not example:
            same.append(("The same picture as", example, original))
    different = list(first.values())
    pairs = find_alike([example.look for example in different])
    same += [("Looks nearly the same as", different[later], different[earlier]) for earlier, later in pairs]
    hint = "Delete one of them, unless that is meant."
    for what, example, original in same[:MOST_DUPLICATES]:
        yield Problem("warning", f"{what} {original.name}; both are kept, so it counts double", example.name, hint)
    if len(same) > MOST_DUPLICATES:
        yield Problem("warning", f"{len(same) - MOST_DUPLICATES} more pictures are there twice, or look so", hint=hint)


def _missing_captions(examples: list[Example]) -> Iterable[Problem]:
    """One problem for all pictures named by their files, one for those that are left without any caption."""
    total = len(examples)
    named = [example for example in examples if example.caption_source != "file" and example.caption]
    if named:
        what = f"No caption for {len(named)} of {total} pictures ({_some(named)}); the file name or trigger word is used"
        yield Problem("note", what, hint=f"Write {Path(named[0].name).stem}.txt beside it to describe it.")
    silent = [example for example in examples if not example.caption]
    if silent:
        what = f"No caption, and a file name that says nothing, for {len(silent)} of {total} pictures ({_some(silent)})"
        hint = f"Write {Path(silent[0].name).stem}.txt beside it, or set a trigger word."
        yield Problem("warning", f"{what}; they are learnt with an empty caption", hint=hint)


def _some(examples: list[Example]) -> str:
    return ", ".join(example.name for example in examples[:3]) + (", ..." if len(examples) > 3 else "")


def _ignored(walk: Walk) -> Iterable[Problem]:
    """Counts of what was passed over: other files by their endings, hidden files and litter."""
    known = (*PICTURE_ENDINGS, *CAPTION_ENDINGS)
    others = Counter(file.path.suffix.lower() for file in walk.files if file.path.suffix.lower() not in known)
    if others:
        kinds = ", ".join(f"{ending or 'without ending'}: {count}" for ending, count in sorted(others.items())[:8])
        hint = "Save pictures as PNG or JPEG to use them." if _OTHER_PICTURES & others.keys() else ""
        yield Problem("note", f"Files of other kinds are ignored: {others.total()} ({kinds})", hint=hint)
    if walk.hidden:
        yield Problem("note", f"Hidden and system files and folders are passed over: {walk.hidden}")


def _nothing_usable(folder: Path, walk: Walk, left_out: list[Problem]) -> DatasetError:
    where = str(folder)
    hint = f"Put pictures into it ({', '.join(ending[1:] for ending in PICTURE_ENDINGS)})."
    reasons = left_out + walk.problems
    if not walk.files and not reasons:
        return DatasetError("The folder is empty" if not walk.hidden else "The folder holds hidden files only", where, hint)
    if not reasons:
        others = "; ".join(problem.what for problem in _ignored(walk)) or "captions only"
        return DatasetError(f"The folder holds no picture: {others}", where, hint)
    first = "; ".join(f"{problem.where}: {problem.what}" for problem in reasons[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return DatasetError(f"No picture in the folder can be used. {first}{more}", where, hint)
