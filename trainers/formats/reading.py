"""Reads a LoRA file in any known scheme into canonical names and float32 factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from trainers.container import Header, open_file, read_header
from trainers.errors import AdapterFileError
from trainers.formats.keys import KeyGroup, family_by_name, group_keys
from trainers.formats.kohya import flat_name, module_weights, read_kohya_prefix
from trainers.formats.peft import PeftScaling, read_dotted_prefix, read_scaling, split_part
from trainers.formats.weights import AdapterFile, ModuleWeights, check_module
from trainers.tensors import FLOATS, NUMBERS, read_tensor
from trainers.text import name_list, printable

KIND_NAMES = {"dora": "a DoRA", "loha": "a LoHa", "lokr": "a LoKr", "oft": "an OFT", "full": "full weight differences"}


def read(path: Path, known: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None) -> AdapterFile:
    """See trainers.formats.read_adapter."""
    with open_file(path) as handle:
        header = read_header(handle, path)
        groups, foreign = group_keys(header.entries)
        if not any(group.kinds for group in groups):
            raise no_adapter(header)
        matched, unmatched = match_groups(groups, known, path)
        scaling = read_scaling(header.metadata, str(path))
        modules: dict[str, ModuleWeights] = {}
        for name, group in matched.items():
            weights = read_module(handle, header, group, scaling)
            if shapes is not None and name in shapes:
                weights = fit_to_layer(name, weights, shapes[name], str(path))
            check_module(name, weights, str(path))
            modules[name] = weights
    return AdapterFile(modules, dict(header.metadata), tuple([*unmatched, *foreign]))


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


def match_groups(groups: list[KeyGroup], known: Iterable[str], path: Path) -> tuple[dict[str, KeyGroup], list[str]]:
    """(groups by canonical name, prefixes that match nothing). Raises AdapterFileError if none match or one does twice."""
    table = {flat_name(name): name for name in known}
    matched: dict[str, KeyGroup] = {}
    unmatched: list[str] = []
    for group in groups:
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
    family, _ = family_by_name(unmatched)
    if family:  # SDXL's first text encoder has the names and widths of SD1's: such a file would load in part.
        what = f"This LoRA was made for {family.upper()}, and the base model is of another family"
        raise AdapterFileError(what, str(path), f"Choose a base model of family {family.upper()}.")
    if not matched:
        what = f"None of the file's {len(groups)} modules is in this base model (the file has {name_list(unmatched)})"
        raise AdapterFileError(what, str(path), "It was made for another kind of base model.")
    return matched, unmatched


def read_module(handle: BinaryIO, header: Header, group: KeyGroup, scaling: Mapping[str, PeftScaling]) -> ModuleWeights:
    """One module's factors and alpha. Raises AdapterFileError for another kind than LoRA, a part missing or unreadable."""
    where = str(header.path)
    if group.kind != "lora":
        kind = KIND_NAMES.get(group.kind, group.kind or "no more than an alpha")
        what = f"{printable(group.prefix, 120)} holds {kind}; only LoRA can be loaded"
        raise AdapterFileError(what, where, "Convert it to a LoRA with the program that made it.")
    missing = [part for part in ("down", "up") if part not in group.parts]
    if missing:
        what = f"Module {printable(group.prefix, 120)} has no {missing[0]} factor"
        raise AdapterFileError(what, where, "Export the file again.")
    parts = {part: read_tensor(handle, header, key, FLOATS) for part, key in group.parts.items() if part in _FACTORS}
    if any(0 in tensor.shape for tensor in parts.values()):
        raise AdapterFileError(f"Module {printable(group.prefix, 120)} has a factor of size zero", where, "Export it again.")
    return module_weights(parts, read_alpha(handle, header, group, scaling, parts["down"].shape[0]))


_FACTORS = ("down", "up", "mid")


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
    down, up = weights.factors["down"], weights.factors["up"]
    made_for = (up.shape[0], *down.shape[1:])
    one_by_one = tuple(shape[2:]) in ((), (1, 1)) and tuple(down.shape[2:]) in ((), (1, 1))
    same = made_for[:2] == tuple(shape[:2]) if one_by_one else made_for == tuple(shape)
    if not same or up.shape[1] != down.shape[0]:
        swapped = (down.shape[0], up.shape[1]) == tuple(shape[:2])
        what = f"{name}: the file's layer is {made_for}, the base model's {tuple(shape)}"
        hint = "Its up and down are swapped." if swapped else "It was made for another kind of base model."
        raise AdapterFileError(what, where, hint)
    if not one_by_one:
        return weights
    ones = (1,) * (len(shape) - 2)
    factors = {"down": down.reshape(*down.shape[:2], *ones), "up": up.reshape(*up.shape[:2], *ones)}
    return ModuleWeights(factors, weights.alpha)
