"""Blends: LoRAs with their strengths under a name, kept as TOML files in HOME/blends. No torch."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainers.cells import MOST_LORAS, LoraUse
from trainers.errors import SettingError
from trainers.files import write_atomically

_NAME = re.compile(r"[^\W_][\w .()+-]{0,59}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for itself
_HEAD = "# A blend of LoRAs: strengths on the denoiser (unet) and the text encoders (text); blocks are multipliers.\n"


@dataclass(frozen=True)
class Blend:
    """LoRAs that act together, each at its strengths. Their paths are absolute here, and relative to HOME in the file."""

    loras: tuple[LoraUse, ...]


def blend_file(home: Path, name: str) -> Path:
    """Where the blend of a name lies. Raises SettingError for a name that no file can have."""
    if not _NAME.fullmatch(name) or name != name.strip(" .") or _RESERVED.fullmatch(name):
        what = "A blend's name has 1 to 60 letters, digits, spaces and . ( ) + -, and begins with a letter or digit"
        raise SettingError(what, where="name", hint="Choose another name.")
    return home / "blends" / f"{name}.toml"


def list_blends(home: Path) -> list[str]:
    """Names of the blends that there are, in the order of the alphabet."""
    try:
        names = [name for name in os.listdir(home / "blends") if name.endswith(".toml")]
    except FileNotFoundError:
        return []
    return sorted((name.removesuffix(".toml") for name in names), key=str.casefold)


def read_blend(file: Path, home: Path) -> Blend:
    """Reads a blend. Raises SettingError for a file that is not there, or is none; that its LoRAs are there is not checked."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingError("There is no such blend", where=file.stem, hint="Choose one of the list.") from error
    except (OSError, ValueError) as error:
        raise SettingError(f"The blend cannot be read: {error}", where=str(file), hint="Correct that file.") from error
    listed = values.get("lora", [])
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_LORAS or values.keys() != {"lora"}:
        what = f"A blend is a list of 1 to {MOST_LORAS} [[lora]] and nothing else"
        raise SettingError(what, where=str(file), hint="Correct that file.")
    return Blend(tuple(_use(one, file, home) for one in listed))


def _use(values: Any, file: Path, home: Path) -> LoraUse:
    """One [[lora]]: file, unet, and where they differ from that or from 1, text and blocks."""
    try:
        if not isinstance(values, Mapping) or not isinstance(values.get("file"), str):
            raise ValueError("its file is missing")
        given = {key: value for key, value in values.items() if key != "file"}
        return LoraUse(path=str(home.absolute() / values["file"]), **{"text": given.get("unet"), **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(piece) for piece in first["loc"])
        raise SettingError(f"{field}: {first['msg']}", where=str(file), hint="Correct that [[lora]].") from error
    except ValueError as error:
        raise SettingError(f"A [[lora]] cannot be read: {error}", where=str(file), hint="Correct it.") from error


def write_blend(file: Path, blend: Blend, home: Path) -> None:
    """Writes a blend, in the place of one of that name. Raises OSError."""
    import tomlkit

    document = tomlkit.document()
    listed = tomlkit.aot()
    for lora in blend.loras:
        table = tomlkit.table()
        table.add("file", _relative(Path(lora.path), home.absolute()))
        table.add("unet", float(lora.unet))
        if lora.text != lora.unet:
            table.add("text", float(lora.text))
        if lora.strengths.blocks:
            blocks = tomlkit.inline_table()
            blocks.update({block: float(value) for block, value in lora.strengths.blocks.items()})
            table.add("blocks", blocks)
        listed.append(table)
    document.add("lora", listed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (_HEAD + tomlkit.dumps(document)).encode())


def _relative(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)
