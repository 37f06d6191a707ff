"""The measured check: real steps, figures that follow the machine, and what to change when memory is too small."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import impasto
from tests.conftest import make_pictures
from trainers import preflight, train
from trainers.config import TrainConfig, read_config
from trainers.preflight import Measured, main, measure, memory_hints, time_to_finish

MEASURED = Measured(2.0, 10.0, 0.5, 1.0, 4 * 10**9, 10 * 10**9, "cpu")


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.toml of a finished run on tiny models. Measuring changes nothing in it, so one serves all tests."""
    folder = tmp_path_factory.mktemp("preflight")
    pictures, run = make_pictures(folder / "pictures"), folder / "run"
    assert impasto("train", pictures, "-o", run, "--base", tiny_base, "--steps", "1", "--force") == 0
    return run / "config.toml"


def test_takes_two_real_steps(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    real = train.update

    def counted(training):
        losses.append(real(training)[0])
        return losses[-1], 0.0

    monkeypatch.setattr(train, "update", counted)
    measured = measure(read_config(config))
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert measured.step_seconds > 0 and measured.sampling_seconds > 0 and measured.load_seconds > 0
    assert 50e6 < measured.memory < measured.memory_free


def test_follows_a_slower_machine(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.training_step

    def slower(*given):
        time.sleep(0.7)
        return real(*given)

    before = measure(read_config(config))
    monkeypatch.setattr(train, "training_step", slower)
    after = measure(read_config(config))
    assert after.step_seconds > before.step_seconds + 0.5
    total = [time_to_finish(read_config(config), 100, found) for found in (before, after)]
    assert total[1] - total[0] > 50


def test_time_adds_up() -> None:
    plain = TrainConfig.model_validate({"samples": {"every": 0}})
    assert time_to_finish(plain, 100, MEASURED) == 10 + 200
    sampled = TrainConfig.model_validate({"samples": {"every": 50, "prompts": ("a", "b", "c"), "steps": 20}})
    assert time_to_finish(sampled, 100, MEASURED) == 10 + 200 + 3 * 3 * 11  # before the first, at 50, at 100
    prior = TrainConfig.model_validate({"samples": {"every": 0}, "prior": {"prompts": ("a",), "images": 4, "steps": 10}})
    assert time_to_finish(prior, 100, MEASURED) == 10 + 200 + 4 * 6


def test_says_what_to_change() -> None:
    assert MEASURED.fits and not replace(MEASURED, memory=9_500_000_000).fits
    hints = memory_hints(TrainConfig.model_validate({"train": {"batch_size": 4}}))
    assert [name in " ".join(hints) for name in ("checkpointing", "batch_size", "base_weights", "resolution")] == [True] * 4
    frugal = {"train": {"checkpointing": True, "batch_size": 1, "base_weights": "int8"}, "text_encoder": {"learning_rate": 0}}
    assert memory_hints(TrainConfig.model_validate(frugal)) == ["Lower dataset.resolution."]


def test_answers_in_one_line(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([str(config)]) == 0
    assert Measured(**json.loads(capsys.readouterr().out)).step_seconds > 0

    def too_large(_config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(preflight, "measure", too_large)
    assert main([str(config)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["what"] == "Out of memory" and "dataset.resolution" in told["hint"]


def test_leaves_nothing_behind(config: Path) -> None:
    before = sorted(config.parent.rglob("*"))
    measure(read_config(config))
    assert sorted(config.parent.rglob("*")) == before
