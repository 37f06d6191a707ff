"""A phone: fingers drag a crop and a slider, and the picture that a slider changes stays in sight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.browser.conftest import eventually, expect
from tests.browser.test_queue import ask
from tests.browser.test_tidy import oblong
from tests.browser.test_window_journey import shot
from tests.tools.mergeable import save_adapter


def swipe(page: Any, target: Any, across: float, at: float = 0.5) -> None:
    """A finger put on the middle of something, at a share of its width, and moved sideways by so many pixels."""
    box = target.bounding_box()
    x, y = box["x"] + box["width"] * at, box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for step in range(1, 6):
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [{"x": x + across * step / 5, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    touch.detach()


def test_a_finger_drags_crops_and_sliders(window: Any, new_page: Callable[..., Any], tmp_path: Path) -> None:
    page = new_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark")
    loras = window.home / "loras"
    loras.mkdir(exist_ok=True)
    save_adapter(loras / "finger.safetensors", Path("pocket"), {"attn1.to_q": "lora"}, 4, seed=7)
    page.goto(window.url)
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    project = ask(page, "POST", "/projects", {"name": "Phone"})["id"]
    ask(page, "PUT", f"/projects/{project}/source", {"folder": str(oblong(tmp_path / "oblong"))})

    page.evaluate("id => { location.hash = `#/${id}/images`; }", project)
    view = page.get_by_role("button", name="View 0.png")
    view.wait_for()
    assert "rgba" not in view.evaluate("node => getComputedStyle(node).backgroundColor"), "seen over any picture"
    page.locator(".picture").nth(0).locator(".crop").wait_for()  # what is cut off is known
    view.click()
    crop = page.get_by_label("Crop of 0.png: the arrow keys move it")
    crop.wait_for()
    with page.expect_response("**/crops") as answer:
        swipe(page, crop, -200)
    assert answer.value.json()["0.png"]["at"][0] == 0

    # Another screen with the picture still open, as by the phone's way back: it must not stay in front of that.
    page.evaluate("id => { location.hash = `#/${id}/blend`; }", project)
    page.get_by_role("button", name="Add finger to the blend").click()
    picture = page.locator("#screen-blend .stage img")
    picture.wait_for()
    was = picture.get_attribute("src")
    page.get_by_text("Text encoder and blocks").click()
    slider = page.get_by_label("finger, down 0, slider")
    slider.wait_for()
    slider.evaluate("node => node.scrollIntoView({ block: 'end' })")  # as far down as a person scrolls to see it
    eventually(page, lambda: 0 <= picture.bounding_box()["y"] < 100, True)
    swipe(page, slider, -60)
    expect(slider).not_to_have_value("1")
    page.wait_for_function("was => document.querySelector('#screen-blend .stage img').getAttribute('src') !== was", arg=was)
    shot(page, "phone-blend")
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
