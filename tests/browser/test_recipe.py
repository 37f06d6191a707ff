"""The recipe: bad input stands at its field and starts nothing, quick changes are not lost, two real steps are measured."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Window, eventually, expect

BAD = {
    "base.model": ("no such folder", "-"),
    "adapter.rank": ("-3", "many"),
    "adapter.alpha": ("0", "large"),
    "optimizer.learning_rate": ("fast", "-1"),
    "text_encoder.learning_rate": ("-1", "slow"),
    "train.steps": ("0", "1.5"),
}


@pytest.fixture
def recipe(window: Window, page: Any, pictures: Path) -> Any:
    """A page at the recipe of a new project, whose id is `page.project`."""
    page.watched.allowed = {422}
    page.goto(window.url)
    page.project = page.evaluate(
        """folder => import('/web/core.js').then(async ({post, put}) => {
          const {id} = await post('/projects', {name: 'Recipe'});
          await put(`/projects/${id}/source`, {folder});
          return id; })""",
        str(pictures),
    )
    page.goto(f"{window.url}#/{page.project}/recipe")
    page.locator("#screen-recipe .live h2").wait_for()
    return page


def field_of(page: Any, name: str) -> Any:
    return page.locator("#field-" + name.replace(".", "-"))


def fault_of(page: Any, name: str) -> Any:
    return page.locator("#field-" + name.replace(".", "-") + "-fault:not(:empty)")


def saved(window: Window, project: str) -> dict[str, Any]:
    """The recipe as the project has it."""
    path = window.home / "projects" / project / "recipe.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_stands_at_its_field_and_starts_nothing(recipe: Any, window: Window, name: str) -> None:
    field = field_of(recipe, name)
    before = field.input_value()
    for value in BAD[name]:
        field.fill(value)
        field.press("Tab")
        fault_of(recipe, name).wait_for()
        expect(fault_of(recipe, name)).to_have_text(re.compile(".{11}"))
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_value(value)
        recipe.get_by_role("button", name="Start training").click()
        recipe.wait_for_function("id => document.activeElement.id === id", arg=field.get_attribute("id"))
        expect(recipe.locator(".fault:not(:empty)")).to_have_count(1)
    assert "recipe" in recipe.url and not list((window.home / "runs").glob("*recipe*"))
    field.fill(before)
    field.press("Tab")
    fault_of(recipe, name).wait_for(state="detached")


def test_bad_input_under_more_is_told_there_and_in_the_file(recipe: Any, window: Window) -> None:
    recipe.get_by_text("More settings").click()
    recipe.get_by_label("Search settings").fill("batch_size")
    field = field_of(recipe, "train.batch_size")
    field.fill("0")
    field.press("Tab")
    fault_of(recipe, "train.batch_size").wait_for()
    expect(recipe.locator(".settings .setting:visible")).to_have_count(1)
    recipe.get_by_text("Recipe as a file").click()
    recipe.get_by_label("Recipe as TOML").fill("[adapter]\nrnak = 3\n")
    recipe.get_by_role("button", name="Use this text").click()
    recipe.locator(".error-card", has_text="rnak").wait_for()
    assert saved(window, recipe.project) == {}


def test_changes_made_faster_than_they_are_saved_all_stay(recipe: Any, window: Window) -> None:
    delayed = "**/api/projects/*"
    recipe.route(delayed, lambda route: (recipe.wait_for_timeout(150), route.continue_())[-1])
    for name, value in (("adapter.rank", "9"), ("adapter.alpha", "5"), ("train.steps", "77")):
        field_of(recipe, name).fill(value)
        field_of(recipe, name).press("Tab")
    recipe.get_by_role("heading", name="77 steps on pocket").wait_for()
    recipe.get_by_text("Rank 9, alpha 5").wait_for()
    recipe.unroute(delayed)
    eventually(recipe, lambda: saved(window, recipe.project), {"adapter": {"rank": 9, "alpha": 5}, "train": {"steps": 77}})
    recipe.get_by_text("changed by you").click()  # the preset's own numbers again
    recipe.get_by_text("Rank 16, alpha 16").wait_for()
    recipe.get_by_role("button", name="Undo").click()
    recipe.get_by_text("Rank 9, alpha 5").wait_for()
    eventually(recipe, lambda: saved(window, recipe.project).get("train"), {"steps": 77})


def test_a_bad_value_among_quick_changes_stays_where_it_was_typed(recipe: Any) -> None:
    rate = field_of(recipe, "optimizer.learning_rate")
    for name, value in (("adapter.rank", "8"), ("optimizer.learning_rate", "fast"), ("train.steps", "1e3")):
        field_of(recipe, name).fill(value)
        field_of(recipe, name).press("Tab")
    recipe.get_by_role("heading", name="1000 steps on pocket").wait_for()
    fault_of(recipe, "optimizer.learning_rate").wait_for()
    expect(rate).to_have_value("fast")
    rate.fill("0,002")  # as many write it
    rate.press("Tab")
    fault_of(recipe, "optimizer.learning_rate").wait_for(state="detached")
    expect(recipe.locator(".fault:not(:empty)")).to_have_count(0)


def test_settings_are_shown_also_when_there_is_no_picture_to_train_on(recipe: Any) -> None:
    field_of(recipe, "train.steps").fill("77")
    field_of(recipe, "train.steps").press("Tab")
    recipe.get_by_role("heading", name="77 steps on pocket").wait_for()
    recipe.evaluate(
        """project => import('/web/core.js').then(async ({get, put}) => {
          const {images} = await get(`/projects/${project}/images`);
          await put(`/projects/${project}/excluded`, Object.fromEntries(images.map(one => [one.rel, true]))); })""",
        recipe.project,
    )
    recipe.reload()
    recipe.get_by_role("heading", name="Not ready yet").wait_for()
    expect(field_of(recipe, "train.steps")).to_have_value("77")
    expect(field_of(recipe, "adapter.rank")).to_have_value("16")
    expect(recipe.get_by_role("button", name="pocket", pressed=True)).to_be_visible()


def test_the_card_follows_a_slider_and_two_real_steps_are_measured(recipe: Any, window: Window) -> None:
    recipe.locator(".measure").get_by_text("to finish").wait_for()
    expect(recipe.locator(".measure")).to_have_text(re.compile("two real steps of.*Memory: "))
    first = recipe.locator(".measure").text_content()
    before = recipe.locator(".live").get_by_text("numbers learn").text_content()
    box = recipe.get_by_label("Rank, slider").bounding_box()
    middle = box["y"] + box["height"] / 2
    recipe.mouse.move(box["x"] + box["width"] * 0.13, middle)
    recipe.mouse.down()
    recipe.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=5)
    recipe.wait_for_function("text => !document.querySelector('.live').textContent.includes(text)", arg=before)
    assert saved(window, recipe.project) == {}  # still being dragged
    recipe.mouse.up()
    recipe.get_by_text("Saved", exact=True).wait_for()
    eventually(recipe, lambda: 50 < saved(window, recipe.project).get("adapter", {}).get("rank", 0) < 80, True)
    recipe.locator(".measure p:not(.subdued)").first.wait_for()
    field_of(recipe, "train.steps").fill("4000")
    field_of(recipe, "train.steps").press("Tab")
    recipe.get_by_role("heading", name="4000 steps on pocket").wait_for()
    recipe.wait_for_function("text => document.querySelector('.measure').textContent !== text", arg=first)


def test_sample_prompts_are_a_line_each(recipe: Any, window: Window) -> None:
    recipe.get_by_text("Sample prompts", exact=True).click()
    field = field_of(recipe, "samples.prompts")
    field.fill("a red heart\n\n a wolf, running ")
    field.press("Tab")
    recipe.get_by_text("Saved", exact=True).wait_for()
    eventually(recipe, lambda: saved(window, recipe.project), {"samples": {"prompts": ["a red heart", "a wolf, running"]}})
    recipe.reload()
    recipe.locator("#screen-recipe .live h2").wait_for()
    expect(field).to_have_value("a red heart\na wolf, running")


def test_ranks_by_layer_are_a_line_each_and_one_that_fits_nothing_is_told(recipe: Any, window: Window) -> None:
    recipe.get_by_text("More settings").click()
    field = recipe.locator("#field-adapter-rank_pattern")
    field.fill("to_q = 32\n attn2.to_k= 4")
    field.press("Tab")
    recipe.get_by_text("layers at rank 32, ").wait_for()
    patterns = {"adapter": {"rank_pattern": {"to_q": 32, "attn2.to_k": 4}}}
    eventually(recipe, lambda: saved(window, recipe.project), patterns)
    for wrong in ("to_qq = 4", "to_q = many"):
        field.fill(wrong)
        field.press("Tab")
        recipe.locator("#field-adapter-rank_pattern-fault", has_text=wrong.split(" ")[0]).wait_for()
    field.fill("to_q = 32")
    field.press("Tab")
    recipe.locator("#field-adapter-rank_pattern-fault:empty").wait_for(state="attached")
    recipe.reload()
    recipe.locator("#screen-recipe .live h2").wait_for()
    expect(field).to_have_value("to_q = 32")
