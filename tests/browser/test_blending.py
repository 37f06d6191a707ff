"""Blending in a real browser: two LoRAs, two sliders, one picture; routing; kept by name, loaded again, exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.browser.conftest import eventually, expect
from tests.browser.test_window_journey import shot
from tests.tools.mergeable import save_adapter
from trainers.blend import read_blend
from trainers.library import read_facts


def picture(page: Any, *before: str) -> str:
    """The address of the picture once it is another one than before and drawn to its end; it is named by what it shows."""
    page.wait_for_function(
        """before => { const image = document.querySelector('#screen-blend .stage img');
          return image.getAttribute('src') && !before.includes(image.getAttribute('src'))
            && document.querySelector('#screen-blend .view progress').hidden; }""",
        arg=list(before),
    )
    return str(page.locator("#screen-blend .stage img").get_attribute("src"))


def move(page: Any, label: str, value: float, *before: str) -> str:
    page.get_by_label(label, exact=True).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )
    return picture(page, *before)


def test_two_loras_are_blended_kept_loaded_and_exported(window: Any, page: Any) -> None:
    loras = window.home / "loras"
    loras.mkdir(exist_ok=True)
    for seed, name in ((1, "first"), (2, "second")):
        save_adapter(loras / f"{name}.safetensors", Path("pocket"), {"attn1.to_q": "lora", "attn2.to_v": "lora"}, 4, seed=seed)
    page.goto(window.url)
    project = page.evaluate("() => import('/web/core.js').then(m => m.post('/projects', {name: 'Blend'})).then(p => p.id)")
    page.goto(f"{window.url}#/{project}/blend")
    page.get_by_role("button", name="Add first to the blend").click()
    one = picture(page)
    page.get_by_role("button", name="Use as card picture").click()
    card = page.locator(".lora-card", has=page.get_by_text("first", exact=True))
    expect(card.locator("img")).to_have_attribute("src", re.compile(Path(one).stem))
    page.locator(".toast").get_by_role("button", name="Undo").click()
    card.locator(".no-picture").wait_for(state="attached")
    page.get_by_role("button", name="Add second to the blend").click()
    both = picture(page, one)
    moved = move(page, "first, strength, slider", -0.5, one, both)
    again = move(page, "second, strength, slider", 0.25, one, both, moved)
    page.locator(".lora", has_text="first").get_by_text("Text encoder and blocks").click()
    page.get_by_label("first, down 0, slider", exact=True).wait_for()
    blocked = move(page, "first, down 0, slider", 0.0, one, both, moved, again)
    shot(page, "blend")
    page.get_by_label("Name of the blend").fill("My two")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("Saved as My two.").wait_for()
    kept = read_blend(window.home / "blends" / "My two.toml", window.home)
    assert [(Path(lora.path).name, lora.unet, lora.text) for lora in kept.loras] == [
        ("first.safetensors", -0.5, -0.5),
        ("second.safetensors", 0.25, 0.25),
    ]
    assert kept.loras[0].blocks == {"down_0": 0.0}
    (loras / "second.safetensors").rename(loras / "second.away")
    page.reload()  # what stood there is kept, but for what is gone
    page.get_by_text("Not in the library any more: second.safetensors").wait_for()
    expect(page.get_by_label("first, strength", exact=True)).to_have_value("-0.5")
    (loras / "second.away").rename(loras / "second.safetensors")
    held: list[Any] = []
    page.route("**/api/library?q=", lambda route: held.append(route), times=1)
    page.reload()
    page.get_by_label("Search the library").fill("zzz")
    page.get_by_text("0 of 2 LoRAs").wait_for()  # overtakes the answer that names all: nothing is gone
    held[0].continue_()
    expect(page.get_by_label("first, strength", exact=True)).to_have_value("-0.5")
    page.get_by_label("Search the library").fill("")
    page.get_by_label("Saved blends").select_option("My two")
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_role("button", name="Take second out").wait_for()
    expect(page.locator("#screen-blend .stage img")).to_have_attribute("src", blocked)
    page.get_by_role("button", name="Take first out").click()
    page.get_by_role("button", name="Take second out").click()
    page.get_by_label("Prompt", exact=True).fill("a cat, Word2")
    page.get_by_text("brought in by the word Word2").wait_for()
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.get_by_text("brought in by the word Word2").wait_for(state="detached")
    page.get_by_label("Saved blends").select_option("My two")
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_role("button", name="Take second out").wait_for()
    page.get_by_label("Name of the blend").fill("sum")
    page.get_by_role("button", name="Export as one LoRA").click()
    page.get_by_role("button", name="Add sum to the blend").wait_for()
    eventually(page, (loras / "sum.safetensors").is_file, True)


def test_the_library_takes_describes_searches_gives_back_and_cuts(window: Any, page: Any, tmp_path: Path) -> None:
    loras = window.home / "loras"
    loras.mkdir(exist_ok=True)
    save_adapter(loras / "third.safetensors", Path("pocket"), {"attn1.to_q": "lora"}, 4, seed=3)
    save_adapter(loras / "round.safetensors", Path("pocket"), {"attn1.to_k": "loha"}, 3, seed=5)
    page.goto(window.url)
    project = page.evaluate("() => import('/web/core.js').then(m => m.post('/projects', {name: 'Library'})).then(p => p.id)")
    page.goto(f"{window.url}#/{project}/blend")
    page.get_by_label("Search the library").fill("word3")
    card = page.locator(".lora-card", has_text="third")
    card.wait_for()
    expect(page.locator(".lora-card")).to_have_count(1)
    card.get_by_text("Details").click()
    card.get_by_text("AutoV2").wait_for()
    with page.expect_response("**/api/library?q=third"):  # a search that answers while a person types in the details
        page.get_by_label("Search the library").evaluate(
            "search => { search.value = 'third'; search.dispatchEvent(new Event('input', {bubbles: true})); }"
        )
        card.get_by_label("Trigger words").fill("half a wo")
    page.wait_for_timeout(100)
    field = card.get_by_label("Trigger words")
    expect(field).to_be_focused()
    expect(field).to_have_value("half a wo")
    card.get_by_label("Trigger words").fill("word3")
    card.get_by_label("Default strength").fill("0.5")
    card.get_by_label("Default strength").press("Tab")
    shot(page, "library")
    card.get_by_role("button", name="Remove from the library").click()
    page.get_by_role("button", name="Keep").click()
    assert (loras / "third.safetensors").is_file()
    card.get_by_role("button", name="Remove from the library").click()
    page.get_by_role("button", name="Remove", exact=True).click()
    card.wait_for(state="detached")
    eventually(page, (loras / "third.safetensors").exists, False)
    page.get_by_role("button", name="Undo").click()
    card.wait_for()
    eventually(page, (loras / "third.safetensors").is_file, True)
    card.get_by_role("button", name="Add third to the blend").click()
    expect(page.get_by_label("third, strength", exact=True)).to_have_value("0.5")

    page.get_by_label("Name of the blend").fill("cut")
    rank = page.get_by_label("Rank of the export")
    expect(rank).to_be_hidden()
    page.get_by_label("Search the library").fill("")
    page.get_by_role("button", name="Add round to the blend").click()
    rank.fill("2")
    page.get_by_text("No LoRA holds exactly what a LoHa changes").wait_for()
    page.get_by_role("button", name="Export as one LoRA").click()
    page.get_by_text(re.compile(r"cut, cut to rank 2: it lacks \d+ % of what the blend changes")).wait_for()
    shot(page, "export")
    assert read_facts(loras / "cut.safetensors").ranks == (2,)

    slow = page.context.new_cdp_session(page)
    network = {"offline": False, "latency": 0, "downloadThroughput": -1}
    slow.send("Network.emulateNetworkConditions", {**network, "uploadThroughput": 50_000})
    coming = save_adapter(tmp_path / "coming.safetensors", Path("pocket"), {"to_q": "lora", "to_v": "lora"}, 32, seed=6)
    page.get_by_label("LoRA files").set_input_files(coming)
    page.get_by_text(re.compile(r"Adding 1 file: .* of \d")).wait_for()
    shot(page, "bringing")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Given up: nothing was added.").wait_for()
    slow.send("Network.emulateNetworkConditions", {**network, "uploadThroughput": -1})
    eventually(
        page, lambda: [path.name for path in loras.iterdir() if "coming" in path.name or path.name.startswith(".upload")], []
    )
    page.get_by_label("LoRA files").set_input_files(coming)
    page.get_by_role("button", name="Add coming to the blend").wait_for()
