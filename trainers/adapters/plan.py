"""Where adapters go, in words: layer names, ranks and scales. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class LayerPlan:
    """Where one adapter goes: canonical layer name, rank, scale, and which learning-rate group it belongs to."""

    name: str
    rank: int
    scale: float
    group: str


@dataclass(frozen=True)
class VectorPlan:
    """New vectors for a word beside one text encoder's table: its canonical name, how many, and what they start from."""

    name: str
    word: str
    count: int
    tokens: tuple[int, ...]
    keeps_length: bool


def canonical_name(part: str, path: str) -> str:
    """`<part>.<path>`; CLIP's paths lose `text_model.`, which transformers wrote before 5.6 and dropped since."""
    return f"{part}.{path.removeprefix('text_model.')}"


def fitting(patterns: Iterable[str], name: str) -> list[str]:
    """The patterns that a layer's name fits, the one that counts first: whole parts of it between dots, with * for anything.

    The longest counts, whatever their order, which no file keeps: TOML puts a.b and a.c together, and settings that are laid
    over others keep the places of those. A * has no length; of the same length the first one by name counts.
    """
    found = [pattern for pattern in patterns if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
    return sorted(found, key=lambda pattern: (-length_of(pattern), pattern))


def length_of(pattern: str) -> int:
    """Characters of a pattern but for *, the dots among them."""
    return len(pattern) - pattern.count("*")


BLOCKS = ("text", "down_0", "down_1", "down_2", "down_3", "mid", "up_0", "up_1", "up_2", "up_3", "other")
"""Where a layer may stand: the text encoders, the denoiser's blocks, and what is in none of them, as conv_in is."""


def block_of(name: str) -> str:
    """The one of BLOCKS in which a layer stands, by its canonical name."""
    part, _, path = name.partition(".")
    if part != "unet":
        return "text"
    block, _, inside = path.partition(".")
    if block == "mid_block":
        return "mid"
    way = {"down_blocks": "down", "up_blocks": "up"}.get(block)
    return f"{way}_{inside.partition('.')[0]}" if way else "other"


@dataclass(frozen=True)
class Strengths:
    """One adapter's strengths: on the denoiser, on the text encoders, and multipliers by block, of which a missing one is 1."""

    unet: float
    text: float
    blocks: Mapping[str, float] = field(default_factory=dict)

    def at(self, block: str) -> float:
        """The strength on the layers of one of BLOCKS."""
        return (self.text if block == "text" else self.unet) * self.blocks.get(block, 1.0)

    def __str__(self) -> str:
        parts = f"{self.unet:g}" if self.text == self.unet else f"{self.unet:g} (text {self.text:g})"
        return " ".join([parts, *(f"{block} x {value:g}" for block, value in self.blocks.items())])

    @property
    def is_off(self) -> bool:
        """Whether nothing of the adapter acts anywhere."""
        return not any(self.at(block) for block in BLOCKS)


def strength_at(strength: float | Strengths, block: str) -> float:
    """A strength on one block; a plain number counts for all."""
    return strength.at(block) if isinstance(strength, Strengths) else float(strength)
