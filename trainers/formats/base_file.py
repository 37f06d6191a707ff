"""Writes a whole base model, as a single file in LDM layout or as a folder in diffusers layout, tensor by tensor.

Any layout is read and either is written, so this also converts one into the other. `change` may give back another tensor
of the same shape, as merging a LoRA does; what it leaves alone keeps its bits.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from trainers.container import BITS, Entry, serialise_header
from trainers.errors import BaseModelError
from trainers.families import ASSETS, BaseModelFacts, stored_tensors
from trainers.families.configuration import FILES
from trainers.families.ldm import Place, part_layouts
from trainers.families.locate import WEIGHTS
from trainers.families.single_file import CONFIGURATION
from trainers.families.stored import Stored, entries_of, metadata_of
from trainers.families.tensor_files import TensorFiles
from trainers.families.vocabulary import only_merges, write_words
from trainers.files import write_atomically
from trainers.tensors import FLOATS, NUMBERS

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""(canonical tensor name such as unet.conv_in.weight, tensor in diffusers' layout) -> the tensor to write."""
SPELLED = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class _Out:
    """One tensor to write: its key, shape and dtype, and the stored ones that it is made of (three where it is fused)."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    stored: tuple[Stored, ...]
    transposed: bool = False


def write_base(
    base: BaseModelFacts,
    target: Path,
    change: Change | None = None,
    dtype: str | None = None,
    told: Mapping[str, str] | None = None,
) -> None:
    """Writes `base` to `target`: a single file where that ends in .safetensors, else a folder.

    `dtype` (fp16, bf16, fp32) casts all numbers that are not whole; None keeps each one's own. `told` is what a single
    file's metadata say beside or in place of the base's own. Raises BaseModelError where something is there already, and
    for numbers that the dtype cannot hold, OSError; nothing half-written is left.
    """
    if target.exists():
        raise BaseModelError("There is such a file or folder already", where=str(target), hint="Choose another name.")
    if target.suffix == ".safetensors":
        write_tensors(target, _single_file(base, dtype), change, _metadata(base) | dict(told or {}))
        return
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_folder(base, aside, change, dtype)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_tensors(target: Path, outs: list[_Out], change: Change | None, metadata: Mapping[str, str]) -> None:
    """One safetensors file of `outs`, each read when its turn comes. Raises OSError, BaseModelError."""
    outs = sorted(outs, key=lambda out: (-BITS[out.dtype], out.key))
    entries, position = [], 0
    for out in outs:
        size = math.prod(out.shape) * BITS[out.dtype] // 8
        entries.append((out.key, Entry(out.dtype, out.shape, position, position + size)))
        position += size

    def pieces() -> Iterator[bytes]:
        yield serialise_header(entries, metadata)
        with TensorFiles() as files:
            for out in outs:
                yield _bytes_of(out, files, change)

    write_atomically(target, pieces())


def _bytes_of(out: _Out, files: TensorFiles, change: Change | None) -> bytes:
    tensors = []
    for name, stored in zip(out.names, out.stored, strict=True):
        tensor = files.read(stored)
        if change is not None and name:
            tensor = change(name, tensor)
        tensors.append(tensor)
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if out.transposed:
        whole = whole.T
    whole = whole.to(NUMBERS[out.dtype]).contiguous()
    if out.dtype == "F16" and any(tensor.dtype != torch.float16 for tensor in tensors) and bool(whole.isinf().any()):
        hint = "Write bf16 or fp32 (--dtype)."
        raise BaseModelError("The base holds numbers that are too large for fp16", where=out.key, hint=hint)
    return whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def _single_file(base: BaseModelFacts, dtype: str | None) -> list[_Out]:
    """What goes into a single file: every part at its place, and what else the base's own single file holds."""
    grouped: dict[str, list[tuple[int, str, Stored]]] = {}
    transposed = set()
    for part, layout in part_layouts(base.family.name, base.configs).items():
        for name, stored in stored_tensors(base, part).items():
            place = layout.place(name)
            if place is not None:
                grouped.setdefault(place.key, []).append((place.third, f"{part}.{name}", stored))
                transposed |= {place.key} if place.transposed else set()
    outs = []
    for key, members in grouped.items():
        members.sort(key=lambda member: member[0])
        shape = members[0][2].shape
        if key.startswith("first_stage_model.") and ".mid.attn_1." in key and len(shape) == 2:
            shape = (*shape, 1, 1)  # the original autoencoder's attention is made of 1x1 convolutions
        if members[0][0] >= 0 and [third for third, _, _ in members] != [0, 1, 2]:
            hint = "The base is incomplete; download it again."
            raise BaseModelError(f"One of q, k and v is missing beside {members[0][1]}", where=str(base.source), hint=hint)
        if len(members) == 3:
            shape = (3 * shape[0], *shape[1:])
        spelled = _spelled(members[0][2], dtype)
        names, stored_ = tuple(name for _, name, _ in members), tuple(stored for _, _, stored in members)
        outs.append(_Out(key, shape[::-1] if key in transposed else shape, spelled, names, stored_, key in transposed))
    return outs + (_foreign(base, {out.key for out in outs}) if base.checkpoint else [])


def _spelled(stored: Stored, dtype: str | None) -> str:
    """How the container spells the dtype to write; a list of positions stays one of whole numbers."""
    return SPELLED[dtype] if dtype and stored.entry.dtype in FLOATS else stored.entry.dtype


def _foreign(base: BaseModelFacts, known: set[str]) -> list[_Out]:
    """Tensors of a single file that are no part's, such as marks and running means: copied as they are."""
    assert base.checkpoint is not None
    layouts = part_layouts(base.family.name, base.configs)
    rest = {
        key: entry
        for key, entry in entries_of(base.checkpoint).items()
        if key not in known
        and not any(layout.names(key) for layout in layouts.values())
        and not (base.vae and key.startswith("first_stage_model."))
    }
    return [
        _Out(key, entry.shape, entry.dtype, ("",), (Stored(base.checkpoint, Place(key), entry),)) for key, entry in rest.items()
    ]


def _metadata(base: BaseModelFacts) -> dict[str, str]:
    """What the source says of itself but for hashes, what it predicts, and its configuration, so that any size can be read."""
    told = dict(metadata_of(base.checkpoint)) if base.checkpoint else {}
    told = {key: value for key, value in told.items() if "hash" not in key}
    told["modelspec.prediction_type"] = "v" if base.prediction_type == "v_prediction" else base.prediction_type
    told["format"] = "pt"
    return told | {CONFIGURATION: json.dumps(base.configs, sort_keys=True)}


def _write_folder(base: BaseModelFacts, folder: Path, change: Change | None, dtype: str | None) -> None:
    """A complete folder in diffusers layout, tokenizers included."""
    for part in (*base.family.parts, "vae"):
        names = {name: stored for name, stored in stored_tensors(base, part).items() if _belongs(base, part, name)}
        outs = [
            _Out(
                _folder_key(part, name),
                _folder_shape(part, name, stored.shape),
                _spelled(stored, dtype),
                (f"{part}.{name}",),
                (stored,),
            )
            for name, stored in names.items()
        ]
        write_tensors(folder / part / f"{WEIGHTS[part]}.safetensors", outs, change, {"format": "pt"})
    for part, config in base.configs.items():
        _write_json(folder / FILES[part], config)
    shipped = ASSETS / "families" / base.family.name
    shutil.copyfile(shipped / "model_index.json", folder / "model_index.json")
    for part in base.family.text_encoders:
        tokenizer = part.replace("text_encoder", "tokenizer")
        sources = [ASSETS / "pocket" / "tokenizer", base.folder / tokenizer]  # the family's own settings over the vocabulary
        for source in sources if base.checkpoint else sources[1:]:
            shutil.copytree(source, folder / tokenizer, dirs_exist_ok=True)
        if only_merges(folder / tokenizer):
            write_words(folder / tokenizer)  # other programs want them


def _belongs(base: BaseModelFacts, part: str, name: str) -> bool:
    """SD 2.x's first encoder has a projection in a single file that diffusers' layout has no place for."""
    return part == "text_encoder_2" or not name.startswith("text_projection")


def _folder_shape(part: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """diffusers' VAE attends by Linear layers, the original by 1x1 convolutions."""
    return shape[:2] if part == "vae" and ".attentions.0." in name else shape


def _folder_key(part: str, name: str) -> str:
    """All programs but the newest transformers ask for `text_model.`, which reads both."""
    return f"text_model.{name}" if part.startswith("text_encoder") and not name.startswith("text_projection") else name


def _write_json(path: Path, values: object) -> None:
    write_atomically(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
