"""What an eager frozen model costs at the least: forward, and backward as far as the first adapted layer. No adapter."""

from __future__ import annotations

from typing import Any

import torch

from trainers.bench.reference import Inputs, Parts, denoising_loss, share


class Limit:
    """The frozen UNet. A step computes what every adapter needs: its loss, and gradients down to the first adapted input."""

    def __init__(self, parts: Parts, first: str, inputs: Inputs, device: str | None = None) -> None:
        self.unet, self.scheduler, self.inputs = share(parts.unet, device), parts.scheduler, inputs
        self.unet.train()
        begin_at(self.unet.get_submodule(first.rpartition(".")[0]))

    def loss(self) -> torch.Tensor:
        """Forward alone."""
        return denoising_loss(self.unet, self.scheduler, self.inputs)

    def step(self, number: int = 0) -> None:
        """Forward and backward."""
        self.loss().backward()  # type: ignore[no-untyped-call]


class Full:
    """Full fine-tuning: forward, and backward into every weight, whose gradient is then dropped. No optimizer."""

    def __init__(self, parts: Parts, inputs: Inputs) -> None:
        self.unet, self.scheduler, self.inputs = share(parts.unet, trainable=True), parts.scheduler, inputs
        self.unet.train()

    def step(self, number: int = 0) -> None:
        """Forward and backward."""
        denoising_loss(self.unet, self.scheduler, self.inputs).backward()  # type: ignore[no-untyped-call]
        for parameter in self.unet.parameters():
            parameter.grad = None


def begin_at(attention: Any) -> Any:
    """Gradients are computed from here on, as if this module's first layers were adapted. Returns the hook's handle."""

    def wants_gradient(module: Any, arguments: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        if hidden.is_leaf:
            hidden.requires_grad_(True)

    return attention.register_forward_pre_hook(wants_gradient, with_kwargs=True)


class Floor:
    """The arithmetic alone: a step's FLOPs at the rate that a square matrix product reaches in the same round."""

    def __init__(self, flops: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flops = flops
        self.side = 2048 if device.type == "cpu" else 8192  # a smaller one says little of a GPU
        generator = torch.Generator().manual_seed(0)
        self.factors = [torch.randn(self.side, self.side, generator=generator).to(device, dtype) for _ in range(2)]
        self.rates: list[float] = []

    def multiply(self) -> None:
        """One product."""
        torch.mm(*self.factors)

    def seconds(self, product_seconds: float) -> float:
        """What the step would take; `product_seconds` is what one product took."""
        self.rates.append(2 * self.side**3 / product_seconds)
        return self.flops / self.rates[-1]
