"""What a run tells of its memory: the parts before the first step, and the first step's peak in the log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tests.command_line import TINY, impasto, read_events
from trainers.families import load_family, recognise_base
from trainers.memory import bytes_of, parts_in_words
from trainers.train import update
from trainers.upsampled import Upsampled


def test_shared_memory_is_counted_once() -> None:
    whole = torch.zeros(10)
    assert bytes_of([whole, whole[2:5], whole.view(2, 5), torch.zeros(3), 7]) == 52


def test_the_parts_are_told_in_bytes(start: Any, tiny_base: Path) -> None:
    training = start("train.ema=0.9")
    numbers = training.flat.weights.numel()
    # Counted on the base as it is read, before anything is laid out anew; an upsampler has its quarters beside its kernel.
    plain = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    parts = (*plain.parts().values(), plain.vae)
    base = sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))
    upsamplers = [module for module in training.model.parts()["unet"].modules() if isinstance(module, Upsampled)]
    base += sum(4 * (16 * one.conv.shape.numel() // 9 + 4 * one.conv.shape[0]) for one in upsamplers)
    told = f"memory: base {base / 1e6:.1f} MB, adapter with gradient and optimizer {5 * 4 * numbers / 1e6:.1f} MB"
    assert parts_in_words(training) == told
    update(training)
    assert parts_in_words(training) == told, "the optimizer's state is what was expected"


def test_a_run_tells_its_parts_and_the_log_has_the_first_steps_peak(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert impasto("train", pictures, "--output", run, "--base", tiny_base, *TINY, "--steps", 3) == 0
    (detail,) = (event["detail"] for event in read_events(run) if event["type"] == "stage" and event["name"] == "train")
    assert re.fullmatch(r"memory: base \d+\.\d MB, adapter with gradient and optimizer \d+\.\d MB", detail)
    (line,) = (line for line in (run / "trainer.log").read_text().splitlines() if "memory: the first step" in line)
    assert re.search(r"took \d+\.\d MB at its peak, beside the \d+\.\d MB held before", line)
