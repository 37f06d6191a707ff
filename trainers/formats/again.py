"""LoRA files that list the very tensors of one that was read before: only their numbers are read, in one go, and checked.

What names, widths and places tell is then known, and it is the same. What is anything but plain is left to formats.reading,
which says in words what is wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch

from trainers.container import Header
from trainers.formats.keys import KeyGroup
from trainers.formats.peft import METADATA_KEY
from trainers.formats.weights import AdapterFile, ModuleWeights

_WIDENED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Run:
    """Neighbouring tensors of one dtype: bytes [start, end) of the data."""

    dtype: torch.dtype
    start: int
    end: int


@dataclass(frozen=True)
class _Place:
    """A tensor's place in its run, and the shape in which it fits its layer."""

    run: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Layout:
    """How a file was read for one base: by canonical name, where the factors stand, and alpha where it has a key."""

    header: Header
    runs: tuple[_Run, ...]
    factors: Mapping[str, tuple[tuple[str, _Place], ...]]
    alpha_places: Mapping[str, _Place]
    alphas: Mapping[str, float]
    unmatched: tuple[str, ...]
    family: str


def layout_of(header: Header, matched: Mapping[str, KeyGroup], file: AdapterFile) -> Layout | None:
    """How `file` was read; None unless all in it is plain LoRA, which takes its numbers as they stand in the file."""
    if any(group.kind != "lora" or {"mid", "scale"} & group.parts.keys() for group in matched.values()):
        return None
    runs: list[_Run] = []
    starts: dict[str, tuple[int, int]] = {}  # key -> number of the run, place in it
    ordered = sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].end))
    for spelled, group in itertools.groupby(ordered, key=lambda item: item[1].dtype):
        tensors = list(group)
        start, end, dtype = tensors[0][1].start, tensors[-1][1].end, _WIDENED.get(spelled)
        if dtype is None or start % dtype.itemsize:
            return None
        starts |= {key: (len(runs), (entry.start - start) // dtype.itemsize) for key, entry in tensors}
        runs.append(_Run(dtype, start, end))

    def place(key: str, shape: tuple[int, ...]) -> _Place:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return _Place(starts[key][0], shape, strides, starts[key][1])

    factors = {
        name: tuple((part, place(group.parts[part], tuple(one.shape))) for part, one in file.modules[name].factors.items())
        for name, group in matched.items()
    }
    keyed = {name: place(group.parts["alpha"], ()) for name, group in matched.items() if "alpha" in group.parts}
    alphas = {name: weights.alpha for name, weights in file.modules.items()}
    return Layout(header, tuple(runs), factors, keyed, alphas, file.unmatched, file.family)


def read_again(
    handle: BinaryIO, header: Header, layout: Layout, data: torch.Tensor, device: torch.device
) -> AdapterFile | None:
    """A file with the tensors of `layout`, float32 on `device`; None where something is not as it was, or not finite.

    data: uint8, as many as the file has bytes behind its header; what is in them afterwards is of no use.
    """
    same_scaling = layout.header.metadata.get(METADATA_KEY) == header.metadata.get(METADATA_KEY)
    if header.entries is not layout.header.entries or not same_scaling:
        return None
    handle.seek(header.data_start)
    if handle.readinto(data.numpy()) != data.numel():  # type: ignore[attr-defined]
        return None
    # Copied even where nothing is to be widened, as the next file is read into the same memory.
    runs = [data[run.start : run.end].view(run.dtype).to(torch.float32, copy=True) for run in layout.runs]
    # A sum is finite only if all of it is. Float32 may overflow without a fault: then all is looked at one by one.
    if not all(math.isfinite(float(run.sum())) for run in runs):
        return None
    alphas = layout.alphas
    if layout.alpha_places:
        told = torch.stack([runs[place.run][place.offset] for place in layout.alpha_places.values()]).tolist()
        alphas = {**alphas, **dict(zip(layout.alpha_places, told, strict=True))}
    there = [run.to(device) for run in runs]
    modules = {
        name: ModuleWeights(
            {part: there[place.run].as_strided(place.shape, place.strides, place.offset) for part, place in factors},
            alphas[name],
        )
        for name, factors in layout.factors.items()
    }
    return AdapterFile(modules, dict(header.metadata), layout.unmatched, layout.family)
