"""One adapted layer's numbers and a whole file's, as they live in memory. Torch-free at import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.adapters import ADAPTERS
from trainers.errors import AdapterFileError
from trainers.text import printable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModuleWeights:
    """The adapter of one layer.

    factors: by the names that its kind gives them, float32; a LoRA has "down" (r, in) or (r, in, kh, kw) and "up"
    (out, r) or (out, r, 1, 1). kind: an entry of ADAPTERS.
    """

    factors: Mapping[str, torch.Tensor]
    alpha: float
    kind: str = "lora"

    @property
    def rank(self) -> int:
        """r; 0 for what has no rank and no alpha: a full difference, or a LoKr of two whole factors."""
        rank: int = ADAPTERS[self.kind].rank(self.factors)
        return rank

    @property
    def scale(self) -> float:
        """alpha / rank, the factor in front of the rest; 1 without a rank."""
        rank = self.rank
        return self.alpha / rank if rank else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes: the layer's own once it is fitted to that, else a kernel may be folded in."""
        shape: tuple[int, ...] = ADAPTERS[self.kind].shape(self.factors)
        return shape

    @property
    def needs_base(self) -> bool:
        """Whether its delta depends on the base's weight: of a DoRA it does."""
        return "dora" in self.kind

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The change of the weight at strength 1, float64: (out, in), or (out, in, kh, kw) for a convolution.

        Raises ValueError where `needs_base` and the frozen `weight` is not given.
        """
        delta: torch.Tensor = ADAPTERS[self.kind].delta(self.factors, self.scale, weight)
        return delta

    def delta_norm(self) -> float | None:
        """Frobenius norm of `delta()`; None where that needs the base."""
        norm: float | None = ADAPTERS[self.kind].norm(self.factors, self.scale)
        return norm


def relative_error(module: ModuleWeights, wanted: ModuleWeights, weight: torch.Tensor | None = None) -> float:
    """Frobenius norm of the difference of the two deltas by that of the wanted one, in float64.

    Infinite for other sizes and NaN. Of two LoRAs the matrices are never formed, of which SDXL's would take 18 GB: their
    difference is U D with the factors side by side, and |U D| = |R_u R_d^T| for the triangles of the QR decompositions
    of U and D^T. `weight` as for `delta`.
    """
    import torch

    if math.prod(module.shape) != math.prod(wanted.shape):
        return math.inf
    if module.kind == wanted.kind == "lora":
        pair = [(each.factors["up"].double().flatten(1), each.factors["down"].double().flatten(1)) for each in (module, wanted)]
        (up, down), (wanted_up, wanted_down) = pair
        ups = torch.cat([module.scale * up, -wanted.scale * wanted_up], dim=1)
        triangles = [torch.linalg.qr(sides, mode="r").R for sides in (ups, torch.cat([down, wanted_down]).T)]
        apart = float((triangles[0] @ triangles[1].T).norm())
        size = wanted.delta_norm() or 0.0
    else:
        delta, other = (each.delta(weight if each.needs_base else None).cpu() for each in (wanted, module))
        apart, size = float((other.reshape(delta.shape) - delta).norm()), float(delta.norm())
    error = apart / size if size else math.inf if apart else 0.0
    return math.inf if math.isnan(error) else error


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds for one base model.

    modules: by canonical name, float32. metadata: as in the file, which is text that others wrote. unmatched: the key
    prefixes in the file that name no module of the base, in the file's spelling. family: for which the names were read.
    """

    modules: dict[str, ModuleWeights]
    metadata: dict[str, str]
    unmatched: tuple[str, ...]
    family: str = ""


def check_module(name: str, weights: ModuleWeights, where: str = "") -> None:
    """Raises AdapterFileError, naming the module, unless all factors are there, fit each other and are finite."""
    shown, again = printable(name, 120), "Export it again."
    if any(0 in factor.shape for factor in weights.factors.values()):
        raise AdapterFileError(f"Module {shown} has a factor of size zero", where, again)
    fault = ADAPTERS[weights.kind].fault(weights.factors)
    if fault:
        raise AdapterFileError(f"Module {shown} {fault}", where, again)
    for part, tensor in weights.factors.items():
        if math.isfinite(float(tensor.sum())):  # a sum is finite only if all of it is
            continue
        bad = int((~tensor.isfinite()).sum())
        if bad:
            what = f"Module {shown}: {bad:,} of {tensor.numel():,} numbers of its {part} factor are NaN or infinite"
            raise AdapterFileError(what, where, "Such a file draws black pictures. Take an earlier checkpoint.")
    if not math.isfinite(weights.alpha):
        raise AdapterFileError(f"Module {shown}: alpha is {weights.alpha}", where, again)
