"""Puts LoRA files into a loaded model, beside its frozen layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from trainers.adapters import ADAPTERS
from trainers.adapters.inject import adapt_layers, attach, find_layers
from trainers.adapters.layer import AdaptedLayer
from trainers.families.base import DiffusionModel
from trainers.families.facts import BaseModelFacts
from trainers.formats import base_for, read_for
from trainers.text import printable

if TYPE_CHECKING:
    from trainers.formats.reading import LoadedBase

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Layers:
    """A loaded base's layers by canonical name, found once, and how files are read for it."""

    model: DiffusionModel
    by_name: dict[str, nn.Module]
    read_as: LoadedBase


def find(model: DiffusionModel) -> Layers:
    """The layers of a base, with any LoRA or none in it."""
    found = find_layers(model.parts())
    shapes = {name: tuple(layer.weight.shape) for name, layer in found.items()}  # type: ignore[arg-type]
    device = str(next(iter(found.values())).weight.device)
    return Layers(model, found, base_for(found, shapes, model.facts.family.name, device))


def attach_file(base: Layers, path: Path, name: str, tell: Tell = lambda remark: None) -> list[AdaptedLayer]:
    """Adds a LoRA file to the loaded base as the adapter `name` and returns the layers that have it.

    `tell` gets a sentence for a file with modules that the base has not, or that was trained on a base read otherwise.
    Raises AdapterFileError, with the base left as it was.
    """
    model, layers = base.model, base.by_name
    file = read_for(path, base.read_as)
    if file.unmatched:
        total = len(file.modules) + len(file.unmatched)
        example = printable(file.unmatched[0])
        tell(f"{len(file.unmatched)} of {total} modules of {path.name} are not in this base, for example {example}.")
    for remark in _read_otherwise(file.metadata, model.facts):
        tell(f"{path.name} was trained {remark}: it may not look as it should.")
    new = [layer for layer in file.modules if not isinstance(layers[layer], AdaptedLayer)]
    if new:
        layers.update(adapt_layers(model.parts(), new))
    adapted = [cast(AdaptedLayer, layers[layer]) for layer in file.modules]
    for layer, module in zip(adapted, file.modules.values(), strict=True):
        attach(layer, name, ADAPTERS[module.kind], module.factors, module.scale)
    return adapted


def attach_files(model: DiffusionModel, paths: list[Path], tell: Tell = lambda remark: None) -> list[str]:
    """Adds LoRA files to a loaded model, as `attach_file` does, and returns the adapters' names."""
    base, names = find(model), [f"file-{number}" for number in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        attach_file(base, path, name, tell)
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
