"""The part of the REST API that finds a LoRA's strength: the measured curve, both pictures, and the baked file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from app.answers import Body
from app.desk import TheDesk
from app.runs import find_lora
from app.studio_routes import Asked
from trainers.config import read_config

_FINE = 61
"""Points of the fitted curves."""


class CalibrationBody(Body):
    """POST /api/calibrations: a LoRA of a run; `step` is null for the finished one."""

    run: Annotated[str, Field(max_length=200)]
    step: int | None = None


class PointAnswer(BaseModel):
    """Similarity (0 the base, 1 the folder) and drift (0 the base, 1 another picture) at a strength."""

    strength: float
    similarity: float
    drift: float


class ResultAnswer(BaseModel):
    """What came out: the measured points, the fitted curves, the suggestion with its standard deviation, and in words."""

    points: list[PointAnswer]
    curve: list[PointAnswer]
    suggested: float
    error: float
    words: str
    whole: list[str]
    """Addresses of pictures at strength 1, as far as they are drawn."""
    best: list[str]
    """The same prompts and noise at the suggested strength."""


class CalibrationAnswer(BaseModel):
    """GET /api/calibrations/{id}: how the drawing stands, for which prompts, and at last the result."""

    state: str
    done: int
    total: int
    problem: str
    prompts: list[str]
    plain: list[str]
    result: ResultAnswer | None


class BakedAnswer(BaseModel):
    """POST /api/calibrations/{id}/bake: the file's name and where to fetch it."""

    name: str
    url: str
    needs: str
    """What it needs beside it, in a sentence: the embedding of its run; empty for most."""


def post_calibration(body: CalibrationBody, desk: TheDesk) -> Asked:
    """Begins to measure, which ends any other drawing."""
    run = desk.runs.find(body.run)
    return Asked(id=desk.calibrations.ask(read_config(run.config), find_lora(run, body.step)))


def get_calibration(number: int, desk: TheDesk) -> CalibrationAnswer:
    """How it stands."""
    found, plan, result, shown = desk.calibrations.look(number)
    told = {key: found[key] for key in ("state", "done", "total", "problem")}
    answer = CalibrationAnswer(**told, prompts=list(plan.prompts), plain=list(plan.plain), result=None)
    if result is None:
        return answer
    last = max(plan.strengths)
    fine = [result.at(last * at / (_FINE - 1)) for at in range(_FINE)]
    urls = {key: [f"/api/studio/pictures/{Path(path).name}" for path in paths] for key, paths in shown.items()}
    answer.result = ResultAnswer(
        points=[PointAnswer(**asdict(point)) for point in result.points],
        curve=[PointAnswer(**asdict(point)) for point in fine],
        suggested=result.suggested,
        error=result.error,
        words=result.words,
        whole=urls["whole"],
        best=urls["suggested"],
    )
    return answer


def post_cancel(number: int, desk: TheDesk) -> Asked:
    """Gives it up at the next sampling step."""
    desk.studio.cancel(number)
    return Asked(id=number)


def post_bake(number: int, desk: TheDesk) -> BakedAnswer:
    """Writes the LoRA anew with the suggested strength as its 1; the file itself stays as it is."""
    path, needs = desk.calibrations.bake(number)
    return BakedAnswer(name=path.name, url=f"/api/calibrations/{number}/baked", needs=needs)


def get_baked(number: int, desk: TheDesk) -> FileResponse:
    """The baked file as a download."""
    path = desk.calibrations.baked(number)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/calibrations", post_calibration),
    ("GET", "/calibrations/{number}", get_calibration),
    ("POST", "/calibrations/{number}/cancel", post_cancel),
    ("POST", "/calibrations/{number}/bake", post_bake),
    ("GET", "/calibrations/{number}/baked", get_baked),
)
