"""Draws the pictures of one request that are not on the disk yet: the base's alone, the others as rows of batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.adapters.plan import Strengths
from trainers.cells import Cell, RenderRequest
from trainers.embeddings import embedding_beside, put_in_embeddings
from trainers.families import check_size, recognise_base
from trainers.families.base import DiffusionModel
from trainers.files import write_atomically
from trainers.generate import Picture, RenderSettings, png_bytes, render
from trainers.samplers import check_sampler
from trainers.warm import Mark, Tell, Warm, base_marks, lora_mark

ROWS = 8
"""How many pictures are drawn as one batch at most: a cancel waits for one sampling step of all of them."""
PIXELS = 4 * 512 * 512
"""How many pixels the pictures of one batch have at most; a larger one is drawn alone. The denoiser of SD 1.5 holds about
1 KB for each (counted in float32, with guidance; SDXL's 0.6 KB): with this 1 GB, where 8 rows of 1024x1024 took 8 GB."""
_DRAWN_BY = 1  # to be raised when the same request draws another picture, so that old files no longer answer for it


@dataclass(frozen=True)
class _Wanted:
    """One picture that a request asks for: the cell, its LoRAs that act, by file, their embeddings, where the picture lies."""

    cell: Cell
    loras: dict[Mark, Strengths]
    words: tuple[Mark, ...]
    path: Path


def picture_file(
    request: RenderRequest, base: tuple[Mark, ...], cell: Cell, loras: Mapping[Mark, Strengths], words: Sequence[Mark] = ()
) -> Path:
    """Where a picture lies: named by a hash of all that it depends on. LoRAs that are off are not part of that.

    `words` are the embeddings that come with its LoRAs.
    """
    negative = request.negative if request.guidance > 1 else ""
    how = [cell.prompt, negative, cell.seed, request.width, request.height, request.steps, request.guidance]
    with_loras = sorted((mark, float(of.unet), float(of.text), sorted(of.blocks.items())) for mark, of in loras.items())
    whole = json.dumps([_DRAWN_BY, base, with_loras, how, request.scheduler, *([words] if words else [])])
    return Path(request.folder) / f"{hashlib.sha256(whole.encode()).hexdigest()[:40]}.png"


def answer(request: RenderRequest, warm: Warm, tell: Tell, check: Callable[[], None]) -> None:
    """Draws the pictures of one request that are not on the disk yet, and tells of each and of each sampling step.

    A picture without any LoRA is drawn alone, so that it is the base's bit for bit; so is the first. The others are rows of
    batches. A row agrees with the same picture drawn alone within 1/255 in float32: the products' sums run in another order.
    On bfloat16 and on a GPU it may be more, which was not measured. `check` is called at each step and may raise.
    Raises TrainingError, OSError.
    """
    check_sampler(request.scheduler)
    warm.tidy(Path(request.folder))
    base = recognise_base(request.base.model, request.base.options)
    check_size(base, request.height, request.width)
    shown: dict[Path, list[int]] = {}
    missing: dict[Path, _Wanted] = {}
    for number, wanted in enumerate(_find(request, base_marks(base))):
        shown.setdefault(wanted.path, []).append(number)
        if not wanted.path.is_file():
            missing[wanted.path] = wanted

    def show(path: Path) -> None:
        for number in shown[path]:
            tell({"event": "picture", "cell": number, "strength": request.strength_of(number), "path": str(path)})

    for path in shown:
        if path not in missing:
            show(path)
    if not missing:
        return
    passes = batches(list(missing.values()), rows_at(request.width, request.height))
    _draw(request, passes, warm, warm.model(base, tell), _Listener(tell, show, check))


@dataclass(frozen=True)
class _Listener:
    """Who is told of events and of pictures that are written, and asked whether they are still wanted."""

    tell: Tell
    show: Callable[[Path], None]
    check: Callable[[], None]


def _draw(request: RenderRequest, passes: list[list[_Wanted]], warm: Warm, model: DiffusionModel, listener: _Listener) -> None:
    how = RenderSettings(request.height, request.width, request.steps, request.guidance, request.negative, request.scheduler)
    total = sum(len(batch) for batch in passes) * request.steps
    done = 0

    for batch in passes:
        listener.check()
        begun = done

        def one_more(batch: list[_Wanted] = batch, begun: int = begun) -> None:
            nonlocal done
            listener.check()
            done = min(done + len(batch), begun + len(batch) * request.steps)  # some samplers look twice
            listener.tell({"event": "step", "done": done, "total": total})

        names = {mark: warm.adapter(model, mark, listener.tell, len(batch[0].loras)) for mark in batch[0].loras}
        files = {name: Path(mark[0]).stem for mark, name in names.items()}
        put_in_embeddings(model, [Path(mark[0]) for mark in batch[0].words])
        pictures = [
            Picture(one.cell.prompt, one.cell.seed, {names[mark]: of for mark, of in one.loras.items()}) for one in batch
        ]
        images = render(model, pictures, how, one_more)
        for one, image, picture in zip(batch, images, pictures, strict=True):
            write_atomically(one.path, png_bytes(image, picture, how, files))
            listener.show(one.path)


def _find(request: RenderRequest, base: tuple[Mark, ...]) -> Iterator[_Wanted]:
    """All pictures of a request in their order. Raises AdapterFileError for a LoRA file that is not there."""
    marks: dict[str, Mark] = {}
    embeddings: dict[str, Mark] = {}
    for cell in request.pictures():
        for lora in cell.loras:
            if lora.path not in marks:
                marks[lora.path] = lora_mark(lora.path)
                if beside := embedding_beside(Path(lora.path)):
                    embeddings[lora.path] = lora_mark(str(beside))
        words = tuple(sorted(embeddings[lora.path] for lora in cell.active if lora.path in embeddings))
        loras = {marks[lora.path]: lora.strengths for lora in cell.active}
        yield _Wanted(cell, loras, words, picture_file(request, base, cell, loras, words))


def rows_at(width: int, height: int) -> int:
    """How many pictures of this size are drawn as one batch."""
    return max(1, min(ROWS, PIXELS // (width * height)))


def batches(wanted: Sequence[_Wanted], at_once: int) -> list[list[_Wanted]]:
    """What is drawn together: those without a LoRA each alone and first, then up to `at_once` of the same LoRAs.

    The very first is always alone, so that there is soon something to see.
    """
    alone = [one for one in wanted if not one.loras] or list(wanted[:1])
    alike: dict[frozenset[Mark], list[_Wanted]] = {}
    for one in wanted:
        if not any(one is other for other in alone):
            alike.setdefault(frozenset(one.loras), []).append(one)
    rows = [group[start : start + at_once] for group in alike.values() for start in range(0, len(group), at_once)]
    return [[one] for one in alone] + rows
