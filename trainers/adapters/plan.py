"""Where adapters go, in words: layer names, ranks and scales. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPlan:
    """Where one adapter goes: canonical layer name, rank, scale, and which learning-rate group it belongs to."""

    name: str
    rank: int
    scale: float
    group: str


def canonical_name(part: str, path: str) -> str:
    """`<part>.<path>`; CLIP's paths lose `text_model.`, which transformers wrote before 5.6 and dropped since."""
    return f"{part}.{path.removeprefix('text_model.')}"
