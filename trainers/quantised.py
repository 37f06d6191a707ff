"""The frozen base in fewer bits: weights kept packed, and unpacked for a moment in each forward and backward pass.

int8  symmetric, one float32 scale for each output channel: q = round(w / s), s = max |w| / 127 (arXiv 2004.09602, section 3)
nf4   16 levels of a normal distribution over blocks of 64 weights (arXiv 2305.14314, section 3), packed by bitsandbytes
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch
from torch import nn

from trainers.errors import SettingError
from trainers.frozen import FrozenLayer, plain_layer

LEVELS = 127  # of each sign: -128 is left out, so that a weight and its negative are packed alike
BLOCK = 64  # weights that share a scale in nf4
NARROW = 16
"""Layers with no more channels than this on a side keep their weights: those that read and write latents and pixels are
small, and an error in them goes everywhere."""

Packed = tuple[torch.Tensor, ...]


def pack(weight: torch.Tensor, kind: str) -> Packed:
    """A weight (out, in) or (out, in, kh, kw) as `kind`: codes first, then what turns them back into numbers."""
    if kind == "int8":
        scale = weight.float().abs().flatten(1).amax(1).view(-1, *(1 for _ in weight.shape[1:])) / LEVELS
        codes = (weight.float() / torch.where(scale > 0, scale, 1.0)).round_().clamp_(-LEVELS, LEVELS)
        return codes.to(torch.int8), scale
    from bitsandbytes import functional  # type: ignore[import-not-found, unused-ignore]

    packed, state = functional.quantize_4bit(weight.float(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax, state.code


def unpack(packed: Packed, kind: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a layer computes with, of `shape` and `dtype`."""
    codes, scale, *levels = packed
    if kind == "int8":
        # Into a tensor of the wanted format: on a GPU that is one kernel, with nothing in float32 between.
        return torch.mul(codes, scale, out=torch.empty(shape, dtype=dtype, device=codes.device))
    from bitsandbytes import functional

    state = functional.QuantState(scale, shape=shape, code=levels[0], blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    weight: torch.Tensor = functional.dequantize_4bit(codes, state)
    return weight


class PackedLayer(FrozenLayer):
    """Keeps its weight packed, and unpacks it for a moment in each pass."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, kind: str) -> None:
        super().__init__(layer)
        self.kind = kind
        for number, tensor in enumerate(pack(layer.weight.detach(), kind)):
            self.register_buffer(f"packed_{number}", tensor)

    @property
    def packed(self) -> Packed:
        """The packed weight, as `pack` gives it."""
        return tuple(self.buffers())

    @property
    def weight(self) -> torch.Tensor:
        """The weight that it computes with, unpacked anew: a copy, so that writing into it changes nothing here."""
        return unpack(self.packed, self.kind, self.shape, self.dtype)

    def without_weight(self) -> nn.Linear | nn.Conv2d:
        """A plain layer of the same form without a bias, whose weight is one zero seen from everywhere: it takes no memory."""
        zero = torch.zeros((), dtype=self.dtype, device=self.packed[0].device)
        plain = plain_layer(self, zero.expand(self.shape))
        plain.bias = None
        return plain


def can_be_packed(layer: nn.Module) -> bool:
    """Whether it is a Linear or a Conv2d that is worth packing, and whose sums are plain."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or min(layer.weight.shape[:2]) <= NARROW:
        return False
    return isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


@torch.no_grad()
def quantise(part: nn.Module, kind: str, device: torch.device) -> tuple[int, int]:
    """Packs the layers of a frozen part of a model on `device`, one after the other. Returns its bytes before and after.

    To be called before adapters are put in, and before the part itself goes to `device`: it then never lies there unpacked.
    """
    before = _bytes_of(part)
    for path in [path for path, layer in part.named_modules() if can_be_packed(layer)]:  # no list that keeps the layers
        parent, _, leaf = path.rpartition(".")
        setattr(part.get_submodule(parent), leaf, PackedLayer(part.get_submodule(path).to(device), kind))  # type: ignore[arg-type]
    return before, _bytes_of(part)


def stand_in(parts: Mapping[str, nn.Module]) -> list[tuple[nn.Module, str, PackedLayer]]:
    """Puts a plain layer without memory in every packed one's place. Returns (its parent, its name there, the packed one)."""
    packed = []
    for part in parts.values():
        for path, layer in [(path, layer) for path, layer in part.named_modules() if isinstance(layer, PackedLayer)]:
            parent, _, leaf = path.rpartition(".")
            packed.append((part.get_submodule(parent), leaf, layer))
            setattr(part.get_submodule(parent), leaf, layer.without_weight())
    return packed


def _bytes_of(part: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))


def check_can_pack(kind: str, device: torch.device) -> None:
    """Raises SettingError when weights cannot be kept as `kind` on `device`."""
    if kind == "nf4" and device.type != "cuda":
        raise SettingError(
            f"train.base_weights = nf4 needs an NVIDIA GPU, and this run computes on {device.type}",
            hint="Set train.base_weights=int8, which works everywhere.",
        )
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise SettingError("train.base_weights = nf4 needs the package bitsandbytes", hint="Run `pip install bitsandbytes`.")
