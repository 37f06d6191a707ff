"""Prior preservation: pictures that the base draws before training, learnt beside the person's own (arXiv 2208.12242)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from trainers.config import TrainConfig
from trainers.dataset.folder import Example
from trainers.families.base import DiffusionModel
from trainers.generate import Picture, RenderSettings, render
from trainers.run_folder import write_atomically

TOGETHER = 4  # pictures drawn as one batch


def draw_prior(
    model: DiffusionModel, config: TrainConfig, planned: Sequence[Example], on_picture: Callable[[int], None]
) -> None:
    """Draws the planned pictures that are not there yet; `on_picture` is told how many there are."""
    settings = RenderSettings(
        planned[0].height if planned else 0, planned[0].width if planned else 0, config.prior.steps, config.prior.guidance
    )
    for start in range(0, len(planned), TOGETHER):
        numbers = range(start, min(start + TOGETHER, len(planned)))
        if not all(planned[number].path.exists() for number in numbers):
            # Always the same groups, so that a picture drawn again after a crash has the same bits.
            pictures = [Picture(planned[number].caption, config.train.seed + number, {}) for number in numbers]
            for number, image in zip(numbers, render(model, pictures, settings), strict=True):
                data = io.BytesIO()
                image.save(data, "PNG")
                write_atomically(planned[number].path, data.getvalue())
        on_picture(numbers[-1] + 1)
