"""`impasto generate`: prompts x strengths as single pictures or as one labelled grid."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainers.cells import LIMIT
from trainers.errors import AdapterFileError, RunFolderError, SettingError
from trainers.families.facts import BaseOptions
from trainers.samplers import check_sampler

if TYPE_CHECKING:
    from PIL import Image

    from trainers.families.base import DiffusionModel


@dataclass(frozen=True)
class DrawRequest:
    """What to draw. `strengths` multiplies each LoRA's own; `size` is (width, height) in pixels or None for the base's."""

    base: str
    loras: tuple[tuple[Path, float], ...]
    prompts: tuple[str, ...]
    strengths: tuple[float, ...]
    output: Path
    as_folder: bool
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 5.0
    scheduler: str = "dpm++"
    size: tuple[int, int] | None = None
    embeddings: tuple[Path, ...] = ()
    options: BaseOptions = field(default_factory=BaseOptions)


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`; the colon of a Windows drive is no strength. Raises AdapterFileError, SettingError."""
    head, colon, tail = text.rpartition(":")
    path, strength = Path(text), 1.0
    if colon and len(head) > 1 and not path.is_file():
        try:
            path, strength = Path(head), float(tail)
        except ValueError:
            if "/" not in tail and "\\" not in tail:
                raise SettingError(f"{tail!r} is not a strength", where=text, hint="For example file:0.8") from None
    if not path.is_file():
        raise AdapterFileError("There is no such LoRA file", where=str(path), hint="Check the path.")
    return path, _within_limit(strength, text)


def find_embeddings(given: Sequence[Path], loras: Iterable[Path]) -> tuple[Path, ...]:
    """The embeddings to draw with: those given, else those that were trained with the LoRAs. Raises AdapterFileError."""
    from trainers.embeddings import embedding_beside

    for path in given:
        if not path.is_file():
            raise AdapterFileError("There is no such embedding", where=str(path), hint="Check the path.")
    return tuple(given) or tuple(path for path in map(embedding_beside, loras) if path)


def parse_strengths(text: str) -> tuple[float, ...]:
    """`0,0.5,1` -> (0.0, 0.5, 1.0). Raises SettingError."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(f"--strengths {text!r} is no list of numbers", hint="For example --strengths 0,0.5,1") from error
    return tuple(_within_limit(value, text) for value in values)


def _within_limit(value: float, text: str) -> float:
    if not -LIMIT <= value <= LIMIT:  # also false for nan
        raise SettingError(f"A strength of {value:g} is outside of -{LIMIT:g} to {LIMIT:g}", where=text, hint="1 is usual.")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """`512x768` -> (width 512, height 768). Raises SettingError."""
    found = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not found:
        raise SettingError(f"--size {text!r} is not WIDTHxHEIGHT", hint="For example --size 512x768")
    return int(found[1]), int(found[2])


def draw(request: DrawRequest, on_picture: Callable[[int, int], object] = lambda done, total: None) -> list[Path]:
    """Renders and writes; returns the files made. `on_picture` is told how many of how many pictures are drawn.

    What of a LoRA does not fit the base, and what of the base was guessed, is told on stderr. Raises TrainingError, before
    any weight is read where it can.
    """
    check_sampler(request.scheduler)
    if request.as_folder and request.output.exists() and not request.output.is_dir():
        raise RunFolderError("The output folder is a file", where=str(request.output), hint="Choose another --output.")
    if request.as_folder and len({file_name(0, strength) for strength in request.strengths}) < len(request.strengths):
        raise SettingError("Two strengths would be drawn into one file", where="--strengths", hint="Let them differ by 0.01.")
    if not request.as_folder and request.output.suffix.lower() != ".png":
        raise SettingError("Pictures are written as .png", where=str(request.output), hint="End --output with .png or with /.")
    from trainers.families import check_size, denoiser_bytes, load_family, recognise_base
    from trainers.formats.recognise import check_family

    base = recognise_base(request.base, request.options)
    if base.guessed:
        typer.echo(base.guessed.replace("base.prediction_type=", "--prediction-type "), err=True)
    size = request.size or (base.resolution, base.resolution)
    check_size(base, height=size[1], width=size[0])
    for path, _ in request.loras:
        check_family(path, base.family.name)
    from trainers.attach import attach_files
    from trainers.device import choose_device
    from trainers.embeddings import add_embedding

    device = choose_device("auto", denoiser_bytes(base))
    model = load_family(base, device.dtype, device.device)
    names = attach_files(model, [path for path, _ in request.loras], lambda remark: typer.echo(remark, err=True))
    for path in request.embeddings:
        typer.echo(f"The word {add_embedding(model, path)} is drawn as {path.name} has it.", err=True)
    own = dict(zip(names, (strength for _, strength in request.loras), strict=True))
    return list(_write_all(request, model, own, size, on_picture))


def _write_all(
    request: DrawRequest,
    model: DiffusionModel,
    own: dict[str, float],
    size: tuple[int, int],
    on_picture: Callable[[int, int], object],
) -> Iterator[Path]:
    from trainers.generate import RenderSettings
    from trainers.page import label_grid

    width, height = size
    how = RenderSettings(height, width, request.steps, request.guidance, request.negative, request.scheduler)
    grid: list[list[Image.Image]] = []
    for number, prompt in enumerate(request.prompts):
        images = []
        for strength in request.strengths:
            images.append(_one(model, prompt, strength, own, request.seed, how))
            on_picture(number * len(request.strengths) + len(images), len(request.prompts) * len(request.strengths))
        grid.append(images)
        if request.as_folder:
            for strength, image in zip(request.strengths, images, strict=True):
                path = request.output / file_name(number, strength)
                _save(image, path)
                yield path
    if not request.as_folder:
        single = len(request.prompts) == len(request.strengths) == 1
        columns = [f"strength {strength:g}" for strength in request.strengths]
        _save(grid[0][0] if single else label_grid(grid, request.prompts, columns), request.output)
        yield request.output


def file_name(prompt: int, strength: float) -> str:
    """Name of one picture in a folder: number of the prompt, from 0, and strength."""
    return f"{prompt:03d}_s{strength:.2f}.png"


def _one(model: DiffusionModel, prompt: str, multiplier: float, own: dict[str, float], seed: int, how: object) -> Image.Image:
    """Each picture alone, so that it is the same whatever it is drawn beside."""
    from trainers.generate import Picture, render

    strengths = {name: strength * multiplier for name, strength in own.items()}
    return render(model, [Picture(prompt, seed, strengths)], how)[0]  # type: ignore[arg-type]


def _save(image: Image.Image, path: Path) -> None:
    import io

    from trainers.files import write_atomically

    data = io.BytesIO()
    image.save(data, "PNG")
    write_atomically(path, data.getvalue())
