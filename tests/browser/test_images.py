"""The images screen: folders dropped or typed, a large grid, captions that are strangers' text, and what is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.browser.conftest import eventually, expect


def fill(folder: Path, count: int) -> Path:
    """A folder with so many small pictures, each another one, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(count):
        colour = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(colour).save(folder / f"{number:04}.png", compress_level=1)
        (folder / f"{number:04}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def new_project(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_role("button", name="New LoRA", exact=True).click()
    page.get_by_text("Drop a folder of pictures here").wait_for()


def use_folder(page: Any, folder: Path) -> None:
    page.get_by_label("Path of a folder").fill(str(folder))
    page.get_by_role("button", name="Use this folder").click()


def test_the_last_of_a_thousand_is_edited_and_saved_within_a_second(window: Any, page: Any, tmp_path: Path) -> None:
    new_project(page, window.url)
    use_folder(page, fill(tmp_path / "thousand", 1000))
    page.locator(".picture").nth(999).wait_for(state="attached")
    last = page.get_by_label("Caption of 0999.png")
    last.scroll_into_view_if_needed()
    last.fill("the last one")
    begun = time.monotonic()
    last.press("Tab")
    page.locator(".picture").nth(999).get_by_text("✓ saved").wait_for()
    print(f"saved after {time.monotonic() - begun:.2f} s")
    assert (tmp_path / "thousand" / "0999.txt").read_text() == "picture 999"  # a typed folder is never written to
    page.reload()
    page.locator(".picture").nth(999).wait_for(state="attached")
    expect(page.get_by_label("Caption of 0999.png")).to_have_value("the last one")


def test_strangers_captions_stay_text_and_what_is_not_read_is_shown(window: Any, page: Any, tmp_path: Path) -> None:
    folder = fill(tmp_path / "few", 3)
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    (folder / "0000.txt").write_text(hostile)
    (folder / "0001.txt").write_text(" ".join(f"word{number}" for number in range(80)))
    new_project(page, window.url)
    use_folder(page, folder)
    expect(page.get_by_label("Caption of 0000.png")).to_have_value(hostile)
    page.get_by_text("Not read: ").wait_for()
    expect(page.locator(".cut", has_text="word79")).to_have_count(1)
    page.get_by_role("button", name="Too long 1").click()
    expect(page.locator(".picture:visible")).to_have_count(1)
    assert page.title() != "owned"


def test_pictures_are_left_out_and_taken_back_by_undo(window: Any, page: Any, tmp_path: Path) -> None:
    new_project(page, window.url)
    use_folder(page, fill(tmp_path / "four", 4))
    page.get_by_text("4 pictures to train on").wait_for()
    page.get_by_role("button", name="Select all").click()
    page.get_by_role("button", name="Exclude", exact=True).first.click()
    page.get_by_text("0 pictures to train on").wait_for()
    expect(page.get_by_role("button", name="Excluded 4")).to_be_visible()
    expect(page.get_by_role("link", name="Next: Recipe")).to_be_hidden()
    page.locator(".toast").get_by_role("button", name="Undo").click()
    page.get_by_text("4 pictures to train on").wait_for()
    page.get_by_label("Trigger word (optional)").fill("zorbo style")
    page.get_by_label("Trigger word (optional)").press("Tab")
    page.get_by_text("5 / 75 tokens").or_(page.get_by_text("6 / 75 tokens")).first.wait_for()


def test_what_a_search_hides_is_not_excluded_and_undo_takes_back_only_what_was_done(
    window: Any, page: Any, tmp_path: Path
) -> None:
    new_project(page, window.url)
    use_folder(page, fill(tmp_path / "five", 5))
    page.get_by_role("button", name="Exclude 0000.png").click()
    page.get_by_text("4 pictures to train on").wait_for()
    page.get_by_role("button", name="Select all").click()
    page.get_by_label("Search names and captions").fill("0003")
    page.get_by_text("1 selected").wait_for()
    page.get_by_role("group", name="Selected pictures").get_by_role("button", name="Exclude").click()
    page.get_by_text("3 pictures to train on").wait_for()
    page.get_by_label("Search names and captions").fill("zzz")
    page.get_by_text("No picture is like this.").wait_for()
    page.get_by_label("Search names and captions").fill("")
    page.get_by_role("button", name="Select all").click()
    page.get_by_role("group", name="Selected pictures").get_by_role("button", name="Exclude").click()
    page.get_by_text("0 pictures to train on").wait_for()
    page.locator(".toast", has_text="3 pictures left out").get_by_role("button", name="Undo").click()
    page.get_by_text("3 pictures to train on").wait_for()


@pytest.mark.parametrize("kind", ["empty", "no pictures", "missing"])
def test_a_folder_without_pictures_is_told_in_words(window: Any, page: Any, tmp_path: Path, kind: str) -> None:
    page.watched.allowed = {400, 404, 422}
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "no pictures":
        (folder / "notes.txt").write_text("only words")
    new_project(page, window.url)
    use_folder(page, folder)
    page.locator(".error-card, .problems li").first.wait_for()
    expect(page.get_by_role("link", name="Next: Recipe")).to_be_hidden()


def test_what_is_no_picture_is_named_and_the_rest_is_taken(
    window: Any, page: Any, drop: Callable[..., None], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "mixed", 2)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "program.exe").write_bytes(b"MZ")
    new_project(page, window.url)
    drop(page, folder)
    page.get_by_text("2 files not taken").wait_for()
    page.get_by_text("2 files not taken").click()
    page.get_by_text("broken.png: ").wait_for()
    page.get_by_text("program.exe: ").wait_for()
    expect(page.locator(".picture")).to_have_count(2)


def test_a_second_drop_waits_and_an_upload_outlives_its_screen(
    own_window: Any, page: Any, drop: Callable[..., None], tmp_path: Path
) -> None:
    many, few = fill(tmp_path / "many", 1200), fill(tmp_path / "few", 3)
    new_project(page, own_window.url)
    drop(page, many)
    page.get_by_text(" %").first.wait_for()
    drop(page, few)
    page.get_by_text("Wait until the files before these have been added.").wait_for()
    page.get_by_role("link", name="Impasto, all projects").click()
    page.get_by_text("2400 files added").wait_for()
    project = next((own_window.home / "projects").iterdir())
    eventually(page, lambda: len(list((project / "images").rglob("*.png"))), 1200)


def test_a_folder_dropped_on_home_is_a_project_of_its_name(
    window: Any, page: Any, drop: Callable[..., None], tmp_path: Path
) -> None:
    page.goto(window.url)
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    drop(page, fill(tmp_path / "my paintings", 3))
    page.get_by_text("3 pictures and 3 captions added.").wait_for()
    expect(page.locator(".topbar .project-name")).to_have_text("my paintings")
    expect(page.locator(".picture")).to_have_count(3)
    # More pictures come in while somebody types.
    caption = page.get_by_label("Caption of my paintings/0001.png")
    page.get_by_label("Select my paintings/0002.png").check()
    caption.press("End")
    caption.press_sequentially(" of a boat")
    drop(page, fill(tmp_path / "a few more", 2))
    page.get_by_text("2 pictures and 2 captions added.").wait_for()
    expect(page.locator(".picture")).to_have_count(5)
    expect(page.locator(".picture .name > span:first-child")).to_have_text([f"{n:04}.png" for n in (0, 1, 0, 1, 2)])
    expect(page.get_by_label("Select my paintings/0002.png")).to_be_checked()
    expect(caption).to_be_focused()
    expect(caption).to_have_value("picture 1 of a boat")
    caption.press("Tab")
    page.locator(".picture").nth(3).get_by_text("✓ saved").wait_for()
    # A field that somebody only stands in takes what comes from elsewhere; it is not put back when it is left.
    other = page.get_by_label("Caption of my paintings/0000.png")
    other.focus()
    page.evaluate(
        """() => import('/web/core.js').then(({ put, place }) =>
          put(`/projects/${place().project}/captions`, { 'my paintings/0000.png': 'from elsewhere' }))"""
    )
    drop(page, fill(tmp_path / "one more", 1))
    page.get_by_text("1 picture and 1 caption added.").wait_for()
    expect(other).to_have_value("from elsewhere")
    # What could not be saved stays in its field.
    page.watched.allowed = {500}
    page.route("**/captions", lambda route: route.fulfill(status=500, json={"what": "The disk is full"}))
    other.fill("not yet saved")
    other.press("Tab")
    page.get_by_text("The disk is full").wait_for()
    drop(page, fill(tmp_path / "the last", 1))
    expect(page.locator(".picture")).to_have_count(7)
    expect(other).to_have_value("not yet saved")


def test_answers_that_come_late_do_not_hide_what_is_newer(
    window: Any, page: Any, drop: Callable[..., None], tmp_path: Path
) -> None:
    """The first answer of the pictures and of the check are held back until newer ones were drawn."""
    late: dict[str, list[Any]] = {}

    def hold(route: Any) -> None:
        what = route.request.url.rsplit("/", 1)[-1]
        if what in late or route.request.method != {"images": "GET", "check": "POST"}[what]:
            route.continue_()
        else:
            late[what] = [route]
            late[what].append(route.fetch())

    def let_go(what: str) -> None:
        route, answer = late[what]
        with page.expect_request_finished(lambda request: request == route.request):
            route.fulfill(response=answer)
        page.evaluate("() => new Promise(done => setTimeout(done, 100))")  # what it would draw is drawn

    page.route(re.compile("/api/projects/[^/]+/(images|check)$"), hold)
    new_project(page, window.url)
    eventually(page, lambda: late["images"][1].json()["images"], [])
    drop(page, fill(tmp_path / "held back", 3))
    page.get_by_text("3 pictures and 3 captions added.").wait_for()
    expect(page.locator(".picture")).to_have_count(3)
    let_go("images")
    expect(page.locator(".picture")).to_have_count(3)
    eventually(page, lambda: late["check"][1].json()["steps"], 400)
    page.evaluate(
        """() => import('/web/core.js').then(({ patch, place }) =>
          patch(`/projects/${place().project}`, { recipe: { train: { steps: 77 } } }))"""
    )
    page.get_by_role("button", name="Exclude held back/0000.png").click()
    page.get_by_text("77 steps on pocket").wait_for()
    let_go("check")
    expect(page.get_by_text("77 steps on pocket")).to_be_visible()


def test_two_thousand_dropped_pictures_leave_the_window_small(
    own_window: Any, page: Any, drop: Callable[..., None], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "two thousand", 2000)
    new_project(page, own_window.url)
    begun = time.monotonic()
    drop(page, folder)
    page.get_by_text(" %").first.wait_for()  # progress is shown
    page.get_by_text("2000 pictures and 2000 captions added.").wait_for()
    memory = psutil.Process(own_window.process.pid).memory_info().rss
    print(f"2000 pictures with captions in {time.monotonic() - begun:.1f} s, window at {memory / 1e6:.0f} MB")
    assert memory < 500e6
    page.locator(".picture").nth(1999).wait_for(state="attached")
