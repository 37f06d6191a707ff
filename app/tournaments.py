"""Blind tournaments: their pictures and every judgement, each in a folder of its own, so that one survives a restart."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from app.refusals import CONFLICT, INVALID, NOT_FOUND, Refusal
from trainers.files import write_atomically
from trainers.tournament import Judgement, next_pair, rank

Side = Literal["left", "right", "same"]
MOST_CONTESTANTS = 20
_NAME = re.compile(r"[0-9a-f]{12}")
_STATE = "tournament.json"


@dataclass(frozen=True)
class Tournament:
    """What is compared and what was judged. `pictures[round][contestant]` are numbers that tell nothing of what they show."""

    id: str
    created: float
    kind: str
    """What the contestants are: prompt, strength, lora or seed."""
    contestants: tuple[str, ...]
    rounds: tuple[str, ...]
    """What each pair of pictures has in common: the labels of the grid's other axis."""
    pictures: tuple[tuple[int, ...], ...]
    seed: int
    judgements: tuple[Judgement, ...] = ()

    def pair(self) -> tuple[int, int, int]:
        """What to look at now: (round, the left one's number, the right one's). Follows from the state alone."""
        first, second = next_pair(rank(len(self.contestants), self.judgements), self.judgements, self.seed)
        draw = random.Random(f"{self.seed}:round:{len(self.judgements)}")
        times = sum({one.first, one.second} == {first, second} for one in self.judgements)
        order = list(range(len(self.rounds)))
        random.Random(f"{self.seed}:{min(first, second)}:{max(first, second)}").shuffle(order)
        # Every round once, in random order, before any comes again.
        at = order[times] if times < len(order) else draw.choice(order)
        return at, first, second


class Tournaments:
    """The tournaments of one home folder. May be used from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def start(self, kind: str, contestants: Sequence[str], rounds: Sequence[str], pictures: Sequence[Sequence[Path]]) -> str:
        """Copies `pictures[round][contestant]` and returns the new one's id. Raises Refusal, OSError."""
        if not 2 <= len(contestants) <= MOST_CONTESTANTS:
            what = f"A tournament is between 2 and {MOST_CONTESTANTS}, and not {len(contestants)}"
            raise Refusal(what, "over", "Choose the other axis of the grid, or draw another grid.", status=INVALID)
        seed, name = secrets.randbits(32), secrets.token_hex(6)
        numbers = list(range(len(contestants) * len(rounds)))
        random.Random(seed).shuffle(numbers)
        of = tuple(tuple(numbers[at * len(contestants) :][: len(contestants)]) for at in range(len(rounds)))
        folder = self._folder / name
        folder.mkdir(parents=True)
        try:
            for row, some in zip(of, pictures, strict=True):
                for number, path in zip(row, some, strict=True):
                    shutil.copyfile(path, folder / f"{number}.png")
            self._write(Tournament(name, time.time(), kind, tuple(contestants), tuple(rounds), of, seed))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return name

    def all(self) -> list[Tournament]:
        """The newest first; a damaged one is left out."""
        names = os.listdir(self._folder) if self._folder.is_dir() else []
        found = [one for name in names if (one := self._read(name)) is not None]
        return sorted(found, key=lambda one: -one.created)

    def find(self, name: str) -> Tournament:
        """One of them. Raises Refusal when there is none."""
        found = self._read(name)
        if found is None:
            raise Refusal("There is no such tournament", name[:80], "Start one from a grid.", status=NOT_FOUND)
        return found

    def judge(self, name: str, pair: int, better: Side) -> Tournament:
        """Takes in what was said of the pair with this number; 409 when it is not the one that is shown."""
        with self._lock:
            one = self.find(name)
            if pair != len(one.judgements):
                raise Refusal("This pair is judged already", str(pair), "Look at the one that is shown now.", status=CONFLICT)
            _, left, right = one.pair()
            said = {"left": "first", "right": "second", "same": "same"}[better]
            judged = Judgement(left, right, said)  # type: ignore[arg-type]
            return self._write(replace(one, judgements=(*one.judgements, judged)))

    def undo(self, name: str) -> Tournament:
        """Takes the last judgement back."""
        with self._lock:
            one = self.find(name)
            return self._write(replace(one, judgements=one.judgements[:-1]))

    def picture(self, name: str, number: int) -> Path:
        """A picture's file. Raises Refusal."""
        path = self._folder / self.find(name).id / f"{number}.png"
        if not path.is_file():
            raise Refusal("There is no such picture", str(number), "Load the page again.", status=NOT_FOUND)
        return path

    def delete(self, name: str) -> None:
        """Takes one away, with its pictures."""
        with self._lock:
            shutil.rmtree(self._folder / self.find(name).id)

    def _write(self, one: Tournament) -> Tournament:
        write_atomically(self._folder / one.id / _STATE, json.dumps(asdict(one)).encode())
        return one

    def _read(self, name: str) -> Tournament | None:
        if not _NAME.fullmatch(name):
            return None
        try:
            told: dict[str, Any] = json.loads((self._folder / name / _STATE).read_text(encoding="utf-8"))
            judged = tuple(Judgement(**one) for one in told["judgements"])
            found = Tournament(
                id=name,
                created=float(told["created"]),
                kind=told["kind"],
                contestants=tuple(told["contestants"]),
                rounds=tuple(told["rounds"]),
                pictures=tuple(tuple(row) for row in told["pictures"]),
                seed=told["seed"],
                judgements=judged,
            )
            rank(len(found.contestants), judged)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return found
