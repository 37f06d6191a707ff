"""A dataset in a real browser: a version kept, changed, gone back to and taken back; a veil over what is not learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser.conftest import expect
from tests.browser.test_queue import ask
from tests.browser.test_window_journey import shot


def test_a_version_is_gone_back_to_and_a_mask_is_seen(window: Any, page: Any, pictures: Path) -> None:
    mask = Image.new("L", (48, 48), 255)
    mask.paste(0, (0, 0, 48, 24))
    mask.save(pictures / "00.mask.png")
    page.goto(window.url)
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    project = ask(page, "POST", "/projects", {"name": "Versions"})["id"]
    ask(page, "PUT", f"/projects/{project}/source", {"folder": str(pictures)})
    page.evaluate("id => { location.hash = `#/${id}/images`; }", project)
    caption = page.get_by_label("Caption of 00.png")
    caption.wait_for()
    page.locator(".versions-of summary").first.click()
    page.get_by_role("button", name="Keep this version").click()
    page.get_by_text("as it is now").wait_for()
    was = caption.input_value()
    caption.fill("other words")
    caption.press("Tab")
    page.get_by_text("✓ saved").wait_for()
    page.get_by_label("Learn only what masks show").check()
    page.get_by_text("1 picture with a mask").wait_for()
    veil = page.get_by_alt_text("Mask of 00.png")
    page.wait_for_function("img => img.complete && img.naturalWidth === 48", arg=veil.element_handle())
    page.locator(".versions-of summary").first.click()
    page.locator(".versions-of summary").first.click()
    page.get_by_role("button", name="Go back to this version").wait_for()
    shot(page, "versions")
    page.get_by_role("button", name="Go back to this version").click()
    expect(page.locator(".picture textarea").first).to_have_value(was)
    page.locator(".toast").get_by_role("button", name="Undo").click()
    expect(page.locator(".picture textarea").first).to_have_value("other words")
    page.get_by_text("What changed").first.click()
    veil.wait_for()
    page.set_viewport_size({"width": 390, "height": 900})
    page.get_by_role("button", name="Switch to dark").click()
    shot(page, "versions-dark")
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
