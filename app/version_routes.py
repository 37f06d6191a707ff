"""The part of the REST API that is about a dataset as it was: its versions, what changed, the way back; and its masks."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from fastapi import Response
from pydantic import BaseModel

from app.desk import ThePlace
from app.masks import draw_mask, mask_setting
from app.refusals import NOT_FOUND, Refusal
from app.versions import Pinned, go_back, list_versions, pin, present_name
from trainers.run_folder import RunFolder


class CaptionChange(BaseModel):
    """A caption that is another one; "" is none."""

    name: str
    before: str
    after: str


class VersionAnswer(BaseModel):
    """A version of a dataset, and what it changed against the one before."""

    id: str
    pinned: float
    """Seconds since 1970."""
    pictures: int
    runs: list[str]
    is_present: bool
    """The dataset is now as it was then."""
    is_first: bool
    added: list[str] = []
    removed: list[str] = []
    replaced: list[str] = []
    captions: list[CaptionChange] = []
    other: list[str] = []


class VersionsAnswer(BaseModel):
    """GET /api/projects/{id}/versions, the newest first. `present` is what the dataset is now, pinned or not."""

    versions: list[VersionAnswer]
    present: str


class BackAnswer(BaseModel):
    """What going back came to; going back to `before` undoes it."""

    before: str
    gone: list[str]
    left_out: list[str]


class MasksAnswer(BaseModel):
    """GET /api/projects/{id}/masks: the setting, and where the masks of the pictures that have one can be seen."""

    setting: str
    masks: dict[str, str]


def get_versions(place: ThePlace) -> VersionsAnswer:
    """All versions that runs or people have pinned."""
    present = present_name(place.project, place.desk.scanner)
    runs = [RunFolder(place.desk.runs.folder / name) for name in place.project.runs]
    found = list_versions(place.project, runs)
    return VersionsAnswer(versions=[_answer(one, present) for one in found], present=present)


def post_version(place: ThePlace) -> VersionsAnswer:
    """Pins the dataset as it is."""
    pin(place.project, place.desk.scanner)
    return get_versions(place)


def post_back(name: str, place: ThePlace) -> BackAnswer:
    """Makes captions, crops and what is left out those of a version; the present one is pinned first."""
    went = go_back(place.project, place.desk.scanner, name)
    return BackAnswer(before=went.before, gone=list(went.gone), left_out=list(went.left_out))


def get_masks(place: ThePlace) -> MasksAnswer:
    """Which pictures have a mask by the recipe's setting. One whose mask cannot be used is told with the folder's health."""
    found = place.desk.scanner.look(place.project).examples.values()
    address = f"/api/projects/{place.project.id}/mask/"
    urls = {
        one.name: f"{address}{quote(one.name, errors='surrogatepass')}?v={(one.mask.sha256 or one.sha256)[:16]}"
        for one in found
        if one.mask
    }
    return MasksAnswer(setting=mask_setting(place.project), masks=urls)


def get_mask(rel: str, place: ThePlace) -> Response:
    """A mask as it lies over its picture: dark where nothing is learnt, clear where all is; PNG."""
    example = place.desk.scanner.look(place.project).examples.get(rel)
    if example is None or example.mask is None:
        raise Refusal("There is no such mask", rel[:200], "Load the page again.", status=NOT_FOUND)
    data = io.BytesIO()
    draw_mask(example.path, example.mask).save(data, "PNG")
    return Response(data.getvalue(), media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})


def _answer(one: Pinned, present: str) -> VersionAnswer:
    changes = one.changes
    told: dict[str, Any] = {}
    if changes:
        told = {kind: list(getattr(changes, kind)) for kind in ("added", "removed", "replaced", "other")}
        told["captions"] = [CaptionChange(name=name, before=before, after=after) for name, before, after in changes.captions]
    return VersionAnswer(
        id=one.name,
        pinned=one.pinned,
        pictures=len(one.version.pictures),
        runs=list(one.runs),
        is_present=one.name == present,
        is_first=changes is None,
        **told,
    )


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/projects/{project_id}/versions", get_versions),
    ("POST", "/projects/{project_id}/versions", post_version),
    ("POST", "/projects/{project_id}/versions/{name}/back", post_back),
    ("GET", "/projects/{project_id}/masks", get_masks),
    ("GET", "/projects/{project_id}/mask/{rel:path}", get_mask),
)
