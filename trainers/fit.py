"""A step that does not fit into memory is made to fit, the cheapest way first, and each change is told with its price.

checkpointing   activations are computed again in place of being kept: the same bits, about a third more time
micro-batches   half as many pictures at once, twice as often: the same pictures and noises, sums in another order
int8 base       half of a 16-bit base's memory: slower, and a base that is rounded

A GPU says that it is full; the step is then done again. A CPU's system ends the process, so there it is estimated before
the first step. What was chosen is kept in the training state, so that a resumed run goes the same way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trainers.config import TrainConfig
from trainers.dataset.batches import Batch

if TYPE_CHECKING:
    from trainers.setup import Training

RECOMPUTED = 1 / 3
"""Share of a step's memory that is left with checkpointing; 0.15 of 0.8 GB were counted for Stable Diffusion 1.5 at 512 px."""
BESIDE = 1.3
"""A step's memory over what its forward pass keeps: gradients on their way, and what a library works in."""
BOUND = 1200
"""Numbers that a picture keeps for each latent pixel and channel of the widest level, at the most: four times as many as
were counted for Stable Diffusion 1.5."""
LEFT_FREE = 0.1
"""Share of the free memory that is not counted on."""


class ReloadBase(Exception):
    """The base must be read anew to be kept as the run's `fit` now says."""


@dataclass(frozen=True)
class Fit:
    """What was changed so that a step fits; the defaults change nothing."""

    checkpointing: bool = False
    at_once: int = 0
    """Pictures in one forward and backward pass; 0: train.batch_size."""
    base_weights: str = ""
    """In place of train.base_weights; empty: as set."""

    @classmethod
    def of(cls, facts: dict[str, Any] | None) -> Fit:
        """From the JSON of its fields."""
        return cls(**(facts or {}))

    def facts(self) -> dict[str, Any]:
        """What `of` reads."""
        return asdict(self)

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The configuration that is computed with; the batch size stays, as it says what a step is."""
        changes: dict[str, Any] = {"checkpointing": config.train.checkpointing or self.checkpointing}
        if self.base_weights:
            changes["base_weights"] = self.base_weights
        return config.model_copy(update={"train": config.train.model_copy(update=changes)})

    def smaller(self, config: TrainConfig) -> tuple[Fit, str] | None:
        """What saves memory next, and what it costs in words; None when nothing is left."""
        size = self.at_once or config.train.batch_size
        if not (config.train.checkpointing or self.checkpointing):
            told = "gradient checkpointing is on from here: the same result, about a third more time"
            return replace(self, checkpointing=True), told
        if size > 1:
            half = -(-size // 2)
            told = (
                f"{half} of a step's pictures are computed at once in place of {size}: the same result but for rounding, slower"
            )
            return replace(self, at_once=half), told
        if config.train.base_weights == "full" and not self.base_weights:
            told = "the base is kept in int8 from here: about half its memory, slower, slightly other numbers"
            return replace(self, base_weights="int8"), told
        return None


def can_fit(training: Training) -> bool:
    """Whether something is left that saves memory, and may be done. Several processes would have to decide alike."""
    settings = training.config.train
    return settings.fit and training.device.count == 1 and training.fit.smaller(training.config) is not None


def make_room(training: Training, warn: Callable[[str], None], why: str) -> None:
    """Takes the next measure and tells it. Raises ReloadBase, the measure noted, when it needs the base anew."""
    smaller = training.fit.smaller(training.config)
    if smaller is None:
        raise ValueError("nothing is left that saves memory")
    before, (training.fit, told) = training.fit, smaller
    warn(f"{why}: {told}.")
    training.runner.forget()
    training.flat.gradient.zero_()
    gc.collect()
    if training.device.device.type == "cuda":
        torch.cuda.empty_cache()
    if training.fit.base_weights != before.base_weights:
        raise ReloadBase
    training.config = training.fit.applied(training.config)
    if training.fit.checkpointing and not before.checkpointing:
        training.model.enable_checkpointing()
    training.batches.at_once = training.fit.at_once or training.config.train.batch_size


def fit_before_first_step(training: Training, warn: Callable[[str], None], forward: Callable[[Batch], torch.Tensor]) -> None:
    """On a CPU: makes room until the largest step is estimated to fit. `forward` gives a batch's loss, with its graph."""
    if training.device.device.type != "cpu" or not can_fit(training) or _fits_by_far(training):
        return
    unet = training.model.parts()["unet"]
    checkpointed = bool(getattr(unet, "is_gradient_checkpointing", False))
    if checkpointed:  # which hides from the count what it recomputes
        unet.disable_gradient_checkpointing()  # type: ignore[operator]
    picture, copies = bytes_of_a_picture(training, forward)
    if checkpointed:
        training.model.enable_checkpointing()
    while True:
        rows = min(training.fit.at_once or training.config.train.batch_size, training.config.examples_per_step)
        pictures = rows * picture * (RECOMPUTED if training.config.train.checkpointing else 1)
        needed = int(BESIDE * (pictures + copies))
        free = int((1 - LEFT_FREE) * memory_free())
        if needed <= free or not can_fit(training):
            return
        make_room(training, warn, f"A step would take about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def _fits_by_far(training: Training) -> bool:
    """Whether it fits by a bound so high that nothing need be counted, which takes a moment at every start."""
    facts, rows = training.model.facts, min(training.config.train.batch_size, training.config.examples_per_step)
    pixels = max(height * width for height, width in training.data.plan.buckets) / facts.pixels_per_latent**2
    numbers = BOUND * rows * pixels * facts.configs["unet"]["block_out_channels"][0]
    copied = sum(tensor.numel() for tensor in _adapter(training))
    return bool(BESIDE * (numbers + copied) * training.device.dtype.itemsize < (1 - LEFT_FREE) * memory_free())


def bytes_of_a_picture(training: Training, forward: Callable[[Batch], torch.Tensor]) -> tuple[int, int]:
    """What the forward pass keeps for the backward pass: (of each picture of the largest bucket, however many they are).

    The former is counted on a small part of the picture. The latter are copies of what learns, in the base's number format,
    and weights that are made of small factors: of a full difference, or beside a sum of periods, as large as the layers. It
    is what one row and two of a still smaller part have in common.
    """
    plan, facts = training.data.plan, training.model.facts
    height, width = max(plan.buckets, key=lambda bucket: bucket[0] * bucket[1])
    step = next(step for step in range(plan.steps_per_epoch) if plan.buckets[plan.indices(step)[0]] == (height, width))
    batch = next(iter(training.batches.step(step)), None)
    if batch is None:
        return 0, 0
    whole = (height // facts.pixels_per_latent, width // facts.pixels_per_latent)
    least = max(1, facts.step // facts.pixels_per_latent)
    side, small = ([min(size, times * least) for size in whole] for times in (4, 1))
    one, two = (_kept_bytes(training, partial(forward, _part(batch, rows, small))) for rows in (1, 2))
    common = max(0, 2 * one - two)
    kept = _kept_bytes(training, partial(forward, _part(batch, 1, side))) - common
    return int(kept * whole[0] * whole[1] / (side[0] * side[1])), common


def _part(batch: Batch, rows: int, side: list[int]) -> Batch:
    """The upper left of the first picture, `side` (height, width) in latent pixels, so many times."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[[0] * rows]

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return of(tensor)[:, :, : side[0], : side[1]]

    return Batch(
        cut(batch.latents),
        cut(batch.noise),
        of(batch.timesteps),
        batch.captions[:1] * rows,
        of(batch.weights),
        of(batch.framing),
        None if batch.mask is None else cut(batch.mask),
        None if batch.keys is None else of(batch.keys),
    )


def _kept_bytes(training: Training, work: Callable[[], torch.Tensor]) -> int:
    """Of the tensors that autograd keeps, those that are there anyhow left out."""
    parts = (*training.model.parts().values(), training.model.vae)
    there = {tensor.untyped_storage().data_ptr() for part in parts for tensor in (*part.parameters(), *part.buffers())}
    there |= {tensor.untyped_storage().data_ptr() for tensor in _adapter(training)}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for place, storage in held.items() if place not in there)


def _adapter(training: Training) -> list[torch.Tensor]:
    """What learns, and what its type keeps beside it."""
    return [training.flat.weights, *(one for own in training.flat.constants.values() for one in own.values())]


def memory_free() -> int:
    """Bytes of the machine's memory that can be had without taking any from another program's."""
    import psutil

    return int(psutil.virtual_memory().available)
