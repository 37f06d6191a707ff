"""What may change between stop and resume, and how the events go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import TINY, impasto, read_events, result_of
from tests.tiny_models import save_tiny_pipeline
from trainers import events
from trainers.config import read_config
from trainers.dataset.prepare import scan_images
from trainers.demo import _next_run
from trainers.manifest import make_manifest
from trainers.outputs import Outputs
from trainers.run_folder import RunFolder, differences


@pytest.fixture
def stopped(pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 6 steps that was stopped after the second."""

    def asked(run: RunFolder) -> str | None:
        done = run.events.exists() and any(event["type"] == "step" and event["step"] == 2 for event in read_events(run.path))
        return "stop" if done else None

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "stop_asked", asked)
        assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *TINY, "--steps", 6) == 3
    assert read_events(tmp_path / "run")[-1]["step"] == 2
    return tmp_path / "run"


def change(run: Path, old: str, new: str) -> None:
    """Edits a run's config.toml."""
    text = (run / "config.toml").read_text(encoding="utf-8")
    assert old in text
    (run / "config.toml").write_text(text.replace(old, new), encoding="utf-8")


def test_settings_that_do_not_decide_the_result_may_change_before_resume(stopped: Path) -> None:
    change(stopped, 'dtype = "fp16"', 'dtype = "fp32"')
    change(stopped, "checkpointing = false", "checkpointing = true")
    assert impasto("resume", stopped) == 0
    assert result_of(stopped).stat().st_size > 0


def test_a_setting_that_decides_the_result_is_named_when_it_changed(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(stopped, "batch_size = 2", "batch_size = 3")
    assert impasto("resume", stopped) == 1
    assert "the setting train.batch_size has changed from 2 to 3" in capsys.readouterr().out
    assert read_events(stopped)[-1]["type"] == "failed"


def test_a_changed_caption_is_named_by_its_picture(stopped: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "00.txt").write_text("something else", encoding="utf-8")
    assert impasto("resume", stopped) == 1
    assert "the caption of 00.png has changed" in capsys.readouterr().out


def test_a_base_whose_settings_changed_is_named_though_its_weights_did_not() -> None:
    """The noise schedule, or how many heads attend, decide as much as the weights; a run from before this was noted goes on."""
    before = {"configuration": {"scheduler": "a", "unet": "b"}}
    assert differences(before, {"configuration": {"scheduler": "c", "unet": "b"}}) == [
        "the configuration of the base's scheduler has changed"
    ]
    assert differences({}, before) == []


def test_the_settings_of_a_base_go_into_the_manifest(start: Any) -> None:
    training = start()
    scan = scan_images(training.config)
    before = make_manifest(training.config, scan, training.model, training.device)
    training.model.facts.configs["scheduler"]["beta_end"] = 0.013
    assert differences(before, make_manifest(training.config, scan, training.model, training.device)) == [
        "the configuration of the base's scheduler has changed"
    ]


def test_events_are_only_ever_added_so_a_reader_goes_on_where_it_was(stopped: Path) -> None:
    path = stopped / "events.jsonl"
    before, offset = events.read_since(path)
    told = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"type": "st')  # a line torn by a crash
    assert impasto("resume", stopped) == 0
    assert path.read_bytes().startswith(told)
    after, _ = events.read_since(path, offset)
    steps = [event["step"] for event in (*before, *after) if event["type"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_display_that_breaks_does_not_end_the_run(
    pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    words = ["train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *TINY, "--steps", 2, "--json"]
    assert impasto(*words) == 0
    monkeypatch.undo()
    assert read_events(tmp_path / "run")[-1]["type"] == "finished"


def test_a_relative_base_is_kept_as_an_absolute_path(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_pipeline(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert impasto("train", pictures, "--output", "run", "--base", "models/tiny", *TINY, "--steps", 1) == 0
    assert read_config(tmp_path / "run" / "config.toml").base.model == str(tmp_path / "models" / "tiny")


def test_a_base_given_by_set_brings_its_own_preset(tiny_base: Path) -> None:
    from trainers.launch import given_settings, plan_run
    from trainers.presets import FOLDER

    sample = FOLDER.parent / "assets" / "samples" / "blackcut"
    plan = plan_run(None, given_settings(sample, None, None, None, None), [f"base.model={tiny_base}"], force=True)
    assert plan.preset == "character"


def test_the_run_folder_may_not_be_the_folder_of_pictures(pictures: Path, tiny_base: Path) -> None:
    before = sorted(pictures.iterdir())
    assert impasto("train", pictures, "--output", pictures, "--base", tiny_base, *TINY) == 2
    assert sorted(pictures.iterdir()) == before


def test_cached_text_states_go_to_the_device_that_trains(tiny_base: Path) -> None:
    from trainers.families import load_family, recognise_base
    from trainers.setup import choose_condition

    model = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    condition = choose_condition(model, torch.device("meta"), learns=False)
    assert condition(("a cat", "a dog")).hidden_states.device.type == "meta"


def test_a_demo_that_was_killed_before_its_picture_is_gone_on_with(stopped: Path, tmp_path: Path) -> None:
    assert impasto("resume", stopped) == 0
    (tmp_path / "demo").mkdir()
    stopped.rename(tmp_path / "demo" / "blackcut")
    run, fresh = _next_run(tmp_path / "demo")
    assert run.path.name == "blackcut" and not fresh
    (run.path / "strip.png").touch()
    run, fresh = _next_run(tmp_path / "demo")
    assert run.path.name == "blackcut-2" and fresh


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


@pytest.mark.parametrize("kind", [events.Sample, events.Checkpoint])
def test_a_file_whose_event_a_kill_has_prevented_is_told_on_resume(
    kind: type[events.Event], pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("--set", "samples.every=1", "--set", "checkpoints.every=1", "--set", "train.save_state_seconds=0")
    words = ("--steps", 2, *every, "--set", "samples.prompts=['a cat']")
    append = events.append

    def append_or_die(path: Path, event: events.Event) -> None:
        if isinstance(event, kind) and getattr(event, "step", None) == 1:
            raise Killed
        append(path, event)

    with monkeypatch.context() as patch:
        patch.setattr(events, "append", append_or_die)
        with pytest.raises(Killed):
            impasto("train", pictures, "--base", tiny_base, *TINY, *words, "--output", tmp_path / "run")
    assert impasto("resume", tmp_path / "run") == 0
    told = [event["path"] for event in read_events(tmp_path / "run") if event["type"] in ("sample", "checkpoint")]
    files = [path for folder in ("samples", "checkpoints") for path in (tmp_path / "run" / folder).iterdir()]
    assert sorted(told) == sorted(path.relative_to(tmp_path / "run").as_posix() for path in files) and len(told) == 5


@pytest.mark.parametrize("step", [4, 5])
def test_what_a_kill_after_the_state_has_prevented_is_made_up(
    step: int, pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--steps", 5, "--set", "samples.every=2", "--set", "checkpoints.every=2", "--set", "train.save_state_seconds=0")
    start = ("train", pictures, "--base", tiny_base, *TINY, *words, "--output")
    assert impasto(*start, tmp_path / "whole") == 0
    sample = Outputs.sample

    def sample_or_die(self: Outputs) -> None:
        if self._training.step == step:
            raise Killed
        sample(self)

    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "sample", sample_or_die)
        with pytest.raises(Killed):
            impasto(*start, tmp_path / "run")
    assert impasto("resume", tmp_path / "run") == 0
    for folder in ("samples", "checkpoints"):
        made, whole = ({path.name for path in (tmp_path / name / folder).iterdir()} for name in ("run", "whole"))
        assert made == whole, folder


def test_another_type_of_adapter_or_optimizer_is_named_although_its_shapes_are_the_same(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(stopped, 'type = "lora"', 'type = "additive"')
    for own in ('init = "gaussian"', 'rank_schedule = "fixed"', "grow_from = 4", "grow_every = 50", "grow_above = 0.01"):
        change(stopped, own + "\n", "")
    assert impasto("resume", stopped) != 0
    assert "adapter.type" in "".join(capsys.readouterr())
