"""A dense sum of the periods that are over, beside the one that goes on: for the types that go in periods (trainers/turns.py).

Their delta is s (sum + up down). The frozen weight is never rewritten and the sum is kept apart from it: in a weight of 16
bits most of what a period learns would be rounded away. The price, of each adapted layer: 4 bytes for every number of its
weight (374 MB for the attention layers of SD 1.5, 3.8 GB for SDXL's), as much again in the machine's memory for the state to
go back to, and in each training state on the disk; and one more product of the weight's size each way, so that such a layer
takes about twice the time. Over a base in 16 bits a step keeps a copy of the sum in that format, half its size, for the way
back. Dropout is of the whole path: what it leaves out is left out of the sum too. Torch-free at import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.adapters.base import Factors, apply_weight, product, scaled
from trainers.adapters.lora import LORA

if TYPE_CHECKING:
    import torch

SUM = "sum"
"""The sum of the periods that are over, before the scale, in the shape of the weight; zero at the start."""


def path(frozen: Any, x: torch.Tensor, total: torch.Tensor, own: Factors, scale: float | torch.Tensor) -> torch.Tensor:
    """s (sum x + up (down x)): (B, ..., in) -> (B, ..., out), or of pictures."""
    return LORA.forward(frozen, x, own, scale) + scaled(apply_weight(frozen, x, total), scale)


def whole(total: torch.Tensor, own: Factors) -> torch.Tensor:
    """sum + up down, in float64."""
    return total.double() + product(own["up"].double(), own["down"].double())


def exported(total: torch.Tensor, own: Factors, scale: float) -> tuple[str, Factors, float]:
    """A full difference, to which no scale applies any more, in the sum's number format."""
    return "full", {"diff": (scale * whole(total, own)).to(total.dtype)}, 1.0
