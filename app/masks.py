"""Masks as the window shows them: which setting the recipe has, and a mask drawn over its picture."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from PIL import Image

from app.projects import Project, read_recipe
from app.refusals import Refusal
from trainers.dataset.masks import Mask, Masks, load_masked

SIDE = 384
"""Longest side in pixels of a drawn mask."""
DIM = 0.75
"""How dark it lies over what is not learnt."""


def mask_setting(project: Project) -> Masks:
    """dataset.masks of the recipe; "off" where it has none. A preset never sets it."""
    try:
        dataset = read_recipe(project).get("dataset", {})
    except Refusal:  # told where the recipe itself is asked for
        return "off"
    found = dataset.get("masks", "off") if isinstance(dataset, dict) else "off"
    return next((known for known in get_args(Masks) if known == found), "off")


def draw_mask(picture: Path, mask: Mask) -> Image.Image:
    """A veil as large as a thumbnail: RGBA, black, and the less clear the less is learnt there. Raises DatasetError."""
    _, grey = load_masked(picture, mask)
    grey.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    veil = Image.new("RGBA", grey.size)
    veil.putalpha(grey.point(lambda value: round(DIM * (255 - value))))
    return veil
