"""The library: cards told by headers, search, what routing may bring in, and files that are removed and come back."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.app_client import make_run
from tests.formats.examples import random_weights
from tests.tiny_lora import save_lora
from trainers.card_pictures import choose_picture
from trainers.errors import AdapterFileError, SettingError
from trainers.formats import ModuleWeights, write_adapter
from trainers.library import change_card, find_card, list_cards, read_said, remove_card, restore_card, routed_words, search
from trainers.routing_words import route

CROSS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def save(path: Path, width: int = 768, rank: int = 4, **metadata: str) -> Path:
    """A LoRA of one layer, whose width tells the family."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {key.replace("__", "."): value for key, value in metadata.items()}
    write_adapter(path, {CROSS: random_weights((320, width), rank, 2.0, 0)}, told)
    return path


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A home with two files brought in, one broken, one of a run."""
    save(tmp_path / "loras" / "ink.safetensors", 768, 4, modelspec__trigger_phrase="inkwash, sumi-e ink", ss_output_name="Ink")
    save(tmp_path / "loras" / "styles" / "big.safetensors", 2048, 16, modelspec__trigger_phrase="bigword")
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no JSON.")
    (tmp_path / "loras" / "notes.txt").write_text("not a LoRA")
    Image.new("RGB", (8, 8)).save(tmp_path / "loras" / "ink.preview.png")
    run = make_run(tmp_path, "2026-run", [])
    save(run.path / "cut.safetensors", 768, 8, modelspec__trigger_phrase="blackcut")
    run.samples.mkdir()
    for step in (10, 20):
        Image.new("RGB", (8, 8)).save(run.samples / f"{step:08d}_00.png")
    return tmp_path


def keys(cards: list[object]) -> set[str]:
    return {card.key for card in cards}  # type: ignore[attr-defined]


def test_cards_tell_what_the_headers_tell(filled: Path) -> None:
    cards = {card.key: card for card in list_cards(filled)}
    assert set(cards) == {
        "loras/ink.safetensors", "loras/styles/big.safetensors", "loras/broken.safetensors", "runs/2026-run/cut.safetensors",
    }  # fmt: skip
    ink, cut = cards["loras/ink.safetensors"], cards["runs/2026-run/cut.safetensors"]
    assert ink.facts and (ink.facts.title, ink.facts.family, ink.facts.ranks, ink.facts.kinds) == (
        "Ink",
        "sd1",
        (4,),
        ("lora",),
    )
    assert ink.words == ("inkwash", "sumi-e ink") and (ink.strength, ink.routed, ink.run) == (1.0, True, "")
    assert ink.picture and ink.picture.name == "ink.preview.png"
    assert cut.run == "2026-run" and cut.picture and cut.picture.name == "00000020_00.png"
    assert cards["loras/broken.safetensors"].facts is None and "JSON" in cards["loras/broken.safetensors"].problem
    assert list_cards(filled / "nowhere") == []


def test_a_file_that_was_written_again_tells_the_new_state(filled: Path) -> None:
    path = save(filled / "loras" / "ink.safetensors", 768, 32)
    os.utime(path, (1, 1))
    card = find_card(filled, "loras/ink.safetensors")
    assert card.facts and card.facts.ranks == (32,)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", 4), ("INK", 1), ("sumi-e wash", 1), ("sdxl", 1), ("rank8 cut", 1), ("blackcut 2026", 1), ("ink sdxl", 0),
    ],
)  # fmt: skip
def test_search_wants_every_word(filled: Path, text: str, found: int) -> None:
    assert len(search(list_cards(filled), text)) == found


def test_routing_brings_in_what_fits_the_base_and_is_not_switched_off(filled: Path) -> None:
    def routed(family: str) -> dict[str, str]:
        found = route("inkwash, blackcut and bigword", routed_words(list_cards(filled), family))
        return {one.key: one.word for one in found}

    assert routed("sd1") == {"loras/ink.safetensors": "inkwash", "runs/2026-run/cut.safetensors": "blackcut"}
    assert routed("sdxl") == {"loras/styles/big.safetensors": "bigword"}
    change_card(filled, "loras/ink.safetensors", routed=False)
    change_card(filled, "runs/2026-run/cut.safetensors", words="something else", strength=0.6)
    assert routed("sd1") == {}
    card = find_card(filled, "runs/2026-run/cut.safetensors")
    assert (card.words, card.strength) == (("something else",), 0.6)
    assert not find_card(filled, "loras/ink.safetensors").routed


def test_what_is_said_of_a_card_is_checked(filled: Path) -> None:
    with pytest.raises(SettingError):
        change_card(filled, "loras/ink.safetensors", strength=9.0)
    with pytest.raises(AdapterFileError):
        change_card(filled, "loras/../../secret.safetensors", strength=1.0)
    (filled / "loras" / "cards.toml").write_text("no toml")
    with pytest.raises(SettingError, match=r"cards\.toml"):
        list_cards(filled)


def test_a_removed_card_comes_back_as_it_was_and_a_run_s_stays(filled: Path) -> None:
    before = (filled / "loras" / "ink.safetensors").read_bytes()
    ticket = remove_card(filled, "loras/ink.safetensors")
    assert "loras/ink.safetensors" not in keys(list_cards(filled))  # type: ignore[arg-type]
    assert not (filled / "loras" / "ink.preview.png").exists()
    assert restore_card(filled, ticket) == ["ink.preview.png", "ink.safetensors"]
    assert (filled / "loras" / "ink.safetensors").read_bytes() == before
    with pytest.raises(AdapterFileError):
        restore_card(filled, ticket)
    ticket = remove_card(filled, "loras/ink.safetensors")
    other = save_lora(filled / "loras" / "ink.safetensors")
    with pytest.raises(AdapterFileError, match="another file"):
        restore_card(filled, ticket)
    assert other.is_file()
    for key in ("runs/2026-run/cut.safetensors", "loras/none.safetensors", "../x", "config.toml"):
        with pytest.raises(AdapterFileError):
            remove_card(filled, key)
    with pytest.raises(AdapterFileError):
        restore_card(filled, "../../runs")


def test_what_is_taken_back_lies_in_its_folder_and_keeps_what_was_said_of_it(filled: Path) -> None:
    key = "loras/styles/big.safetensors"
    change_card(filled, key, words="my word", strength=0.5)
    ticket = remove_card(filled, key)
    (filled / "loras" / "styles").rmdir()  # as somebody tidies up
    assert restore_card(filled, ticket) == ["styles/big.safetensors"]
    card = find_card(filled, key)
    assert (card.words, card.strength) == (("my word",), 0.5)
    assert not list((filled / "loras" / ".removed").iterdir())
    before = filled / "loras" / ".removed" / "7"  # of a version that kept no folders
    before.mkdir()
    save(before / "old.safetensors")
    assert restore_card(filled, "7") == ["old.safetensors"] and find_card(filled, "loras/old.safetensors")


def test_a_copied_picture_that_no_card_names_goes_and_the_last_choice_can_be_undone(filled: Path, tmp_path: Path) -> None:
    drawn, copies, ink, big = (
        tmp_path / "drawn",
        filled / "loras" / ".pictures",
        "loras/ink.safetensors",
        "loras/styles/big.safetensors",
    )
    drawn.mkdir()
    for name in ("a.png", "b.png", "c.png", "outside.png"):
        Image.new("RGB", (8, 8)).save(drawn / name)
    choose_picture(filled, big, "c.png", drawn)
    ticket = remove_card(filled, big)
    choose_picture(filled, ink, "a.png", drawn)
    choose_picture(filled, ink, "b.png", drawn)
    (drawn / "a.png").unlink()
    choose_picture(filled, ink, "a.png", drawn)  # undone
    choose_picture(filled, ink, "", drawn)
    assert sorted(path.name for path in copies.iterdir()) == ["a.png", "c.png"]
    choose_picture(filled, ink, "", drawn)
    assert [path.name for path in copies.iterdir()] == ["c.png"]
    restore_card(filled, ticket)
    assert find_card(filled, big).picture == copies / "c.png"
    with pytest.raises(AdapterFileError, match="no such picture"):
        choose_picture(filled, ink, "../drawn/outside.png", drawn)


def test_two_cards_changed_at_once_are_both_noted(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(home: Path) -> dict[str, dict[str, Any]]:
        found = read_said(home)
        time.sleep(0.02)
        return found

    monkeypatch.setattr("trainers.library.read_said", slowly)
    said = {"loras/ink.safetensors": 0.25, "loras/styles/big.safetensors": 0.75}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda key: change_card(filled, key, strength=said[key]), said))
    assert {key: find_card(filled, key).strength for key in said} == said


def test_a_loha_tells_its_rank(tmp_path: Path) -> None:
    one, two = random_weights((320, 768), 3, 2.0, 0), random_weights((320, 768), 3, 2.0, 1)
    factors = {"w1_a": one.factors["up"], "w1_b": one.factors["down"], "w2_a": two.factors["up"], "w2_b": two.factors["down"]}
    (tmp_path / "loras").mkdir()
    write_adapter(tmp_path / "loras" / "h.safetensors", {CROSS: ModuleWeights(factors, 3.0, "loha")}, {})
    (card,) = list_cards(tmp_path)
    assert card.facts and (card.facts.kinds, card.facts.ranks, card.facts.family) == (("loha",), (3,), "sd1")


def test_a_family_that_widths_do_not_tell_is_what_the_file_says_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    layer = {CROSS: random_weights((32, 48), 2, 2.0, 0)}
    write_adapter(tmp_path / "loras" / "a.safetensors", layer, {"ss_base_model_version": "sd_v1"})
    write_adapter(tmp_path / "loras" / "b.safetensors", layer, {"ss_base_model_version": "sdxl_base_v1-0"})
    write_adapter(tmp_path / "loras" / "c.safetensors", layer, {})
    families = {card.path.name[0]: card.facts.family for card in list_cards(tmp_path) if card.facts}
    assert families == {"a": "sd1", "b": "sdxl", "c": "unknown"}
