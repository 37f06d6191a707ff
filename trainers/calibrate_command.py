"""`impasto calibrate`: measures which strength a LoRA should have, and bakes it in when asked to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainers.cli_files import base_of_run
from trainers.errors import RunFolderError, SettingError
from trainers.families.facts import BaseOptions

if TYPE_CHECKING:
    from PIL import Image

    from trainers.calibrate import Calibration, Plan
    from trainers.cells import Cell
    from trainers.warm import Warm

_SHOWN = 4
"""How many prompts the picture shows."""


def calibrate(
    lora: Annotated[Path, typer.Argument(metavar="LORA", help="A LoRA file (.safetensors).", show_default=False)],
    images: Annotated[Path, typer.Option(help="The folder that it was trained on, with captions.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="Base model. Default: that of the run the file lies in, else pocket.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt with the trigger, in place of new subjects. May be repeated.", show_default=False),
    ] = None,
    trigger: Annotated[str, typer.Option(help="Trigger word. Default: what all captions share.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=200, help="Sampling steps. Default: the run's for its samples, else the base's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=30, help="How hard the prompt is followed. Default: as of the steps.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a .png that shows strength 0, 1 and the suggested one.", show_default=False)
    ] = None,
    bake: Annotated[
        Path | None,
        typer.Option(help="Write the LoRA with the suggested strength as its 1 to this .safetensors.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured as one JSON object.")] = False,
) -> None:
    """Measure which strength a LoRA should have: likeness to its folder against drift without the trigger."""
    from trainers.calibrate import calibrate as calibrate_pictures
    from trainers.calibrate import make_plan
    from trainers.dataset.folder import scan_folder
    from trainers.dataset.pictures import load_pixels
    from trainers.families import recognise_base
    from trainers.formats import read_without_base
    from trainers.warm import Warm, lora_mark

    _check_new(picture, ".png")
    _check_new(bake, ".safetensors")
    name, options = base_of_run(lora, BaseOptions()) if base is None else (base, BaseOptions())
    facts = recognise_base(name, options)
    read_without_base(lora, facts.family.name)  # a damaged one is told before the base loads
    plan = make_plan(scan_folder(images, trigger=trigger).examples, trigger, seed=seed, new=prompt or ())
    named = {"steps": steps, "guidance": guidance}
    how = {
        "base": {"model": name, **asdict(options)},
        **_sampling(lora, name, options),
        **{key: value for key, value in named.items() if value is not None},
    }
    warm = Warm()
    # And what does not fit this base before anything is drawn: the base's own pictures come first.
    warm.adapter(warm.model(facts, lambda event: None), lora_mark(str(lora)), lambda event: None)
    drawn = _draw(plan.cells(lora), how, warm)
    found = calibrate_pictures(plan, drawn, [load_pixels(path) for path in plan.wanted])
    _tell(found, plan, as_json)  # first: minutes of measuring are not to be lost to a file that cannot be made
    if picture:
        _save_picture(picture, plan, lora, found.suggested, how, warm)
    if bake:
        _bake(lora, found.suggested, bake, facts.family.name)


def _check_new(path: Path | None, ending: str) -> None:
    if path and path.suffix.lower() != ending:
        raise SettingError(f"{path.name} does not end with {ending}", where=str(path), hint="Choose another name.")
    if path and path.exists():
        raise RunFolderError("There is such a file already", str(path), "Choose another name.")


def _sampling(lora: Path, base: str, options: BaseOptions) -> dict[str, object]:
    """How the run in which the file lies draws its samples; else how runs on this base do.

    The best strength depends on it: the harder a prompt is followed, the harder its LoRA is.
    """
    from trainers.config import read_config
    from trainers.families import recognise_base
    from trainers.presets import default_preset, resolve
    from trainers.run_folder import run_of

    run = run_of(lora)
    config = read_config(run.config) if run else resolve(default_preset(recognise_base(base, options)), {})
    return config.samples.model_dump(include={"negative", "steps", "guidance", "scheduler"})


def _draw(cells: list[Cell], how: dict[str, object], warm: Warm) -> dict[int, Image.Image]:
    """All cells at the base's own size, by number; on a terminal stderr tells how far it is."""
    import tempfile

    from PIL import Image

    from trainers.cells import RenderRequest
    from trainers.draw_cells import answer
    from trainers.families import recognise_base
    from trainers.families.settings import BaseSettings

    base = BaseSettings.model_validate(how["base"])
    side = recognise_base(base.model, base.options).resolution
    found: dict[int, Image.Image] = {}
    with (
        tempfile.TemporaryDirectory(prefix="impasto-calibrate-") as folder,
        typer.progressbar(length=len(cells), label="drawing", file=typer.get_text_stream("stderr")) as bar,
    ):

        def tell(event: dict[str, object]) -> None:
            if event["event"] == "picture":
                with Image.open(str(event["path"])) as image:
                    found[int(str(event["cell"]))] = image.convert("RGB")
                bar.update(1)

        request = RenderRequest.model_validate(
            {**how, "base": base, "id": 1, "cells": cells, "width": side, "height": side, "folder": folder}
        )
        answer(request, warm, tell, lambda: None)
    return found


def _save_picture(path: Path, plan: Plan, lora: Path, suggested: float, how: dict[str, object], warm: Warm) -> None:
    import io

    from trainers.files import write_atomically
    from trainers.page import label_grid

    prompts, strengths = plan.prompts[:_SHOWN], (0.0, 1.0, suggested)
    drawn = _draw([plan.cell(lora, prompt, strength) for prompt in prompts for strength in strengths], how, warm)
    rows = [[drawn[row * len(strengths) + column] for column in range(len(strengths))] for row in range(len(prompts))]
    data = io.BytesIO()
    names = ["base", "strength 1", f"suggested {suggested:.2f}"]
    label_grid(rows, prompts, names).save(data, "PNG")
    write_atomically(path, data.getvalue())


def _bake(lora: Path, suggested: float, output: Path, family: str) -> None:
    from trainers.tools.merge import merge_adapters

    if suggested <= 0:
        raise SettingError("Strength 0 is the base alone: there is nothing to bake", hint="Train it for longer.")
    done = merge_adapters([(lora, suggested)], output, family=family, tell=lambda remark: typer.echo(remark, err=True))
    typer.echo(f"{done}: {output}", err=True)


def _tell(found: Calibration, plan: Plan, as_json: bool) -> None:
    if as_json:
        told = {**asdict(found), "prompts": plan.prompts, "plain": plan.plain, "words": found.words}
        typer.echo(json.dumps(told))
        return
    typer.echo("strength  similarity  drift")
    for point in found.points:
        typer.echo(f"{point.strength:8.2f}  {point.similarity:10.3f}  {point.drift:5.3f}")
    typer.echo(found.words)
