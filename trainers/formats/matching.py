"""Which modules an adapter file holds, by the names in its header alone: of which family, and which of the base's. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from trainers.container import Header
from trainers.errors import AdapterFileError
from trainers.families import FAMILIES
from trainers.formats.keys import KeyGroup
from trainers.formats.kohya import flat_names, read_kohya_prefix
from trainers.formats.names import canonical_of
from trainers.formats.peft import read_dotted_prefix
from trainers.formats.recognise import guess_family, title_of
from trainers.text import name_list


def sure_family(header: Header, groups: list[KeyGroup]) -> str:
    """The family that a file tells by names and widths, else in words. Raises AdapterFileError for none that is known here."""
    path = header.path
    family, reason = guess_family(groups, header.entries)
    if family == "unknown":  # as of a small base, whose widths are nobody's
        told = header.metadata.get("ss_base_model_version")
        family = next((name for name, facts in FAMILIES.items() if facts.base_version == told), family)
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
    if any(name.startswith(("emb_params", "string_to_param")) for name in names) or set(names) == {"clip_l", "clip_g"}:
        return AdapterFileError("This is a textual inversion, not a LoRA", where, "Choose a LoRA file.")
    return AdapterFileError(f"There is no LoRA in the file; it holds {name_list(names)}", where, "Choose a LoRA file.")


def spellings(known: Iterable[str], family: str) -> dict[tuple[str, str], str]:
    """Every flat name by which files of the family call a layer -> its canonical name."""
    return {flat: name for name in known for flat in flat_names(name, family)}


def match_groups(
    groups: list[KeyGroup], table: Mapping[tuple[str, str], str] | None, family: str, path: Path
) -> tuple[dict[str, KeyGroup], list[str]]:
    """(groups by canonical name, prefixes that match nothing). Raises AdapterFileError if none match or one does twice.

    table: the base's `spellings`; None takes what the names tell by themselves.
    """
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
