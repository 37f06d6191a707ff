"""Grids that the window draws: which are known, how each stands, its page, and what differs between two of its pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from app.refusals import CONFLICT, NOT_FOUND, Refusal
from app.studio_client import Studio
from trainers.cells import Cell
from trainers.formats.hashes import file_hashes
from trainers.grid import Grid, grid_png
from trainers.page import Difference, difference

REMEMBERED = 50
"""How many grids can be looked at; of more, the oldest is forgotten."""
Look = Callable[[], dict[str, Any]]
"""How a drawing stands, as Studio.look tells it."""
_hashes: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class AskedGrid:
    """A grid, the files of its LoRAs, and the base as the renderer is told it."""

    grid: Grid
    files: tuple[Path, ...]
    base: Mapping[str, Any]


@dataclass(frozen=True)
class AskedDifference:
    """Two pictures that are drawn to be compared; `same_noise` when their seeds are equal."""

    same_noise: bool


class Grids:
    """The grids of one window, by the number of their request. May be used from any thread."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._lock = threading.Lock()
        self._grids: dict[int, tuple[AskedGrid, Look]] = {}
        self._differences: dict[int, tuple[AskedDifference, Look]] = {}

    def ask(self, asked: AskedGrid) -> int:
        """Begins to draw a grid, which ends any other drawing; returns its number."""
        number = self._draw(asked, asked.grid.cells(asked.files), replaces=True)
        self._keep(self._grids, number, asked)
        return number

    def ask_difference(self, number: int, first: int, second: int | None) -> int:
        """Begins to compare two cells of a grid, or one with the base's own picture (None). Raises Refusal."""
        asked = self.find(number)
        for cell in (first, second):
            if cell is not None and not 0 <= cell < len(asked.grid):
                raise Refusal("There is no such picture in this grid", str(cell), "Choose another.", status=NOT_FOUND)
        one = asked.grid.cell(first, asked.files)
        other = asked.grid.cell(second, asked.files) if second is not None else Cell(prompt=one.prompt, seed=one.seed)
        # Both are asked for: what is drawn already comes from the disk.
        found = self._draw(asked, [one, other], replaces=False)
        self._keep(self._differences, found, AskedDifference(one.seed == other.seed))
        return found

    def find(self, number: int) -> AskedGrid:
        """What was asked. Raises Refusal for a grid that is not known (any more)."""
        return self._find(number)[0]

    def look(self, number: int) -> dict[str, Any]:
        """How its drawing stands, as Studio.look tells it. Raises Refusal."""
        return self._find(number)[1]()

    def page(self, number: int) -> bytes:
        """The labelled page of what is drawn so far, as PNG with the settings in it. Raises Refusal."""
        asked, look = self._find(number)
        grid, drawn = asked.grid, look()["cells"]
        pictures = [_open(Path(drawn[cell])) if cell in drawn else None for cell in range(len(grid))]
        if not any(pictures):
            raise Refusal("Nothing of this grid is drawn yet", str(number), "Wait for its first picture.", status=CONFLICT)
        return grid_png(grid, pictures)

    def difference(self, number: int) -> tuple[dict[str, Any], AskedDifference, Difference | None]:
        """How a comparison stands, and what differs once both pictures are there. Raises Refusal."""
        with self._lock:
            known = self._differences.get(number)
        if known is None:
            raise Refusal("There is no such comparison", str(number), "Choose the two pictures again.", status=NOT_FOUND)
        asked, look = known
        found = look()
        drawn = found["cells"]
        if not {0, 1} <= drawn.keys():
            return found, asked, None
        return found, asked, difference(_open(Path(drawn[0])), _open(Path(drawn[1])))

    def _find(self, number: int) -> tuple[AskedGrid, Look]:
        with self._lock:
            if number not in self._grids:
                raise Refusal("There is no such grid", str(number), "Draw it again.", status=NOT_FOUND)
            return self._grids[number]

    def _draw(self, asked: AskedGrid, cells: list[Cell], replaces: bool) -> int:
        how = asked.grid.model_dump(include={"negative", "width", "height", "steps", "guidance", "scheduler"})
        listed = [cell.model_dump(mode="json") for cell in cells]
        return self._studio.ask({**how, "base": dict(asked.base), "cells": listed, "replaces": replaces})

    def _keep(self, known: dict[int, Any], number: int, asked: Any) -> None:
        with self._lock:
            known[number] = asked, self._studio.watch(number)
            for old in list(known)[:-REMEMBERED]:
                del known[old]


def lora_hash(path: Path) -> str:
    """sha256 of a file in hex, computed once for each state of the file. Raises AdapterFileError, OSError."""
    facts = path.stat()
    mark = (str(path), facts.st_mtime_ns, facts.st_size)
    if mark not in _hashes:
        _hashes[mark] = file_hashes(path).whole
    return _hashes[mark]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise Refusal("A picture of this grid is gone", path.name, "Draw it again.", status=NOT_FOUND) from error
