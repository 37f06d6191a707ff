"""A grid of pictures over two of prompt, strength, LoRA and seed; saved as a PNG from which its settings are read back.

Imports no torch. What is saved names files by name and hash, never by path.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainers.cells import MOST_CELLS, Cell, LoraUse, Strength
from trainers.errors import SettingError
from trainers.page import label_grid
from trainers.samplers import SAMPLERS

AxisKind = Literal["prompt", "strength", "lora", "seed"]
TEXT_KEY = "impasto grid"
"""Keyword of the PNG's text chunk."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_TEXT = 1 << 20
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
_Many = Field(max_length=MOST_CELLS)


class GridLora(BaseModel):
    """A LoRA or one of its checkpoints: the file's name, its sha256 in hex, and what the grid calls it."""

    model_config = _STRICT
    name: Annotated[str, Field(max_length=255)]
    hash: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    label: Annotated[str, Field(max_length=255)] = ""

    @field_validator("name")
    @classmethod
    def _no_path(cls, value: str) -> str:
        if "/" in value or "\\" in value:
            raise ValueError("a file is named without its folder")
        return value


class Grid(BaseModel):
    """What a grid shows. `rows` and `columns` are two of the four kinds; of the others there is one value (or no LoRA)."""

    model_config = _STRICT
    rows: AxisKind
    columns: AxisKind
    base: Annotated[str, Field(max_length=255)]
    """The base model's name; a person's own file without its folder."""
    prompts: Annotated[tuple[Annotated[str, Field(max_length=4096)], ...], Field(strict=False), _Many]
    strengths: Annotated[tuple[Strength, ...], Field(strict=False), _Many]
    loras: Annotated[tuple[GridLora, ...], Field(strict=False), _Many]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(strict=False), _Many]
    negative: Annotated[str, Field(max_length=4096)] = ""
    width: int = Field(ge=32, le=2048)
    height: int = Field(ge=32, le=2048)
    steps: int = Field(default=20, ge=1, le=200)
    guidance: float = Field(default=5.0, ge=0, le=30)
    scheduler: str = "dpm++"

    @field_validator("scheduler")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        if value not in SAMPLERS:
            raise ValueError(f"there is no sampler {value[:40]!r}; there are {', '.join(SAMPLERS)}")
        return value

    @model_validator(mode="after")
    def _is_a_grid(self) -> Grid:
        if self.rows == self.columns:
            raise ValueError(f"rows and columns are both over the {self.rows}: choose two of prompt, strength, lora, seed")
        for kind in ("prompt", "strength", "lora", "seed"):
            values = self.values(kind)
            if kind in (self.rows, self.columns):
                if not values or len(set(values)) < len(values):
                    raise ValueError(f"an axis over the {kind} needs at least one value, and each once")
            elif len(values) != 1 and not (kind == "lora" and not values):
                raise ValueError(f"the {kind} is on no axis, so there is one of it and not {len(values)}")
        if len(self) > MOST_CELLS:
            raise ValueError(f"{len(self)} pictures; a grid has at most {MOST_CELLS}")
        return self

    def __len__(self) -> int:
        return len(self.values(self.rows)) * len(self.values(self.columns))

    def values(self, kind: AxisKind) -> tuple[Any, ...]:
        """The values of one kind, in their order."""
        found: dict[AxisKind, tuple[Any, ...]] = {
            "prompt": self.prompts,
            "strength": self.strengths,
            "lora": tuple(lora.hash for lora in self.loras),
            "seed": self.seeds,
        }
        return found[kind]

    def labels(self, kind: AxisKind) -> list[str]:
        """What stands at the rows or columns over a kind."""
        if kind == "prompt":
            return list(self.prompts)
        if kind == "strength":
            return [f"strength {value:g}" for value in self.strengths]
        if kind == "lora":
            return [lora.label or lora.name.removesuffix(".safetensors") for lora in self.loras]
        return [f"seed {seed}" for seed in self.seeds]

    def place(self, cell: int) -> dict[AxisKind, int]:
        """Which value of each kind a cell has, as its number among `values`; cells are counted row by row."""
        row, column = divmod(cell, len(self.values(self.columns)))
        places: dict[AxisKind, int] = {"prompt": 0, "strength": 0, "lora": 0, "seed": 0}
        return places | {self.rows: row, self.columns: column}

    def cells(self, files: Sequence[Path]) -> list[Cell]:
        """The pictures to draw, row by row; `files` are those of `loras`."""
        return [self.cell(number, files) for number in range(len(self))]

    def cell(self, number: int, files: Sequence[Path]) -> Cell:
        """One of them."""
        at = self.place(number)
        strength = self.strengths[at["strength"]]
        loras = (LoraUse(path=str(files[at["lora"]]), unet=strength, text=strength),) if files else ()
        return Cell(prompt=self.prompts[at["prompt"]], seed=self.seeds[at["seed"]], loras=loras)


def make_grid(values: dict[str, Any]) -> Grid:
    """A grid out of plain values, as JSON has them. Raises SettingError naming the field."""
    try:
        return Grid.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = first["msg"].removeprefix("Value error, ")
        raise SettingError(
            what, where=".".join(str(piece) for piece in first["loc"]), hint="Change it and draw again."
        ) from error


def grid_png(grid: Grid, pictures: Sequence[Image.Image | None]) -> bytes:
    """The labelled page as PNG with the settings in it; `pictures` row by row, None for one that is not drawn (yet)."""
    across = len(grid.values(grid.columns))
    images = [list(pictures[start : start + across]) for start in range(0, len(pictures), across)]
    page = label_grid(images, grid.labels(grid.rows), grid.labels(grid.columns))
    told, data = PngInfo(), io.BytesIO()
    told.add_itxt(TEXT_KEY, json.dumps(grid.model_dump(mode="json"), ensure_ascii=False))
    page.save(data, "PNG", pnginfo=told)
    return data.getvalue()


def read_grid(png: bytes) -> Grid:
    """The settings of a saved grid; the start of the file up to the pixels is enough. Raises SettingError.

    Only chunk lengths are followed, and no pixel is decoded.
    """
    text = _find_text(png)
    if text is None:
        hint = "It must be the PNG as it was saved: what sends or shows pictures often takes the settings out."
        raise SettingError("This picture holds no settings of a grid", hint=hint)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingError("The settings in this picture are damaged", hint="Take the PNG as it was saved.") from error
    if not isinstance(values, dict):
        raise SettingError("The settings in this picture are damaged", hint="Take the PNG as it was saved.")
    return make_grid(values)


def _find_text(png: bytes) -> bytes | None:
    """What stands in our iTXt chunk before the pixels: keyword, 0, two bytes of compression, two empty words, text."""
    if not png.startswith(_SIGNATURE):
        return None
    head, start = f"{TEXT_KEY}\0".encode() + bytes(2), len(_SIGNATURE)
    while start + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        if kind in (b"IDAT", b"IEND"):
            return None
        if kind == b"iTXt" and length <= _MOST_TEXT and png.startswith(head, start + 8):
            parts = png[start + 8 + len(head) : start + 8 + length].split(b"\0", 2)
            return parts[2] if len(parts) == 3 else None
        start += 12 + length
    return None
