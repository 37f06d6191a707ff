"""Contact sheets of a finished base, small enough to be committed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from assets.pocket.build import prompts as ask
from assets.pocket.build.pictures import SIDE, tile, to_images
from assets.pocket.build.prompts import Prompt
from assets.pocket.build.styles import DRAWN_STYLES
from assets.pocket.build.unet import MAIN_STYLES, SIDE_STYLES
from trainers.families.base import DiffusionModel
from trainers.files import write_atomically

LIMIT = 120_000
"""Most bytes of a sheet."""
COLUMNS = 12
COLOURS = (256, 128, 64, 32)
STYLES = (*MAIN_STYLES, *SIDE_STYLES, *DRAWN_STYLES)
"""All style words that a caption of the training has."""
MARGIN = 76
"""Width in pixels of the row names."""


def save_small(sheet: Image.Image, path: Path, limit: int = LIMIT) -> int:
    """Writes the sheet as PNG with the largest palette that keeps it within `limit` bytes, else the smallest; returns bytes."""
    for colours in COLOURS:
        data = io.BytesIO()
        # Dithering would make the white ground noisy, which costs the eye and most of the compression.
        sheet.quantize(colours, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
        if data.tell() <= limit:
            break
    write_atomically(path, data.getvalue())
    return data.tell()


def name_rows(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """The sheet with a margin on the left that names its rows, which are all equally high."""
    page = Image.new("RGB", (sheet.width + MARGIN, sheet.height), "white")
    page.paste(sheet, (MARGIN, 0))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for row, name in enumerate(names):
        pen.text((4, int((row + 0.5) * sheet.height / len(names))), name, fill="black", font=font, anchor="lm")
    return page


def alternate(first: Sequence[Image.Image], second: Sequence[Image.Image], columns: int = COLUMNS) -> list[Image.Image]:
    """Rows of `columns` pictures of the first and the second by turns, both equally long. White fills up a short last row."""
    blank = Image.new("RGB", first[0].size, "white")
    rows: list[Image.Image] = []
    for start in range(0, len(first), columns):
        for images in (first, second):
            several = list(images[start : start + columns])
            rows += several + [blank] * (columns - len(several))
    return rows


def prompts_sheet(drawn: Sequence[Image.Image]) -> Image.Image:
    """The prompts that are measured, in their order, twelve a row."""
    return tile(list(drawn), COLUMNS)


def comparison_sheet(drawn: Sequence[Image.Image], other: Sequence[Image.Image]) -> Image.Image:
    """Another base's pictures above this one's, for the same prompts from the same noise."""
    sheet = tile(alternate(other, drawn), COLUMNS)
    return name_rows(sheet, ("other", "this base") * -(-len(drawn) // COLUMNS))


def styles_sheet(model: DiffusionModel, labels: Sequence[str], styles: Sequence[str]) -> Image.Image:
    """Labels across, style words down; a column starts from one noise."""
    rows = [image for style in styles for image in ask.draw(model, [Prompt(label, style) for label in labels])]
    return name_rows(tile(rows, len(labels)), styles)


def vae_sheet(model: DiffusionModel, styles: Sequence[str] = ("inkline", "blackcut")) -> Image.Image:
    """The first twelve pictures of each sample folder, and below them the same after the VAE."""
    rows: list[Image.Image] = []
    for style in styles:
        planes = ask.read_sample(style, model.facts.resolution)[:COLUMNS]
        rows += alternate(ask.as_images(planes), to_images(ask.reconstruct(model, planes)))
    return name_rows(tile(rows, COLUMNS, SIDE), [name for style in styles for name in (style, "after VAE")])


def draw_sheets(
    base: Path,
    work: Path,
    out: Path,
    other: Path | None = None,
    styles: Sequence[str] = STYLES,
    prompts: int = 96,
    base_set: Path | None = None,
) -> list[Path]:
    """Draws the sheets of a base folder into `out`, each a PNG of at most 120 kB; returns their files.

    1-prompts: the measured prompts. 2-other: 24 of them, `other` above this base (left out without one). 3-styles: 12 concepts
    in each style word. 4-vae: sample pictures after the VAE. Raises BaseModelError, DatasetError.
    """
    model = ask.load_base(base)
    labels = list(ask.read_concepts(base_set or work / "base-set"))
    chosen = ask.choose_prompts(labels, prompts)
    drawn = ask.draw(model, chosen)
    sheets = {"1-prompts": prompts_sheet(drawn)}
    if other:
        few = chosen[: 2 * COLUMNS]
        sheets["2-other"] = comparison_sheet(drawn[: len(few)], ask.draw(ask.load_base(other), few))
    spread = [labels[place * len(labels) // COLUMNS] for place in range(min(COLUMNS, len(labels)))]
    sheets["3-styles"] = styles_sheet(model, spread, styles)
    sheets["4-vae"] = vae_sheet(model)
    out.mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets.items():
        save_small(sheet, out / f"{name}.png")
    return [out / f"{name}.png" for name in sheets]
