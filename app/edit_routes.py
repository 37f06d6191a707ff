"""The part of the REST API that edits pictures: many captions at once after a preview, crops, and steps back and forward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Container
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from app.answers import Body, SavedAnswer
from app.captions import check_names
from app.crops import CropAnswer, describe_crops
from app.desk import Place, ThePlace
from app.history import Stepped, change, find_standing, redo, undo
from app.image_list import describe_images
from app.inspection import InspectionAnswer
from app.refusals import CONFLICT, Refusal
from trainers.dataset.bulk import Kind, Operation, change_captions
from trainers.errors import DatasetError

_SHOWN = 200
"""Changes in a preview; of more the number is told."""


class BulkBody(Body):
    """POST /api/projects/{id}/bulk and .../bulk/preview: what to do to captions. The fields are those of `Operation`."""

    kind: Kind
    text: Annotated[str, Field(max_length=4096)] = ""
    into: Annotated[str, Field(max_length=4096)] = ""
    pattern: bool = False
    match_case: bool = True
    front: bool = False
    by: Literal["name", "frequency"] = "name"
    keep: int = Field(default=0, ge=0, le=100)
    names: list[str] | None = None
    """The pictures; null is all that are not left out."""
    key: str = ""
    """Of the preview that was looked at; needed to apply."""


class ChangesBody(Body):
    """POST /api/projects/{id}/changes: captions and pictures left out, by name, as one step that can be taken back."""

    label: Annotated[str, Field(max_length=200)]
    captions: dict[str, str] = Field(default_factory=dict)
    excluded: dict[str, bool] = Field(default_factory=dict)


class CaptionChange(BaseModel):
    """A caption before and after."""

    rel: str
    before: str
    after: str


class PreviewAnswer(BaseModel):
    """What a bulk edit would change: how many of how many captions, the first of them, and the key to apply it with."""

    count: int
    total: int
    key: str
    changes: list[CaptionChange]


class HistoryAnswer(BaseModel):
    """GET /api/projects/{id}/history: what would be taken back and done again, "" for nothing, and how many steps there are."""

    undo: str
    redo: str
    undos: int
    redos: int


class SteppedAnswer(SavedAnswer):
    """POST /api/projects/{id}/undo and .../redo: the pictures that changed, and those that somebody had changed since."""

    label: str
    left: list[str]
    """Changed by another way since, or gone: they stay as they are."""


def post_preview(body: BulkBody, place: ThePlace) -> PreviewAnswer:
    """What a bulk edit would change; nothing is written."""
    captions, changed, total = _changes(body, place)
    shown = [CaptionChange(rel=name, before=captions[name], after=text) for name, text in list(changed.items())[:_SHOWN]]
    return PreviewAnswer(count=len(changed), total=total, key=_key(captions, changed), changes=shown)


def post_bulk(body: BulkBody, place: ThePlace) -> SavedAnswer:
    """Does what the preview showed; 409 when captions have changed since."""
    captions, changed, _ = _changes(body, place)
    if body.key != _key(captions, changed):
        raise Refusal("The captions have changed since the preview", hint="Look at the preview again.", status=CONFLICT)
    change(place.project, place.desk.scanner, _label(body, len(changed)), captions=changed)
    return describe_saved(place, changed)


def post_changes(body: ChangesBody, place: ThePlace) -> SavedAnswer:
    """Saves captions and leaves pictures out, or takes them in, as one step."""
    change(place.project, place.desk.scanner, body.label, captions=body.captions, excluded=body.excluded)
    return describe_saved(place, {*body.captions, *body.excluded})


def get_history(place: ThePlace) -> HistoryAnswer:
    """What can be taken back and done again, also after the window was closed."""
    return HistoryAnswer(**vars(find_standing(place.project)))


def post_undo(place: ThePlace) -> SteppedAnswer:
    """Takes the last step back; 409 when there is none."""
    return _stepped(place, undo(place.project, place.desk.scanner))


def post_redo(place: ThePlace) -> SteppedAnswer:
    """Does the step again that was taken back; 409 when there is none."""
    return _stepped(place, redo(place.project, place.desk.scanner))


def get_crops(place: ThePlace) -> dict[str, CropAnswer]:
    """Where each picture is cut for training with the recipe as it is, by name; empty while the recipe leads to no run."""
    return describe_crops(place.project, place.desk.scanner.look(place.project))


def put_crops(body: dict[str, tuple[float, float] | None], place: ThePlace) -> dict[str, CropAnswer]:
    """Moves crops, by name: from left and from top, each in [0, 1]; null is the middle. Answers those crops."""
    outside = [name for name, crop in body.items() if crop and not all(0 <= part <= 1 for part in crop)]
    if outside:
        raise Refusal("A crop lies between 0 and 1", outside[0][:200])
    change(place.project, place.desk.scanner, label_of("Crop", body), crops=body)
    found = describe_crops(place.project, place.desk.scanner.look(place.project))
    return {name: crop for name, crop in found.items() if name in body}


def get_inspection(place: ThePlace) -> InspectionAnswer:
    """What may be wrong with the pictures; asked again until all are looked at."""
    return place.desk.inspector.look(place.project, place.desk.scanner.look(place.project))


def describe_saved(place: Place, names: Container[str]) -> SavedAnswer:
    """These pictures as they are now, and the folder's health."""
    now = describe_images(place.project, place.desk.scanner.look(place.project))
    return SavedAnswer(images=[image for image in now.images if image.rel in names], health=now.health)


def label_of(what: str, names: Collection[str]) -> str:
    """A step in words: `what`, and the picture or how many."""
    return f"{what}: {next(iter(names))}" if len(names) == 1 else f"{what}: {len(names)} pictures"


def _stepped(place: Place, stepped: Stepped) -> SteppedAnswer:
    saved = describe_saved(place, stepped.changed)
    return SteppedAnswer(images=saved.images, health=saved.health, label=stepped.label, left=sorted(stepped.left))


def _changes(body: BulkBody, place: Place) -> tuple[dict[str, str], dict[str, str], int]:
    """Captions as they are trained on, those that change, and how many were looked at."""
    look = place.desk.scanner.look(place.project)
    captions = {name: example.caption for name, example in look.examples.items() if name not in look.edits.excluded}
    if body.names is not None:
        check_names(look, dict.fromkeys(body.names))
        captions |= {name: look.examples[name].caption for name in body.names}
    operation = Operation(**body.model_dump(exclude={"names", "key"}))
    try:
        changed = change_captions(captions, operation, body.names)
    except DatasetError as error:
        raise Refusal(error.what, error.where, error.hint) from error
    return captions, changed, len(captions if body.names is None else set(body.names))


def _key(captions: dict[str, str], changed: dict[str, str]) -> str:
    whole = json.dumps([(name, captions[name], text) for name, text in changed.items()])
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _label(body: BulkBody, count: int) -> str:
    tags = "tag" if "," not in body.text else "tags"
    said = {
        "prepend": f"Put “{body.text[:40]}” in front",
        "append": f"Put “{body.text[:40]}” behind",
        "replace": f"Replace “{body.text[:40]}” by “{body.into[:40]}”",
        "add": f"Add the {tags} “{body.text[:40]}”",
        "remove": f"Remove the {tags} “{body.text[:40]}”",
        "sort": f"Sort tags by {body.by}",
        "unique": "Remove duplicate tags",
    }
    return f"{said[body.kind]}: {count} captions" if count != 1 else f"{said[body.kind]}: 1 caption"


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/projects/{project_id}/bulk/preview", post_preview),
    ("POST", "/projects/{project_id}/bulk", post_bulk),
    ("POST", "/projects/{project_id}/changes", post_changes),
    ("GET", "/projects/{project_id}/history", get_history),
    ("POST", "/projects/{project_id}/undo", post_undo),
    ("POST", "/projects/{project_id}/redo", post_redo),
    ("GET", "/projects/{project_id}/crops", get_crops),
    ("PUT", "/projects/{project_id}/crops", put_crops),
    ("GET", "/projects/{project_id}/inspection", get_inspection),
)
