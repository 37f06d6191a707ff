"""The part of the REST API that is about the queue: what waits, in which order, for how long, and what holds it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from app.answers import Body, RunAnswer, RunStart
from app.desk import Desk, TheDesk, ThePlace, TheRun
from app.projects import list_projects
from app.queue_file import Entry, QueueState
from app.run_routes import answer_run
from app.runs import Standing
from trainers.config import read_config
from trainers.errors import TrainingError
from trainers.preflight import time_to_finish

_ALIKE = 20
"""So many of the newest runs are looked at for one that took steps like those of a run that waits."""


class QueueOrder(Body):
    """PUT /api/queue: all runs that wait, the next one first."""

    order: list[str]


class ResumeLater(Body):
    """POST /api/runs/{run_id}/queue: go on when its turn comes, with `force` although what went into it has changed."""

    force: bool = False


class EntryAnswer(BaseModel):
    """A run that waits. Times in seconds; null where nothing like it has been measured."""

    run: str
    project: str
    project_name: str
    title: str
    added: float
    """When it was added: seconds since 1970, 0 where that was not noted."""
    steps: int
    resumes: bool
    """Whether it was begun before, and goes on."""
    seconds: float | None
    """How long it will take."""
    starts_in: float | None
    """When its turn comes, if all before it end by themselves."""


class QueueAnswer(BaseModel):
    """GET /api/queue."""

    entries: list[EntryAnswer]
    at_work: RunAnswer | None
    """What trains now."""
    before: RunAnswer | None
    """What trained before, where that has not ended well."""
    held: bool
    why: str
    """What holds the queue, in words; empty while it goes on by itself."""


def get_queue(desk: TheDesk) -> QueueAnswer:
    """What waits, what trains now, and what holds the queue."""
    state = desk.queue.state()
    if not state.entries:
        at_work = desk.runs.at_work()
        return QueueAnswer(entries=[], at_work=at_work and answer_run(at_work), before=None, held=False, why="")
    standings = desk.runs.standings()
    at_work = next((standing for standing in standings if standing.is_at_work), None)
    before = None if at_work else desk.queue.before(state)
    bad = before is not None and before.state in ("failed", "lost", "paused")
    return QueueAnswer(
        entries=_entries(desk, state, standings, at_work),
        at_work=at_work and answer_run(at_work),
        before=answer_run(before) if before and bad else None,
        held=bool(state.hold),
        why=_why(state),
    )


def post_to_queue(body: RunStart, place: ThePlace) -> RunAnswer:
    """Prepares a run as it would be started now, captions and all, and puts it at the end: 422 as a start is refused."""
    desk = place.desk
    with desk.runs.turn:
        run, plan = desk.runs.prepare(place.project, desk.scanner, body.settings, body.preset, body.force)
        try:
            measured = desk.preflight.known(plan, (run.path / "edits.json").read_bytes())
            seconds = time_to_finish(plan.config, plan.data.steps, measured) if measured else None
            adapter = plan.config.adapter
            rank = f", rank {adapter.rank}" if adapter.has_rank else ""
            title = f"{plan.data.steps} steps on {plan.base.name}, preset {plan.preset}{rank}"
            entry = Entry(run=run.path.name, project=place.project.id, title=title, steps=plan.data.steps, seconds=seconds)
            desk.queue.add(entry.model_copy(update={"added": time.time()}))
        except Exception:
            desk.runs.drop_prepared(place.project, run)
            raise
    return answer_run(desk.runs.standing(run))


def post_run_to_queue(body: ResumeLater, run: TheRun, desk: TheDesk) -> RunAnswer:
    """Puts a run that was paused, stopped, has failed or was killed at the end, to go on when its turn comes.

    409 when it trains, is finished or waits already.
    """
    with desk.runs.turn:
        standing = desk.runs.standing(run)
        steps, speed = standing.progress.steps, standing.progress.seconds_per_step
        left = max(0, steps - standing.saved_step)
        desk.queue.add(
            Entry(
                run=standing.id,
                project=standing.project,
                added=time.time(),
                title=f"goes on from step {standing.saved_step} of {steps}" if steps else "begins again",
                steps=left,
                seconds=speed and speed * left,
                resumes=True,
                force=body.force,
            )
        )
    return answer_run(desk.runs.standing(run))


def put_queue(body: QueueOrder, desk: TheDesk) -> QueueAnswer:
    """Sets the order; 409 when these are not exactly the runs that wait."""
    desk.queue.reorder(body.order)
    return get_queue(desk)


def delete_from_queue(run_id: str, desk: TheDesk) -> Response:
    """Takes a run out of the queue with its prepared folder; 404 once it has begun."""
    desk.queue.cancel(run_id)
    return Response(status_code=204)


def post_hold(desk: TheDesk) -> QueueAnswer:
    """Starts nothing more until it is told to go on."""
    desk.queue.hold()
    return get_queue(desk)


def post_go_on(desk: TheDesk) -> QueueAnswer:
    """Goes on with the next one as soon as nothing trains."""
    desk.queue.go_on()
    return get_queue(desk)


def _why(state: QueueState) -> str:
    return {
        "": "",
        "person": "You hold the queue.",
        "paused": "The run before is paused. Resume it, and the queue goes on after it; or go on now.",
        "interrupted": "The run before was cut off while the window was closed. Resume it, or go on with the next one.",
        "refused": f"The next run could not be started: {state.why}",
    }[state.hold]


def _entries(desk: Desk, state: QueueState, standings: list[Standing], at_work: Standing | None) -> list[EntryAnswer]:
    names = {project.id: project.name for project in list_projects(desk.home)}
    speeds = _speeds(standings)
    begins = at_work.progress.left_now() if at_work else 0.0
    answers = []
    for entry in state.entries:
        speed = speeds.get(_pace(desk.runs.folder / entry.run / "config.toml"))
        seconds = entry.seconds if entry.seconds is not None else speed and speed * entry.steps
        answers.append(
            EntryAnswer(
                **entry.model_dump(exclude={"seconds", "force"}),
                project_name=names.get(entry.project, entry.project or entry.run),
                seconds=seconds,
                starts_in=begins,
            )
        )
        begins = None if begins is None or seconds is None else begins + seconds
    return answers


def _speeds(standings: list[Standing]) -> dict[str, float]:
    """Seconds per step by what decides about them, of the newest runs that have told it."""
    told = [standing for standing in standings if standing.progress.seconds_per_step][:_ALIKE]
    return {_pace(standing.run.config): standing.progress.seconds_per_step or 0.0 for standing in reversed(told)}


def _pace(config: Path) -> str:
    try:
        return _pace_of(config, config.stat().st_mtime_ns)
    except (OSError, TrainingError):
        return ""


@functools.lru_cache(maxsize=500)
def _pace_of(path: Path, _changed: int) -> str:
    """What decides how long a step takes: the base, the adapter, the size of pictures and batches."""
    config = read_config(path)
    wanted: dict[str, Any] = {
        "base": True,
        "adapter": {"type", "rank", "targets"},
        "text_encoder": {"rank", "learning_rate"},
        "dataset": {"resolution", "buckets"},
        "train": {"batch_size", "accumulation", "precision", "base_weights", "checkpointing", "compile"},
    }
    return config.model_dump_json(include=wanted)


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/queue", get_queue),
    ("PUT", "/queue", put_queue),
    ("POST", "/queue/hold", post_hold),
    ("POST", "/queue/go-on", post_go_on),
    ("DELETE", "/queue/{run_id}", delete_from_queue),
    ("POST", "/projects/{project_id}/queue", post_to_queue),
    ("POST", "/runs/{run_id}/queue", post_run_to_queue),
)
