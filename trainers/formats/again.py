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
    """Neighbouring tensors of one dtype: bytes [start, end) of the data, and each one's key and how many numbers it has."""

    dtype: torch.dtype
    start: int
    end: int
    keys: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Module:
    """Where one layer's factors stand, and in which shapes they fit it; `alpha` where no key of its own gives it."""

    factors: tuple[tuple[str, str, tuple[int, ...]], ...]  # part, key, shape
    alpha_key: str | None
    alpha: float


@dataclass(frozen=True)
class Layout:
    """How a file was read for one base."""

    header: Header
    runs: tuple[_Run, ...]
    modules: Mapping[str, _Module]
    unmatched: tuple[str, ...]
    family: str


def layout_of(header: Header, matched: Mapping[str, KeyGroup], file: AdapterFile) -> Layout | None:
    """How `file` was read; None unless all in it is plain LoRA, which takes its numbers as they stand in the file."""
    runs = _runs(header)
    if runs is None or any(group.kind != "lora" or {"mid", "scale"} & group.parts.keys() for group in matched.values()):
        return None
    modules = {}
    for name, group in matched.items():
        weights = file.modules[name]
        factors = tuple((part, group.parts[part], tuple(factor.shape)) for part, factor in weights.factors.items())
        modules[name] = _Module(factors, group.parts.get("alpha"), weights.alpha)
    return Layout(header, runs, modules, file.unmatched, file.family)


def _runs(header: Header) -> tuple[_Run, ...] | None:
    entries = sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].end))
    runs = []
    for spelled, group in itertools.groupby(entries, key=lambda item: item[1].dtype):
        tensors = list(group)
        start, end = tensors[0][1].start, tensors[-1][1].end
        dtype = _WIDENED.get(spelled)
        if dtype is None or start % dtype.itemsize:
            return None
        sizes = tuple(math.prod(entry.shape) for _, entry in tensors)
        runs.append(_Run(dtype, start, end, tuple(key for key, _ in tensors), sizes))
    return tuple(runs)


def read_again(handle: BinaryIO, header: Header, layout: Layout, device: torch.device) -> AdapterFile | None:
    """A file with the tensors of `layout`, float32 on `device`; None where something is not as it was, or not finite."""
    alphas = layout.header.metadata.get(METADATA_KEY) == header.metadata.get(METADATA_KEY)
    if header.entries is not layout.header.entries or not alphas:
        return None
    data = torch.empty(header.size - header.data_start, dtype=torch.uint8)
    handle.seek(header.data_start)
    if handle.readinto(memoryview(data.numpy())) != data.numel():  # type: ignore[attr-defined]
        return None
    numbers: dict[str, torch.Tensor] = {}
    factors = numbers if device.type == "cpu" else {}
    for run in layout.runs:
        wide = data[run.start : run.end].view(run.dtype).float()
        # A sum is finite only if all of it is. Float32 may overflow without a fault: then all is looked at one by one.
        if not math.isfinite(float(wide.sum())):
            return None
        numbers.update(zip(run.keys, wide.split(run.sizes), strict=True))
        if factors is not numbers:
            factors.update(zip(run.keys, wide.to(device).split(run.sizes), strict=True))
    modules = {
        name: ModuleWeights(
            {part: factors[key].view(shape) for part, key, shape in module.factors},
            module.alpha if module.alpha_key is None else float(numbers[module.alpha_key]),
        )
        for name, module in layout.modules.items()
    }
    return AdapterFile(modules, dict(header.metadata), layout.unmatched, layout.family)
