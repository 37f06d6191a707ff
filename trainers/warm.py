"""A base model that stays in memory, and the LoRA files beside it: what the render worker keeps from request to request."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.adapters.inject import find_layers
from trainers.adapters.layer import AdaptedLayer
from trainers.attach import Layers, attach_file, find
from trainers.device import choose_device
from trainers.errors import AdapterFileError
from trainers.families import BaseModelFacts, denoiser_bytes, load_family, weight_files
from trainers.families.base import DiffusionModel

Tell = Callable[[dict[str, Any]], object]
Mark = tuple[str, int, int]
"""What a file is known by: path, time of change in nanoseconds, size in bytes."""
KEPT_LORAS = 4
"""How many LoRA files stay beside the base unless one picture has more; the one not used for longest makes room."""
KEPT_BYTES = 2 * 2**30
"""How much of earlier pictures stays on the disk."""


class Warm:
    """The base model in memory and the LoRA files put into it. A LoRA is swapped without reading the base again."""

    def __init__(self) -> None:
        self._base: tuple[Mark, ...] = ()
        self._model: DiffusionModel | None = None
        self._layers: Layers | None = None
        self._loras: dict[Mark, list[AdaptedLayer]] = {}  # with the layers that have each; the last used one last
        self._tidied: set[Path] = set()

    def tidy(self, folder: Path) -> None:
        """Once for each folder: the oldest pictures go until KEPT_BYTES are left."""
        if folder in self._tidied:
            return
        self._tidied.add(folder)
        found = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*.png"))
        over = sum(size for _, size, _ in found) - KEPT_BYTES
        for _, size, file in found:
            if over <= 0:
                break
            file.unlink(missing_ok=True)
            over -= size

    def model(self, base: BaseModelFacts, tell: Tell) -> DiffusionModel:
        """The loaded base, read only when it is another one or its files have changed. Raises TrainingError."""
        marks = base_marks(base)
        if self._model is None or self._base != marks:
            tell({"event": "loading"})
            self._model = self._layers = None  # before the next is read: two bases may not fit into memory
            self._loras.clear()
            gc.collect()
            device = choose_device("auto", denoiser_bytes(base))
            self._model, self._base = load_family(base, device.dtype, device.device), marks
        return self._model

    def adapter(self, model: DiffusionModel, lora: Mark, tell: Tell, together: int = 1) -> str:
        """Name of the LoRA's adapter in the loaded base. Raises AdapterFileError, with the base left as it was.

        together: how many are asked for one after the other that must all stay.
        """
        if self._layers is None or self._layers.model is not model:
            self._loras.clear()
            self._layers = find(model)
        name = str(lora)
        if lora not in self._loras:
            if lora_mark(lora[0]) != lora:
                raise AdapterFileError("The LoRA file was written again meanwhile", where=lora[0], hint="Draw again.")
            tell({"event": "loading"})
            told = functools.partial(print, file=sys.stderr)
            self._loras[lora] = attach_file(self._layers, Path(lora[0]), name, told)
        self._loras[lora] = self._loras.pop(lora)
        # Of a file that a training has just written again, only the new state is of use.
        stale = [mark for mark in self._loras if mark[0] == lora[0] and mark != lora]
        for old in stale or list(self._loras)[: -max(KEPT_LORAS, together)]:
            gone = str(old)
            for layer in self._loras.pop(old):
                del layer.adapters[gone], layer.strengths[gone]
        return name


def adapted_layers(model: DiffusionModel) -> list[AdaptedLayer]:
    """The layers that any LoRA was put into."""
    return [layer for layer in find_layers(model.parts()).values() if isinstance(layer, AdaptedLayer)]


def base_marks(base: BaseModelFacts) -> tuple[Mark, ...]:
    """What a base is known by: its weight files, and the settings that change what is drawn."""
    files = {file: None for part in (*base.family.parts, "vae") for file in weight_files(base, part)}
    settings = json.dumps([base.configs, base.clip_skip], sort_keys=True)
    return (*(_mark(file) for file in files), (settings, 0, 0))


def lora_mark(path: str) -> Mark:
    """What a LoRA file is known by. Raises AdapterFileError when there is no such file."""
    if not Path(path).is_file():
        raise AdapterFileError("There is no such LoRA file", where=path, hint="Check the path.")
    return _mark(Path(path).absolute())


def _mark(path: Path) -> Mark:
    facts = path.stat()
    return str(path), facts.st_mtime_ns, facts.st_size
