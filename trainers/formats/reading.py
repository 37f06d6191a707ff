"""Reads a LoRA file in any known scheme into canonical names and float32 factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from trainers.adapters import ADAPTERS
from trainers.adapters.base import AdapterKind
from trainers.adapters.dora import MAGNITUDE
from trainers.container import Header, open_file, read_header
from trainers.errors import AdapterFileError
from trainers.formats.again import Layout, layout_of, read_again
from trainers.formats.keys import KeyGroup, group_keys
from trainers.formats.kohya import factors_of
from trainers.formats.matching import match_groups, no_adapter, sure_family
from trainers.formats.peft import PeftScaling, read_scaling, split_part
from trainers.formats.recognise import refuse_other_family
from trainers.formats.weights import AdapterFile, ModuleWeights, check_module
from trainers.tensors import FLOATS, NUMBERS, read_tensor
from trainers.text import printable

LAYOUTS = 16
"""How many layouts of files are remembered."""
LARGEST = 2**28
"""Numbers in one weight; the largest of a Stable Diffusion has 2**24."""
KIND_NAMES = {"oft": "an OFT"}


@dataclass
class LoadedBase:
    """What files are read for: a base's spellings, and the weight shapes of its layers where the files are held to them.

    `layouts` is how the last files of plain LoRA were laid out, by what their headers list, as the next one mostly is like
    one of them. `scratch` takes the bytes of such a file: new memory costs as much as reading into it.
    """

    family: str
    table: Mapping[tuple[str, str], str]
    shapes: Mapping[str, tuple[int, ...]] | None
    device: torch.device
    layouts: dict[str, Layout] = field(default_factory=dict)
    scratch: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def room(self, size: int) -> torch.Tensor:
        """The first `size` bytes of the scratch memory, which grows to the largest file."""
        if len(self.scratch) < size:
            self.scratch = torch.empty(size, dtype=torch.uint8)
        return self.scratch[:size]

    def remember(self, layout: Layout | None) -> None:
        """Keeps the last few ways in which files were laid out."""
        if layout is not None:
            self.layouts.pop(layout.header.listing, None)
            self.layouts[layout.header.listing] = layout
            if len(self.layouts) > LAYOUTS:
                del self.layouts[next(iter(self.layouts))]


def read(path: Path, base: LoadedBase | None, family: str | None) -> AdapterFile:
    """See trainers.formats.read_adapter and read_without_base."""
    with open_file(path) as handle:
        layouts = {} if base is None else base.layouts
        header = read_header(handle, path, {listing: layout.header for listing, layout in layouts.items()})
        if base is not None and header.listing in layouts:
            data = base.room(header.size - header.data_start)
            again = read_again(handle, header, layouts[header.listing], data, base.device)
            if again is not None:
                return again
        groups, foreign = group_keys(header.entries)
        if not any(group.kinds for group in groups):
            raise no_adapter(header)
        if base is not None:
            family = base.family
            refuse_other_family(groups, header.entries, family, path)
        elif family is None:
            family = sure_family(header, groups)
        matched, unmatched = match_groups(groups, None if base is None else base.table, family, path)
        scaling = read_scaling(header.metadata, str(path))
        modules: dict[str, ModuleWeights] = {}
        for name, group in matched.items():
            weights = read_module(handle, header, group, scaling)
            if base is not None and base.shapes is not None and name in base.shapes:
                weights = fit_to_layer(name, weights, base.shapes[name], str(path))
            check_module(name, weights, str(path))
            modules[name] = weights
    file = AdapterFile(modules, dict(header.metadata), tuple([*unmatched, *foreign]), family)
    if base is not None:
        base.remember(layout_of(header, matched, file))
    return file


def read_module(handle: BinaryIO, header: Header, group: KeyGroup, scaling: Mapping[str, PeftScaling]) -> ModuleWeights:
    """One module's factors and alpha. Raises AdapterFileError for an unknown kind, and for parts that are missing or misfit."""
    where, shown = str(header.path), printable(group.prefix, 120)
    if "diff_b" in group.parts:
        what = f"{shown} changes the layer's bias (diff_b), which cannot be loaded"
        raise AdapterFileError(what, where, "Leave biases out where the file is made.")
    if group.kind not in ADAPTERS:
        holds = KIND_NAMES.get(group.kind, group.kind or "no more than an alpha")
        what = f"{shown} holds {holds}; only {', '.join(ADAPTERS)} can be loaded"
        raise AdapterFileError(what, where, "Convert it to a LoRA with the program that made it.")
    kind: AdapterKind = ADAPTERS[group.kind]
    parts = {part: key for part, key in group.parts.items() if part in (*kind.parts, "mid")}
    tensors = {part: read_tensor(handle, header, key, FLOATS) for part, key in parts.items()}
    if any(0 in tensor.shape for tensor in tensors.values()):
        raise AdapterFileError(f"Module {shown} has a factor of size zero", where, "Export it again.")
    if MAGNITUDE in parts and "lora_magnitude_vector" in parts[MAGNITUDE]:
        tensors[MAGNITUDE] = tensors[MAGNITUDE].reshape(-1, 1)  # peft: always one for each output, in several shapes
    if len(tensors) > 1:
        _refuse_giant(math.prod(sorted(max(tensor.shape, default=1) for tensor in tensors.values())[-2:]), shown, where)
    factors = factors_of(tensors)
    fault = kind.fault(factors)
    if fault:
        raise AdapterFileError(f"Module {shown} {fault}", where, "Export the file again.")
    _refuse_giant(math.prod(kind.shape(factors)), shown, where)
    rank = kind.rank(factors)
    alpha = read_alpha(handle, header, group, scaling, rank or 1)
    if "scale" in group.parts and not rank and alpha is not None:  # no alpha / rank into which it would go
        first = next(iter(factors))
        factors, alpha = {**factors, first: factors[first] * alpha}, None
    return ModuleWeights(factors, float(rank or 1) if alpha is None else alpha, group.kind)


def _refuse_giant(numbers: int, shown: str, where: str) -> None:
    """Raises AdapterFileError where factors may multiply to more numbers than any layer has.

    Two vectors of a few MB would make a matrix of terabytes, long before it is held against its layer.
    """
    if numbers > LARGEST:
        what = f"Module {shown} would change a layer of {numbers:,} numbers, more than any model has"
        raise AdapterFileError(what, where, "Export the file again.")


def read_alpha(
    handle: BinaryIO, header: Header, group: KeyGroup, scaling: Mapping[str, PeftScaling], rank: int
) -> float | None:
    """Alpha so that the scale is alpha / rank; None where the file does not say. Raises AdapterFileError for no number."""
    if "scale" in group.parts:  # Two readers take a stored scale before alpha; the others never meet one.
        return read_scalar(handle, header, group.parts["scale"]) * rank
    if "alpha" in group.parts:
        return read_scalar(handle, header, group.parts["alpha"])
    if "peft" in group.schemes:
        part, path = split_part(group.prefix)
        return scaling.get(part, PeftScaling()).alpha_of(path, rank)
    return None


def read_scalar(handle: BinaryIO, header: Header, key: str) -> float:
    """An alpha or scale. Raises AdapterFileError unless it is a single finite number."""
    tensor = read_tensor(handle, header, key, NUMBERS)
    if tensor.numel() != 1 or not bool(tensor.float().isfinite().all()):
        what = f"{printable(key, 120)} is not a single finite number"
        raise AdapterFileError(what, str(header.path), "Export the file again.")
    return float(tensor.item())


def fit_to_layer(name: str, weights: ModuleWeights, shape: tuple[int, ...], where: str) -> ModuleWeights:
    """The factors in the layer's own form, (out, in) or (out, in, kh, kw). Raises AdapterFileError for other widths."""
    kind: AdapterKind = ADAPTERS[weights.kind]
    factors = kind.fit(weights.factors, shape)
    if factors is None:
        up, down = weights.factors.get("up"), weights.factors.get("down")
        swapped = up is not None and down is not None and (down.shape[0], up.shape[1]) == tuple(shape[:2])
        what = f"{name}: the file's layer is {weights.shape}, the base model's {tuple(shape)}"
        hint = "Its up and down are swapped." if swapped else "It was made for another kind of base model."
        raise AdapterFileError(what, where, hint)
    return dataclasses.replace(weights, factors=factors)
