"""LoRA (arXiv 2106.09685, section 4.1): y = W0 x + s B A x, with A Gaussian, B zero and s = alpha / rank.

A is called `down` and B `up`, as in the files of the ecosystem. A convolution's `down` has the frozen kernel's size
and its `up` is 1 x 1 (as in loralib and kohya's LoCon).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from trainers.settings import Settings

if TYPE_CHECKING:
    import torch

Target = Literal["attention", "cross_attention", "self_attention", "feed_forward", "projections", "convolutions"]


class LoraSettings(Settings):
    """LoRA on the denoiser."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Inner width of the adapter: how much it can learn, and the size of the file."""
    alpha: float | None = Field(default=None, gt=0, le=4096)
    """The update is scaled by alpha / rank. Unset: equal to the rank, so the scale is 1."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard`: alpha / rank. `rslora`: alpha / sqrt(rank) (arXiv 2312.03732), for high ranks."""
    targets: tuple[Target, ...] = ("attention",)
    """Which layers learn: attention (cross_attention and self_attention), feed_forward, projections, convolutions."""

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one group of layers, for example attention")
        return value

    @property
    def effective_alpha(self) -> float:
        """Alpha, resolved: the rank where it is unset."""
        return float(self.rank) if self.alpha is None else self.alpha

    def scale_of(self, alpha: float, rank: int) -> float:
        """Factor on the low-rank path."""
        return alpha / (rank if self.scaling == "standard" else math.sqrt(rank))


class Lora:
    """The mathematics of LoRA on plain tensors; no state."""

    @staticmethod
    def factor_shapes(weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the trainable factors for a frozen weight (out, in) or (out, in, kh, kw)."""
        out, *inner = weight
        return {"down": (rank, *inner), "up": (out, rank, *(1 for _ in inner[1:]))}

    @staticmethod
    def initialise(factors: Mapping[str, torch.Tensor], generator: torch.Generator) -> None:
        """Fills `down` with a Gaussian of variance 1 / fan_in and `up` with zero, so that step 0 is the base.

        The paper leaves the Gaussian's width open; 1 / fan_in keeps the low-rank path's size independent of the rank.
        """
        down = factors["down"]
        down.normal_(0.0, 1.0 / math.sqrt(down[0].numel()), generator=generator)
        factors["up"].zero_()

    @staticmethod
    def forward(frozen: Any, x: torch.Tensor, factors: Mapping[str, torch.Tensor], scale: float | torch.Tensor) -> torch.Tensor:
        """s B A x, factored: (B, ..., in) -> (B, ..., out), or (B, in, H, W) -> (B, out, H', W') beside a convolution.

        `frozen` is the Linear or Conv2d beside which it runs.
        `scale` is a number, or a tensor (B,) with one scale for each row of the batch.
        """
        import torch.nn.functional as F

        down, up = factors["down"].to(x.dtype), factors["up"].to(x.dtype)
        convolution = down.dim() == 4
        inner = F.conv2d(x, down, None, frozen.stride, frozen.padding, frozen.dilation) if convolution else F.linear(x, down)
        if not isinstance(scale, float):
            scale = scale.to(x.dtype).view(-1, *(1 for _ in inner.shape[1:]))
        inner = inner * scale
        return F.conv2d(inner, up) if convolution else F.linear(inner, up)

    @staticmethod
    def delta(factors: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """The update as a matrix in float64, of the frozen weight's shape."""
        down, up = factors["down"].double(), factors["up"].double()
        return scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])

    @staticmethod
    def export_alpha(scale: float, rank: int) -> float:
        """Alpha for a file, whose readers all compute alpha / rank, whatever scaling was used here."""
        return scale * rank


LORA = Lora()
