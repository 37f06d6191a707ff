"""The part of the REST API that has captions written by a model: started, looked at, cancelled. Saving them is another step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from app.answers import Body
from app.captioning import CaptioningAnswer
from app.captions import check_names
from app.desk import ThePlace
from app.refusals import CONFLICT, Refusal


class CaptioningBody(Body):
    """POST /api/projects/{id}/captioning: with which model (a folder, or a hub id that is then fetched), for which pictures."""

    model: Annotated[str, Field(max_length=1000)]
    prompt: Annotated[str, Field(max_length=1000)] = ""
    max_tokens: int = Field(default=60, ge=1, le=500)
    names: list[str] | None = None
    """The pictures; null is all without a caption that are not left out."""


def post_captioning(body: CaptioningBody, place: ThePlace) -> CaptioningAnswer:
    """Begins; 409 while captions are being written, and while something trains."""
    desk, project = place.desk, place.project
    if not body.model.strip():
        raise Refusal("Name a model first", "model", "A folder, or a hub id (owner/name).")
    look = desk.scanner.look(project)
    names = body.names
    if names is None:
        names = [
            name for name, one in look.examples.items() if one.caption_source != "file" and name not in look.edits.excluded
        ]
    check_names(look, dict.fromkeys(names))
    if not names:
        raise Refusal("There is no picture to describe", hint="All have captions: select some to describe them anew.")
    if other := desk.runs.at_work():
        raise Refusal("A training is using the machine", other.id, "Wait until it has ended, or stop it.", status=CONFLICT)
    found = {name: str(look.examples[name].path.absolute()) for name in names}
    # A name that is no Unicode does not go through JSON.
    pictures = [(name, path) for name, path in found.items() if _is_text(name + path)]
    request = {"model": body.model.strip(), "prompt": body.prompt, "max_tokens": body.max_tokens, "pictures": pictures}
    if not desk.captioning.start(project.id, request):
        raise Refusal("Captions are being written already", hint="Wait for them, or cancel.", status=CONFLICT)
    return desk.captioning.look(project.id)


def _is_text(text: str) -> bool:
    return text == text.encode("utf-8", "replace").decode("utf-8")


def get_captioning(place: ThePlace) -> CaptioningAnswer:
    """How far it is, and what is written until now."""
    return place.desk.captioning.look(place.project.id)


def delete_captioning(place: ThePlace) -> CaptioningAnswer:
    """Ends it; what is written until now can still be looked at and taken."""
    place.desk.captioning.cancel(place.project.id)
    return place.desk.captioning.look(place.project.id)


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/projects/{project_id}/captioning", post_captioning),
    ("GET", "/projects/{project_id}/captioning", get_captioning),
    ("DELETE", "/projects/{project_id}/captioning", delete_captioning),
)
