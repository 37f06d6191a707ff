"""Where each picture of a project is cut for training, by the very function that the training places it with."""

from __future__ import annotations

from pydantic import BaseModel

from app.planning import config_of
from app.projects import Project
from app.scanning import Look
from trainers.dataset.buckets import crop_share
from trainers.dataset.prepare import place_examples


class CropAnswer(BaseModel):
    """What is trained on of a picture. `box`: left, top, right, bottom, each in [0, 1] of the picture's width or height."""

    box: tuple[float, float, float, float]
    at: tuple[float, float]
    """Where it lies, from left and from top, in [0, 1] of what it can move; 0.5 is the middle."""
    moved: bool
    """Whether a person has moved it."""
    room: tuple[float, float]
    """How far it can move, in [0, 1] of the picture's width and height."""
    size: tuple[int, int]
    """Width and height in pixels of the training picture."""
    enlarged: float
    """Factor by which the picture is scaled up for it, 1.0 when it is not."""


def describe_crops(project: Project, look: Look) -> dict[str, CropAnswer]:
    """The crop of each picture, by name, with the recipe as it is. Empty while that leads to no run: its screen says why."""
    known = config_of(project)
    if known is None:
        return {}
    examples = look.scan.examples
    answers = {}
    for example, placement in zip(examples, place_examples(*known, examples), strict=True):
        left, top, right, bottom = crop_share(placement)
        answers[example.name] = CropAnswer(
            box=(left, top, right, bottom),
            at=example.crop,
            moved=example.name in look.edits.crops,
            room=(1 - (right - left), 1 - (bottom - top)),
            size=(placement.bucket[1], placement.bucket[0]),
            enlarged=placement.enlarged,
        )
    return answers
