"""Writes the tables of the families' tensors: `python -m tests.family_tables`. Builds the models without memory."""

from __future__ import annotations

import gzip
import json

from trainers.families.configuration import read_configs
from trainers.families.facts import ASSETS, FAMILIES, BaseModelFacts
from trainers.families.parts import build_part


def table_of(family: str) -> dict[str, dict[str, list[int]]]:
    """Part -> name -> shape, from the library's own models."""
    facts = FAMILIES[family]
    folder = ASSETS / "families" / family
    base = BaseModelFacts(family, folder, facts, "epsilon", 1, 4, 8, 64, False, configs=read_configs(folder))
    return {
        part: {name.removeprefix("text_model."): list(t.shape) for name, t in build_part(base, part).state_dict().items()}
        for part in ("vae", *facts.text_encoders, "unet")
    }


if __name__ == "__main__":
    for name in FAMILIES:
        text = json.dumps(table_of(name), separators=(",", ":"))
        (ASSETS / "families" / name / "tensors.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
