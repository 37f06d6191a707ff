"""A run on the tiny base, set up to its first step in a fraction of a second, for tests of the step and of what feeds it."""

from __future__ import annotations

from pathlib import Path

import torch

from trainers.config import TrainConfig, build_config, parse_override
from trainers.export import Exported, trained_modules
from trainers.run_folder import RunFolder
from trainers.settings import merge
from trainers.setup import Training, set_up
from trainers.train import training_step, update

DEFAULTS = ("dataset.resolution=32", "dataset.buckets=false", "dataset.holdout=0", "adapter.rank=2", "train.precision=fp32")


def tiny_config(base: Path, pictures: Path, *overrides: str) -> TrainConfig:
    """Rank 2 at 32x32, no held-out pictures, unless `overrides` (as after --set) say otherwise."""
    values = {"base": {"model": str(base)}, "dataset": {"images": str(pictures)}}
    for text in (*DEFAULTS, *overrides):
        values = merge(values, parse_override(text))
    return build_config(values)


def tiny_training(base: Path, pictures: Path, run: Path, *overrides: str) -> Training:
    """A run ready for its first update, in the folder `run`."""
    run.mkdir(parents=True, exist_ok=True)
    return set_up(tiny_config(base, pictures, *overrides), RunFolder(run), lambda event: None)


def exported(training: Training) -> Exported:
    """What a file of the run's weights would hold."""
    return trained_modules(training.flat, training.exported, training.plans, training.config, training.model)


def shake(training: Training, size: float = 0.05) -> None:
    """Gives every factor, also the zero ones, a fixed random value, so that all gradients are there."""
    with torch.no_grad():
        training.flat.weights.normal_(0.0, size, generator=torch.Generator().manual_seed(1))


def update_from(training: Training, updates: int) -> torch.Tensor:
    """The weights (N,) after some more updates."""
    for _ in range(updates):
        update(training)
    return training.flat.weights.clone()


def first_loss(training: Training) -> torch.Tensor:
    """The loss of the first step's only micro-batch."""
    (batch,) = training.batches.step(0)
    return training_step(training.model, batch, training.condition, training.config.train.min_snr_gamma)
