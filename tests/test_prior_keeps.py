"""Prior preservation preserves: on pocket, what a training does to other pictures of the usual kind is less with it."""

from __future__ import annotations

from pathlib import Path

import numpy

from tests.command_line import ROOT
from tests.tiny_runs import update_from
from trainers.adapters.inject import TRAINED
from trainers.generate import Picture, RenderSettings, render
from trainers.presets import resolve
from trainers.run_folder import RunFolder
from trainers.setup import Training, set_up

USUAL = ("a fox, noto style", "a carrot, noto style", "a grinning face, noto style", "a tractor, noto style")
STEPS = 16


def train(run: Path, prior: tuple[str, ...], steps: int) -> Training:
    run.mkdir()
    values = {
        "dataset": {"images": str(ROOT / "assets" / "samples" / "blackcut"), "holdout": 0, "repeats": 1},
        "prior": {"prompts": prior, "images": 6, "steps": 4},
        "train": {"steps": steps, "batch_size": 2, "recording": "off", "precision": "fp32"},
        "schedule": {"type": "constant", "warmup": 0},
        "adapter": {"rank": 8},
    }
    training = set_up(resolve("pocket", values), RunFolder(run), lambda event: None)
    update_from(training, steps)
    return training


def drift(training: Training) -> float:
    """Root mean square that the training moves pictures of the usual kind by, from noises that it has not seen; 1 is white."""
    side = training.model.facts.resolution
    how = RenderSettings(side, side, 4, 3.0)
    base, moved = (
        render(training.model, [Picture(prompt, 901, {TRAINED: strength}) for prompt in USUAL], how) for strength in (0.0, 1.0)
    )
    pairs = zip(base, moved, strict=True)
    squares = [numpy.square(numpy.asarray(a, numpy.float64) - numpy.asarray(b, numpy.float64)).mean() for a, b in pairs]
    return float(numpy.sqrt(numpy.mean(squares))) / 255


def test_less_is_forgotten_although_it_learns_twice_as_long(tmp_path: Path) -> None:
    """One's own pictures are shown as often in both runs: the one with as many prior pictures takes twice the steps."""
    without = drift(train(tmp_path / "without", (), STEPS))
    beside = drift(train(tmp_path / "with", USUAL, 2 * STEPS))
    print(f"drift on the class prompts: {without:.4f} without prior pictures, {beside:.4f} with them")
    assert 0 < beside < 0.9 * without
