"""The training pictures of the pocket base: read once, as planes of bytes, with what is known of each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

DRAWN_SIDE = 128
"""Side in pixels of the pictures of the set. Changes are drawn at this side, then halved: lines come out smooth."""
SIDE = 64
"""Side in pixels that the model draws."""


@dataclass(frozen=True)
class Picture:
    """What captions.jsonl says of one picture of the set."""

    file: str
    style: str
    label: str
    tags: tuple[str, ...]
    group: str
    code_point: str
    licence: str


def read_index(folder: Path) -> list[Picture]:
    """The pictures that folder/captions.jsonl names, in its order."""
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Picture(**{**entry, "tags": tuple(entry["tags"])}) for entry in map(json.loads, lines)]


def read_planes(folder: Path, pictures: list[Picture]) -> Tensor:
    """(N, 3, 128, 128) uint8 of the pictures, in their order."""

    def read(picture: Picture) -> np.ndarray:
        with Image.open(folder / picture.file) as image:
            square = image.convert("RGB").resize((DRAWN_SIDE, DRAWN_SIDE), Image.Resampling.LANCZOS)
        return np.asarray(square).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        return torch.from_numpy(np.stack(list(pool.map(read, pictures))))


def halve(planes: Tensor) -> Tensor:
    """(N, 3, 128, 128) float in 0..1 -> (N, 3, 64, 64), each pixel the mean of four."""
    return functional.avg_pool2d(planes, DRAWN_SIDE // SIDE)


def to_model(planes: Tensor) -> Tensor:
    """0..1 -> -1..1, the range a VAE reads."""
    return planes * 2 - 1


def to_images(planes: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in -1..1 -> pictures."""
    pixels = ((planes.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(square) for square in pixels]


def tile(images: list[Image.Image], columns: int, side: int = SIDE, gap: int = 2) -> Image.Image:
    """The pictures in rows of `columns`, each `side` pixels, `gap` pixels of grey between them."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), (200, 200, 200))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        square = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(square, (gap + column * (side + gap), gap + row * (side + gap)))
    return sheet
