"""LoRA files: read any scheme that is known, write kohya's or peft's. Torch-free at import; the functions need torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainers.formats.weights import AdapterFile, ModuleWeights

if TYPE_CHECKING:
    from trainers.formats.reading import LoadedBase

__all__ = [
    "AdapterFile", "FileDtype", "FileForm", "ModuleWeights", "base_for", "read_adapter", "read_for", "read_without_base",
    "write_adapter",
]  # fmt: skip

FileDtype = Literal["fp16", "bf16", "fp32"]
FileForm = Literal["kohya", "peft"]


def write_adapter(
    path: Path,
    modules: Mapping[str, ModuleWeights],
    metadata: Mapping[str, str],
    dtype: FileDtype = "fp16",
    form: FileForm = "kohya",
    family: str = "sd1",
) -> dict[str, str]:
    """Writes an adapter file and returns the metadata that stand in it: the given ones and the three hashes.

    modules: by canonical name. The same input gives the same bytes, and the file appears under its name complete or not
    at all. In kohya form, which every program reads, a part with several alphas is written with its commonest, the
    ratios being moved into the factors, because diffusers would give all of them that one. In peft form, diffusers' own,
    alpha / rank is moved into the factors, because most readers of that form take it for 1; it holds LoRA and DoRA only.
    In fp16 each rank's up and down are brought to like sizes by powers of two, which leaves their product as it is.
    Raises AdapterFileError for no modules, misfits, a kind or name that the form has not, NaN or infinity (also after
    the cast), or a full disk.
    """
    from trainers.formats.writing import write

    return write(path, modules, metadata, dtype, form, family)


def read_adapter(
    path: Path, known: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None, family: str = "sd1"
) -> AdapterFile:
    """Reads an adapter file in kohya, peft or old diffusers form for a base whose layers are `known` (canonical names).

    shapes: the weight shapes of those layers; with it every module is held against its layer and takes its form, as 2-D
    factors of a 1x1 convolution or a kernel that is folded in. family: the base's. Raises AdapterFileError for a file
    that is damaged, is no safetensors, is a kind of adapter that is not known here, holds NaN, was made for another
    family, misfits the base, or matches none of it.
    """
    return read_for(path, base_for(known, shapes, family))


def base_for(
    known: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None, family: str = "sd1", device: str = "cpu"
) -> LoadedBase:
    """A base to read one file after the other for: what is the same for all of them is done once. Arguments as above.

    A file of plain LoRA whose tensors lie as in one before is read at once. `device`: where its factors are wanted.
    """
    import torch

    from trainers.formats.matching import spellings
    from trainers.formats.reading import LoadedBase

    return LoadedBase(family, spellings(known, family), shapes, torch.device(device))


def read_for(path: Path, base: LoadedBase) -> AdapterFile:
    """As `read_adapter`, for a base that is kept."""
    from trainers.formats.reading import read

    return read(path, base, base.family)


def read_without_base(path: Path, family: str | None = None) -> AdapterFile:
    """Reads an adapter file by the names in it alone. family: None takes what names and widths tell.

    Raises AdapterFileError as `read_adapter`, and where no family is told.
    """
    from trainers.formats.reading import read

    return read(path, None, family)
