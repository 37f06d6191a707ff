"""Dropout of an adapter's path in training: on what it reads, on the components of its rank, and on the whole path.

input   numbers of x before A are zero, the others 1 / (1 - p) as large (lora_dropout of loralib and peft)
rank    components of A x are zero for a whole example, the others 1 / (1 - p) as large (rank_dropout of kohya's LoRA)
module  the layer's path is off for a whole step, and as it is otherwise (module_dropout of kohya and LyCORIS: no scale)

What is dropped is computed by whole numbers from the run's seed, the step, the example, the layer's name and the place
in its numbers: the same on any device, in what checkpointing computes again, in a run that goes on, and however processes
and micro-batches share a step. A recorded step reads all of it from one tensor. Imports no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dropout:
    """Probabilities, in [0, 1)."""

    input: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether anything is ever dropped."""
        return bool(self.input or self.rank or self.module)


@dataclass
class Keys:
    """What the micro-batch at work is dropped by: (B, 2) int32, each row's own and its step's; else None."""

    of_rows: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerDropout:
    """Dropout on one layer's adapter: off while there are no keys, as when pictures are drawn or a loss is held out."""

    rates: Dropout
    layer: tuple[int, int]
    """Two numbers in the range of an int32 that tell this layer from all others."""
    keys: Keys

    def path(self, kind: Any, frozen: Any, x: torch.Tensor, factors: Any, scale: Any) -> torch.Tensor:
        """`kind.forward` with what is dropped, while there are keys."""
        assert self.keys.of_rows is not None
        rows, steps = self.keys.of_rows.unbind(1)
        rates, more = self.rates, {}
        if rates.input and x.is_floating_point():  # words are looked up: there is nothing to scale
            dropped = _dropped(rows, self.layer[0], rates.input, x[0].numel()).view(x.shape)
            x = x.masked_fill(dropped, 0.0) / (1 - rates.input)
        if rates.rank:
            # By another number, or the first components would be dropped with the first numbers of x.
            dropped = _dropped(rows, self.layer[1], rates.rank, factors["down"].shape[0])
            more = {"dropped": dropped}
            scale = scale / (1 - rates.rank)
        y: torch.Tensor = kind.forward(frozen, x, factors, scale, **more)
        if rates.module:
            off = _dropped(steps, self.layer[0], rates.module, 1)
            y = y.masked_fill(off.view(-1, *(1 for _ in y.shape[1:])), 0.0)
        return y


def layer_dropout(rates: Dropout, name: str, keys: Keys) -> LayerDropout | None:
    """For the layer of this name; None where nothing is dropped."""
    digest = hashlib.sha256(name.encode()).digest()
    numbers = (int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:8], "little", signed=True))
    return LayerDropout(rates, numbers, keys) if rates.is_on else None


def _dropped(keys: torch.Tensor, layer: int, probability: float, count: int) -> torch.Tensor:
    """Which of `count` numbers are dropped by each of `keys` (B,): (B, count) bool.

    A hash of 32 bits decides two of them: a probability is met to 1 / 65536.
    """
    import torch

    own = _mixed(keys ^ layer)[:, None]
    hashes = _mixed(_mixed(torch.arange(-(-count // 2), dtype=torch.int32, device=keys.device)) ^ own)
    return (hashes.view(torch.int16) < int(probability * 65536) - 32768)[:, :count]


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """int32 -> int32, one to one, each bit of the answer by all of the number (T. Mueller); products keep their low bits.

    In place from the first operation on: an operation that asks for new memory takes longer than its numbers do.
    """
    for _ in range(2):
        numbers = ((numbers >> 16).bitwise_and_(0xFFFF)).bitwise_xor_(numbers).mul_(0x45D9F3B)
    return ((numbers >> 16).bitwise_and_(0xFFFF)).bitwise_xor_(numbers)
