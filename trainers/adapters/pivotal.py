"""Pivotal tuning: new vectors for the trigger word (textual inversion, arXiv 2208.01618), beside a LoRA or alone.

The trigger is read as n new tokens: y = table[id] for the base's tokens, y = v[k] for the k-th of them, in every text encoder
the family has. The table is never written to, and the encoders stay frozen unless a LoRA is asked for in them too.

The vectors start as those of words that the base knows, so that step 0 is the base's answer to these words. With
`keep_length`, v = L w / ||w||, where w is what learns and L the length at the start: a vector turns, and stays as long as
words are. The LoRA is plain, and its strength says nothing of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from trainers.adapters.lora import LORA
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch

VECTORS, LENGTH = "vectors", "length"
"""Names of what learns (n, width), and of the constant beside it (n, 1) where lengths are kept."""
NO_TRIGGER = (
    "Pivotal tuning needs a trigger word: its vectors are what is learnt",
    "dataset.trigger",
    "Give a word of your own, as --trigger zwx; or choose another adapter.type.",
)
"""What, where and hint of the refusal."""


class PivotalSettings(LowRankSettings):
    """Vectors of its own for the trigger word, with a LoRA on the denoiser or without."""

    type: Literal["pivotal"] = "pivotal"
    """Kind of adapter."""
    lora: bool = True
    """Train a LoRA beside the trigger's vectors; off trains the vectors alone, a file of a few kB."""
    vectors: int = Field(default=2, ge=1, le=64)
    """How many vectors the trigger word has in each text encoder, of the 75 places in a prompt."""
    start_words: str = ""
    """Words that the vectors start from, as `round icon`. Empty: the trigger word as the base reads it."""
    vectors_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the vectors. Unset: 0.001, or the optimizer's where it has one rate for all parts."""
    keep_length: bool = True
    """Each vector stays as long as it starts, as words are; off lets it grow."""

    @property
    def trained(self) -> Any:
        """The mathematics of the layers; that of the vectors stands in this file."""
        return LORA

    @property
    def changes_layers(self) -> bool:
        """See LowRankSettings."""
        return self.lora

    @property
    def trigger_vectors(self) -> int:
        """See LowRankSettings."""
        return self.vectors


def start_vectors(table: torch.Tensor, tokens: tuple[int, ...], count: int) -> torch.Tensor:
    """`count` vectors (count, width) float32 out of a table (tokens, width): those of `tokens`, in their order.

    More vectors than tokens repeat each; fewer are the means of neighbours.
    """
    import torch

    own = table[torch.tensor(tokens, device=table.device)].float().cpu()
    edges = [number * len(tokens) // count for number in range(count + 1)]
    pieces = [own[low : max(high, low + 1)] for low, high in pairwise(edges)]
    return torch.stack([piece[0] if len(piece) == 1 else piece.mean(0) for piece in pieces])


def lengths_of(vectors: torch.Tensor) -> torch.Tensor:
    """(n, width) -> (n, 1), never zero."""
    lengths: torch.Tensor = vectors.norm(dim=1, keepdim=True)
    return lengths.clamp_min(1e-12)


def vectors_of(factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The vectors (n, width) as the text encoder reads them."""
    vectors = factors[VECTORS]
    return vectors * (factors[LENGTH] / lengths_of(vectors)) if LENGTH in factors else vectors
