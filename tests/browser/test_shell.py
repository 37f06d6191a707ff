"""The page itself: how soon it is there, what it asks for, its head, home, light and dark, keys, many tabs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.app_client import make_run
from tests.browser.conftest import eventually, expect

SCREENS = ("images", "recipe", "train", "studio", "blend")


def each_screen(page: Any, url: str, project: str) -> Iterator[str]:
    """Goes to home and to each screen of a project, and names it once it is quiet."""
    for screen in ("home", *SCREENS):
        page.goto(f"{url}#/" + ("" if screen == "home" else f"{project}/{screen}"))
        page.wait_for_function("s => document.body.dataset.screen === s", arg=screen)
        page.wait_for_load_state("networkidle")
        yield screen


def make_project(page: Any, name: str) -> str:
    """The id of a project made through the window's own API."""
    return str(page.evaluate("name => import('/web/core.js').then(m => m.post('/projects', {name})).then(p => p.id)", name))


def test_the_page_is_seen_and_usable_soon_and_the_window_loads_no_model_library(own_window: Any, page: Any) -> None:
    begun = time.monotonic()
    page.goto(own_window.url)
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    usable = time.monotonic() - begun
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    print(f"first paint {painted:.2f} s, usable {usable:.2f} s, from the command {time.monotonic() - own_window.started:.2f} s")
    loaded = " ".join(entry.path for entry in psutil.Process(own_window.process.pid).memory_maps())
    assert "gradio" in loaded or "numpy" in loaded  # the list is the real one
    assert not any(f"site-packages/{name}/" in loaded for name in ("torch", "diffusers", "transformers"))


def test_nothing_on_any_screen_is_without_a_name(window: Any, page: Any) -> None:
    page.goto(window.url)
    project = make_project(page, "Names")
    for screen in each_screen(page, window.url, project):
        assert (
            page.evaluate(
                """() => [...document.querySelectorAll('input,select,textarea,button')].filter(e => e.checkVisibility())
              .filter(e => !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')
                && !(e.tagName === 'BUTTON' && e.textContent.trim())).map(e => e.outerHTML.slice(0, 200))"""
            )
            == []
        ), screen


def test_home_shows_projects_and_renames_and_deletes_them(window: Any, page: Any) -> None:
    page.goto(window.url)
    hostile = "<img src=x onerror=alert(1)>"
    project = make_project(page, hostile)
    folder = window.home / "projects" / project
    card = page.locator("article", has=page.get_by_role("heading", name=hostile))
    card.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the project").fill("Renamed by hand")
    page.get_by_role("dialog").get_by_role("button", name="Rename").click()
    renamed = page.locator("article", has=page.get_by_role("heading", name="Renamed by hand"))
    renamed.get_by_role("button", name="Delete").click()
    eventually(page, lambda: 'name = "Renamed by hand"' in (folder / "project.toml").read_text(), True)
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert folder.is_dir()
    renamed.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    renamed.wait_for(state="detached")
    eventually(page, folder.exists, False)


def test_of_askings_that_overlap_only_the_newest_counts_and_writes_keep_their_order(window: Any, page: Any) -> None:
    page.goto(window.url)
    script = """async () => {
      const { inTurn, newest } = await import('/web/core.js');
      const said = [], open = {};
      const asking = name => new Promise((yes, no) => (open[name] = { yes: () => yes(name), no: () => no(new Error(name)) }));
      const fresh = newest();
      const told = name => fresh(asking(name)).then(found => said.push(found), error => said.push(error.message));
      const all = ['old', 'fails', 'new'].map(told);
      open.new.yes(), open.fails.no(), open.old.yes();
      await Promise.all(all);
      const last = [told('left'), told('refused')];
      open.refused.no(), open.left.yes();
      await Promise.all(last);
      const left = told('over');
      fresh();
      open.over.yes();
      await left;
      const write = inTurn(), order = [];
      const slow = write(() => asking('slow').then(found => order.push(found)));
      const bad = write(() => { order.push('bad'); throw new Error('bad'); }).catch(() => order.push('refused'));
      const quick = write(() => order.push('quick'));
      await new Promise(done => setTimeout(done, 20));
      order.push('then'), open.slow.yes();
      await Promise.all([slow, bad, quick]);
      return { said: said.map(String).sort(), order };
    }"""
    found = page.evaluate(script)
    assert found["said"] == ["new", "null", "null", "null", "null", "refused"]
    assert found["order"][:3] == ["then", "slow", "bad"] and sorted(found["order"][3:]) == ["quick", "refused"]


def test_a_new_lora_is_one_key_away_and_the_steps_are_links(window: Any, page: Any) -> None:
    page.goto(window.url)
    page.get_by_role("button", name="New LoRA", exact=True).press("Enter")
    page.wait_for_function("document.body.dataset.screen === 'images'")
    for name in SCREENS[1:]:
        page.get_by_role("navigation", name="Steps").get_by_role("link", name=name.capitalize()).press("Enter")
        page.wait_for_function("s => document.body.dataset.screen === s", arg=name)
        expect(page.locator(".screen:visible")).to_have_id(f"screen-{name}")
        expect(page.locator(".steps [aria-current]")).to_have_text(name.capitalize())
    page.go_back()
    page.wait_for_function("s => document.body.dataset.screen === s", arg=SCREENS[-2])
    page.get_by_role("navigation", name="Steps").get_by_role("link", name="Train", exact=True).press("Enter")
    page.get_by_role("heading", name="Nothing has been trained yet").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_s_light_and_can_be_switched(window: Any, new_page: Callable[..., Any], scheme: Any) -> None:
    page = new_page(color_scheme=scheme)
    page.goto(window.url)
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3"
    eventually(page, lambda: page.evaluate(shade) < 100, scheme == "dark")
    page.locator("#theme").click()
    eventually(page, lambda: page.evaluate(shade) < 100, scheme == "light")
    page.reload()
    page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    eventually(page, lambda: page.evaluate(shade) < 100, scheme == "light")


def test_on_a_phone_nothing_scrolls_sideways(window: Any, new_page: Callable[..., Any]) -> None:
    page = new_page()
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(window.url)
    project = make_project(page, "A phone")
    for screen in each_screen(page, window.url, project):
        too_wide = f"document.documentElement.scrollWidth > 390 && {json.dumps(screen)}"
        eventually(page, partial(page.evaluate, too_wide), False)


def test_six_tabs_are_all_alive(window: Any, new_page: Callable[..., Any]) -> None:
    first = new_page()
    pages = [first, *(new_page(first.context) for _ in range(5))]
    for page in pages:
        page.goto(window.url)
        page.get_by_role("button", name="New LoRA", exact=True).wait_for()
    make_project(first, "Seen in six tabs")
    for page in pages:
        page.bring_to_front()
        page.get_by_role("heading", name="Seen in six tabs").wait_for()
        page.get_by_role("link", name="Open Seen in six tabs").click()
        page.get_by_label("Trigger word (optional)").or_(page.get_by_text("Drop a folder of pictures here")).first.wait_for()
        page.locator(".topbar .project-name", has_text="Seen in six tabs").wait_for()


def test_a_card_tells_where_its_run_stands_after_a_restart(own_window: Any, page: Any) -> None:
    page.goto(own_window.url)
    project = make_project(page, "Survives")
    file = own_window.home / "projects" / project / "project.toml"
    ended = json.dumps({"type": "stopped", "time": time.time(), "step": 7, "path": "x.safetensors"})
    started = {"type": "started", "time": time.time(), "step": 0, "steps": 20, "images": 1, "prior": 0}
    make_run(own_window.home, "2026-01-01-000000_survives", [json.dumps(started), ended])
    text = file.read_text()
    assert "runs = []" in text
    file.write_text(text.replace("runs = []", 'runs = ["2026-01-01-000000_survives"]'))
    page.watched.offline = True
    own_window.restart(kill=True)
    page.goto(own_window.url)
    page.get_by_text("Stopped, step 7 of 20").wait_for()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    assert Path(own_window.home / "runs").is_dir()
