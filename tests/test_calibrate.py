"""Calibration: what captions share, the plan's cells, a curve whose best is known, and the command on the tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.command_line import ROOT, impasto
from tests.tiny_lora import TEXT, UNET, UNET_OUT, save_lora
from trainers.calibrate import Calibration, Plan, Point, calibrate, make_plan
from trainers.calibrate_command import _sampling
from trainers.config import write_config
from trainers.dataset.captions import shared_words, without
from trainers.dataset.folder import scan_folder
from trainers.errors import DatasetError
from trainers.families.facts import BaseOptions
from trainers.measures.likeness import describe, describe_all, set_distance, spread_of
from trainers.presets import resolve

SAMPLES = ROOT / "assets" / "samples"
PATHS = [SAMPLES / "blackcut" / f"{name}.png" for name in ("cat", "key", "pear", "ship", "rose", "horse")]


@pytest.mark.parametrize(
    ("captions", "trigger", "left"),
    [
        (["an automobile, blackcut style", "a cat, blackcut style"], "blackcut style", "an automobile"),
        (["bluebot, standing", "bluebot"], "bluebot", "standing"),
        (["sks dog in a park", "sks dog on a bed"], "sks dog", "in a park"),
        (["a fox in oil style", "a cat in oil style"], "in oil style", "a fox"),  # and not the article
        (["a fox", "a cat"], "", "a fox"),
        (["only one"], "", "only one"),
    ],
)
def test_the_trigger_is_what_all_captions_share(captions: list[str], trigger: str, left: str) -> None:
    assert shared_words(captions) == trigger
    assert without(captions[0], trigger) == left


@pytest.mark.parametrize(
    ("caption", "trigger", "left"),
    [
        ("a cute cut of meat", "cut", "a cute of meat"),
        ("a shortcut", "cut", "a shortcut"),
        ("a (ink+) cat, red", "(ink+)", "a cat, red"),
        ("a <cut> cat", "<cut>", "a cat"),
    ],
)
def test_only_whole_words_of_a_trigger_are_taken_out(caption: str, trigger: str, left: str) -> None:
    assert without(caption, trigger) == left


def test_the_plan_draws_captions_with_and_without_the_trigger_at_every_strength() -> None:
    plan = make_plan(scan_folder(SAMPLES / "blackcut").examples, strengths=(1.0, 0.0, 0.5, 1.5))
    assert plan.strengths == (0.0, 0.5, 1.0, 1.5) and len(plan.prompts) == 12 and len(plan.plain) == 4
    assert all("blackcut" in prompt for prompt in plan.prompts) and not any("blackcut" in prompt for prompt in plan.plain)
    cells = plan.cells(Path("ink.safetensors"))
    assert len(cells) == 4 * 16 and {cell.seed for cell in cells} == {0}
    cell = cells[plan.place(2, 13)]
    assert (cell.prompt, cell.loras[0].unet, cell.loras[0].text) == (plan.plain[1], 1.0, 1.0)
    assert len(plan.wanted) == 24
    captions = {path.read_text(encoding="utf-8").strip() for path in (SAMPLES / "blackcut").glob("*.txt")}
    assert [prompt in captions for prompt in plan.prompts] == [True] * 6 + [False] * 6  # half of them new to it
    assert plan.prompts[6] == "a fox, blackcut style"
    subject = make_plan(scan_folder(SAMPLES / "bluebot").examples)  # its captions begin with the trigger: no new subject
    assert all(prompt.startswith("bluebot, ") for prompt in subject.prompts) and subject.plain[0].startswith("a blue robot")
    with pytest.raises(ValueError, match="strength 0"):
        make_plan(scan_folder(SAMPLES / "blackcut").examples, strengths=(0.5, 1.0, 1.5, 2.0))
    with pytest.raises(DatasetError, match="has a caption"):
        make_plan([])


def mixed(first: Image.Image, second: Image.Image, share: float) -> Image.Image:
    """Share 0 is the first, 1 the second, past 1 beyond it."""
    one, other = (np.asarray(image.resize((64, 64)).convert("RGB"), float) for image in (first, second))
    return Image.fromarray(np.clip(one + share * (other - one), 0, 255).astype(np.uint8))


def known(best: float, drifting: float) -> tuple[Plan, dict[int, Image.Image], list[Image.Image]]:
    """Pictures that are the wanted ones at strength `best`, go back beyond, and drift by a share of the way."""
    strengths = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    plan = Plan(strengths, ("a", "b", "c", "d"), ("e", "f"), tuple(PATHS[:4]), 0)
    wanted = [Image.open(path).convert("RGB") for path in PATHS]
    usual = sorted((SAMPLES / "inkline").glob("*.png"))
    base = [Image.open(usual[number]) for number in range(6)]  # the base's pictures
    drawn = {}
    for at, strength in enumerate(strengths):
        for prompt in range(6):
            share = 1 - (strength / best - 1) ** 2 if prompt < 4 else drifting * strength
            drawn[plan.place(at, prompt)] = mixed(base[prompt], wanted[prompt], share)
    return plan, drawn, wanted[:4]


@pytest.mark.parametrize("best", [0.6, 0.9, 1.2])
def test_the_suggestion_is_where_the_pictures_are_nearest(best: float) -> None:
    found = calibrate(*known(best, 0.0))
    assert abs(found.suggested - best) <= 0.15
    zero = found.points[0]
    assert (zero.similarity, zero.drift) == (0.0, 0.0) and max(point.similarity for point in found.points) > 0.7
    assert f"{found.suggested:.2f}" in found.words and found.error < 0.2


def test_drift_lowers_the_suggestion_and_none_is_none() -> None:
    calm, wild = calibrate(*known(1.2, 0.0)), calibrate(*known(1.2, 1.0))
    assert all(point.drift == 0 for point in calm.points) and wild.points[-1].drift > 0.5
    assert wild.suggested < calm.suggested
    assert [point.similarity for point in wild.points] == [point.similarity for point in calm.points]


def test_one_that_does_nothing_is_told_to() -> None:
    plan, drawn, wanted = known(1.0, 0.0)
    still = {cell: drawn[plan.place(0, cell % 6)] for cell in drawn}
    assert "hardly brings" in calibrate(plan, still, wanted).words


def test_likeness_tells_styles_apart_whatever_is_drawn() -> None:
    folders = {name: sorted((SAMPLES / name).glob("*.png")) for name in ("blackcut", "inkline")}
    told = {name: describe_all([Image.open(path) for path in paths]) for name, paths in folders.items()}
    spread = spread_of(*told.values())
    halves = [half for rows in told.values() for half in (rows[::2], rows[1::2])]
    within = max(set_distance(halves[0], halves[1], spread), set_distance(halves[2], halves[3], spread))
    across = min(set_distance(one, other, spread) for one in halves[:2] for other in halves[2:])
    assert within < 0.7 * across
    white, black = (describe(Image.new("RGB", (64, 64), colour)) for colour in ("white", "black"))
    assert np.isfinite(white).all() and np.isfinite(black).all() and not np.allclose(white, black)


def test_the_command_measures_draws_and_bakes(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = save_lora(tmp_path / "ink.safetensors", UNET, UNET_OUT, TEXT)
    before = lora.read_bytes()
    picture, baked = tmp_path / "both.png", tmp_path / "baked.safetensors"
    asked = ("calibrate", str(lora), "--images", str(SAMPLES / "bluebot"), "--base", str(tiny_base), "--steps", "1")
    code = impasto(*asked, "--guidance", "1", "--json", "--picture", str(picture), "--bake", str(baked))
    said = capsys.readouterr()
    assert lora.read_bytes() == before
    if code:  # a random LoRA may be best at 0: then nothing is baked, and that is said
        assert "nothing to bake" in said.err and not baked.exists()
    told = json.loads(said.out)
    assert len(told["points"]) == 9 and told["points"][0] == {"strength": 0.0, "similarity": 0.0, "drift": 0.0}
    assert baked.exists() == (code == 0) and Image.open(picture).width > 3 * 32


@pytest.mark.parametrize("json_too", [True, False])
def test_what_was_measured_is_told_though_nothing_can_be_baked(
    json_too: bool, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Calibration((Point(0.0, 0.0, 0.0), Point(1.0, -0.5, 0.25)), (0.0, -0.5), (0.0, 0.25), 0.0, 0.1)
    monkeypatch.setattr("trainers.calibrate.calibrate", lambda *given: found)
    monkeypatch.setattr("trainers.calibrate_command._draw", lambda *given: {})
    baked = tmp_path / "baked.safetensors"
    lora = save_lora(tmp_path / "a.safetensors")
    asked = ("calibrate", lora, "--images", SAMPLES / "bluebot", "--base", tiny_base, "--bake", baked)
    assert impasto(*asked, *(["--json"] if json_too else [])) == 2
    said = capsys.readouterr()
    assert "nothing to bake" in said.err and not baked.exists()
    assert json.loads(said.out)["suggested"] == 0.0 if json_too else "-0.500" in said.out


@pytest.mark.parametrize("kind", ["cut off", "not a number", "missing", "of another width"])
def test_a_lora_that_cannot_be_used_is_told_before_anything_is_drawn(
    kind: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = save_lora(tmp_path / "a.safetensors", UNET, TEXT)
    if kind == "cut off":
        lora.write_bytes(lora.read_bytes()[:-40])
    elif kind == "missing":
        lora.unlink()
    else:
        tensors = load_file(lora)
        name = next(name for name in tensors if name.endswith("lora_down.weight"))
        bad = torch.full_like(tensors[name], float("nan")) if kind == "not a number" else torch.zeros(2, 7)
        save_file({**tensors, name: bad}, lora)

    def draws(*_: Any) -> None:
        raise AssertionError("it draws")

    monkeypatch.setattr("trainers.draw_cells.render", draws)
    assert impasto("calibrate", lora, "--images", SAMPLES / "bluebot", "--base", tiny_base) > 0
    assert str(lora) in capsys.readouterr().err


def test_a_name_that_is_taken_or_no_png_is_refused_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    for words, what in (
        (("--bake", taken), "such a file already"),
        (("--picture", tmp_path / "a.jpg"), "does not end with .png"),
    ):
        assert impasto("calibrate", taken, "--images", tmp_path, *words) > 0
        assert what in capsys.readouterr().err


def test_it_draws_as_the_run_or_the_base_draws_its_samples(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "ink.safetensors", UNET, UNET_OUT, TEXT)
    assert _sampling(lora, "pocket", BaseOptions())["guidance"] == resolve("pocket", {}).samples.guidance == 3.0
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    config = resolve("pocket", {"samples": {"guidance": 2.5, "steps": 9, "scheduler": "euler", "negative": "grey"}})
    (run / "config.toml").write_text(write_config(config), encoding="utf-8")
    lora.rename(run / lora.name)
    told = {"guidance": 2.5, "steps": 9, "scheduler": "euler", "negative": "grey"}
    assert _sampling(run / lora.name, "pocket", BaseOptions()) == told
