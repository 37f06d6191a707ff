"""LoRA files: read any scheme that is known, write the kohya form. Torch-free at import; the functions need torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from trainers.formats.weights import AdapterFile, ModuleWeights

__all__ = ["AdapterFile", "FileDtype", "ModuleWeights", "read_adapter", "write_adapter"]

FileDtype = Literal["fp16", "bf16", "fp32"]


def write_adapter(
    path: Path, modules: Mapping[str, ModuleWeights], metadata: Mapping[str, str], dtype: FileDtype = "fp16"
) -> dict[str, str]:
    """Writes a LoRA in kohya form and returns the metadata that stand in it: the given ones and the three hashes.

    modules: by canonical name. The same input gives the same bytes, and the file appears under its name complete or not
    at all. A part with several alphas is written with its commonest, the ratios being moved into the factors, because
    diffusers would give all of them that one. In fp16 each rank's up and down are brought to like sizes by powers of
    two, which leaves their product as it is. Raises AdapterFileError for no modules, misfits, NaN or infinity (also
    after the cast), or a full disk.
    """
    from trainers.formats.writing import write

    return write(path, modules, metadata, dtype)


def read_adapter(path: Path, known: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> AdapterFile:
    """Reads a LoRA in kohya, peft or old diffusers form for a base whose layers are `known` (canonical names).

    shapes: the weight shapes of those layers; with it every module is held against its layer, and 2-D factors of a
    1x1 convolution become 4-D or the reverse. Raises AdapterFileError for a file that is damaged, is no safetensors,
    is another kind of adapter, holds NaN, misfits the base, or matches none of it.
    """
    from trainers.formats.reading import read

    return read(path, known, shapes)
