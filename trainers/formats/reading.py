"""Reads a LoRA file in any known scheme into canonical names and float32 factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from trainers.adapters import ADAPTERS
from trainers.adapters.base import AdapterKind
from trainers.adapters.dora import MAGNITUDE
from trainers.container import Entry, Header, open_file, read_header
from trainers.errors import AdapterFileError
from trainers.families import FAMILIES
from trainers.formats.keys import KeyGroup, group_keys
from trainers.formats.kohya import factors_of, flat_names, read_kohya_prefix
from trainers.formats.names import canonical_of
from trainers.formats.peft import PeftScaling, read_dotted_prefix, read_scaling, split_part
from trainers.formats.recognise import guess_family, refuse_other_family, title_of
from trainers.formats.weights import AdapterFile, ModuleWeights, check_module
from trainers.tensors import FLOATS, NUMBERS, read_tensor
from trainers.text import name_list, printable

KIND_NAMES = {"oft": "an OFT"}


def read(
    path: Path, known: Iterable[str] | None, shapes: Mapping[str, tuple[int, ...]] | None, family: str | None
) -> AdapterFile:
    """See trainers.formats.read_adapter and read_without_base."""
    with open_file(path) as handle:
        header = read_header(handle, path)
        groups, foreign = group_keys(header.entries)
        if not any(group.kinds for group in groups):
            raise no_adapter(header)
        if known is not None and family is not None:
            refuse_other_family(groups, header.entries, family, path)
        if family is None:
            family = sure_family(groups, header.entries, path)
        matched, unmatched = match_groups(groups, known, family, path)
        scaling = read_scaling(header.metadata, str(path))
        modules: dict[str, ModuleWeights] = {}
        for name, group in matched.items():
            weights = read_module(handle, header, group, scaling)
            if shapes is not None and name in shapes:
                weights = fit_to_layer(name, weights, shapes[name], str(path))
            check_module(name, weights, str(path))
            modules[name] = weights
    return AdapterFile(modules, dict(header.metadata), tuple([*unmatched, *foreign]), family)


def sure_family(groups: list[KeyGroup], entries: Mapping[str, Entry], path: Path) -> str:
    """The family that a file tells of itself. Raises AdapterFileError where it tells none that is known here."""
    family, reason = guess_family(groups, entries)
    if family in FAMILIES:
        return family
    if family == "unknown":
        what = f"The file does not tell for which family it was made: {reason}"
        raise AdapterFileError(what, str(path), f"Say it with --family: {', '.join(FAMILIES)}.")
    raise AdapterFileError(f"This LoRA was made for {title_of(family)} ({reason})", str(path), "It cannot be used here.")


def no_adapter(header: Header) -> AdapterFileError:
    """The error for a sound safetensors file without any adapter in it, saying what it seems to be instead."""
    where, names = str(header.path), list(header.entries)
    if not names:
        return AdapterFileError("The file holds no tensors", where, "Export it again.")
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.", "conv_in.", "down_blocks.")) for name in names):
        return AdapterFileError("This is a base model, not a LoRA", where, "Give it as the base model.")
    if any(name.startswith(("emb_params", "string_to_param")) for name in names):
        return AdapterFileError("This is a textual inversion, not a LoRA", where, "Choose a LoRA file.")
    return AdapterFileError(f"There is no LoRA in the file; it holds {name_list(names)}", where, "Choose a LoRA file.")


def match_groups(
    groups: list[KeyGroup], known: Iterable[str] | None, family: str, path: Path
) -> tuple[dict[str, KeyGroup], list[str]]:
    """(groups by canonical name, prefixes that match nothing). Raises AdapterFileError if none match or one does twice."""
    table = None if known is None else {flat: name for name in known for flat in flat_names(name, family)}
    matched: dict[str, KeyGroup] = {}
    unmatched: list[str] = []
    for group in groups:
        if table is None:
            name = canonical_of(group.prefix, family)
        else:
            flat = read_kohya_prefix(group.prefix)
            meanings = [flat] if flat is not None else read_dotted_prefix(group.prefix)
            name = next((table[meaning] for meaning in meanings if meaning in table), None)
        if name is None:
            unmatched.append(group.prefix)
        elif name in matched or group.twins:
            twins = name_list([matched[name].prefix, group.prefix] if name in matched else group.twins)
            what = f"The file gives {name} twice ({twins}), and programs disagree on what that means"
            raise AdapterFileError(what, str(path), "Export it again with one spelling.")
        else:
            matched[name] = group
    if not matched:
        what = f"None of the file's {len(groups)} modules is in this base model (the file has {name_list(unmatched)})"
        raise AdapterFileError(what, str(path), "It was made for another kind of base model.")
    return matched, unmatched


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
    factors = factors_of(tensors)
    fault = kind.fault(factors)
    if fault:
        raise AdapterFileError(f"Module {shown} {fault}", where, "Export the file again.")
    rank = kind.rank(factors)
    alpha = read_alpha(handle, header, group, scaling, rank or 1)
    if "scale" in group.parts and not rank and alpha is not None:  # no alpha / rank into which it would go
        first = next(iter(factors))
        factors, alpha = {**factors, first: factors[first] * alpha}, None
    return ModuleWeights(factors, float(rank or 1) if alpha is None else alpha, group.kind)


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
