"""Where each tensor of a base lies on the disk, known from headers alone, in either layout. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainers.container import Entry, open_file, read_header
from trainers.errors import AdapterFileError, BaseModelError
from trainers.families.ckpt import is_ckpt, read_ckpt_entries
from trainers.families.configuration import read_json, wrong
from trainers.families.facts import BaseModelFacts
from trainers.families.ldm import PartLayout, Place, part_layouts
from trainers.families.locate import WEIGHTS

# diffusers wrote a VAE's attention so before 0.12, and well-known repositories still do.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Stored:
    """One tensor of a part: its file, its place there, and what the file's header says of it (of all three, if fused)."""

    file: Path
    place: Place
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it has once it is taken out of its place."""
        shape = self.entry.shape
        if self.place.third >= 0:
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.place.transposed else shape


def stored_tensors(base: BaseModelFacts, part: str) -> dict[str, Stored]:
    """Name in diffusers' layout (without text_model) -> where it is stored, in the order of the files.

    Raises BaseModelError for files that are missing or damaged.
    """
    found: dict[str, Stored] = {}
    if part == "vae" and base.vae is not None:
        for file in _vae_files(base.vae):
            _collect_vae(file, base, found)
    elif base.checkpoint is not None:
        _collect(base.checkpoint, part_layouts(base.family.name, base.configs)[part], found)
    else:
        for file in weight_files(base, part):
            for key, entry in entries_of(file).items():
                found[_plain_name(part, key)] = Stored(file, Place(key), entry)
    return found


def entries_of(path: Path) -> Mapping[str, Entry]:
    """The tensors in a checkpoint file by name. Raises BaseModelError for what is damaged or no checkpoint."""
    return _header_of(path)[0]


def _header_of(path: Path) -> tuple[Mapping[str, Entry], Mapping[str, str]]:
    with as_base_error():
        try:
            facts = path.stat()
        except OSError as error:
            raise BaseModelError(f"The file cannot be read: {error.strerror}", where=str(path)) from error
        return _read_header_of(path, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=16)  # a run asks several times; the key changes with the file
def _read_header_of(path: Path, changed: int, size: int) -> tuple[Mapping[str, Entry], Mapping[str, str]]:
    if is_ckpt(path):
        return read_ckpt_entries(path), {}
    with open_file(path) as handle:
        header = read_header(handle, path)
    return header.entries, header.metadata


def metadata_of(path: Path) -> Mapping[str, str]:
    """What a single file says about itself; nothing for a .ckpt. Raises BaseModelError as `entries_of`."""
    return _header_of(path)[1]


@contextmanager
def as_base_error() -> Iterator[None]:
    """What is wrong with a file of a base is told as the base's fault."""
    try:
        yield
    except AdapterFileError as error:
        raise BaseModelError(error.what, error.where, error.hint) from error


def _collect(file: Path, layout: PartLayout, found: dict[str, Stored]) -> None:
    for key, entry in entries_of(file).items():
        for name, place in layout.names(key):
            found.setdefault(name, Stored(file, place, entry))


def _collect_vae(file: Path, base: BaseModelFacts, found: dict[str, Stored]) -> None:
    """A VAE's own file: in LDM layout, with or without its beginning, or in diffusers'."""
    table = part_layouts(base.family.name, base.configs)["vae"].table
    if any(".down.0." in key for key in entries_of(file)):
        _collect(file, PartLayout(("first_stage_model.", ""), table), found)
    else:
        found |= {_plain_name("vae", key): Stored(file, Place(key), entry) for key, entry in entries_of(file).items()}


def _vae_files(vae: Path) -> list[Path]:
    return files_of_part(vae, "vae", "") if vae.is_dir() else [vae]


def _plain_name(part: str, key: str) -> str:
    if part == "vae" and ".attentions.0." in key:
        for old, new in _OLD_ATTENTION.items():
            key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return key.removeprefix("text_model.") if part.startswith("text_encoder") else key


def weight_files(base: BaseModelFacts, part: str) -> list[Path]:
    """The files that hold a part's weights (unet, vae, text_encoder, ...): one, or its pieces in order.

    Raises BaseModelError naming the part where there is none, or a piece is missing.
    """
    if part == "vae" and base.vae is not None:
        return _vae_files(base.vae)
    return [base.checkpoint] if base.checkpoint else files_of_part(base.folder, part, part)


def files_of_part(folder: Path, part: str, inside: str) -> list[Path]:
    """The weight files of a part in the sub-folder `inside` of `folder`. Raises BaseModelError."""
    name = f"{WEIGHTS[part]}.safetensors"
    index = f"{inside}/{name}.index.json" if inside else f"{name}.index.json"
    if not (folder / index).is_file():
        names = [name]
    else:
        pieces = read_json(folder, index).get("weight_map")
        names = list(pieces.values()) if isinstance(pieces, dict) else []
        if not names or not all(isinstance(piece, str) and piece == Path(piece).name != "" for piece in names):
            raise wrong(folder, index, "weight_map", "names no files beside it")
        names = sorted(set(names))
    missing = [piece for piece in names if not (folder / inside / piece).is_file()]
    if missing:
        what = f"The base model has no weights for {part}" + (f": {missing[0]} is missing" if len(names) > 1 else "")
        raise BaseModelError(what, where=str(folder / inside), hint=f"Expected the file {missing[0]}; variants are not used.")
    return [folder / inside / piece for piece in names]


def denoiser_bytes(base: BaseModelFacts) -> int:
    """Bytes of the denoiser's weights as they are stored."""
    return sum(stored.entry.end - stored.entry.start for stored in stored_tensors(base, "unet").values())
