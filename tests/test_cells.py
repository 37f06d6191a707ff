"""Pictures of different prompts, seeds and LoRAs in one request: each as if asked for alone, soon, once, and cancellable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from tests.asked_worker import kinds, run, wait_for
from tests.tiny_lora import TEXT, UNET, UNET_OUT, save_lora
from trainers.adapters.inject import find_layers
from trainers.adapters.plan import BLOCKS, block_of
from trainers.draw_cells import PIXELS, ROWS, rows_at
from trainers.errors import SettingError
from trainers.families import load_family, recognise_base
from trainers.generate import Picture, RenderSettings, render
from trainers.warm import KEPT_LORAS, Warm, adapted_layers
from trainers.worker import parse_request, serve

UP = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def use(path: Path, unet: float = 1.0, text: float | None = None, blocks: dict[str, float] | None = None) -> dict[str, Any]:
    return {"path": str(path), "unet": unet, "text": unet if text is None else text, "blocks": blocks or {}}


def cell(*loras: dict[str, Any], prompt: str = "a red apple", seed: int = 5) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "loras": list(loras)}


@pytest.fixture
def ask(tiny_base: Path, tmp_path: Path) -> Any:
    """ask(cell, ..., id=1) -> a request for the tiny base, 3 steps at 32x32, into tmp_path/out."""
    how = {"width": 32, "height": 32, "steps": 3, "guidance": 4.0, "negative": "blurry", "folder": str(tmp_path / "out")}
    usual = {"do": "render", "id": 1, "base": str(tiny_base), **how}
    return lambda *cells, **changes: {**usual, "cells": list(cells), **changes}


def drawn(events: list[dict[str, Any]]) -> dict[int, Any]:
    """Cell's number -> pixels (H, W, 3) as whole numbers."""
    found = [event for event in events if event["event"] == "picture"]
    return {event["cell"]: numpy.asarray(Image.open(event["path"])).astype(int) for event in found}


def test_each_cell_shows_what_it_shows_alone_and_one_without_a_lora_is_the_base_bit_for_bit(
    ask: Any, tiny_base: Path, tmp_path: Path
) -> None:
    first = save_lora(tmp_path / "a.safetensors", UNET, TEXT)
    second = save_lora(tmp_path / "b.safetensors", UNET, UNET_OUT, seed=1)
    cells = [
        cell(use(first), use(second, -0.5)),
        cell(use(first, 0.5), use(second), prompt="a cat", seed=6),
        cell(use(first, 0.0), use(second, 1.0, 0.0)),
        cell(use(first, 0.0, 1.0)),
        cell(use(first, 1.0, 1.0, {"text": 0.0})),
        cell(use(first, 0.0), use(second, 1.0, 1.0, dict.fromkeys(BLOCKS, 0.0))),
        cell(prompt="a cat", seed=6),
    ]
    warm = Warm()
    together = drawn(run(ask(*cells), warm=warm))
    assert set(together) == set(range(len(cells)))
    for number, one in enumerate(cells[:5]):
        (alone,) = drawn(run(ask(one, folder=str(tmp_path / f"single-{number}")), warm=warm)).values()
        assert numpy.abs(together[number] - alone).max() <= 1
    base = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    how = RenderSettings(height=32, width=32, steps=3, guidance=4.0, negative="blurry")
    for number, prompt, seed in ((5, "a red apple", 5), (6, "a cat", 6)):
        (expected,) = render(base, [Picture(prompt, seed, {})], how)
        assert numpy.array_equal(together[number], numpy.asarray(expected))
    assert all(numpy.abs(together[number] - together[5]).max() > 2 for number in (0, 2, 3, 4))
    assert numpy.abs(together[3] - together[4]).max() > 2


def test_the_first_picture_comes_from_a_pass_of_its_own_and_the_others_in_batches(ask: Any, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "a.safetensors")
    events = run(ask(*(cell(use(lora), seed=seed) for seed in range(ROWS + 3))))
    passes = [1, ROWS, 2]
    expected = ["loading", "loading"] + [kind for rows in passes for kind in ["step"] * 3 + ["picture"] * rows] + ["done"]
    assert kinds(events) == expected
    steps = [(event["done"], event["total"]) for event in events if event["event"] == "step"]
    assert steps[:3] == [(done, 3 * (ROWS + 3)) for done in (1, 2, 3)] and steps[-1] == (3 * (ROWS + 3), 3 * (ROWS + 3))


@pytest.mark.parametrize(("side", "rows"), [(32, ROWS), (128, ROWS), (256, ROWS), (512, 4), (768, 1), (1024, 1), (2048, 1)])
def test_how_many_are_drawn_together_follows_from_their_size(side: int, rows: int) -> None:
    assert rows_at(side, side) == rows
    assert rows == 1 or rows * side * side <= PIXELS


def test_pictures_do_not_depend_on_how_many_are_drawn_together(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, warm = save_lora(tmp_path / "a.safetensors", UNET, TEXT), Warm()
    cells = [cell(use(lora, strength), seed=seed) for strength in (0.5, 1.0) for seed in range(4)]
    usual = drawn(run(ask(*cells), warm=warm))
    monkeypatch.setattr("trainers.draw_cells.PIXELS", 3 * 32 * 32)
    events = run(ask(*cells, folder=str(tmp_path / "few")), warm=warm)
    assert [kind for kind in kinds(events) if kind != "loading"] == (
        ["step"] * 3 + ["picture"] + 2 * (["step"] * 3 + ["picture"] * 3) + ["step"] * 3 + ["picture", "done"]
    )
    few = drawn(events)
    assert all(numpy.abs(few[number] - usual[number]).max() <= 1 for number in range(8))


def test_equal_cells_are_drawn_once_and_known_ones_not_at_all(ask: Any, tmp_path: Path) -> None:
    lora, other = save_lora(tmp_path / "a.safetensors"), save_lora(tmp_path / "b.safetensors", seed=1)
    one, same = cell(use(lora), use(other, 0.0)), cell(use(lora, blocks={"mid": 1.0}))
    events = run(ask(one, same))
    assert kinds(events).count("step") == 3 and kinds(events).count("picture") == 2
    again = run(
        ask(same, cell(use(lora, blocks={"mid": 0.5})), cell(use(lora, blocks={"down_0": 0.5})), cell(use(lora), use(other)))
    )
    assert kinds(again)[0] == "picture" and again[0]["cell"] == 0
    assert len({event["path"] for event in again if event["event"] == "picture"}) == 4


def test_all_loras_of_one_picture_stay_however_many_and_of_several_pictures_the_last(ask: Any, tmp_path: Path) -> None:
    files = [save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(KEPT_LORAS + 3)]
    warm = Warm()
    whole = cell(*(use(file, 0.3) for file in files))
    events = run(ask(whole), warm=warm)
    model = warm.model(recognise_base(ask()["base"]), lambda event: None)
    assert {len(layer.adapters) for layer in adapted_layers(model)} == {len(files)}
    run(ask(*(cell(use(file)) for file in files), id=2), warm=warm)
    assert {len(layer.adapters) for layer in adapted_layers(model)} == {KEPT_LORAS}
    again = run(ask(whole, folder=str(tmp_path / "again")), warm=warm)
    assert numpy.abs(drawn(again)[0] - drawn(events)[0]).max() <= 1


def test_cells_that_nobody_wants_any_more_are_abandoned(ask: Any, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "a.safetensors")
    told: list[dict[str, Any]] = []

    def lines() -> Iterator[bytes]:
        yield json.dumps(ask(*(cell(use(lora), seed=seed) for seed in range(20)), steps=30)).encode()
        wait_for(told, 1, "picture")
        yield json.dumps({"do": "cancel", "id": 1}).encode()
        wait_for(told, 1, "cancelled", "done")

    serve(lines(), told.append, Warm())
    assert kinds(told)[-1] == "cancelled" and kinds(told).count("picture") < 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cells": []}, "neither"),
        ({"seed": 1}, "seed"),
        ({"cells": [cell(use(Path("a"), 5.0))]}, "unet"),
        ({"cells": [cell(use(Path("a"), 1.0, -5.0))]}, "text"),
        ({"cells": [cell(use(Path("a"), float("nan")))]}, "unet"),
        ({"cells": [cell(use(Path("a"), blocks={"down_9": 1.0}))]}, "down_9"),
        ({"cells": [cell(use(Path("a")), use(Path("./a")))]}, "twice"),
        ({"cells": [{"prompt": "a"}]}, "seed"),
        ({"cells": [cell(seed=-1)]}, "seed"),
        ({"cells": [cell()] * 401}, "cells"),
    ],
)
def test_a_cell_that_cannot_be_drawn_is_refused_naming_the_field(ask: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        parse_request({**ask(cell()), **changes})


def test_every_layer_of_a_base_stands_in_a_block(tiny_base: Path) -> None:
    base = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    found = {name: block_of(name) for name in find_layers(base.parts())}
    assert set(found.values()) <= set(BLOCKS)
    assert {"text", "down_0", "mid", "up_0", "other"} <= set(found.values())
    assert (found[UNET], found[TEXT], found["unet.conv_in"], block_of(UP)) == ("down_0", "text", "other", "up_1")
