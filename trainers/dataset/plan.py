"""Which examples each step sees: the held-out part, and the order of epochs, derived from (seed, epoch) alone."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainers.errors import DatasetError, SettingError

MIN_FOR_HOLDOUT = 5
"""With fewer different pictures none is held out: each is needed for training."""
MAX_EPOCH = 5_000_000
"""Pictures shown in one epoch, repeats counted; the order of an epoch is kept in memory."""


def random_for(*parts: int | str) -> random.Random:
    """A generator that depends on `parts` alone, the same on every machine and after every resume."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def dropout_keys(seed: int, step: int, slot: int, index: int) -> tuple[int, int]:
    """Keys of what is left out of an adapter for one example of a step, and for the whole step: see adapters.dropout.Keys."""
    own, whole = random_for("dropout", seed, step, slot, index), random_for("dropout", seed, step)
    return own.getrandbits(32) - 2**31, whole.getrandbits(32) - 2**31


def split_holdout(contents: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits examples, given as the sha256 of each file, into (training, held-out) indices, both ascending.

    The choice depends on each content and the seed, not on order or names, so a picture added moves at most one other
    across. Equal contents stay on one side. With `share` > 0 and MIN_FOR_HOLDOUT different pictures at least one is
    held out, with fewer none; training always keeps one. Raises ValueError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"a held-out share of {share} is outside [0, 1)")
    different = sorted(set(contents), key=lambda content: hashlib.sha256(f"{seed}/holdout/{content}".encode()).digest())
    count = 0
    if share > 0 and len(different) >= MIN_FOR_HOLDOUT:
        count = min(max(1, round(share * len(different))), len(different) - 1)
    held = set(different[:count])
    train = [index for index, content in enumerate(contents) if content not in held]
    return train, [index for index, content in enumerate(contents) if content in held]


def epoch_steps(
    buckets: Sequence[tuple[int, int]], repeats: Sequence[int], per_step: int, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """The example indices of each step of an epoch: every example as often as its repeats, one bucket per step.

    `buckets` (height, width) and `repeats` are given per training example. Each bucket is shuffled and cut into steps of
    `per_step`, the last, incomplete one kept; then the steps are shuffled. Depends on (seed, epoch) alone.
    """
    _check(buckets, repeats, per_step)
    generator = random_for(seed, "epoch", epoch)
    members: dict[tuple[int, int], list[int]] = {bucket: [] for bucket in sorted(set(buckets))}
    for index, (bucket, count) in enumerate(zip(buckets, repeats, strict=True)):
        members[bucket] += [index] * count
    steps: list[tuple[int, ...]] = []
    for indices in members.values():
        generator.shuffle(indices)
        steps += [tuple(indices[start : start + per_step]) for start in range(0, len(indices), per_step)]
    generator.shuffle(steps)
    return steps


def steps_per_epoch(buckets: Sequence[tuple[int, int]], repeats: Sequence[int], per_step: int) -> int:
    """How many steps `epoch_steps` gives: each bucket's showings over `per_step`, rounded up, summed."""
    _check(buckets, repeats, per_step)
    showings: Counter[tuple[int, int]] = Counter()
    for bucket, count in zip(buckets, repeats, strict=True):
        showings[bucket] += count
    return sum(-(-total // per_step) for total in showings.values())


def _check(buckets: Sequence[tuple[int, int]], repeats: Sequence[int], per_step: int) -> None:
    if len(buckets) != len(repeats) or per_step < 1 or any(count < 1 for count in repeats):
        raise ValueError("one bucket and one repeat of at least 1 per example, and at least 1 example per step")
    if sum(repeats) > MAX_EPOCH:
        what = f"One epoch would show {sum(repeats):,} pictures; the limit is {MAX_EPOCH:,}"
        raise SettingError(what, where="dataset.repeats", hint="Lower the repeats; train.epochs shows pictures again.")


@dataclass(frozen=True)
class StepPlan:
    """The examples of any step of a run, found without replaying the steps before it. Steps count from 0.

    Raises DatasetError without examples, SettingError when an epoch is longer than MAX_EPOCH.
    """

    buckets: tuple[tuple[int, int], ...]
    """(height, width) per training example."""
    repeats: tuple[int, ...]
    per_step: int
    """Examples in one optimizer update: batch size times accumulation. The last step of a bucket may hold fewer."""
    seed: int
    steps_per_epoch: int = field(init=False, compare=False)
    _epochs: dict[int, list[tuple[int, ...]]] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.buckets:
            raise DatasetError("No picture is left to train on", hint="Add pictures, or lower dataset.holdout.")
        object.__setattr__(self, "steps_per_epoch", steps_per_epoch(self.buckets, self.repeats, self.per_step))

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step lies in. Raises ValueError below step 0."""
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        return step // self.steps_per_epoch

    def indices(self, step: int) -> tuple[int, ...]:
        """Indices of the training examples of a step, 1 to per_step of them, all of one bucket."""
        epoch = self.epoch_of(step)
        steps = self._epochs.get(epoch)
        if steps is None:
            steps = epoch_steps(self.buckets, self.repeats, self.per_step, self.seed, epoch)
            # One epoch is kept: memory does not grow with the length of a run.
            self._epochs.clear()
            self._epochs[epoch] = steps
        return steps[step % self.steps_per_epoch]
