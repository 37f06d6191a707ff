"""The part of the REST API that compares: grids that fill in picture by picture, their settings read back, differences."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BaseModel, Field

from app.answers import Body
from app.blend_routes import base_of, card_path
from app.desk import Desk, Place, TheDesk
from app.grids import AskedGrid, lora_hash
from app.projects import read_project
from app.refusals import Refusal
from app.runs import find_lora, lora_files
from app.studio_routes import Asked
from trainers.config import read_config
from trainers.errors import TrainingError
from trainers.grid import AxisKind, Grid, GridLora, make_grid, read_grid
from trainers.library import list_cards

_Text = Annotated[str, Field(max_length=4096)]


class LoraChoice(Body):
    """A LoRA of a run, where `step` is null for the finished one; or `file`, the key of a card of the library."""

    run: Annotated[str, Field(max_length=200)] = ""
    step: int | None = None
    file: _Text = ""


class GridBody(Body):
    """POST /api/grids: `rows` and `columns` are two of prompt, strength, lora, seed; of the others there is one value.

    All is drawn on the base of the LoRAs' runs; where all are of the library, on that of the `project`.
    """

    rows: AxisKind
    columns: AxisKind
    loras: Annotated[list[LoraChoice], Field(min_length=1, max_length=100)]
    project: Annotated[str, Field(max_length=200)] = ""
    prompts: Annotated[list[_Text], Field(max_length=400)]
    strengths: Annotated[list[float], Field(max_length=400)]
    seeds: Annotated[list[int], Field(max_length=400)]
    negative: _Text = ""
    width: int
    height: int
    steps: int = 20
    guidance: float = 5.0
    scheduler: str = "dpm++"


class CellAnswer(BaseModel):
    """A picture that is drawn, by its number row by row."""

    cell: int
    url: str


class GridAnswer(BaseModel):
    """GET /api/grids/{id}: how it stands, `done` of `total` sampling steps, and the pictures so far."""

    state: str
    done: int
    total: int
    rows: list[str]
    columns: list[str]
    cells: list[CellAnswer]
    problem: str


class ReadLora(BaseModel):
    """A LoRA that a saved grid names; where a file with the same bytes is here, its run and step, or its key in the library."""

    name: str
    hash: str
    run: str
    step: int | None
    file: str


class ReadAnswer(BaseModel):
    """POST /api/grids/read: the settings of a saved grid, its LoRAs looked up among the runs and in the library."""

    grid: dict[str, Any]
    loras: list[ReadLora]


class DifferenceBody(Body):
    """POST /api/grids/{id}/differences: two cells; without a second the base's own picture of the same prompt and noise."""

    first: int
    second: int | None = None


class DifferenceAnswer(BaseModel):
    """GET /api/differences/{id}: mean and largest difference as shares of 1, and the picture, `factor` times amplified."""

    state: str
    problem: str
    same_noise: bool
    url: str = ""
    factor: int = 0
    mean: float = 0.0
    largest: float = 0.0


def post_grid(body: GridBody, desk: TheDesk) -> Asked:
    """Begins a grid, which ends any other drawing; 422 with the field in `where`. Returns at once."""
    files, base = _files(body, desk)
    labels = [_label(body.loras, files, at) for at in range(len(files))]
    loras = [{"name": path.name, "hash": lora_hash(path), "label": label} for path, label in zip(files, labels, strict=True)]
    values = body.model_dump(exclude={"loras", "project"}) | {"loras": loras, "base": base_name(base["model"])}
    try:
        grid = make_grid(values)
    except TrainingError as error:
        raise Refusal(error.what, error.where, error.hint) from error
    return Asked(id=desk.grids.ask(AskedGrid(grid, tuple(files), base)))


def _files(body: GridBody, desk: Desk) -> tuple[list[Path], dict[str, Any]]:
    """The LoRAs' files and the base that they are drawn on. Raises Refusal."""
    files, bases = [], []
    cards = list_cards(desk.home) if any(choice.file for choice in body.loras) else []
    for at, choice in enumerate(body.loras):
        if choice.file:
            files.append(card_path(cards, choice.file, f"loras.{at}.file"))
            continue
        run = desk.runs.find(choice.run)
        files.append(find_lora(run, choice.step))
        bases.append(read_config(run.config).base.model_dump())
    if not bases:
        bases.append(base_of(Place(read_project(desk.home, body.project), desk))[0].base.model_dump())
    if any(base != bases[0] for base in bases):
        raise Refusal("These LoRAs were trained on different bases", "loras", "Compare those of one base.")
    return files, bases[0]


def _label(choices: list[LoraChoice], files: list[Path], at: int) -> str:
    """What a LoRA is called beside the others: its step within one run, else with the run; one of the library by its file."""
    if choices[at].file:
        return files[at].stem
    step = "finished" if choices[at].step is None else f"step {choices[at].step}"
    return step if len({choice.run for choice in choices}) == 1 else f"{choices[at].run}, {step}"


def base_name(model: str) -> str:
    """A base's name without the folders of this machine; a hub id stays whole."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model[:255]


def get_grid(number: int, desk: TheDesk) -> GridAnswer:
    """How a grid stands, with the pictures so far."""
    grid, found = desk.grids.find(number).grid, desk.grids.look(number)
    cells = [CellAnswer(cell=cell, url=f"/api/studio/pictures/{Path(path).name}") for cell, path in found["cells"].items()]
    return GridAnswer(
        state=found["state"],
        done=found["done"],
        total=found["total"],
        rows=grid.labels(grid.rows),
        columns=grid.labels(grid.columns),
        cells=sorted(cells, key=lambda one: one.cell),
        problem=found["problem"],
    )


def post_cancel(number: int, desk: TheDesk) -> Asked:
    """Gives a grid up at the next sampling step; what is drawn stays."""
    desk.grids.find(number)
    desk.studio.cancel(number)
    return Asked(id=number)


def get_page(number: int, desk: TheDesk) -> Response:
    """The grid as one labelled PNG, from which its settings can be read back; what is not drawn yet is empty."""
    headers = {"Content-Disposition": f'attachment; filename="grid-{number}.png"', "Cache-Control": "no-store"}
    return Response(desk.grids.page(number), media_type="image/png", headers=headers)


async def post_read(request: Request, desk: TheDesk) -> ReadAnswer:
    """The settings in a saved grid; the body is the PNG, or its start up to the pixels."""
    from starlette.concurrency import run_in_threadpool

    body = await request.body()
    return await run_in_threadpool(_read, body, desk)


def _read(png: bytes, desk: Desk) -> ReadAnswer:
    try:
        grid = read_grid(png)
    except TrainingError as error:
        raise Refusal(error.what, error.where, error.hint) from error
    return ReadAnswer(grid=grid.model_dump(mode="json"), loras=_look_up(grid, desk))


def _look_up(grid: Grid, desk: Desk) -> list[ReadLora]:
    names = {lora.name for lora in grid.loras}
    known: dict[str, tuple[str, int | None]] = {}
    for standing in desk.runs.standings():
        for step, path in lora_files(standing.run):
            if path.name in names and path.is_file():  # a hash reads the whole file
                known.setdefault(lora_hash(path), (standing.id, step))
    cards = {lora_hash(card.path): card.key for card in list_cards(desk.home) if card.path.name in names and not card.problem}

    def answer(lora: GridLora) -> ReadLora:
        run, step = known.get(lora.hash, ("", None))
        return ReadLora(name=lora.name, hash=lora.hash, run=run, step=step, file=cards.get(lora.hash, ""))

    return [answer(lora) for lora in grid.loras]


def post_difference(number: int, body: DifferenceBody, desk: TheDesk) -> Asked:
    """Begins to compare two pictures of a grid."""
    return Asked(id=desk.grids.ask_difference(number, body.first, body.second))


def get_difference(number: int, desk: TheDesk) -> DifferenceAnswer:
    """How a comparison stands."""
    found, asked, seen = desk.grids.difference(number)
    told = DifferenceAnswer(state=found["state"], problem=found["problem"], same_noise=asked.same_noise)
    if seen is None:
        return told
    picture = {"url": f"/api/differences/{number}/picture", "factor": seen.factor, "mean": seen.mean, "largest": seen.largest}
    return told.model_copy(update=picture)


def get_difference_picture(number: int, desk: TheDesk) -> Response:
    """|a - b| of the two, amplified."""
    seen = desk.grids.difference(number)[2]
    if seen is None:
        raise Refusal("The two pictures are not drawn yet", str(number), "Wait for them.", status=409)
    data = io.BytesIO()
    seen.picture.save(data, "PNG")
    return Response(data.getvalue(), media_type="image/png", headers={"Cache-Control": "no-store"})


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/grids", post_grid),
    ("POST", "/grids/read", post_read),
    ("GET", "/grids/{number}", get_grid),
    ("POST", "/grids/{number}/cancel", post_cancel),
    ("GET", "/grids/{number}/page", get_page),
    ("POST", "/grids/{number}/differences", post_difference),
    ("GET", "/differences/{number}", get_difference),
    ("GET", "/differences/{number}/picture", get_difference_picture),
)
