"""Compare in a real browser: a grid fills in, is cancelled, saved and brought back; a blind tournament gives a ranking."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.app_client import make_run
from tests.browser.conftest import expect
from tests.command_line import ROOT
from tests.tiny_lora import TEXT, UNET, UNET_OUT, save_lora
from trainers.grid import read_grid

SHOTS = os.environ.get("IMPASTO_SHOTS")


@pytest.fixture
def compare(window: Any, page: Any, tiny_base: Path) -> Callable[[str], None]:
    """compare(name) opens the screen for a new project with a run on the tiny base that has a LoRA and a checkpoint."""

    def opened(name: str) -> None:
        from app.projects import add_run, read_project

        page.goto(window.url)
        script = "name => import('/web/core.js').then(m => m.post('/projects', {name})).then(p => p.id)"
        project = str(page.evaluate(script, name))
        finished = {"type": "finished", "time": 1.0, "step": 20, "path": "ink.safetensors", "seconds": 1}
        run = make_run(window.home, name, [json.dumps(finished)], project=project)
        images = ROOT / "assets" / "samples" / "blackcut"
        lines = ["[base]", f"model = {json.dumps(str(tiny_base))}", "[dataset]", f"images = {json.dumps(str(images))}"]
        lines += ["resolution = 32", "[samples]", 'prompts = ["a cat"]', "steps = 2", "guidance = 3.0"]
        run.config.write_text("\n".join(lines), encoding="utf-8")
        run.checkpoints.mkdir()
        save_lora(run.path / "ink.safetensors", UNET, UNET_OUT, TEXT)
        save_lora(run.checkpoints / "ink-00000010.safetensors", UNET, TEXT, seed=1)
        add_run(read_project(window.home, project), name)
        page.goto(f"{window.url}#/{project}/compare")
        page.get_by_role("button", name="Draw grid").wait_for()

    return opened


def shot(page: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_a_grid_fills_in_is_cancelled_and_comes_back(
    window: Any, compare: Callable[[str], None], page: Any, tmp_path: Path
) -> None:
    # Whatever else the window holds by now: one LoRA more in the library, so that a choice tells its run.
    (window.home / "loras").mkdir(exist_ok=True)
    save_lora(window.home / "loras" / "beside.safetensors", UNET, seed=9)
    compare("grids")
    expect(page.get_by_label("grids, the finished LoRA", exact=True)).to_be_checked()
    expect(page.locator("#part-grid .choices input:checked")).to_have_count(1)
    page.get_by_label("Prompts, one a line").fill("a cat\na dog")
    page.get_by_label("Strengths", exact=True).fill("0, 0.5, 1")
    page.get_by_role("button", name="Draw grid").click()
    page.get_by_text("Drawn: 6 of 6 pictures.").wait_for()
    expect(page.locator(".cell img")).to_have_count(6)
    expect(page.locator(".table thead th")).to_have_text([f"strength {s}" for s in ("0", "0.5", "1")])
    page.get_by_role("button", name="a cat, strength 1").click()
    page.get_by_text("Difference from the base").wait_for()
    page.get_by_role("button", name="a cat, strength 0", exact=True).click()
    page.get_by_text("Difference of the two").wait_for()
    shot(page, "compare-grid")
    with page.expect_download() as kept:
        page.get_by_role("link", name="Save grid").click()
    saved = tmp_path / "grid.png"
    kept.value.save_as(saved)
    grid = read_grid(saved.read_bytes())
    assert grid.prompts == ("a cat", "a dog") and Image.open(saved).width > 480
    assert [lora.name for lora in grid.loras] == ["ink.safetensors"]

    # 400 pictures of many steps, cancelled after the first.
    page.get_by_role("button", name="LoRA × seed").click()
    page.get_by_label("grids, step 10", exact=True).check()
    page.get_by_label("Seeds", exact=True).fill(", ".join(str(seed) for seed in range(200)))
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Sampling steps").fill("50")
    page.get_by_role("button", name="Draw grid").click()
    page.locator(".cell img").first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled:").wait_for()
    assert 1 <= page.locator(".cell img").count() < 400

    page.get_by_label("Saved grid").set_input_files(saved)
    page.get_by_text("The settings of the saved grid are back").wait_for()
    expect(page.get_by_label("Prompts, one a line")).to_have_value("a cat\na dog")
    expect(page.get_by_label("Sampling steps")).to_have_value("2")
    expect(page.get_by_label("grids, step 10", exact=True)).not_to_be_checked()
    expect(page.get_by_label("grids, the finished LoRA", exact=True)).to_be_checked()


def test_a_blind_tournament_ranks_and_a_strength_is_suggested(compare: Callable[[str], None], page: Any) -> None:
    compare("blind")
    page.get_by_label("Prompts, one a line").fill("a cat\na dog")
    page.get_by_label("Strengths", exact=True).fill("0, 0.75, 1.5")
    page.get_by_role("button", name="Draw grid").click()
    page.get_by_role("button", name="Blind tournament of the columns").click()
    page.get_by_text("Pair 1:").wait_for()
    assert "strength" not in page.get_by_role("region", name="Pair").inner_html()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Pair 2:").wait_for()
    page.get_by_role("button", name="↓ No difference").click()
    page.get_by_text("Pair 3:").wait_for()
    page.get_by_role("button", name="The right one is better").click()
    page.get_by_text("Pair 4:").wait_for()
    page.get_by_role("button", name="Take back").click()
    page.get_by_text("Pair 3:").wait_for()
    page.get_by_role("button", name="Show ranking").click()
    page.get_by_text("not to be told apart").wait_for()
    expect(page.locator(".places tr")).to_have_count(3)
    shot(page, "compare-blind")
    page.reload()
    page.get_by_role("tab", name="Blind tournament").click()
    page.get_by_text("Pair 3:").wait_for()

    page.get_by_role("tab", name="Best strength").click()
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("Suggested strength").wait_for()
    page.locator(".side-by-side figure").nth(3).wait_for()
    shot(page, "compare-strength")


def test_loras_of_the_library_are_compared_before_anything_is_trained(window: Any, page: Any, tiny_base: Path) -> None:
    folder = window.home / "loras"
    folder.mkdir(exist_ok=True)
    save_lora(folder / "brought.safetensors", UNET, UNET_OUT, TEXT, seed=3)
    page.goto(window.url)
    recipe = {"base": {"model": str(tiny_base)}, "dataset": {"resolution": 32}, "samples": {"steps": 2}}
    script = """recipe => import('/web/core.js').then(async ({ post, patch }) => {
      const { id } = await post('/projects', { name: 'brought in' });
      await patch(`/projects/${id}`, { recipe });
      return id;
    })"""
    project = str(page.evaluate(script, recipe))
    page.goto(f"{window.url}#/{project}/compare")
    expect(page.get_by_label("brought (library)")).to_be_checked()
    page.get_by_label("Prompts, one a line").fill("a cat")
    page.get_by_label("Strengths", exact=True).fill("0, 1")
    page.get_by_role("button", name="Draw grid").click()
    page.get_by_text("Drawn: 2 of 2 pictures.").wait_for()
    page.get_by_role("tab", name="Best strength").click()
    page.get_by_text("as it needs the pictures").wait_for()
    page.goto(f"{window.url}#/{project}/images")
    page.get_by_role("heading", name="Images").wait_for()
    page.goto(f"{window.url}#/{project}/compare")
    page.get_by_text("Drawn: 2 of 2 pictures.").wait_for()
    expect(page.get_by_label("Prompts, one a line")).to_have_value("a cat")
    expect(page.locator(".cell img")).to_have_count(2)
