"""The whole way in a real browser: drop a folder, edit, train, reload, stop, resume, take the file home, move the slider."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import eventually, expect
from tests.command_line import ROOT

SAMPLE = ROOT / "assets" / "samples" / "blackcut"
SHOTS = os.environ.get("IMPASTO_SHOTS")
STEPS = int(os.environ.get("IMPASTO_JOURNEY_STEPS", "30"))
"""Steps of the journey; the preset's own number, 400, takes some minutes more."""


def shot(page: Any, name: str) -> None:
    """A picture of the screen, where the person who looks asked for some."""
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder with six of the sample's pictures in a sub-folder, with captions."""
    folder = tmp_path / "my pictures"
    (folder / "inner").mkdir(parents=True)
    for path in sorted(SAMPLE.glob("*.png"))[:6]:
        shutil.copy(path, folder / "inner" / path.name)
        shutil.copy(path.with_suffix(".txt"), folder / "inner" / path.with_suffix(".txt").name)
    return folder


def trained_captions(home: Path) -> str:
    """What the newest run was told about captions."""
    run = max((home / "runs").iterdir())
    return (run / "edits.json").read_text(encoding="utf-8")


def open_images(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_role("button", name="New LoRA", exact=True).click()
    page.get_by_text("Drop a folder of pictures here").wait_for()


def drag(page: Any, label: str, share: float) -> str:
    """Takes a slider by its handle to a share of its way, with the mouse; what its box then says."""
    slider = page.get_by_label(f"{label}, slider", exact=True)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    least, most, value = slider.evaluate("s => [s.min, s.max, s.value].map(Number)")
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8 + (box["width"] - 16) * (value - least) / (most - least), middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + (box["width"] - 16) * share, middle, steps=8)
    page.mouse.up()
    page.get_by_text("Saved", exact=True).wait_for()
    return str(slider.locator("xpath=following-sibling::input").input_value())


def test_the_journey(own_window: Any, page: Any, drop: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / "my icons"
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("*.md"))
    begun = time.monotonic()
    open_images(page, own_window.url)
    shot(page, "images-empty")
    drop(page, folder)
    page.get_by_text("24 pictures and 24 captions added.").wait_for()
    captions = page.locator(".picture textarea")
    for number, text in enumerate(("one thing", "<b>two</b> things", "three, things")):
        captions.nth(number).fill(text)
        captions.nth(number).press("Tab")
        page.locator(".picture").nth(number).get_by_text("✓ saved").wait_for()
    shot(page, "images")

    page.get_by_role("link", name="Next: Recipe").click()
    page.get_by_role("heading", name="400 steps on pocket").wait_for()
    page.locator(".measure").get_by_text("to finish").wait_for()
    shot(page, "recipe")
    page.get_by_role("button", name="pocket").click()
    page.get_by_text("Preset pocket.").wait_for()
    page.get_by_text("Recipe as a file").click()  # pictures of few steps: how well they are drawn is told elsewhere
    page.get_by_label("Recipe as TOML").fill("[prior]\nsteps = 4\n[samples]\nsteps = 6\n")
    page.get_by_role("button", name="Use this text").click()
    page.get_by_text("The recipe was taken over.").wait_for()
    steps = page.locator("#field-train-steps")
    steps.fill(str(STEPS))
    steps.press("Tab")
    page.get_by_role("heading", name=f"{STEPS} steps on pocket").wait_for()
    rank = drag(page, "Rank", 0.14)
    rate = drag(page, "Learning rate", 0.77)
    page.get_by_text(f"Rank {rank}, alpha {rank}").wait_for()
    page.locator("#screen-recipe").get_by_role("button", name="Start training").click()

    page.get_by_role("img", name=re.compile("base$")).first.wait_for()
    told = json.loads(trained_captions(own_window.home))  # written before the run began
    assert {"one thing", "<b>two</b> things", "three, things"} <= set(told["captions"].values())
    page.reload()
    page.get_by_text("s a step").wait_for()
    page.get_by_role("button", name="Stop and keep").click()
    page.get_by_text("Stopped at step").wait_for()
    page.get_by_role("button", name="Resume").click()
    page.get_by_text(f"Finished: {STEPS} steps").wait_for(timeout=5 * 60_000)
    page.get_by_text("facts are written inside the file").wait_for()
    shot(page, "train")

    with page.expect_download() as caught:
        page.get_by_role("link", name="Download (").click()
    run = max((own_window.home / "runs").iterdir())
    made = next(run.glob("*.safetensors"))
    assert caught.value.suggested_filename == made.name
    assert Path(caught.value.path()).read_bytes() == made.read_bytes()
    settings = tomllib.loads((run / "config.toml").read_text())
    assert settings["adapter"]["rank"] == int(rank) != 16 and settings["prior"]["steps"] == 4
    assert settings["optimizer"]["learning_rate"] == float(rate) != 1e-3

    page.get_by_role("link", name="Try it in the Studio").click()
    expect(page.get_by_label("Prompt", exact=True)).not_to_have_value("")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Drawn.").wait_for()
    expect(page.locator(".rung")).to_have_count(9)
    check_slider(page)
    shot(page, "studio")
    page.goto(own_window.url)
    page.get_by_text(f"Finished, step {STEPS} of {STEPS}").wait_for()
    shot(page, "home")
    print(f"the journey of {STEPS} steps took {time.monotonic() - begun:.0f} s")


def test_one_drop_and_one_click_train(own_window: Any, page: Any, drop: Callable[..., None], few: Path) -> None:
    """The shortest way: a folder on Home, Start training, and at the end Download (here it is killed, and its run deleted)."""
    page.goto(own_window.url)
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    drop(page, few)
    page.get_by_text("6 pictures and 6 captions added.").wait_for()
    page.locator("#screen-images").get_by_text("400 steps on pocket, preset pocket").wait_for()
    seen = "[...document.querySelectorAll('input, select')].filter(e => e.checkVisibility() && e.type !== 'checkbox').length"
    eventually(page, lambda: page.evaluate(seen) <= 8, True)
    page.locator("#screen-images").get_by_role("button", name="Start training").click()
    page.get_by_text("The base model draws").or_(page.get_by_text("s a step")).first.wait_for()
    run = max((own_window.home / "runs").iterdir())
    assert tomllib.loads((run / "config.toml").read_text())["train"]["steps"] == 400
    expect(page.get_by_role("button", name="Delete this run")).to_have_count(0)
    os.kill(int(json.loads((run / "process.json").read_text())["pid"]), signal.SIGKILL)
    page.get_by_role("button", name="Delete this run").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_function("document.body.dataset.screen === 'images'")
    expect(page.locator(".picture")).to_have_count(6)
    eventually(page, run.exists, False)


def check_slider(page: Any) -> None:
    """Moving it swaps pictures without a request; letting go renders that strength."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/api/" in request.url else None)
    page.wait_for_timeout(600)  # the last poll of the drawing
    asked.clear()
    took = page.evaluate(
        """() => new Promise(done => { const slider = document.getElementById('strength'); let worst = 0, value = -0.5;
          const step = () => { const begun = performance.now(); slider.value = value; slider.dispatchEvent(new Event('input'));
            worst = Math.max(worst, performance.now() - begun); value += 0.05;
            if (value <= 1.5) requestAnimationFrame(step); else done(worst); }; step(); })"""
    )
    print(f"slowest answer of the slider: {took:.1f} ms")
    assert asked == []
    expect(page.locator(".rung img")).to_have_count(9)
    sources = page.evaluate("[...document.querySelectorAll('.rung img')].map(i => i.getAttribute('src'))")
    assert len(set(sources)) == 9
    layers = "[...document.querySelectorAll('.stage .layer:not(.base)')].map(i => i.getAttribute('src'))"
    for number in (0, 4, 8):  # what is seen is that strength's own picture
        page.locator(".rung").nth(number).click()
        eventually(page, lambda: page.evaluate(layers), [sources[number]] * 2)
    assert asked == []
    page.evaluate(
        "() => { const s = document.getElementById('strength'); s.value = 0.6; s.dispatchEvent(new Event('input')); "
        "s.dispatchEvent(new Event('change')); }"
    )
    page.get_by_text("0.60 · rendered").wait_for()
    expect(page.locator(".rung")).to_have_count(10)


def test_a_killed_trainer_and_a_killed_window(own_window: Any, page: Any, few: Path) -> None:
    open_images(page, own_window.url)
    page.get_by_label("Path of a folder").fill(str(few))
    page.get_by_role("button", name="Use this folder").click()
    page.locator(".picture").nth(5).wait_for()
    before = sorted(path.name for path in (few / "inner").iterdir())
    page.get_by_role("link", name="Next: Recipe").click()
    page.get_by_text("Recipe as a file").click()
    page.get_by_label("Recipe as TOML").fill(
        "[prior]\nprompts = []\n[train]\nsteps = 400\nbatch_size = 6\n[samples]\nevery = 0\n[adapter]\nrank = 2\n"
    )
    page.get_by_role("button", name="Use this text").click()
    page.get_by_role("heading", name="400 steps on pocket").wait_for()
    page.locator("#screen-recipe").get_by_role("button", name="Start training").click()
    page.get_by_text("step 1 of 400").or_(page.get_by_text("s a step")).first.wait_for()
    run = max((own_window.home / "runs").iterdir())
    process = int(json.loads((run / "process.json").read_text())["pid"])

    page.watched.offline = True
    own_window.restart(kill=True)
    page.get_by_text("The window does not answer").wait_for(state="detached")
    page.get_by_role("button", name="Stop and keep").wait_for()
    os.kill(process, 0)  # it trains on

    os.kill(process, signal.SIGKILL)
    page.get_by_text("Training ended unexpectedly").or_(page.get_by_text("Training was killed")).first.wait_for(timeout=5000)
    page.get_by_role("button", name="Resume").wait_for()
    assert sorted(path.name for path in (few / "inner").iterdir()) == before
