"""Which part of a picture is learnt: its alpha channel, or a mask file beside it. White is learnt, black is not.

A file belongs to cat.jpg that is called cat-masklabel.png (as OneTrainer writes them) or cat.mask.png, or masks/cat.png in
a folder beside it (as kohya's scripts take a second folder of the same names). What is masked out has no influence at
all: its pixels are replaced by the mean colour of the rest before the picture is scaled, as scaling and the VAE look
beyond a pixel's own place, and its latents have no share in the loss. What is transparent in a mask file is black.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy
from PIL import Image, ImageChops, ImageStat

from trainers.dataset.buckets import Placement
from trainers.dataset.files import FoundFile
from trainers.dataset.pictures import has_alpha, load_pixels, read_picture
from trainers.errors import DatasetError, Problem

if TYPE_CHECKING:
    from trainers.dataset.folder import Example

Masks = Literal["off", "files", "alpha", "auto"]
"""Where masks come from. `auto`: the mask file of a picture that has one, else its alpha channel."""
ENDINGS = ("-masklabel", ".mask")
"""What a mask file's name has after its picture's."""
FOLDER = "masks"
SHAPE_OFF = 0.01
"""Share by which a mask's aspect ratio may differ from its picture's: sides are whole pixels."""
FILLING = 2
"""Version of what `fill` and `cells_of` make of a mask. Raise it with them: older cached latents are then unused."""


@dataclass(frozen=True)
class Mask:
    """A picture's mask. Without `path` it is the alpha channel of the picture itself."""

    path: Path | None = None
    sha256: str = ""
    """Of the mask file's bytes."""


@dataclass
class FoundMasks:
    """Mask files by the picture that they belong to, and what is to be said about those that belong to none."""

    beside: dict[Path, FoundFile] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def split_masks(files: Sequence[FoundFile]) -> tuple[list[FoundFile], FoundMasks]:
    """Pictures, and the mask files among them; whether masks are wanted or not, a mask is no picture to learn."""
    known = {_key(file.path.parent, file.path.stem): file for file in files}
    pictures, masks = [], FoundMasks()
    for file in files:
        stem, parent = file.path.stem, file.path.parent
        ending = next((ending for ending in ENDINGS if stem.lower().endswith(ending)), "")
        above = known.get(_key(parent.parent, stem)) if parent.name.lower() == FOLDER else None
        picture = known.get(_key(parent, stem[: -len(ending)])) if ending else above
        if picture is not None:
            masks.beside.setdefault(picture.path, file)
        elif ending:
            masks.problems.append(Problem("note", "A mask without a picture; ignored", file.name))
        else:
            pictures.append(file)
    return pictures, masks


def with_masks(setting: Masks, examples: Sequence[Example], files: FoundMasks) -> tuple[list[Example], list[Problem]]:
    """The examples with the masks that they have, and a problem for each that is left out as its mask cannot be used."""
    problems, kept = list(files.problems), []
    if setting in ("off", "alpha"):
        if files.beside:
            hint = f"Set dataset.masks={'auto' if setting == 'alpha' else 'files'} to learn only what they show in white."
            problems.append(Problem("note", f"Mask files that are not used: {len(files.beside)}", hint=hint))
        files = FoundMasks()
    for example in examples:
        try:
            mask = _mask_of(setting, example, files.beside) if setting != "off" else None
            kept.append(replace(example, mask=mask))
        except DatasetError as error:
            hint = error.hint or "Correct the mask, or leave the picture out."
            problems.append(Problem("warning", f"{error.what}; left out", example.name, hint))
            continue
        if mask is None and example.path in files.beside:
            what = f"Its mask {files.beside[example.path].path.name} hides nothing; all of the picture is learnt"
            problems.append(Problem("note", what, example.name))
    return kept, problems


def _mask_of(setting: Masks, example: Example, files: Mapping[Path, FoundFile]) -> Mask | None:
    """Raises DatasetError for a mask that cannot be read, has another shape, or leaves nothing to learn."""
    file = files.get(example.path)
    if file is not None:
        facts, extent = _look_at_file(file.path, *_state(file.path))
        width, height, sha256 = facts
        if abs(width * example.height / (height * example.width) - 1) > SHAPE_OFF:
            what = f"Its mask {file.path.name} has another shape: {width}x{height} for {example.width}x{example.height}"
            raise DatasetError(what, example.name)
        mask = Mask(file.path, sha256)
    elif setting in ("alpha", "auto"):
        extent, mask = _look_at_alpha(example.path, *_state(example.path)), Mask()
    else:
        return None
    if extent[1] == 0:
        raise DatasetError(f"Its {'mask' if file else 'alpha channel'} is empty, so that nothing of it would be learnt")
    return None if extent[0] == 255 else mask


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DatasetError(f"The file cannot be read: {error.strerror}", str(path)) from error
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=20_000)
def _look_at_file(path: Path, size: int, changed: int) -> tuple[tuple[int, int, str], tuple[int, int]]:
    """(width, height, sha256) of a mask file, and its darkest and lightest value."""
    facts = read_picture(path, decode=False)
    return (facts.width, facts.height, facts.sha256), _extent(_load_grey(path))


@functools.lru_cache(maxsize=20_000)
def _look_at_alpha(path: Path, size: int, changed: int) -> tuple[int, int]:
    """Darkest and lightest value of a picture's alpha; (255, 255) where it has none, which its header tells."""
    picture = load_pixels(path, alpha=True) if has_alpha(path) else None
    return _extent(picture.getchannel("A")) if picture is not None and picture.mode == "RGBA" else (255, 255)


def _load_grey(path: Path, sha256: str = "", data: bytes | None = None) -> Image.Image:
    """A mask file as 8-bit grey: its luminance, black where it is transparent, as a mask painted on a clear layer is."""
    picture = load_pixels(path, sha256, data, alpha=True)
    grey = picture.convert("L")
    return ImageChops.multiply(grey, picture.getchannel("A")) if picture.mode == "RGBA" else grey


def _extent(mask: Image.Image) -> tuple[int, int]:
    low, high = mask.getextrema()
    return int(low), int(high)  # type: ignore[arg-type]


def load_masked(
    path: Path, mask: Mask, sha256: str = "", data: bytes | None = None, mask_data: bytes | None = None
) -> tuple[Image.Image, Image.Image]:
    """A picture as RGB, filled where it is masked out, and its mask as 8-bit grey of the same size.

    Hashes and `data` as in `load_pixels`, `mask_data` for the mask's file. Raises DatasetError naming the file.
    """
    if mask.path is None:
        picture = load_pixels(path, sha256, data, alpha=True)
        if picture.mode != "RGBA":
            raise DatasetError("The picture has no alpha channel any more", str(path), "Start the run again.")
        grey = picture.getchannel("A")
        return fill(picture.convert("RGB"), grey, grey), grey
    picture = load_pixels(path, sha256, data)
    grey = _load_grey(mask.path, "" if mask_data is not None else mask.sha256, mask_data)
    if grey.size != picture.size:
        grey = grey.resize(picture.size, Image.Resampling.BILINEAR)
    # Where a mask is grey the picture stays as it is: the file weighs it, and cuts nothing out.
    return fill(picture, grey, grey.point(lambda value: 255 if value else 0)), grey


def fill(picture: Image.Image, mask: Image.Image, shown: Image.Image) -> Image.Image:
    """The picture where `shown` is white, its mean colour within the mask where it is black: 8-bit, all of one size.

    That colour is made of what is not masked out alone, and stands out least from it.
    """
    inside = mask.point(lambda value: 255 if value else 0)
    if inside.getbbox() is None:
        raise DatasetError("Its mask is empty, so that nothing of it would be learnt")
    colour = tuple(round(mean) for mean in ImageStat.Stat(picture, inside).mean)
    return Image.composite(picture, Image.new("RGB", picture.size, colour), shown)


def cells_of(mask: Image.Image, placement: Placement, flip: bool, cells: tuple[int, int]) -> numpy.ndarray:
    """A mask scaled, cropped and mirrored as its picture is, and averaged over each of `cells` (h, w): float32 in [0, 1].

    Raises DatasetError when the crop leaves nothing of it.
    """
    height, width = placement.resized
    left, top, right, bottom = placement.crop
    x, y = mask.width / width, mask.height / height
    box = (left * x, top * y, right * x, bottom * y)
    small = mask.convert("F").resize((cells[1], cells[0]), Image.Resampling.BOX, box=box)
    shown = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small
    weights = numpy.asarray(shown, dtype=numpy.float32) / 255
    if not weights.any():
        raise DatasetError("The crop leaves nothing of what its mask shows, so that nothing of it would be learnt")
    return weights


def _key(folder: Path, stem: str) -> tuple[Path, str]:
    return folder, unicodedata.normalize("NFC", stem).casefold()
