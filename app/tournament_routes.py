"""The part of the REST API for blind tournaments: two pictures without labels, what is said of them, and the ranking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastapi import Response
from fastapi.responses import FileResponse
from pydantic import BaseModel

from app.answers import Body
from app.desk import TheDesk
from app.refusals import CONFLICT, Refusal
from app.tournaments import Side, Tournament
from trainers.tournament import SURE, in_words, rank


class TournamentBody(Body):
    """POST /api/tournaments: a finished grid, whose rows or columns compete."""

    grid: int
    over: Literal["rows", "columns"]


class StartedAnswer(BaseModel):
    """The id of a new tournament."""

    id: str


class ListedAnswer(BaseModel):
    """One of GET /api/tournaments."""

    id: str
    created: float
    kind: str
    contestants: int
    judged: int


class TournamentsAnswer(BaseModel):
    """GET /api/tournaments, the newest first."""

    tournaments: list[ListedAnswer]


class PairAnswer(BaseModel):
    """GET /api/tournaments/{id}: the pair to look at, told by its number; nothing says which is which."""

    pair: int
    left: str
    right: str
    about: str
    """What both have in common."""
    judged: int


class JudgementBody(Body):
    """POST /api/tournaments/{id}/judgements: which of the pair with this number is better."""

    pair: int
    better: Side


class PlaceAnswer(BaseModel):
    """A contestant: worth in natural logarithms against the mean, and half the width of its 95 % interval."""

    name: str
    worth: float
    margin: float
    compared: int


class RankingAnswer(BaseModel):
    """GET /api/tournaments/{id}/ranking, the best first."""

    places: list[PlaceAnswer]
    words: str
    decided: bool
    """The leader is better than every other by more than chance (95 %)."""


def post_tournament(body: TournamentBody, desk: TheDesk) -> StartedAnswer:
    """Begins one out of a grid; 409 while the grid is not wholly drawn."""
    grid, drawn = desk.grids.find(body.grid).grid, desk.grids.look(body.grid)["cells"]
    if len(drawn) < len(grid):
        raise Refusal("The grid is not wholly drawn", str(body.grid), "Wait for it, or draw it again.", status=CONFLICT)
    kind, other = (grid.rows, grid.columns) if body.over == "rows" else (grid.columns, grid.rows)
    across = len(grid.values(grid.columns))
    table = [[Path(drawn[row * across + column]) for column in range(across)] for row in range(len(grid) // across)]
    if body.over == "rows":
        table = [list(column) for column in zip(*table, strict=True)]
    return StartedAnswer(id=desk.tournaments.start(kind, grid.labels(kind), grid.labels(other), table))


def get_tournaments(desk: TheDesk) -> TournamentsAnswer:
    """All of them."""
    listed = [
        ListedAnswer(
            id=one.id, created=one.created, kind=one.kind, contestants=len(one.contestants), judged=len(one.judgements)
        )
        for one in desk.tournaments.all()
    ]
    return TournamentsAnswer(tournaments=listed)


def get_pair(name: str, desk: TheDesk) -> PairAnswer:
    """The pair to look at now."""
    return _answer(desk.tournaments.find(name))


def post_judgement(name: str, body: JudgementBody, desk: TheDesk) -> PairAnswer:
    """Takes a judgement in; the next pair."""
    return _answer(desk.tournaments.judge(name, body.pair, body.better))


def post_undo(name: str, desk: TheDesk) -> PairAnswer:
    """Takes the last judgement back; the pair that it was about."""
    return _answer(desk.tournaments.undo(name))


def get_ranking(name: str, desk: TheDesk) -> RankingAnswer:
    """The ranking so far, with its uncertainty."""
    one = desk.tournaments.find(name)
    ranking = rank(len(one.contestants), one.judgements)
    places = [
        PlaceAnswer(
            name=one.contestants[number],
            worth=float(ranking.worths[number]),
            margin=SURE * ranking.error(number),
            compared=sum(number in (judged.first, judged.second) for judged in one.judgements),
        )
        for number in ranking.order
    ]
    decided = bool(one.judgements) and not ranking.not_told_apart()
    return RankingAnswer(places=places, words=in_words(ranking, one.contestants, one.judgements), decided=decided)


def get_picture(name: str, number: int, desk: TheDesk) -> FileResponse:
    """A picture by the number that the pair tells."""
    keep = {"Cache-Control": "private, max-age=31536000, immutable"}
    return FileResponse(desk.tournaments.picture(name, number), media_type="image/png", headers=keep)


def delete_tournament(name: str, desk: TheDesk) -> Response:
    """Takes one away."""
    desk.tournaments.delete(name)
    return Response(status_code=204)


def _answer(one: Tournament) -> PairAnswer:
    at, left, right = one.pair()
    urls = [f"/api/tournaments/{one.id}/pictures/{one.pictures[at][number]}" for number in (left, right)]
    return PairAnswer(pair=len(one.judgements), left=urls[0], right=urls[1], about=one.rounds[at], judged=len(one.judgements))


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/tournaments", post_tournament),
    ("GET", "/tournaments", get_tournaments),
    ("GET", "/tournaments/{name}", get_pair),
    ("DELETE", "/tournaments/{name}", delete_tournament),
    ("POST", "/tournaments/{name}/judgements", post_judgement),
    ("POST", "/tournaments/{name}/undo", post_undo),
    ("GET", "/tournaments/{name}/ranking", get_ranking),
    ("GET", "/tournaments/{name}/pictures/{number}", get_picture),
)
