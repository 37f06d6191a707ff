"""Embeddings: a word's learned vectors as a file of their own, in the form that A1111, Forge, ComfyUI and diffusers read.

One text encoder: a single tensor `emb_params` (n, width), whose name none of them minds. SDXL: `clip_l` (n, 768) and `clip_g`
(n, 1280), and nothing else. In a prompt the word is the file's name; here it is the trigger phrase in the metadata, where
there is one, so that a checkpoint need not be renamed. Always float32: a few kB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from trainers.container import open_file, read_header
from trainers.errors import AdapterFileError
from trainers.files import write_atomically
from trainers.tensors import FLOATS, read_tensor
from trainers.text import printable

ALONE = "emb_params"
_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_MOST = 75
"""Places in a prompt."""


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors (n, width) float32 by text encoder."""

    word: str
    vectors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]


def write_embedding(path: Path, vectors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the vectors (n, width) by text encoder, and reads them back. Raises AdapterFileError for NaN, infinity, or a
    file that does not hold them, OSError for a full disk."""
    own = {part: tensor.detach().float().cpu().contiguous() for part, tensor in vectors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in own.values()):
        raise AdapterFileError("The trigger's vectors are not finite numbers", str(path), "Train with a lower rate.")
    keys = {part: _KEYS[part] if len(own) > 1 else ALONE for part in own}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({keys[part]: tensor for part, tensor in own.items()}, dict(metadata)))
    read = read_embedding(path).vectors
    if read.keys() != own.keys() or not all(torch.equal(read[part], own[part]) for part in own):
        raise AdapterFileError("The embedding is not as it was written", str(path), "Check the disk.")


def read_embedding(path: Path) -> Embedding:
    """Reads one of our embeddings or another program's, if it is a .safetensors. Raises AdapterFileError for any other."""
    with open_file(path) as handle:
        header = read_header(handle, path)
        names = list(header.entries)
        if set(names) == set(_KEYS.values()):
            parts = {part: key for part, key in _KEYS.items()}
        elif len(names) == 1:
            parts = {"text_encoder": names[0]}
        else:
            shown = ", ".join(printable(name, 40) for name in sorted(names)[:3])
            what = f"This is no embedding: it holds {len(names)} tensors ({shown})"
            raise AdapterFileError(what, str(path), "An embedding holds one tensor, or clip_l and clip_g.")
        vectors = {part: read_tensor(handle, header, key, FLOATS).float() for part, key in parts.items()}
    vectors = {part: tensor[None] if tensor.dim() == 1 else tensor for part, tensor in vectors.items()}
    counts = {tensor.shape[0] for tensor in vectors.values()}
    if any(tensor.dim() != 2 for tensor in vectors.values()) or len(counts) != 1 or not 1 <= counts.pop() <= _MOST:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in vectors.values())
        raise AdapterFileError(f"This is no embedding: its tensor is {shapes}", str(path), "Its vectors are (n, width).")
    if not all(bool(tensor.isfinite().all()) for tensor in vectors.values()):
        raise AdapterFileError("The embedding holds NaN or infinity", str(path), "Export it again.")
    word = header.metadata.get("modelspec.trigger_phrase", "").strip() or path.stem
    return Embedding(printable(word, 200), vectors, dict(header.metadata))
