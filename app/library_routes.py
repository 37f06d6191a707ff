"""The part of the REST API about the library: LoRAs as cards, files brought in and taken out, and what a prompt brings in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Query, Request
from fastapi.responses import FileResponse

from app import uploads
from app.desk import TheDesk
from app.library_answers import (
    CardAnswer,
    CardChange,
    CardDetails,
    CardNamed,
    LibraryAnswer,
    PictureChoice,
    Removed,
    Restore,
)
from app.projects import list_projects
from app.refusals import NOT_FOUND, Refusal
from trainers.card_pictures import choose_picture
from trainers.errors import AdapterFileError
from trainers.library import (
    FOLDER,
    Card,
    change_card,
    find_card,
    hashes_of,
    list_cards,
    remove_card,
    restore_card,
    search,
)

_LIMITS = uploads.Limits(files=100, request_bytes=16 << 30, picture_bytes=8 << 30)
"""Of one upload; a LoRA of a large base at a high rank has a few GB."""
Key = Annotated[str, Query(max_length=1024)]


def get_library(desk: TheDesk, q: Annotated[str, Query(max_length=200)] = "") -> LibraryAnswer:
    """All LoRAs that hold every word of `q`, the newest first."""
    cards = list_cards(desk.home)
    projects = _projects(desk)
    return LibraryAnswer(cards=[answer_card(card, projects) for card in search(cards, q)], total=len(cards))


def get_card(file: Key, desk: TheDesk) -> CardDetails:
    """What is written inside a file, and its hashes."""
    card = _find(desk, file)
    hashes = hashes_of(card)
    metadata = dict(card.facts.metadata) if card.facts else {}
    return CardDetails(metadata=metadata, sha256=hashes.whole, autov2=hashes.autov2, autov3=hashes.autov3)


def put_card(body: CardChange, desk: TheDesk) -> CardAnswer:
    """Changes the strength or words by which routing brings a LoRA in, or switches that off for it."""
    said = body.model_dump(exclude={"file"}, exclude_none=True)
    _find(desk, body.file)
    return answer_card(change_card(desk.home, body.file, **said), _projects(desk))


def get_picture(file: Key, desk: TheDesk) -> FileResponse:
    """The picture of a card."""
    picture = _find(desk, file).picture
    if picture is None or picture.is_symlink():
        raise Refusal("This LoRA has no picture", file[:200], "Put one beside it: NAME.png.", status=NOT_FOUND)
    return FileResponse(picture, media_type="image/png", headers={"Cache-Control": "private, no-cache"})


def put_picture(body: PictureChoice, desk: TheDesk) -> CardAnswer:
    """Shows a LoRA with a picture that was drawn, of which a copy is kept; the picture beside its file stays."""
    _find(desk, body.file)
    return answer_card(choose_picture(desk.home, body.file, body.picture, desk.studio.folder), _projects(desk))


async def post_loras(request: Request, desk: TheDesk) -> uploads.Received:
    """Brings LoRA files in, with pictures beside them. Each is checked by its header; nothing there is overwritten."""
    return await uploads.receive(request, desk.home / FOLDER, _LIMITS, (".safetensors",))


def post_remove(body: CardNamed, desk: TheDesk) -> Removed:
    """Moves a file out of the library, to where it can be taken back from. A run's file stays."""
    _find(desk, body.file)
    return Removed(ticket=remove_card(desk.home, body.file))


def post_restore(body: Restore, desk: TheDesk) -> LibraryAnswer:
    """Takes a removed file back."""
    restore_card(desk.home, body.ticket)
    return get_library(desk)


def _projects(desk: TheDesk) -> dict[str, str]:
    """Run -> the name of its project."""
    return {run: project.name for project in list_projects(desk.home) for run in project.runs}


def answer_card(card: Card, projects: Mapping[str, str]) -> CardAnswer:
    """A card as it is sent; `projects` are the names of the runs' projects."""
    facts = card.facts
    chosen = card.chosen.name if card.chosen and card.chosen.is_file() else ""
    version = f"&v={card.mark[1]}{chosen.removesuffix('.png')}"
    return CardAnswer(
        key=card.key,
        name=card.path.name,
        title=facts.title if facts else card.path.stem,
        run=card.run,
        project=projects.get(card.run, ""),
        steps=facts.metadata.get("ss_steps", "") if facts else "",
        changed=card.mark[1] / 1e9,
        family=facts.family if facts else "",
        kinds=list(facts.kinds) if facts else [],
        ranks=list(facts.ranks) if facts else [],
        words=list(card.words),
        size=card.mark[2],
        picture=f"/api/library/picture?file={quote(card.key, safe='')}{version}" if card.picture else "",
        chosen=chosen,
        strength=card.strength,
        routed=card.routed,
        problem=card.problem,
    )


def _find(desk: TheDesk, key: str) -> Card:
    try:
        return find_card(desk.home, key)
    except AdapterFileError as error:
        raise Refusal(error.what, error.where, error.hint, status=NOT_FOUND) from error


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/library", get_library),
    ("GET", "/library/card", get_card),
    ("PUT", "/library/card", put_card),
    ("GET", "/library/picture", get_picture),
    ("PUT", "/library/picture", put_picture),
    ("POST", "/library/files", post_loras),
    ("POST", "/library/remove", post_remove),
    ("POST", "/library/restore", post_restore),
)
