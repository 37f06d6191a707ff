"""A grid as the render worker draws it: rows in batches, the first picture alone, and a cancel that ends it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_lora import UNET, UNET_OUT, save_lora
from trainers.cells import RenderRequest
from trainers.draw_cells import ROWS, answer
from trainers.generate import render
from trainers.grid import make_grid
from trainers.warm import Warm


class _Given(Exception):
    """It is no longer wanted."""


@pytest.fixture
def asked(tiny_base: Path, tmp_path: Path) -> RenderRequest:
    """A grid of 5 prompts x 9 strengths of a LoRA on the tiny base, one sampling step each."""
    lora = save_lora(tmp_path / "ink.safetensors", UNET, UNET_OUT)
    grid = make_grid(
        {
            "rows": "prompt",
            "columns": "strength",
            "base": "tiny",
            "prompts": ["a cat", "a dog", "a fox", "a cup", "a hat"],
            "strengths": [number / 4 for number in range(9)],
            "loras": [{"name": lora.name, "hash": "0" * 64}],
            "seeds": [1],
            "width": 32,
            "height": 32,
        }
    )
    how: dict[str, Any] = {"width": 32, "height": 32, "steps": 1, "guidance": 1.0, "folder": str(tmp_path / "out")}
    return RenderRequest.model_validate({"id": 1, "base": str(tiny_base), "cells": grid.cells([lora]), **how})


def test_45_pictures_are_drawn_in_few_passes_of_which_the_first_is_one(
    asked: RenderRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counted(model: Any, pictures: Any, *more: Any) -> Any:
        passes.append(len(pictures))
        return render(model, pictures, *more)

    monkeypatch.setattr("trainers.draw_cells.render", counted)
    told: list[dict[str, Any]] = []
    answer(asked, Warm(), told.append, lambda: None)
    assert {event["cell"] for event in told if event["event"] == "picture"} == set(range(45))
    # The five at strength 0 alone, as they are the base's own bit for bit; the other forty by rows.
    assert passes == [1] * 5 + [ROWS] * (40 // ROWS)


def test_a_cancel_ends_a_grid_before_another_picture_or_step(asked: RenderRequest) -> None:
    told: list[str] = []

    def check() -> None:
        if "picture" in told:
            raise _Given

    with pytest.raises(_Given):
        answer(asked, Warm(), lambda event: told.append(event["event"]), check)
    assert told.count("picture") == 1 and told[-1] == "picture" and len(list(Path(asked.folder).glob("*.png"))) == 1
