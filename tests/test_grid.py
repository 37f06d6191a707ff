"""Grids: which cells, labels, the PNG that holds its settings and no path, hostile PNGs, and the difference picture."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainers.errors import SettingError
from trainers.grid import TEXT_KEY, Grid, grid_png, make_grid, read_grid
from trainers.page import difference

HASHES = ("a" * 64, "b" * 64)


def values(**changes: Any) -> dict[str, Any]:
    """Two prompts x three strengths, as JSON has them."""
    usual = {
        "rows": "prompt",
        "columns": "strength",
        "base": "pocket",
        "prompts": ["a cat, 墨 style", "a dog"],
        "strengths": [0.0, 0.5, 1.0],
        "loras": [{"name": "ink.safetensors", "hash": HASHES[0]}],
        "seeds": [7],
        "width": 64,
        "height": 64,
        "guidance": 3.0,
    }
    return usual | changes


def two_loras() -> list[dict[str, str]]:
    names = ("ink-00000100.safetensors", "ink-00000200.safetensors")
    return [{"name": name, "hash": found, "label": ""} for name, found in zip(names, HASHES, strict=True)]


def test_cells_are_drawn_row_by_row_each_with_its_values() -> None:
    cells = make_grid(values()).cells([Path("ink.safetensors")])
    assert [(cell.prompt[:5], cell.seed, cell.loras[0].unet, cell.loras[0].text) for cell in cells] == [
        (prompt, 7, strength, strength) for prompt in ("a cat", "a dog") for strength in (0.0, 0.5, 1.0)
    ]


@pytest.mark.parametrize("rows", ["prompt", "strength", "lora", "seed"])
@pytest.mark.parametrize("columns", ["prompt", "strength", "lora", "seed"])
def test_any_two_kinds_make_a_grid(rows: str, columns: str) -> None:
    several = {"prompt": ["a", "b"], "strength": [0.25, 1.0], "lora": two_loras(), "seed": [1, 2]}
    given = {f"{kind}s": some if kind in (rows, columns) else some[:1] for kind, some in several.items()}
    if rows == columns:
        with pytest.raises(SettingError, match="are both over"):
            make_grid(values(rows=rows, columns=columns, **given))
        return
    grid = make_grid(values(rows=rows, columns=columns, **given))
    cells = grid.cells([Path("one"), Path("two")][: len(grid.loras)])
    assert len(cells) == len(grid) == 4 and len({cell.model_dump_json() for cell in cells}) == 4
    assert len(grid.labels(grid.rows)) == len(grid.labels(grid.columns)) == 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seeds": [1, 2]}, "the seed is on no axis"),
        ({"strengths": [1.0, 1.0]}, "each once"),
        ({"strengths": []}, "at least one value"),
        ({"strengths": [9.0]}, "less than or equal to 4"),
        ({"prompts": [str(number) for number in range(200)]}, "600 pictures; a grid has at most 400"),
        ({"scheduler": "magic"}, "no sampler 'magic'"),
        ({"loras": [{"name": "home/me/ink.safetensors", "hash": HASHES[0]}]}, "without its folder"),
        ({"extra": 1}, "Extra inputs"),
    ],
)
def test_what_is_no_grid_is_refused_with_its_reason(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(SettingError, match=what):
        make_grid(values(**changes))


def test_a_saved_grid_is_read_back_whole_and_holds_no_folder() -> None:
    grid = make_grid(values())
    colours = ["red", "lime", "blue", "cyan", "magenta", None]
    png = grid_png(grid, [colour and Image.new("RGB", (64, 64), colour) for colour in colours])
    assert read_grid(png) == grid
    assert read_grid(png[: png.index(b"IDAT")]) == grid  # the browser need not send the pixels
    with Image.open(io.BytesIO(png)) as page:
        told = json.loads(page.info[TEXT_KEY])  # as any program reads it
        seen = {colour for _, colour in page.getcolors(1 << 24) or []}
    assert told["prompts"][0] == "a cat, 墨 style" and "/" not in json.dumps(told)
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255)} <= seen
    assert Grid.model_validate(told) == grid


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "png",
    [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**32 - 1) + b"iTXt" + TEXT_KEY.encode() + bytes(3),
        b"\x89PNG\r\n\x1a\n" + chunk(b"iTXt", TEXT_KEY.encode() + bytes(3)),
        b"\x89PNG\r\n\x1a\n" + chunk(b"iTXt", TEXT_KEY.encode() + bytes(5) + b"[" * 100_000),
        b"\x89PNG\r\n\x1a\n" + chunk(b"iTXt", TEXT_KEY.encode() + bytes(5) + b"[1]"),
        b"\x89PNG\r\n\x1a\n" + chunk(b"iTXt", TEXT_KEY.encode() + bytes(5) + b'{"rows": 1}'),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") + chunk(b"iTXt", TEXT_KEY.encode() + bytes(5) + b"{}"),
    ],
)
def test_a_png_without_good_settings_is_refused(png: bytes) -> None:
    with pytest.raises(SettingError):
        read_grid(png)


def test_a_chunk_of_another_keyword_is_passed_over() -> None:
    told, data = PngInfo(), io.BytesIO()
    told.add_itxt("parameters", "a cat")
    told.add_itxt(TEXT_KEY, json.dumps(values()))
    Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=told)
    assert read_grid(data.getvalue()) == make_grid(values())


def test_a_difference_is_amplified_by_the_factor_that_is_told() -> None:
    first = np.full((8, 8, 3), 100, np.uint8)
    second = first.copy()
    second[0, 0] = (110, 95, 100)
    found = difference(Image.fromarray(first), Image.fromarray(second), 8)
    shown = np.asarray(found.picture)
    assert shown[0, 0].tolist() == [80, 40, 0] and shown[1:].max() == 0
    assert found.factor == 8 and found.largest == pytest.approx(10 / 255)
    assert found.mean == pytest.approx(15 / (8 * 8 * 3) / 255)
    chosen = difference(Image.fromarray(first), Image.fromarray(first + 20))
    assert chosen.factor == 8 and np.asarray(chosen.picture).max() == 160  # 16 times would be cut at 255
    same = difference(Image.fromarray(first), Image.fromarray(first))
    assert same.largest == 0 and not np.asarray(same.picture).any()
    with pytest.raises(ValueError, match="cannot be compared"):
        difference(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9)))
