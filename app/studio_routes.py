"""The part of the REST API that draws: a ladder of strengths of a run's LoRA, picture by picture, by the warm renderer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from app.answers import Body, DrawingDefaults, FileAnswer, begin_with
from app.desk import TheDesk, TheRun
from app.refusals import NOT_FOUND, Refusal, refuse_settings
from app.run_routes import answer_run
from app.runs import find_lora
from trainers import events
from trainers.config import read_config
from trainers.dataset.prepare import render_side
from trainers.errors import Problem, TrainingError
from trainers.families import recognise_base
from trainers.samplers import check_sampler

_FIRST_EVENTS = 1 << 18
"""Bytes of events among which the first samples are: they are drawn before the first step."""
_PICTURE = re.compile(r"[A-Za-z0-9._-]+\.png")


class DrawRequest(Body):
    """POST /api/studio: pictures of a run's LoRA at strengths, all from the same noise. Sizes in pixels."""

    run: Annotated[str, Field(max_length=200)]
    step: int | None = None
    """Which checkpoint; null is the finished LoRA, else the newest."""
    prompt: Annotated[str, Field(max_length=4096)]
    negative: Annotated[str, Field(max_length=4096)] = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    width: int = Field(ge=32, le=2048, multiple_of=8)
    height: int = Field(ge=32, le=2048, multiple_of=8)
    steps: int = Field(default=20, ge=1, le=200)
    guidance: float = Field(default=5.0, ge=0, le=30, allow_inf_nan=False)
    scheduler: str = "dpm++"
    strengths: list[Annotated[float, Field(ge=-4, le=4, allow_inf_nan=False)]] = Field(min_length=1, max_length=17)
    replaces: bool = True
    """Whether what was asked before and is not done is given up."""


class Asked(BaseModel):
    """What to look at from now on."""

    id: int


class PictureAnswer(BaseModel):
    """One picture."""

    strength: float
    url: str


class DrawAnswer(BaseModel):
    """GET /api/studio/{id}: waiting, loading, drawing, done, failed or cancelled; `done` of `total` sampling steps."""

    state: str
    done: int
    total: int
    pictures: list[PictureAnswer]
    problem: str


class DefaultsAnswer(DrawingDefaults):
    """What the studio begins with, from the run's own settings."""

    run: str
    files: list[FileAnswer]


def get_defaults(run: TheRun, desk: TheDesk) -> DefaultsAnswer:
    """Prompt, seed and size to begin with."""
    config = read_config(run.config)
    samples, side = config.samples, render_side(config, recognise_base(config.base.model, config.base.options))
    standing = desk.runs.standing(run)
    told, _ = events.read_since(run.events, 0, _FIRST_EVENTS)
    drawn = [str(event["prompt"]) for event in told if event["type"] == "sample"]
    return DefaultsAnswer(
        run=standing.id,
        prompt=next(iter((*samples.prompts, *drawn, config.dataset.trigger))),
        **begin_with(samples, side),
        files=answer_run(standing).files,
    )


def post_draw(body: DrawRequest, desk: TheDesk) -> Asked:
    """Asks for pictures; 422 with the field in `where` for what cannot be drawn. Returns at once."""
    run = desk.runs.find(body.run)
    try:
        check_sampler(body.scheduler)
    except TrainingError as error:
        raise refuse_settings([Problem("error", error.what, "scheduler", error.hint)]) from error
    request = body.model_dump(exclude={"run", "step"})
    lora, base = str(find_lora(run, body.step)), read_config(run.config).base.model_dump()
    return Asked(id=desk.studio.ask({**request, "base": base, "lora": lora}))


def get_draw(number: int, desk: TheDesk) -> DrawAnswer:
    """How a request stands, with the pictures so far."""
    try:
        found = desk.studio.look(number)
    except KeyError as error:
        raise Refusal("There is no such drawing", str(number), "Press Draw again.", status=NOT_FOUND) from error
    pictures = [
        PictureAnswer(strength=strength, url=f"/api/studio/pictures/{Path(path).name}")
        for strength, path in sorted(found["pictures"].items())
    ]
    return DrawAnswer(**{**found, "pictures": pictures})


def post_cancel(number: int, desk: TheDesk) -> Asked:
    """Gives a drawing up at its next sampling step."""
    desk.studio.cancel(number)
    return Asked(id=number)


def get_picture(name: str, desk: TheDesk) -> FileResponse:
    """A picture of the studio. Its name is looked up in the folder's list."""
    folder = desk.studio.folder
    if not _PICTURE.fullmatch(name) or not folder.is_dir() or name not in os.listdir(folder):
        raise Refusal("There is no such picture", name[:200], "Press Draw again.", status=NOT_FOUND)
    keep = {"Cache-Control": "private, max-age=31536000, immutable"}  # named by what it shows
    return FileResponse(folder / name, media_type="image/png", headers=keep)


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/runs/{run_id}/studio", get_defaults),
    ("POST", "/studio", post_draw),
    ("GET", "/studio/{number}", get_draw),
    ("POST", "/studio/{number}/cancel", post_cancel),
    ("GET", "/studio/pictures/{name}", get_picture),
)
