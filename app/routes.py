"""The REST API under /api: one table of routes, each a function; the window itself uses nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse

from app import uploads
from app.answers import (
    ImagesAnswer,
    NewProject,
    ProjectAnswer,
    ProjectChange,
    ProjectsAnswer,
    SavedAnswer,
    SourceChange,
)
from app.blend_routes import ROUTES as BLEND_ROUTES
from app.calibration_routes import ROUTES as CALIBRATION_ROUTES
from app.captioning_routes import ROUTES as CAPTIONING_ROUTES
from app.desk import TheDesk, ThePlace, make_desk
from app.edit_routes import ROUTES as EDIT_ROUTES
from app.edit_routes import describe_saved, label_of
from app.grid_routes import ROUTES as GRID_ROUTES
from app.history import change
from app.image_list import describe_images
from app.library_routes import ROUTES as LIBRARY_ROUTES
from app.library_routes import post_loras
from app.plan_routes import ROUTES as PLAN_ROUTES
from app.plan_routes import post_run
from app.planning import chosen_preset
from app.projects import (
    Project,
    change_project,
    create_project,
    delete_project,
    list_projects,
    read_project,
    read_recipe,
    recipe_text,
    set_source,
    write_recipe,
)
from app.queue_routes import ROUTES as QUEUE_ROUTES
from app.queue_routes import post_to_queue
from app.recipe_routes import ROUTES as RECIPE_ROUTES
from app.refusals import CONFLICT, Refusal, refuse_settings, setting_problems
from app.routing import Route, UploadRoute
from app.run_routes import ROUTES as RUN_ROUTES
from app.run_routes import answer_run
from app.runs import Standing
from app.studio_routes import ROUTES as STUDIO_ROUTES
from app.thumbnails import make_thumbnail
from app.tournament_routes import ROUTES as TOURNAMENT_ROUTES
from app.version_routes import ROUTES as VERSION_ROUTES
from trainers.demo import PROMPTS
from trainers.errors import TrainingError
from trainers.families import ASSETS


def router(home: Path) -> APIRouter:
    """All routes, answering for one home folder. Nothing is read or made before the first request."""
    desk = make_desk(home)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        desk.queue.watch()
        yield
        desk.close()

    async def lay_out(request: Request) -> None:
        request.state.desk = desk

    api = APIRouter(prefix="/api", lifespan=lifespan, route_class=Route, dependencies=[Depends(lay_out)])
    for method, path, endpoint in (
        *ROUTES,
        *EDIT_ROUTES,
        *CAPTIONING_ROUTES,
        *BLEND_ROUTES,
        *CALIBRATION_ROUTES,
        *GRID_ROUTES,
        *LIBRARY_ROUTES,
        *PLAN_ROUTES,
        *QUEUE_ROUTES,
        *RECIPE_ROUTES,
        *RUN_ROUTES,
        *STUDIO_ROUTES,
        *TOURNAMENT_ROUTES,
        *VERSION_ROUTES,
    ):
        kind = UploadRoute if endpoint in (post_images, post_loras) else None
        status = 201 if endpoint in (post_project, post_sample, post_run, post_to_queue) else None
        api.add_api_route(path, endpoint, methods=[method], status_code=status, route_class_override=kind)
    return api


def get_projects(desk: TheDesk) -> ProjectsAnswer:
    """All projects, the newest first, each with its newest run."""
    standings = desk.runs.standings()
    return ProjectsAnswer(projects=[_answer(project, standings) for project in list_projects(desk.home)])


def post_project(body: NewProject, desk: TheDesk) -> ProjectAnswer:
    """Makes an empty project."""
    return _answer(create_project(desk.home, body.name), [])


def post_sample(desk: TheDesk) -> ProjectAnswer:
    """Makes a project of the pictures that ship, ready to train. They are read from their place."""
    project = set_source(create_project(desk.home, "Sample"), str(ASSETS / "samples" / "blackcut"))
    write_recipe(project, {"samples": {"prompts": list(PROMPTS[:2])}})
    return _answer(project, [])


def get_project(place: ThePlace) -> ProjectAnswer:
    """One project."""
    return _answer(place.project, place.desk.runs.standings())


def patch_project(body: ProjectChange, place: ThePlace) -> ProjectAnswer:
    """Changes name, trigger word, preset or recipe; all of it, or with a refusal nothing."""
    project = place.project
    given = body.model_dump(include={"name", "trigger", "preset"}, exclude_none=True)
    try:
        if body.preset:
            chosen_preset(project, body.preset)
        if body.recipe is not None:
            write_recipe(project.model_copy(update=given), body.recipe)
    except TrainingError as error:
        raise refuse_settings(setting_problems(error)) from error
    return _answer(change_project(project, **given) if given else project, place.desk.runs.standings())


def remove_project(place: ThePlace) -> Response:
    """Removes a project and the pictures copied into it. Its runs stay, and so does a folder that the person named."""
    with place.desk.runs.turn:  # or a run that waits would begin in between
        other = place.desk.runs.at_work()
        if other and other.id in read_project(place.desk.home, place.project.id).runs:
            raise Refusal("This project is training", other.id, "Stop it first.", status=CONFLICT)
        place.desk.queue.cancel_project(place.project.id)
        delete_project(place.project)
    return Response(status_code=204)


def get_recipe(place: ThePlace) -> PlainTextResponse:
    """The recipe as TOML: what the person chose, over the preset."""
    return PlainTextResponse(recipe_text(place.project), media_type="application/toml")


async def put_recipe(request: Request, place: ThePlace) -> dict[str, Any]:
    """Takes a recipe as TOML text, comments included; answers the settings that are in it."""
    data = await request.body()
    try:
        return write_recipe(place.project, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Refusal("The recipe is no UTF-8 text", "recipe", "Save it as UTF-8.") from error
    except Refusal:
        raise
    except TrainingError as error:
        raise refuse_settings(setting_problems(error)) from error


def put_source(body: SourceChange, place: ThePlace) -> ProjectAnswer:
    """Takes the pictures from a folder on this machine, where nothing is ever written, or from the project again."""
    return _answer(set_source(place.project, body.folder), place.desk.runs.standings())


async def post_images(request: Request, place: ThePlace) -> uploads.Received:
    """Stores uploaded pictures, captions and zips in the project; the file name of a part may be a relative path."""
    if not place.project.is_own:
        what = "This project uses a folder of yours, and nothing is ever written there"
        raise Refusal(what, place.project.source, "Put the files into that folder, or make a new project.", status=CONFLICT)
    return await uploads.receive(request, place.project.images)


def get_images(place: ThePlace) -> ImagesAnswer:
    """The pictures with captions, tokens and problems, and the folder's health."""
    return describe_images(place.project, place.desk.scanner.look(place.project))


def get_thumb(rel: str, place: ThePlace, w: int = 192, v: str = "") -> FileResponse:
    """A thumbnail as WebP, at most about `w` pixels a side. `v` is the file's version: with it the answer never changes."""
    picture = place.desk.scanner.find_picture(place.project, rel)
    path = make_thumbnail(picture, place.project.thumbs, w)
    keep = "private, max-age=31536000, immutable" if v else "private, no-cache"
    return FileResponse(path, media_type="image/webp", headers={"Cache-Control": keep})


def put_captions(body: dict[str, str], place: ThePlace) -> SavedAnswer:
    """Saves captions by picture name; answers those pictures with their new token counts."""
    change(place.project, place.desk.scanner, label_of("Caption", body), captions=body)
    return describe_saved(place, body)


def put_excluded(body: dict[str, bool], place: ThePlace) -> SavedAnswer:
    """Excludes pictures, or takes them in again, by name; others stay as they are."""
    change(place.project, place.desk.scanner, label_of("Left out" if all(body.values()) else "Taken in", body), excluded=body)
    return describe_saved(place, body)


def _answer(project: Project, standings: list[Standing]) -> ProjectAnswer:
    own = [standing for standing in standings if standing.id in project.runs]
    answers = [answer_run(standing) for standing in own]
    try:
        recipe = read_recipe(project)
    except Refusal:  # damaged by hand: GET recipe tells it; the rest of the project is usable
        recipe = {}
    return ProjectAnswer(
        **project.model_dump(exclude={"folder", "runs"}),
        id=project.id,
        recipe=recipe,
        runs=[answer.id for answer in reversed(answers)],
        latest=next(
            (answer for answer, one in zip(answers, own, strict=True) if one.has_begun), answers[0] if answers else None
        ),
        cover=next((answer.sample for answer in answers if answer.sample), ""),
    )


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/projects", get_projects),
    ("POST", "/projects", post_project),
    ("POST", "/sample", post_sample),
    ("GET", "/projects/{project_id}", get_project),
    ("PATCH", "/projects/{project_id}", patch_project),
    ("DELETE", "/projects/{project_id}", remove_project),
    ("GET", "/projects/{project_id}/recipe", get_recipe),
    ("PUT", "/projects/{project_id}/recipe", put_recipe),
    ("PUT", "/projects/{project_id}/source", put_source),
    ("GET", "/projects/{project_id}/images", get_images),
    ("POST", "/projects/{project_id}/images", post_images),
    ("GET", "/projects/{project_id}/thumb/{rel:path}", get_thumb),
    ("PUT", "/projects/{project_id}/captions", put_captions),
    ("PUT", "/projects/{project_id}/excluded", put_excluded),
)
