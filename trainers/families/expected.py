"""What tensors a model of a family's usual sizes has, so that a missing one is found without building the model. No torch.

The tables ship in assets/families; a test builds the models without memory and compares. `python -m tests.family_tables`
writes them anew.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping
from typing import Any

from trainers.errors import BaseModelError
from trainers.families.configuration import read_configs
from trainers.families.facts import ASSETS, BaseModelFacts
from trainers.families.stored import Stored, stored_tensors
from trainers.text import name_list

_FREE = ("sample_size", "_diffusers_version", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Settings that change no tensor's name or shape."""


@functools.cache
def expected_tensors(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part -> name in diffusers' layout, without text_model -> shape, of a family's published models."""
    packed = (ASSETS / "families" / family / "tensors.json.gz").read_bytes()
    table = json.loads(gzip.decompress(packed))
    return {part: {name: tuple(shape) for name, shape in tensors.items()} for part, tensors in table.items()}


def check_tensors(base: BaseModelFacts) -> None:
    """Holds the files' headers against the tables, for parts of the usual sizes. Raises BaseModelError naming the tensor."""
    usual = read_configs(ASSETS / "families" / base.family.name)
    for part, wanted in expected_tensors(base.family.name).items():
        if _same(base.configs[part], usual[part]):
            match_tensors(base, part, wanted, stored_tensors(base, part))


def match_tensors(
    base: BaseModelFacts, part: str, wanted: Mapping[str, tuple[int, ...]], known: Mapping[str, Stored]
) -> dict[str, Stored]:
    """Where each wanted tensor is stored. Raises BaseModelError for missing and misfitting ones."""
    where = str(next(iter(known.values())).file) if known else str(base.source)
    missing = [name for name in wanted if name not in known]
    if missing:
        what = f"The {part.replace('_', ' ')} lacks {len(missing)} of its {len(wanted)} tensors ({name_list(missing)})"
        raise BaseModelError(what, where=where, hint="The file is incomplete, or of another kind; download it again.")
    for name, shape in wanted.items():
        if _without_ones(known[name].shape) != _without_ones(shape):
            what = f"{part}: {name} is {known[name].shape} in the file, and {shape} in {base.family.title}"
            raise BaseModelError(what, where=where, hint="This is a model of another kind.")
    return {name: known[name] for name in wanted}


def _same(config: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    return all(config.get(name, value) == value for name, value in usual.items() if name not in _FREE)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a Linear layer of the same widths hold the same numbers."""
    return shape[:2] if tuple(shape[2:]) == (1, 1) else shape
