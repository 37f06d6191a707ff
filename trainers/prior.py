"""Prior preservation: pictures that the base draws first, or given ones, learnt beside one's own (arXiv 2208.12242)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trainers import events
from trainers.config import TrainConfig
from trainers.dataset.folder import Example
from trainers.dataset.pictures import hash_file
from trainers.dataset.prepare import planned_prior, render_side
from trainers.device import Device
from trainers.families.base import DiffusionModel
from trainers.files import write_atomically
from trainers.generate import Picture, RenderSettings, render

TOGETHER = 4  # pictures drawn as one batch


def prior_examples(
    model: DiffusionModel, config: TrainConfig, folder: Path, device: Device, emit: events.Emit, interrupted: Callable[[], bool]
) -> list[Example]:
    """The prior pictures: those of `prior.folder`, else those in `folder`, the missing ones drawn by the first process.

    Raises KeyboardInterrupt as soon as `interrupted`, as a large base takes minutes; what is drawn stays.
    """
    planned = planned_prior(config, folder, render_side(config, model.facts))
    if not planned or config.prior.folder:
        return planned
    emit(events.Stage(name="prior", detail="the base draws pictures that keep it from forgetting", total=len(planned)))

    def on_picture(done: int) -> None:
        emit(events.Stage(name="prior", done=done, total=len(planned)))
        if interrupted():
            raise KeyboardInterrupt

    if device.is_main:
        _draw(model, config, planned, on_picture)
    device.wait_for_all()
    return [replace(example, sha256=hash_file(example.path)) for example in planned]


def _draw(model: DiffusionModel, config: TrainConfig, planned: Sequence[Example], on_picture: Callable[[int], None]) -> None:
    how = RenderSettings(planned[0].height, planned[0].width, config.prior.steps, config.prior.guidance)
    for start in range(0, len(planned), TOGETHER):
        numbers = range(start, min(start + TOGETHER, len(planned)))
        if not all(planned[number].path.exists() for number in numbers):
            # Always the same groups, so that a picture drawn again after a crash has the same bits.
            pictures = [Picture(planned[number].caption, config.train.seed + number, {}) for number in numbers]
            for number, image in zip(numbers, render(model, pictures, how), strict=True):
                data = io.BytesIO()
                image.save(data, "PNG")
                write_atomically(planned[number].path, data.getvalue())
        on_picture(numbers[-1] + 1)
