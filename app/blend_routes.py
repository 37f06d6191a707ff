"""The part of the REST API that blends: LoRAs of the library at strengths on a project's base, kept by name and exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import Response
from pydantic import ValidationError

from app.answers import begin_with
from app.desk import Desk, Place, TheDesk, ThePlace
from app.library_answers import (
    BlendAnswer,
    BlendBody,
    BlendDefaults,
    BlendDraw,
    BlendsAnswer,
    BlendState,
    CardNamed,
    ExportBody,
    RoutedAnswer,
    Routing,
    RoutingAnswer,
    UseBody,
)
from app.projects import read_recipe
from app.refusals import CONFLICT, NOT_FOUND, Refusal, refuse_settings
from app.studio_routes import Asked
from trainers.adapters.plan import BLOCKS
from trainers.blend import Blend, blend_file, list_blends, read_blend, write_blend
from trainers.cells import Cell, LoraUse
from trainers.config import TrainConfig, read_config
from trainers.dataset.prepare import render_side
from trainers.errors import Problem, SettingError, TrainingError
from trainers.families import BaseModelFacts, recognise_base
from trainers.library import FOLDER, Card, list_cards, routed_words
from trainers.presets import resolve
from trainers.routing_words import route
from trainers.run_folder import RunFolder
from trainers.samplers import check_sampler


def get_defaults(place: ThePlace) -> BlendDefaults:
    """What to begin with, from the project's newest run, else its recipe."""
    config, base = base_of(place)
    samples, side = config.samples, render_side(config, base)
    return BlendDefaults(
        base=base.name,
        family=base.family.name,
        prompt=next(iter((*samples.prompts, config.dataset.trigger or "a picture"))),
        **begin_with(samples, side),
        blocks=list(BLOCKS),
        blends=list_blends(place.desk.home),
    )


def post_draw(body: BlendDraw, place: ThePlace) -> Asked:
    """Asks for one picture; what was asked before and is not done is given up. Returns at once."""
    try:
        check_sampler(body.scheduler)
    except TrainingError as error:
        raise refuse_settings([Problem("error", error.what, "scheduler", error.hint)]) from error
    cell = Cell(prompt=body.prompt, seed=body.seed, loras=_uses(place.desk, body.loras))
    shared = body.model_dump(include={"negative", "width", "height", "steps", "guidance", "scheduler"})
    base = base_of(place)[0].base.model_dump()
    return Asked(id=place.desk.studio.ask({**shared, "base": base, "cells": [cell.model_dump()], "replaces": True}))


def post_weigh(body: CardNamed, place: ThePlace) -> Asked:
    """Asks where a LoRA's weight lies, block by block, beside the base's own; the answer comes as of a drawing."""
    (use,) = _uses(place.desk, [UseBody(file=body.file, unet=1.0, text=1.0)])
    return Asked(id=place.desk.studio.ask({"do": "weigh", "base": base_of(place)[0].base.model_dump(), "path": use.path}))


def post_export(body: ExportBody, place: ThePlace) -> Asked:
    """Asks for the LoRAs as one file of the library, whose strength 1 is theirs together; 409 for a name that is taken."""
    blend_file(place.desk.home, body.name)  # the same names are good for both
    output = place.desk.home / FOLDER / f"{body.name}.safetensors"
    if output.exists():
        raise Refusal("The library has a LoRA of this name", output.name, "Choose another name.", status=CONFLICT)
    loras = [use.model_dump() for use in _uses(place.desk, body.loras)]
    what = {"do": "export", "loras": loras, "output": str(output), "family": base_of(place)[1].family.name, "rank": body.rank}
    return Asked(id=place.desk.studio.ask(what))


def get_state(number: int, desk: TheDesk) -> BlendState:
    """How a drawing, a weighing or an export stands."""
    try:
        found = desk.studio.look(number)
    except KeyError as error:
        raise Refusal("There is no such request", str(number), "Ask again.", status=NOT_FOUND) from error
    picture = found["cells"].get(0)
    url = f"/api/studio/pictures/{Path(picture).name}" if picture else ""
    return BlendState(**{key: found[key] for key in ("state", "done", "total", "answer", "problem")}, picture=url)


def post_route(body: Routing, place: ThePlace) -> RoutingAnswer:
    """Which LoRAs a prompt brings in by the trigger words that it holds, of those that fit the project's base."""
    cards = list_cards(place.desk.home)
    strengths = {card.key: card.strength for card in cards}
    found = route(body.prompt, routed_words(cards, base_of(place)[1].family.name))
    return RoutingAnswer(loras=[RoutedAnswer(file=one.key, word=one.word, strength=strengths[one.key]) for one in found])


def get_blend(name: str, desk: TheDesk) -> BlendAnswer:
    """A blend by its name."""
    file = blend_file(desk.home, name)
    if not file.is_file():
        raise Refusal("There is no such blend", name[:80], "Choose one of the list.", status=NOT_FOUND)
    keys = {card.path: card.key for card in list_cards(desk.home)}
    loras, missing = [], []
    for lora in read_blend(file, desk.home).loras:
        if Path(lora.path) in keys:
            of = lora.strengths
            loras.append(UseBody(file=keys[Path(lora.path)], unet=of.unet, text=of.text, blocks=dict(of.blocks)))
        else:
            missing.append(Path(lora.path).name)
    return BlendAnswer(loras=loras, missing=missing)


def put_blend(name: str, body: BlendBody, desk: TheDesk) -> BlendsAnswer:
    """Keeps a blend by its name, in the place of one that has it."""
    write_blend(blend_file(desk.home, name), Blend(_uses(desk, body.loras)), desk.home)
    return BlendsAnswer(blends=list_blends(desk.home))


def delete_blend(name: str, desk: TheDesk) -> Response:
    """Deletes a blend; its LoRAs stay."""
    blend_file(desk.home, name).unlink(missing_ok=True)
    return Response(status_code=204)


def base_of(place: Place) -> tuple[TrainConfig, BaseModelFacts]:
    """The settings of the project's newest run, else of its recipe, and the base that they name."""
    known = {standing.id: standing.run for standing in place.desk.runs.standings()}
    run: RunFolder | None = next((known[name] for name in reversed(place.project.runs) if name in known), None)
    if run:
        config = read_config(run.config)
    else:
        own = {"dataset": {"images": str(place.project.images)}}
        config = resolve(place.project.preset or "pocket", {**read_recipe(place.project), **own})
    return config, recognise_base(config.base.model, config.base.options)


def card_path(cards: Sequence[Card], key: str, where: str) -> Path:
    """The file of one of the library's cards. Raises Refusal for one that is not there or cannot be used."""
    card = next((one for one in cards if one.key == key), None)
    if card is None or card.problem:
        what = card.problem if card else "This LoRA is not in the library any more"
        raise Refusal(what, where, "Take it out.", status=NOT_FOUND)
    return card.path


def _uses(desk: Desk, given: Sequence[UseBody]) -> tuple[LoraUse, ...]:
    """The LoRAs with their paths, looked up in the library. Raises Refusal for one that is not there or stands twice."""
    found, cards = [], list_cards(desk.home)
    for number, one in enumerate(given):
        path = card_path(cards, one.file, f"loras.{number}.file")
        try:
            found.append(LoraUse(path=str(path), unet=one.unet, text=one.text, blocks=one.blocks))
        except ValidationError as error:
            raise SettingError(error.errors()[0]["msg"], f"loras.{number}.blocks") from error
    if len({use.path for use in found}) < len(found):
        raise Refusal("The same LoRA stands in the blend twice", "loras", "Take one of the two out.")
    return tuple(found)


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/projects/{project_id}/blend", get_defaults),
    ("POST", "/projects/{project_id}/blend", post_draw),
    ("POST", "/projects/{project_id}/blend/weigh", post_weigh),
    ("POST", "/projects/{project_id}/blend/export", post_export),
    ("POST", "/projects/{project_id}/route", post_route),
    ("GET", "/blend/{number}", get_state),
    ("GET", "/blends/{name}", get_blend),
    ("PUT", "/blends/{name}", put_blend),
    ("DELETE", "/blends/{name}", delete_blend),
)
