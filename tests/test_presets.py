"""The presets that ship: each parses, says for whom it is, and holds the numbers that it was given on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import impasto
from trainers.checks import check_settings
from trainers.config import TrainConfig, write_config
from trainers.errors import SettingError
from trainers.families import BaseOptions, recognise_base
from trainers.presets import default_preset, list_presets, preset_summary, preset_text, read_preset, resolve
from trainers.settings import merge

PURPOSES = ("character", "style", "object", "draft", "low_memory")
GIVEN = {"base": {"model": "pocket"}, "dataset": {"images": "pictures"}}

# name -> rank, alpha, denoiser's rate, text encoder's rate, steps, pictures a step, noise offset, resolution
NUMBERS: dict[str, tuple[int, float, float, float, int, int, float, int | None]] = {
    "character": (16, 8, 1e-4, 5e-5, 2000, 2, 0.0, None),
    "style": (32, 16, 1e-4, 2e-5, 2500, 2, 0.04, None),
    "object": (8, 8, 1e-4, 5e-5, 1200, 2, 0.0, None),
    "draft": (8, 8, 3e-4, 1e-4, 300, 2, 0.0, 384),
    "low_memory": (4, 4, 1e-4, 0, 1500, 2, 0.0, None),
    "sdxl_character": (32, 16, 1e-4, 0, 2000, 1, 0.0, None),
    "sdxl_style": (32, 16, 1e-4, 0, 2500, 1, 0.03, None),
    "sdxl_object": (16, 16, 1e-4, 0, 1200, 1, 0.0, None),
    "sdxl_draft": (16, 16, 3e-4, 0, 500, 1, 0.0, 768),
    "sdxl_low_memory": (8, 8, 1e-4, 0, 1500, 2, 0.0, 768),
}


def config_of(name: str) -> TrainConfig:
    return resolve(name, GIVEN)


def test_every_promised_preset_ships_and_no_other() -> None:
    assert set(list_presets()) == {"pocket", *PURPOSES, *(f"sdxl_{purpose}" for purpose in PURPOSES)}


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_resolves_and_comes_back_from_its_own_text(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    (tmp_path / "config.toml").write_text(write_config(config), encoding="utf-8")
    assert resolve(str(tmp_path / "config.toml"), GIVEN) == config


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_says_for_whom_how_long_and_how_much_memory(name: str) -> None:
    summary = preset_summary(name)
    assert summary[0].startswith("For whom: ")
    text = " ".join(summary)
    assert "How long: " in text and "Memory: " in text


@pytest.mark.parametrize("name", [name for name in list_presets() if name != "pocket"])
def test_what_was_not_measured_is_said_to_be_so(name: str) -> None:
    text = " ".join(preset_summary(name))
    assert "Not measured by us" in text
    assert "`impasto check" in text


@pytest.mark.parametrize("name", list_presets())
def test_every_line_of_a_preset_is_short_enough_to_read(name: str) -> None:
    assert [line for line in preset_text(name).splitlines() if len(line) > 128] == []


@pytest.mark.parametrize("name", NUMBERS)
def test_a_preset_holds_its_numbers(name: str) -> None:
    config = config_of(name)
    rank, alpha, rate, text_rate, steps, pictures, offset, resolution = NUMBERS[name]
    assert (config.adapter.rank, config.adapter.alpha) == (rank, alpha)
    assert (config.optimizer.type, config.optimizer.learning_rate) == ("adamw", rate)
    assert config.text_encoder_rate == text_rate
    assert (config.train.steps, config.examples_per_step) == (steps, pictures)
    assert (config.train.noise_offset, config.dataset.resolution) == (offset, resolution)
    assert (config.schedule.type, config.train.min_snr_gamma) == ("cosine", 5.0)


@pytest.mark.parametrize("name", list_presets())
def test_the_text_encoder_follows_the_adapter_in_every_preset(name: str) -> None:
    assert not {"rank", "alpha"} & set(read_preset(name).get("text_encoder", {}))
    config = config_of(name)
    assert (config.text_encoder_rank, config.text_encoder_alpha) == (config.adapter.rank, config.adapter.effective_alpha)


@pytest.mark.parametrize("name", ["low_memory", "sdxl_low_memory"])
def test_presets_for_small_gpus_save_memory(name: str) -> None:
    config = config_of(name)
    assert config.train.batch_size == 1 and config.train.checkpointing and config.text_encoder_rate == 0


@pytest.mark.parametrize("name", list_presets())
def test_an_sdxl_preset_is_meant_for_sdxl_and_no_other_is(name: str) -> None:
    assert (config_of(name).base.family == "sdxl") == name.startswith("sdxl_")


@pytest.mark.parametrize("name", ["pocket", "character", "style", "object", "low_memory"])
def test_a_preset_without_a_resolution_of_its_own_suits_pocket_too(name: str) -> None:
    problems = check_settings(config_of(name), recognise_base("pocket"))
    assert [problem for problem in problems if problem.severity in ("error", "advice")] == []


def test_zero_terminal_snr_with_min_snr_is_told_to_learn_nothing_at_the_end(tiny_sd2_base: Path) -> None:
    base = recognise_base(str(tiny_sd2_base), BaseOptions(zero_terminal_snr=True))
    told = {
        gamma: check_settings(resolve("style", merge(GIVEN, {"train": {"min_snr_gamma": gamma}})), base) for gamma in (5, 0)
    }
    assert [gamma for gamma in told if any(problem.where == "train.min_snr_gamma" for problem in told[gamma])] == [5]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "additive"])
def test_a_native_type_that_the_peft_form_cannot_hold_is_refused_before_anything_loads(kind: str) -> None:
    told = {}
    for output in ("native", "plain"):
        values = {"adapter": {"type": kind}, "output": {"form": "peft", "kind": output}}
        problems = check_settings(resolve("style", merge(GIVEN, values)), recognise_base("pocket"))
        told[output] = [problem.where for problem in problems if problem.severity == "error"]
    assert told == {"native": ["output.kind"] if kind in ("loha", "lokr") else [], "plain": []}


def test_pocket_starts_from_its_own_preset() -> None:
    assert default_preset(recognise_base("pocket")) == "pocket"


def test_another_base_of_that_family_starts_from_character(tiny_base: Path) -> None:
    assert default_preset(recognise_base(str(tiny_base))) == "character"


def test_an_sdxl_preset_on_pocket_is_refused_in_words_even_by_force(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert impasto("train", pictures, "--output", tmp_path / "run", "--preset", "sdxl_character", "--force") == 2
    said = capsys.readouterr().err
    assert "for Stable Diffusion XL" in said and "pocket" in said and "preset without sdxl_" in said
    assert not (tmp_path / "run").exists()


def test_a_preset_of_ones_own_is_laid_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[adapter]\nrank = 3\n", encoding="utf-8")
    config = resolve(str(tmp_path / "mine.toml"), GIVEN, ["adapter.alpha=6"])
    assert (config.adapter.rank, config.adapter.alpha, config.train) == (3, 6, TrainConfig().train)


def test_a_preset_of_ones_own_may_name_the_base(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(f"[base]\nmodel = '{tiny_base}'\n", encoding="utf-8")
    words = ("check", pictures, "--preset", tmp_path / "mine.toml", "--no-measure")
    assert impasto(*words) == 0
    assert "base        tiny " in capsys.readouterr().out
    assert impasto(*words, "--base", "pocket") == 0
    assert "base        pocket " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[adapter", "adapter = 3\n", "[adapter]\nrnk = 3\n", "\xff"])
def test_a_broken_preset_of_ones_own_is_refused_in_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingError):
        resolve(str(tmp_path / "mine.toml"), GIVEN)
