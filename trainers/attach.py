"""Puts LoRA files into a loaded model, beside its frozen layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainers.adapters import ADAPTERS
from trainers.adapters.inject import adapt_layers, attach, find_layers
from trainers.families.base import DiffusionModel
from trainers.formats import read_adapter
from trainers.text import printable


def attach_files(model: DiffusionModel, paths: list[Path], tell: Callable[[str], object] = lambda remark: None) -> list[str]:
    """Adds LoRA files to a loaded model and returns the adapters' names.

    `tell` gets a sentence for each file with modules that the base has not. Raises AdapterFileError when none is there.
    """
    found = find_layers(model.parts())
    shapes = {name: tuple(layer.weight.shape) for name, layer in found.items()}  # type: ignore[arg-type]
    names = []
    for number, path in enumerate(paths):
        file = read_adapter(path, list(found), shapes, model.facts.family.name)
        if file.unmatched:
            total = len(file.modules) + len(file.unmatched)
            example = printable(file.unmatched[0])
            tell(f"{len(file.unmatched)} of {total} modules of {path.name} are not in this base, for example {example}.")
        name = f"file-{number}"
        layers = adapt_layers(model.parts(), list(file.modules))
        for layer, module in file.modules.items():
            attach(layers[layer], name, ADAPTERS[module.kind], module.factors, module.scale)
        names.append(name)
    return names
