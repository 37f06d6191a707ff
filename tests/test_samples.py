"""Samples while training: drawn together, the same again after a resume, and their share of the time is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from app.progress import Progress, in_a_sentence
from tests.command_line import TINY, impasto, read_events, result_of
from tests.tiny_lora import TEXT, UNET, save_lora
from tests.tiny_runs import shake, tiny_training
from trainers import events, outputs
from trainers.attach import attach_files
from trainers.console import in_words
from trainers.families import load_family, recognise_base
from trainers.formats.hashes import base_file_hashes
from trainers.generate import Picture, RenderSettings, render, render_latents
from trainers.outputs import Outputs
from trainers.run_folder import RunFolder

PROMPTS = ["a red apple", "a blue car", "a cat"]


def sampled(tiny_base: Path, pictures: Path, run: Path, *more: str) -> tuple[Outputs, list[events.Event]]:
    """The outputs of a run at its first step, and what they told; its adapter is not zero."""
    told: list[events.Event] = []

    def emit(event: events.Event) -> None:
        told.append(event)
        events.append(RunFolder(run).events, event)

    prompts = f"samples.prompts={PROMPTS}"
    training = tiny_training(tiny_base, pictures, run, "samples.steps=2", prompts, "output.verify=false", *more)
    shake(training, 0.2)
    return Outputs(RunFolder(run), training, emit, 0.0), told


def files(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run / "samples").glob("*.png"))]


@pytest.mark.parametrize(("pixels", "batches"), [(4 * 32 * 32, [3]), (2 * 32 * 32, [2, 1]), (1, [1, 1, 1])])
def test_samples_are_drawn_as_many_at_once_as_pixels_allow_and_look_like_each_alone(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int, batches: list[int]
) -> None:
    drawn: list[int] = []

    def counted(model: Any, wanted: Any, how: Any) -> Any:
        drawn.append(len(wanted))
        return render(model, wanted, how)

    monkeypatch.setattr(outputs, "render", counted)
    monkeypatch.setattr(outputs, "BATCH_PIXELS", pixels)
    making, told = sampled(tiny_base, pictures, tmp_path / "run")
    making.sample()
    assert drawn == batches and len(files(tmp_path / "run")) == len(PROMPTS)
    assert [event.prompt for event in told if isinstance(event, events.Sample)] == PROMPTS
    together = [Image.open(path) for path in sorted((tmp_path / "run" / "samples").glob("*.png"))]
    monkeypatch.setattr(outputs, "BATCH_PIXELS", 1)
    sampled(tiny_base, pictures, tmp_path / "alone")[0].sample()
    alone = [Image.open(path) for path in sorted((tmp_path / "alone" / "samples").glob("*.png"))]
    for first, second in zip(together, alone, strict=True):
        assert numpy.abs(numpy.asarray(first).astype(int) - numpy.asarray(second).astype(int)).max() <= 2


def test_a_resume_that_finds_one_sample_missing_makes_the_same_pictures(
    tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    making, _ = sampled(tiny_base, pictures, tmp_path / "run")
    making.sample()
    before = files(tmp_path / "run")
    assert len(set(before)) == len(PROMPTS)
    sorted((tmp_path / "run" / "samples").glob("*.png"))[1].unlink()
    again, _ = sampled(tiny_base, pictures, tmp_path / "run")
    again.make_up()
    assert files(tmp_path / "run") == before


def test_the_time_of_all_samples_is_told_at_the_end_also_of_those_before_a_resume(
    tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # two processes
        making, told = sampled(tiny_base, pictures, tmp_path / "run")
        making.sample()
    making.finish(1000.0)
    seconds = [
        event["seconds"] for event in events.read_since(tmp_path / "run" / "events.jsonl")[0] if event["type"] == "sample"
    ]
    assert len(seconds) == 2 * len(PROMPTS) and min(seconds) > 0
    finished = told[-1]
    assert isinstance(finished, events.Finished) and finished.sample_seconds == pytest.approx(sum(seconds))


@pytest.mark.parametrize(("spent", "words"), [(120.0, "samples took 12 % of the time"), (0.0, ""), (1.0, "")])
def test_the_share_of_the_samples_is_said(tmp_path: Path, spent: float, words: str) -> None:
    event = events.Finished(step=10, path="a.safetensors", seconds=1000.0, sample_seconds=spent, proof="It is read alike.")
    line = in_words(event, RunFolder(tmp_path))
    assert line.startswith("done in 16 min 40 s") and line.endswith("It is read alike.")
    progress = Progress()
    progress.apply({"type": event.type, **vars(event)})
    sentence = in_a_sentence("finished", progress, 0)
    assert sentence.startswith("Finished: 10 steps in 16 min 40 s") and sentence.endswith("It is read alike.")
    for text in (line, sentence):
        assert words in text and ("samples took" in text) == bool(words)
    del vars(event)["sample_seconds"]  # as in a run of an older version
    progress.apply({"type": event.type, **vars(event)})
    assert "samples took" not in in_a_sentence("finished", progress, 0)


@pytest.mark.parametrize(("layers", "encoded"), [((UNET,), 2), ((UNET, TEXT), 6)], ids=["unet", "text too"])
def test_a_ladder_encodes_no_text_twice(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: tuple[str, ...], encoded: int
) -> None:
    model = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    (name,) = attach_files(model, [save_lora(tmp_path / "a.safetensors", *layers)])
    encode, asked = model.encode_captions, []
    monkeypatch.setattr(model, "encode_captions", lambda captions: (asked.append(captions), encode(captions))[1])
    ladder = [Picture("a cat", 1, {name: strength}) for strength in (0.5, 1.0, 1.5)]
    render_latents(model, ladder, RenderSettings(16, 16, steps=3, negative="blurry"))
    assert len(asked) == encoded


def test_the_bases_file_is_hashed_once_and_after_the_first_step(
    pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def hashes(path: Path) -> tuple[str, str]:
        steps.append(sum(event["type"] == "step" for event in read_events(tmp_path / "run")))
        return base_file_hashes(path)

    monkeypatch.setattr("trainers.outputs.base_file_hashes", hashes)
    assert impasto("train", pictures, "--base", tiny_base, *TINY, "--steps", 3, "-o", tmp_path / "run") == 0
    assert len(steps) == 1 and steps[0] >= 1
    with safe_open(result_of(tmp_path / "run"), "pt") as file:
        assert file.metadata()["ss_new_sd_model_hash"]
