"""The library: LoRA files in HOME/loras and those of finished runs, as cards told by their headers alone. No torch."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.cells import LIMIT
from trainers.container import Header, open_file, read_header
from trainers.errors import AdapterFileError, SettingError
from trainers.families import FAMILIES
from trainers.files import write_atomically
from trainers.formats.hashes import FileHashes, file_hashes
from trainers.formats.keys import KeyGroup, group_keys
from trainers.formats.matching import no_adapter
from trainers.formats.recognise import guess_family, input_width
from trainers.routing_words import trigger_words
from trainers.run_folder import RunFolder
from trainers.text import printable

FOLDER, REMOVED, PICTURES = "loras", ".removed", ".pictures"
_PREVIEWS = (".preview.png", ".png")
"""How a picture beside a file is called: its name without ending, and one of these."""
_changing = threading.Lock()
"""Held from the reading of cards.toml to its writing."""
Mark = tuple[str, int, int]
"""What a file is known by: path, time of change in nanoseconds, size in bytes."""


@dataclass(frozen=True)
class Facts:
    """What a file's header tells. Texts are printable and cut to length."""

    title: str
    family: str
    """sd1, sd2, sdxl, flux, sd3, or unknown."""
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    """Lowest first."""
    words: tuple[str, ...]
    """Trigger words."""
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """One LoRA. `key` is its path below HOME; `strength` what routing brings it in at, with `routed` off not at all."""

    key: str
    path: Path
    mark: Mark
    facts: Facts | None
    problem: str
    """Why it cannot be used; then there are no facts."""
    run: str
    """The run that made it; empty for a file that was brought in."""
    words: tuple[str, ...]
    strength: float
    routed: bool
    chosen: Path | None
    """The drawn picture that it is to be shown with."""

    @property
    def picture(self) -> Path | None:
        """The one that was chosen, else the run's last sample or the picture beside the file."""
        if self.chosen and self.chosen.is_file():
            return self.chosen
        if self.run:
            samples = sorted(RunFolder(self.path.parent).samples.glob("*_00.png"))
            return samples[-1] if samples else None
        beside = (self.path.with_name(self.path.stem + ending) for ending in _PREVIEWS)
        return next((path for path in beside if path.is_file()), None)


def list_cards(home: Path) -> list[Card]:
    """All LoRAs of a home folder, the newest first. Raises SettingError for a damaged cards.toml."""
    said = read_said(home)
    cards = [_card(home, path, run, said) for path, run in _files(home)]
    return sorted((card for card in cards if card is not None), key=lambda card: (-card.mark[1], card.key))


def find_card(home: Path, key: str) -> Card:
    """The LoRA of a key, looked up in what is there. Raises AdapterFileError when there is none."""
    for path, run in _files(home):
        if path.relative_to(home).as_posix() == key and (card := _card(home, path, run, read_said(home))):
            return card
    raise AdapterFileError("There is no such LoRA in the library", printable(key, 200), "Load the page again.")


def search(cards: list[Card], text: str) -> list[Card]:
    """The cards that hold every word of `text`, in any case: in title, file name, trigger words, family, rank8, metadata."""
    wanted = text.casefold().split()
    return [card for card in cards if all(word in _text_of(card) for word in wanted)]


def routed_words(cards: list[Card], family: str) -> dict[str, tuple[str, ...]]:
    """Key -> trigger words of the LoRAs that routing may bring in on a base of `family`: those it fits."""
    usable = (card for card in cards if card.routed and card.words and card.facts)
    return {card.key: card.words for card in usable if card.facts and card.facts.family in (family, "unknown")}


def change_card(home: Path, key: str, **said: Any) -> Card:
    """Notes `strength`, `words` (as trigger_words reads them) or `routed`, of which a file itself stays as it is.

    Raises AdapterFileError for a key that is not there, SettingError for a strength beyond the limit.
    """
    import tomlkit

    find_card(home, key)
    if not -LIMIT <= said.get("strength", 0.0) <= LIMIT:
        raise SettingError(f"A strength lies between -{LIMIT:g} and {LIMIT:g}", where="strength", hint="1 is usual.")
    with _changing:
        every = read_said(home)
        every[key] = {**every.get(key, {}), **said}
        write_atomically(home / FOLDER / "cards.toml", tomlkit.dumps(every).encode())
    return find_card(home, key)


def remove_card(home: Path, key: str) -> str:
    """Moves a file of HOME/loras, with the picture beside it, aside into .removed; returns what `restore_card` wants.

    Raises AdapterFileError for a key that is not there and for a run's file, which goes with its run.
    """
    card = find_card(home, key)
    if card.run:
        what = "This LoRA belongs to a run, and the library only shows it"
        raise AdapterFileError(what, printable(card.run, 80), "Delete the run to delete it.")
    # By a folder of its own, so that what was removed before under the same name stays.
    ticket = f"{time.time_ns()}"
    # With the folders it lay in, so that it comes back under its key, by which cards.toml knows it.
    place = home / FOLDER / REMOVED / ticket / card.path.parent.relative_to(home / FOLDER)
    place.mkdir(parents=True)
    for path in _together(card.path):
        os.replace(path, place / path.name)
    return ticket


def restore_card(home: Path, ticket: str) -> list[str]:
    """Takes back what `remove_card` moved; returns their paths in HOME/loras. Raises AdapterFileError where that cannot be."""
    place = home / FOLDER / REMOVED / ticket
    files = sorted(path for path in place.rglob("*") if path.is_file()) if ticket.isdecimal() else []
    if not files:
        raise AdapterFileError("There is nothing to take back", hint="It was taken back already.")
    targets = {file: home / FOLDER / file.relative_to(place) for file in files}
    for target in targets.values():
        if target.exists():
            raise AdapterFileError("There is another file of that name now", target.name, "Remove that one first.")
    for file, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(place)  # folders only, by now
    return [file.relative_to(place).as_posix() for file in files]


def read_facts(path: Path) -> Facts:
    """What a file's header tells. Raises AdapterFileError for what is no LoRA, or not safetensors."""
    with open_file(path) as handle:
        header = read_header(handle, path)
    groups, _ = group_keys(header.entries)
    if not any(group.kinds for group in groups):
        raise no_adapter(header)
    metadata = {printable(key, 60): printable(value, 300) for key, value in sorted(header.metadata.items())}
    title = header.metadata.get("modelspec.title") or header.metadata.get("ss_output_name") or path.stem
    told = header.metadata.get("modelspec.trigger_phrase", "")
    return Facts(
        title=printable(title.replace("\\", "/").rpartition("/")[2], 80) or path.stem,
        family=_family(header, groups),
        kinds=tuple(sorted({group.kind or "unknown" for group in groups})),
        ranks=tuple(sorted({rank for group in groups if (rank := _rank(group, header))})),
        words=trigger_words(printable(told, 300)),
        metadata=metadata,
    )


def _family(header: Header, groups: list[KeyGroup]) -> str:
    """What names and widths tell, else what the file says of its base, as one of a small base or of few layers must."""
    found = guess_family(groups, header.entries)[0]
    version = header.metadata.get("ss_base_model_version", "")
    if found != "unknown" or not version:
        return found
    return next((name for name, family in FAMILIES.items() if version.startswith(family.base_version)), found)


def _rank(group: KeyGroup, header: Header) -> int | None:
    """The rank of a module, as its shapes tell it; None for a type without."""
    shapes = (header.entries[group.parts[part]].shape for part in ("down", "w1_b", "w2_b") if part in group.parts)
    return next((shape[0] for shape in shapes if len(shape) > 1 and input_width(group, header.entries)), None)


def hashes_of(card: Card) -> FileHashes:
    """The hashes by which galleries know a file; read once for each state of it. Raises AdapterFileError."""
    return _hashes_of(card.mark)


@functools.lru_cache(maxsize=1024)
def _hashes_of(mark: Mark) -> FileHashes:
    with open_file(Path(mark[0])) as handle:
        header = read_header(handle, Path(mark[0]))
    return file_hashes(Path(mark[0]), header.data_start)


@functools.lru_cache(maxsize=1024)
def _facts_of(mark: Mark) -> Facts | str:
    """The facts, or why there are none; read once for each state of a file."""
    try:
        return read_facts(Path(mark[0]))
    except AdapterFileError as error:
        return f"{error.what}. {error.hint}".strip()


def _card(home: Path, path: Path, run: str, said: Mapping[str, Mapping[str, Any]]) -> Card | None:
    try:
        facts = path.stat()
    except OSError:  # it went between the listing and now
        return None
    mark = (str(path), facts.st_mtime_ns, facts.st_size)
    found, key = _facts_of(mark), path.relative_to(home).as_posix()
    mine = said.get(key, {})
    known = found if isinstance(found, Facts) else None
    words = trigger_words(mine["words"]) if "words" in mine else known.words if known else ()
    strength, routed = float(mine.get("strength", 1.0)), bool(mine.get("routed", True))
    name = Path(str(mine.get("picture", ""))).name
    chosen = home / FOLDER / PICTURES / name if name else None
    return Card(key, path, mark, known, found if isinstance(found, str) else "", run, words, strength, routed, chosen)


def _files(home: Path) -> Iterator[tuple[Path, str]]:
    """(file, run or "") of all LoRAs: finished ones of runs, and what lies in HOME/loras, sub-folders too."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(home / "runs")):
            run = RunFolder(home / "runs" / name)
            result = run.result if run.config.is_file() else None
            if result:
                yield result, name
    for folder, inside, names in os.walk(home / FOLDER):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".safetensors") and not name.startswith("."):
                yield Path(folder) / name, ""


def _together(path: Path) -> list[Path]:
    beside = [path.with_name(path.stem + ending) for ending in _PREVIEWS]
    return [path, *(one for one in beside if one.is_file())]


def read_said(home: Path) -> dict[str, dict[str, Any]]:
    """What the person said of the cards, by key."""
    file = home / FOLDER / "cards.toml"
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingError(f"What was said of the LoRAs cannot be read: {error}", str(file), "Correct that file.") from error
    return {key: dict(said) for key, said in values.items() if isinstance(said, dict)}


@functools.lru_cache(maxsize=1024)
def _searched(mark: Mark) -> str:
    found = _facts_of(mark)
    if isinstance(found, str):
        return ""
    ranks = " ".join(f"rank{rank}" for rank in found.ranks)
    return f"{found.title} {found.family} {' '.join(found.kinds)} {ranks} {' '.join(found.metadata.values())}".casefold()


def _text_of(card: Card) -> str:
    return f"{card.key} {card.run} {' '.join(card.words)}".casefold() + " " + _searched(card.mark)
