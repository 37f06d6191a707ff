"""What a run can go back to: its training state on the disk after a kill, a good state in memory when its numbers break.

The good one is remembered every 50 steps, so by the step and not by the clock: two runs of the same settings go back alike.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

import torch

from trainers.errors import DivergedError, RunFolderError
from trainers.run_folder import RunFolder
from trainers.setup import Training
from trainers.training_state import Recovery, TrainingState, load_good, save_state
from trainers.turns import goes_in_periods

EVERY = 50
"""Steps between two states that are remembered: in memory, and on the disk with the next training state."""


class StateKeeper:
    """Puts a run's last training state back, and writes new ones; only the first of several processes writes."""

    def __init__(self, run: RunFolder, training: Training, before: TrainingState | None) -> None:
        """Raises RunFolderError when `before` is of another adapter or optimizer."""
        self._run, self._training = run, training
        self.began = time.time()
        """When the run began, in seconds since 1970."""
        self._trained = 0.0
        self._begun = self._saved = time.monotonic()
        if before is not None:
            self._resume(before)

    @property
    def seconds(self) -> float:
        """Seconds that the run has trained, over all its processes."""
        return self._trained + time.monotonic() - self._begun

    def save(self) -> None:
        """Writes the state as it is now. Raises OSError, with the states before it kept."""
        training = self._training
        self._saved = time.monotonic()
        if not training.device.is_main:
            return
        training.check_manifest()  # no state without what it is a state of
        facts = {
            "at": self.began,
            "seconds": self.seconds,
            "kernels": training.device.kernels(),
            "recovery": asdict(training.recovery),
            **training.loss_scale.facts(),
            "fit": training.fit.facts(),
            "turned": training.turned,
            "good": training.good.step if training.good else None,
            "layout": _layout(training),
        }
        optimizer = training.optimizer.state_dict()
        flat = training.flat
        state = TrainingState(training.step, flat.weights, training.mean, optimizer, facts, flat.kept_constants())
        save_state(self._run, state, training.good)

    def save_if_older(self, ahead: float) -> None:
        """Saves when the last state would be older than it may be after `ahead` more seconds."""
        if time.monotonic() - self._saved + ahead > self._training.config.train.save_state_seconds:
            self.save()

    def _resume(self, state: TrainingState) -> None:
        training = self._training
        if state.facts["layout"] != _layout(training):
            what = "The training state was made with another adapter or optimizer"
            raise RunFolderError(what, str(self._run.state), "Put those settings back, or train into a new run folder.")
        put_back(training, state)
        training.recovery = Recovery.of(state.facts["recovery"])
        good = state.facts["good"]
        training.good = None if good is None else load_good(self._run, good)
        self.began, self._trained = state.facts["at"], state.facts["seconds"]


def _layout(training: Training) -> str:
    """Names what the numbers of a state mean: the adapter's factors in their order, and the optimizer."""
    shapes = [(layer, name, shape) for layer, name, _, shape in training.flat.in_order()]
    return hashlib.sha256(repr((training.config.optimizer.type, shapes)).encode()).hexdigest()[:16]


def snapshot(training: Training) -> TrainingState:
    """A copy in the machine's memory of all that the run moves, which nothing changes any more."""
    mean = None if training.mean is None else _copied(training.mean)
    optimizer = _copied(training.optimizer.state_dict())
    facts = {**training.loss_scale.facts(), "turned": training.turned}
    constants = _copied(training.flat.kept_constants()) if goes_in_periods(training) else {}  # of other types they never change
    return TrainingState(training.step, _copied(training.flat.weights), mean, optimizer, facts, constants)


def put_back(training: Training, state: TrainingState) -> None:
    """The run as it was at `state`, which is left as it is."""
    training.step, training.turned = state.step, state.facts.get("turned", 0)
    training.loss_scale = training.loss_scale.as_in(state.facts)
    with torch.no_grad():
        training.flat.weights.copy_(state.weights)
        for layer, constants in state.constants.items():
            for name, constant in constants.items():
                training.flat.constants[layer][name].copy_(constant)
        if training.mean is not None and state.mean is not None:
            training.mean.copy_(state.mean)
    training.optimizer.load_state_dict(_copied(state.optimizer))


def remember(training: Training) -> None:
    """Takes the state as the one to go back to, if it is its turn and all its numbers are finite."""
    due = training.good is None or (training.step % EVERY == 0 and training.step > training.good.step)
    if due and bool(torch.isfinite(training.flat.weights).all()):
        training.good = snapshot(training)


def go_back(training: Training, error: DivergedError) -> None:
    """Puts the last good state back with lower rates; the batch that broke is passed over.

    Raises `error`, the good state put back, when `train.recoveries` are used up.
    """
    broke, good = training.step, training.good
    if good is None:
        raise error
    put_back(training, good)
    if training.recovery.attempts >= training.config.train.recoveries:
        raise error
    training.recovery = training.recovery.again(broke)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value
