"""VectorTable: stands in for a text encoder's frozen table of tokens and adds learned vectors under negative numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainers.adapters.pivotal import vectors_of
from trainers.adapters.plan import canonical_name


class VectorTable(nn.Module):
    """y = table[id] for id >= 0, and vector -1 - id of `words`, one word behind the other, for id < 0.

    Numbers above the table's would do for the lookup, but CLIP finds a prompt's end as its highest number where its
    configuration is of the old kind, as SDXL's is.
    """

    def __init__(self, frozen: nn.Embedding) -> None:
        super().__init__()
        self.frozen = frozen
        self.words: dict[str, Mapping[str, torch.Tensor]] = {}
        """By word: its vectors, as pivotal.vectors_of reads them."""

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table (tokens, width)."""
        return self.frozen.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, n) int64 -> (B, n, width), in the table's number format."""
        known: torch.Tensor = self.frozen(tokens.clamp_min(0))
        if not self.words:
            return known
        vectors = torch.cat([vectors_of(factors) for factors in self.words.values()])
        learned = F.embedding((-1 - tokens).clamp_min(0), vectors).to(known.dtype)
        return torch.where((tokens < 0)[..., None], learned, known)


def add_tables(parts: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, VectorTable]:
    """Replaces the named tables by VectorTables (kept where already there). Raises KeyError for an unknown name."""
    paths = {canonical_name(part, path): (module, path) for part, module in parts.items() for path, _ in module.named_modules()}
    tables: dict[str, VectorTable] = {}
    for name in names:
        root, path = paths[name]
        table: Any = root.get_submodule(path)
        if not isinstance(table, VectorTable):
            table = VectorTable(table)
            parent, _, leaf = path.rpartition(".")
            setattr(root.get_submodule(parent), leaf, table)
        tables[name] = table
    return tables
