"""Tidying a folder in the window: a bulk edit seen before it is done, steps back and forward, a crop that is dragged."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.browser.conftest import PATIENCE, eventually, expect
from tests.browser.test_images import new_project, use_folder
from tests.tiny_captioners import save_tiny_blip
from trainers.dataset.edits import read_edits


def oblong(folder: Path) -> Path:
    """Four pictures: two much too wide for any bucket, two square; with tags."""
    folder.mkdir()
    for number, (width, height) in enumerate([(900, 150), (800, 160), (256, 256), (256, 256)]):
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        pixels = np.stack([across * 255 // width, down * 255 // height, (across * (number + 2) // 9 + down) % 256], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("style, red" if number % 2 else "style, blue, ink", encoding="utf-8")
    return folder


def shoot(page: Any, name: str) -> None:
    """A picture of the page where somebody wants to look at it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def captions_are(page: Any, wanted: list[str]) -> None:
    for number, text in enumerate(wanted):
        expect(page.get_by_label(f"Caption of {number}.png")).to_have_value(text)


def test_captions_are_changed_at_once_and_a_crop_is_dragged_and_all_goes_back(window: Any, page: Any, tmp_path: Path) -> None:
    folder = oblong(tmp_path / "oblong")
    new_project(page, window.url)
    use_folder(page, folder)
    page.locator(".picture").nth(3).wait_for()
    begun = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    captions_are(page, begun)

    page.get_by_role("button", name="Edit captions").click()
    page.get_by_label("What to do").select_option("replace")
    page.get_by_label("Text").fill("style")
    page.get_by_label("Replace with").fill("woodcut")
    page.locator(".changes tr").nth(3).wait_for()
    expect(page.locator(".changes del").first).to_have_text("style")
    expect(page.locator(".changes ins").first).to_have_text("woodcut")
    captions_are(page, begun)
    shoot(page, "bulk")
    page.get_by_role("button", name="Change 4 captions").click()
    page.get_by_text("No caption would change.").wait_for()
    replaced = [text.replace("style", "woodcut") for text in begun]
    captions_are(page, replaced)

    page.get_by_label("Select 2.png").check()
    page.get_by_label("What to do").select_option("add")
    page.get_by_label("Text").fill("square")
    page.get_by_role("button", name="Change 1 caption").click()
    page.get_by_text("No caption would change.").wait_for()
    expect(page.get_by_label("Caption of 2.png")).to_have_value("woodcut, blue, ink, square")

    page.reload()
    page.locator(".picture").nth(3).wait_for()
    page.get_by_role("button", name="Undo", exact=True).click()
    page.get_by_text("Undone: Add the tag “square”: 1 caption").wait_for()
    captions_are(page, replaced)
    page.keyboard.press("Control+z")
    page.get_by_text("Undone: Replace “style” by “woodcut”: 4 captions").wait_for()
    captions_are(page, begun)
    expect(page.get_by_role("button", name="Undo", exact=True)).to_be_disabled()
    page.keyboard.press("Control+Shift+z")
    page.get_by_text("Done again: Replace").wait_for()
    captions_are(page, replaced)

    page.get_by_role("button", name="Tags", exact=True).click()
    page.get_by_role("group", name="Tags").get_by_role("button", name="ink 2").click()
    expect(page.locator(".picture:visible")).to_have_count(2)
    shoot(page, "tags")
    page.get_by_role("button", name="Show all pictures").click()

    crop = page.locator(".picture").nth(0).locator(".crop")
    crop.scroll_into_view_if_needed()
    before = crop.bounding_box()
    x, y = before["x"] + before["width"] / 2, before["y"] + before["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 40, y + 5, steps=4)
    with page.expect_response("**/crops") as answer:
        page.mouse.up()
    moved = answer.value.json()["0.png"]
    assert moved["at"][0] == 0 and moved["moved"]
    eventually(page, lambda: crop.bounding_box()["x"] < before["x"] - 5, True)
    expect(page.get_by_label("Select 0.png")).not_to_be_checked()
    project = page.url.split("#/")[1].split("/")[0]
    edits = window.home / "projects" / project / "captions.json"
    eventually(page, lambda: read_edits(edits).crops["0.png"][0], 0)

    page.get_by_role("button", name="View 1.png").click()
    with page.expect_response("**/crops"):
        page.get_by_label("Crop of 1.png: the arrow keys move it").press("ArrowRight")
    page.get_by_text("cut off: drag the bright part").wait_for()
    shoot(page, "crop")
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("Control+z")
    page.get_by_text("Undone: Crop: 1.png").wait_for()
    with page.expect_response(lambda one: one.url.endswith("/crops") and one.request.method == "GET") as answer:
        page.keyboard.press("Control+z")
        page.get_by_text("Undone: Crop: 0.png").wait_for()
    page.wait_for_function(
        "x => Math.abs(document.querySelector('.picture .crop').getBoundingClientRect().x - x) < 2", arg=before["x"]
    )
    eventually(page, lambda: json.loads(edits.read_text()).get("crops"), None)
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == begun


def test_a_copy_is_left_out_and_captions_of_a_model_are_taken_after_a_look(window: Any, page: Any, tmp_path: Path) -> None:
    folder = oblong(tmp_path / "copies")
    (folder / "4.png").write_bytes((folder / "2.png").read_bytes())
    (folder / "1.txt").unlink()
    model = save_tiny_blip(tmp_path / "captioner")
    new_project(page, window.url)
    use_folder(page, folder)
    page.locator(".picture").nth(4).wait_for()

    page.get_by_role("button", name="Look over").click()
    copy = page.get_by_role("article", name="The same file")
    copy.wait_for()
    shoot(page, "look-over")
    copy.get_by_role("button", name="Leave out 4.png").click()
    page.get_by_role("button", name="Excluded 1").wait_for()
    copy.wait_for(state="detached")

    page.get_by_role("button", name="Write captions").click()
    page.get_by_label("Captioning model").fill(str(model))
    page.get_by_label("Prompt for the model").fill("a photo of")
    page.locator("form.describe").get_by_role("button", name="Write captions").click()
    page.get_by_role("button", name="Take 1 caption").wait_for(timeout=2 * PATIENCE)
    field = page.get_by_label("New caption of 1.png")
    expect(field).to_have_value(re.compile("^a photo of "))
    kept = page.get_by_label("Caption of 1.png", exact=True)
    expect(kept).to_have_value("")
    field.fill("corrected by hand")
    shoot(page, "describe")
    page.get_by_role("button", name="Take 1 caption").click()
    page.get_by_text("1 caption taken").wait_for()
    expect(kept).to_have_value("corrected by hand")
    page.get_by_role("button", name="Undo", exact=True).first.click()
    page.get_by_text("Undone: Captions by captioner").wait_for()
    expect(kept).to_have_value("")
    assert not (folder / "1.txt").exists()
