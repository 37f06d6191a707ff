"""One adapted layer's numbers and a whole file's, as they live in memory. Torch-free at import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.errors import AdapterFileError
from trainers.text import printable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModuleWeights:
    """The LoRA of one layer.

    factors: "down" (r, in) or (r, in, kh, kw), "up" (out, r) or (out, r, 1, 1), float32. The change of the layer's
    weight at strength 1 is alpha / r * up @ down.
    """

    factors: Mapping[str, torch.Tensor]
    alpha: float

    @property
    def rank(self) -> int:
        """r: the rows of `down`."""
        return int(self.factors["down"].shape[0])

    @property
    def scale(self) -> float:
        """alpha / rank, the factor in front of up @ down."""
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """The change of the weight at strength 1, float64: (out, in), or (out, in, kh, kw) for a convolution."""
        up, down = self.factors["up"].double().flatten(1), self.factors["down"].double()
        return (self.scale * (up @ down.flatten(1))).reshape(up.shape[0], *down.shape[1:])

    def delta_norm(self) -> float:
        """Frobenius norm of `delta()`, from the two (r, r) Gram matrices: the full matrix is never formed."""
        up, down = self.factors["up"].double().flatten(1), self.factors["down"].double().flatten(1)
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.scale) * math.sqrt(max(squared, 0.0))


@dataclass(frozen=True)
class AdapterFile:
    """What a LoRA file holds for one base model.

    modules: by canonical name, float32. metadata: as in the file, which is text that others wrote. unmatched: the key
    prefixes in the file that name no module of the base, in the file's spelling.
    """

    modules: dict[str, ModuleWeights]
    metadata: dict[str, str]
    unmatched: tuple[str, ...]


def check_module(name: str, weights: ModuleWeights, where: str = "") -> None:
    """Raises AdapterFileError, naming the module, unless both factors are there, fit each other and are finite."""
    shown, again = printable(name, 120), "Export it again."
    missing = [part for part in ("down", "up") if part not in weights.factors]
    if missing:
        raise AdapterFileError(f"Module {shown} has no {' and no '.join(missing)} factor", where, again)
    down, up = weights.factors["down"], weights.factors["up"]
    if 0 in down.shape or 0 in up.shape:
        raise AdapterFileError(f"Module {shown} has a factor of size zero", where, again)
    sound = down.ndim in (2, 4) and up.ndim in (2, 4) and tuple(up.shape[2:]) in ((), (1, 1))
    if not sound or up.shape[1] != down.shape[0]:
        what = f"Module {shown}: up {tuple(up.shape)} and down {tuple(down.shape)} do not fit each other"
        raise AdapterFileError(what, where, "They may be swapped. " + again)
    for part, tensor in weights.factors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            what = f"Module {shown}: {bad:,} of {tensor.numel():,} numbers of its {part} factor are NaN or infinite"
            raise AdapterFileError(what, where, "Such a file draws black pictures. Take an earlier checkpoint.")
    if not math.isfinite(weights.alpha):
        raise AdapterFileError(f"Module {shown}: alpha is {weights.alpha}", where, again)
