"""Two ways to compute y = (W + s B A) x, in the same eager model: factored, or with the sum formed in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainers.bench.reference import Inputs, Parts, denoising_loss, share

FORMS = ("factored", "materialised")


class _Factored(nn.Module):
    def __init__(self, frozen: Any, rank: int) -> None:
        super().__init__()
        self.frozen, device = frozen, frozen.weight.device
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features, device=device) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        y: torch.Tensor = self.frozen(x) + F.linear(F.linear(x, down), up)
        return y


class _Materialised(_Factored):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.frozen.weight + (self.up @ self.down).to(x.dtype)
        return F.linear(x, weight, self.frozen.bias)


class Adapted:
    """The frozen UNet with adapters of one form on the layers `paths`, float32 beside whatever the base is in."""

    def __init__(self, parts: Parts, paths: Sequence[str], form: str, rank: int, inputs: Inputs) -> None:
        self.unet, self.scheduler, self.inputs = share(parts.unet), parts.scheduler, inputs
        kind = {"factored": _Factored, "materialised": _Materialised}[form]
        for path in paths:
            parent, _, leaf = path.rpartition(".")
            layer = kind(self.unet.get_submodule(path), rank)
            setattr(self.unet.get_submodule(parent), leaf, layer)
        self.unet.train()

    def loss(self) -> torch.Tensor:
        """Forward alone."""
        return denoising_loss(self.unet, self.scheduler, self.inputs)

    def step(self, number: int = 0) -> None:
        """Forward and backward."""
        self.loss().backward()  # type: ignore[no-untyped-call]
        for parameter in self.unet.parameters():
            parameter.grad = None
