"""Puts LoRA files into a loaded model, beside its frozen layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from trainers.adapters import ADAPTERS
from trainers.adapters.inject import adapt_layers, attach, find_layers
from trainers.families.base import DiffusionModel
from trainers.families.facts import BaseModelFacts
from trainers.formats import read_adapter
from trainers.text import printable


def attach_files(model: DiffusionModel, paths: list[Path], tell: Callable[[str], object] = lambda remark: None) -> list[str]:
    """Adds LoRA files to a loaded model and returns the adapters' names.

    `tell` gets a sentence for each file with modules that the base has not, or that was trained on a base read otherwise.
    Raises AdapterFileError when none is there.
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
        for remark in _read_otherwise(file.metadata, model.facts):
            tell(f"{path.name} was trained {remark}: it may not look as it should.")
        name = f"file-{number}"
        layers = adapt_layers(model.parts(), list(file.modules))
        for layer, module in file.modules.items():
            attach(layers[layer], name, ADAPTERS[module.kind], module.factors, module.scale)
        names.append(name)
    return names


def _read_otherwise(metadata: Mapping[str, str], base: BaseModelFacts) -> list[str]:
    """How the base was read in training and is not now, as far as the file tells."""
    remarks = []
    skip = metadata.get("ss_clip_skip", "")
    if skip.isdigit() and int(skip) != base.clip_skip and int(skip) > 1:
        remarks.append(f"with clip skip {skip}, and the base is read with {base.clip_skip}")
    said = metadata.get("modelspec.prediction_type", "")
    known = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(said, base.prediction_type)
    if known != base.prediction_type:
        remarks.append(f"on a base that predicts {known}, and this one predicts {base.prediction_type}")
    return remarks
