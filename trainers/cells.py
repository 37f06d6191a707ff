"""What the render worker is asked for: pictures of prompts, seeds and LoRA files at strengths; chores. Imports no torch."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, field_validator, model_validator

from trainers.adapters.plan import BLOCKS, Strengths
from trainers.families.settings import BaseSettings

LIMIT = 4.0
"""Strengths beyond this, either way, draw noise only."""
MOST_LORAS = 16
"""How many LoRAs one picture may have."""
MOST_CELLS = 400
"""How many pictures one request may ask for."""

Strength = Annotated[float, Field(ge=-LIMIT, le=LIMIT)]
Base = Annotated[BaseSettings, BeforeValidator(lambda value: {"model": value} if isinstance(value, str) else value)]
"""A base model; its name alone will do."""
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class LoraUse(BaseModel):
    """A LoRA file with its strengths on the denoiser and on the text encoders, and multipliers by block; a missing one is 1."""

    model_config = _STRICT
    path: str
    unet: Strength
    text: Strength
    blocks: dict[str, Strength] = {}

    @field_validator("blocks")
    @classmethod
    def _known_blocks(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in BLOCKS:
                raise ValueError(f"there is no block {name[:40]!r}; the blocks are {', '.join(BLOCKS)}")
        return value

    @property
    def strengths(self) -> Strengths:
        """The strengths as the renderer takes them, without the multipliers that change nothing."""
        return Strengths(
            self.unet, self.text, {block: self.blocks[block] for block in BLOCKS if self.blocks.get(block, 1) != 1}
        )


class Cell(BaseModel):
    """One picture: what it shows, the noise it begins with, and the LoRAs that act on it."""

    model_config = _STRICT
    prompt: str
    seed: int = Field(ge=0, lt=2**63)
    loras: Annotated[tuple[LoraUse, ...], Strict(False), Field(max_length=MOST_LORAS)] = ()

    @field_validator("loras")
    @classmethod
    def _each_file_once(cls, value: tuple[LoraUse, ...]) -> tuple[LoraUse, ...]:
        paths = [os.path.abspath(lora.path) for lora in value]
        if len(set(paths)) < len(paths):
            raise ValueError("the same LoRA file stands in it twice")
        return value

    @property
    def active(self) -> tuple[LoraUse, ...]:
        """The LoRAs that are not off; without any, the picture is the base's own."""
        return tuple(lora for lora in self.loras if not lora.strengths.is_off)


class RenderRequest(BaseModel):
    """What to draw. Sizes in pixels; each strength multiplies the LoRA's own; PNG files are written into `folder`.

    Either `cells`, or prompt, seed and strengths of one `lora` at most, which are short for one cell for each strength.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    id: int
    base: Base
    cells: list[Cell] = Field([], max_length=MOST_CELLS)
    lora: str | None = None
    prompt: str = ""
    negative: str = ""
    seed: int = Field(0, ge=0, lt=2**63)
    width: int
    height: int
    steps: int = Field(20, ge=1, le=500)
    guidance: float = Field(5.0, ge=0, le=100)
    scheduler: str = "dpm++"
    strengths: list[Strength] = Field([], max_length=32)
    folder: str
    replaces: bool = False

    @model_validator(mode="after")
    def _one_way_of_asking(self) -> RenderRequest:
        short = {"lora", "prompt", "seed", "strengths"} & self.model_fields_set
        if self.cells and short:
            raise ValueError(f"with cells there is no {', '.join(sorted(short))}")
        if not self.cells and not (self.strengths and {"prompt", "seed"} <= short):
            raise ValueError("neither cells nor prompt, seed and strengths say what to draw")
        return self

    def pictures(self) -> list[Cell]:
        """The cells, or those that prompt, seed, lora and strengths are short for."""
        if self.cells:
            return self.cells
        of = [(LoraUse(path=self.lora, unet=value, text=value),) if self.lora else () for value in self.strengths]
        return [Cell(prompt=self.prompt, seed=self.seed, loras=loras) for loras in of]

    def strength_of(self, cell: int) -> float:
        """The strength by which a picture is told beside its number."""
        if self.cells:
            loras = self.cells[cell].loras
            return loras[0].unet if loras else 0.0
        return self.strengths[cell]


class WeighRequest(BaseModel):
    """How strong a LoRA file is in each block of a base."""

    model_config = ConfigDict(strict=True, frozen=True)
    id: int
    base: Base
    path: str
    folder: str


class ExportRequest(BaseModel):
    """A blend to be written as one LoRA file; with a rank it is cut to that, else it is exact."""

    model_config = ConfigDict(strict=True, frozen=True)
    id: int
    loras: Annotated[tuple[LoraUse, ...], Strict(False), Field(min_length=1, max_length=MOST_LORAS)]
    output: str
    family: str
    rank: int | None = Field(None, ge=1, le=4096)
    folder: str = ""
