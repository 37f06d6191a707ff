"""The table of adapter types: its entries are settings that exist, and each is told at its best rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import ROOT
from trainers.bench.family import ENTRIES, Entry, Measured, _concepts, _file_name, _prompts, table
from trainers.presets import resolve


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_a_recipe(entry: Entry) -> None:
    assert len(entry.rates) >= 3
    config, usual = resolve("pocket", {}, entry.at(entry.rates[0])), resolve("pocket", {}).text_encoder.learning_rate
    assert config.optimizer.learning_rate == entry.rates[0]
    share = entry.text_share
    assert config.text_encoder.learning_rate == (usual if share is None else pytest.approx(share * entry.rates[0]))


def test_no_two_entries_share_a_file() -> None:
    assert len({_file_name(entry.name) for entry in ENTRIES}) == len(ENTRIES)


def test_prompts_name_the_true_pictures_in_the_captions_words(tmp_path: Path) -> None:
    for name in ("alarm-clock", "pear"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    concepts = _concepts(tmp_path)
    assert [label for label, _ in concepts] == ["alarm clock", "pear"]
    sample = ROOT / "assets" / "samples" / "blackcut"
    assert _prompts(sample, concepts) == ["an alarm clock, blackcut style", "a pear, blackcut style"]


def test_the_table_tells_the_rate_with_the_lowest_held_out_loss() -> None:
    found = [Measured("lora", rate, loss, 0.5, 0.1, 0.2, 900_000_000, 2_000_000) for rate, loss in ((1e-3, 0.08), (2e-3, 0.07))]
    row = table(found).splitlines()[-1]
    assert row == "| lora | 0.002 (0.001, 0.002) | 0.0700 | 0.500 | 0.100 | 0.200 | 900 | 2.00 |"
