"""Checkpoints of the older kind (.ckpt, .pt): a pickle, so read by torch with weights_only and by nothing else.

Their header cannot be read without torch. Where torch is not loaded, as in the window, a process of its own looks:
`python -P -m trainers.families.ckpt FILE` prints the tensors' names, dtypes and shapes as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainers.container import Entry
from trainers.errors import BaseModelError

_SPELLED = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
_UNSAFE = "The file holds more than weights, and such a file can run programs: it was not opened"
_HINT = "Ask for the .safetensors version."


def is_ckpt(path: Path) -> bool:
    """Whether a file's name says that it is a pickled checkpoint."""
    return path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin")


def read_ckpt_entries(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of its tensors; start and end only tell their size. Raises BaseModelError."""
    if "torch" in sys.modules:
        found = _look(load_ckpt(path))
    else:
        command = [sys.executable, "-P", "-m", "trainers.families.ckpt", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=300)
            answer = json.loads(done.stdout)
        except (ValueError, subprocess.TimeoutExpired) as error:
            raise BaseModelError("The checkpoint could not be read", where=str(path), hint=_HINT) from error
        if "what" in answer:
            raise BaseModelError(answer["what"], answer["where"], answer["hint"])
        found = answer["tensors"]
    return {name: Entry(dtype, tuple(shape), 0, size) for name, (dtype, shape, size) in found.items()}


def load_ckpt(path: Path) -> dict[str, Any]:
    """The tensors of a pickled checkpoint by name, still on the disk where its kind allows. Raises BaseModelError."""
    import pickle
    import zipfile

    import torch

    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise BaseModelError(f"The file cannot be read: {error.strerror}", where=str(path)) from error
    if not start.startswith((b"PK", b"\x80")):
        safe = start[8:9] == b"{"
        what = "This is a safetensors file that is called .ckpt" if safe else "This is no checkpoint, whatever its name says"
        raise BaseModelError(what, where=str(path), hint="Call it .safetensors." if safe else _HINT)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise BaseModelError(_UNSAFE, where=str(path), hint=_HINT) from error
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, AttributeError, IndexError, TypeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BaseModelError(f"The checkpoint is damaged or none: {first}", where=str(path), hint=_HINT) from error
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    tensors = {str(name): value for name, value in values.items() if torch.is_tensor(value)} if isinstance(values, dict) else {}
    if not tensors:
        raise BaseModelError("The checkpoint holds no tensors", where=str(path), hint=_HINT)
    if any(tensor.layout != torch.strided or tensor.device.type != "cpu" for tensor in tensors.values()):
        raise BaseModelError("The checkpoint holds tensors without plain numbers", where=str(path), hint=_HINT)
    return tensors


def _look(tensors: dict[str, Any]) -> dict[str, tuple[str, list[int], int]]:
    found = {}
    for name, tensor in tensors.items():
        spelled, size = _SPELLED.get(str(tensor.dtype).removeprefix("torch."), ("U8", 1))
        found[name] = (spelled, list(tensor.shape), tensor.numel() * size)
    return found


def main(path: str) -> int:
    """Prints what is in the file, or why it cannot be read, as one line of JSON."""
    try:
        print(json.dumps({"tensors": _look(load_ckpt(Path(path)))}))
    except BaseModelError as error:
        print(json.dumps({"what": error.what, "where": error.where, "hint": error.hint}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
