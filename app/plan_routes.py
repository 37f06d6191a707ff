"""The part of the REST API that leads to a run: what it would be, what two real steps of it take, and its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from app.answers import CheckAnswer, MeasureAnswer, RunAnswer, RunStart
from app.desk import Place, ThePlace
from app.image_list import answer_problem
from app.planning import plan_project, settings_of, take_edits
from app.refusals import setting_problems
from app.run_routes import answer_run
from trainers.dataset.edits import Edits, write_edits
from trainers.errors import TrainingError
from trainers.launch import RunPlan
from trainers.layers import adapter_size
from trainers.preflight import memory_hints, time_to_finish


def post_check(body: RunStart, place: ThePlace) -> CheckAnswer:
    """What a run with these settings would be. A refusal is an answer here (`ok` false), as a page asks while one types."""
    try:
        plan, _ = _plan(body, place)
        size = adapter_size(plan.config, plan.base)
    except TrainingError as error:
        name, settings, family = settings_of(place.project, body.settings, body.preset)
        problems = [answer_problem(problem) for problem in setting_problems(error)]
        return CheckAnswer(ok=False, problems=problems, preset=name, settings=settings, family=family)
    adapter = plan.config.adapter
    return CheckAnswer(
        ok=True,
        problems=[answer_problem(problem) for problem in plan.problems],
        arithmetic=plan.arithmetic,
        steps=plan.data.steps,
        pictures=len(plan.data.own),
        held_out=len(plan.data.held_out),
        base=plan.base.name,
        family=plan.base.family.name,
        preset=plan.preset,
        scale=adapter.scale_of(adapter.effective_alpha, adapter.rank),
        layers=size.layers,
        ranks=size.ranks,
        parameters=size.parameters,
        file_bytes=size.file_bytes,
        is_quick=plan.base.is_pocket,
        settings=plan.config.model_dump(mode="json"),
    )


def post_measure(body: RunStart, place: ThePlace) -> MeasureAnswer:
    """Measures two real steps of a run with these settings, in a process of its own: to be asked again while it measures."""
    desk = place.desk
    if desk.runs.at_work():
        return MeasureAnswer(state="busy", what="Something trains now, and would be slowed down: measured when it has ended")
    plan, edits = _plan(body, place)
    check = desk.preflight.look(place.project.id, plan, write_edits(edits))
    measured = check.measured
    if measured is None:
        state: Literal["measuring", "failed"] = "measuring" if check.process else "failed"
        return MeasureAnswer(state=state, what=check.problem, hints=[check.hint] if check.hint else [])
    return MeasureAnswer(
        state="done",
        hints=[] if measured.fits else memory_hints(plan.config),
        seconds=time_to_finish(plan.config, plan.data.steps, measured),
        seconds_per_step=measured.step_seconds,
        memory=measured.memory,
        memory_free=measured.memory_free,
        fits=measured.fits,
        device=measured.device,
    )


def _plan(body: RunStart, place: Place) -> tuple[RunPlan, Edits]:
    """What a run would be, and the captions as they are. Raises Refusal."""
    edits = take_edits(place.project, place.desk.scanner)
    nowhere = place.project.edits_file
    plan = plan_project(place.project, place.desk.scanner, body.settings, edits, nowhere, body.preset, body.force)
    return plan, edits


def post_run(body: RunStart, place: ThePlace) -> RunAnswer:
    """Starts a run: 422 with a problem for each setting that cannot be, 409 while another one trains."""
    desk = place.desk
    desk.preflight.stop()
    run = desk.runs.start(place.project, desk.scanner, body.settings, body.preset, body.force)
    return answer_run(desk.runs.standing(run))


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/projects/{project_id}/check", post_check),
    ("POST", "/projects/{project_id}/measure", post_measure),
    ("POST", "/projects/{project_id}/runs", post_run),
)
