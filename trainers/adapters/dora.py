"""DoRA (arXiv 2402.09353, section 4): W' = m (W + dW) / ||W + dW||, where dW is that of another type, mostly LoRA.

The norm goes over the axes where m has length 1: the paper and peft have one m for each output (out, 1), older LyCORIS
one for each input (1, in). The delta at strength 1 is W' - W, and a strength goes along the straight line from W to W'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from trainers.adapters.base import AdapterKind, Factors, Started, Weight, scaled
from trainers.adapters.loha import LOHA
from trainers.adapters.lokr import LOKR
from trainers.adapters.lora import LORA
from trainers.adapters.settings import LowRankSettings

if TYPE_CHECKING:
    import torch

MAGNITUDE = "dora_scale"
"""m, in the shape of the weight with 1 for every axis but one."""
GAIN = "gain"
"""m / ||W + dW||, once the adapter stands beside its layer."""
SQUARES, INNER = "squares", "inner_scale"
"""||W||^2 of each output (out,), and alpha / r: what a DoRA in training keeps beside its factors."""


class DoraSettings(LowRankSettings):
    """DoRA: a LoRA on the direction of each output's weights, and a magnitude of its own for each output."""

    type: Literal["dora"] = "dora"
    """Kind of adapter."""

    @classmethod
    def ups(cls) -> tuple[str, ...]:
        """See LowRankSettings; the magnitudes keep the learning rate."""
        return ("up",)

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        return TRAINED_DORA


class Dora:
    """The mathematics of DoRA over `inner`; no state. See adapters.base.AdapterKind for the meaning of each method."""

    def __init__(self, inner: AdapterKind) -> None:
        self.inner = inner
        self.parts = (*inner.parts, MAGNITUDE)
        self.pairs = inner.pairs

    def fault(self, factors: Factors) -> str:
        """The inner type's, and a magnitude for each output or each input."""
        fault = self.inner.fault(factors)
        if fault or MAGNITUDE not in factors:
            return fault or "has no dora_scale"
        made, magnitude = self.inner.shape(factors), factors[MAGNITUDE]
        if magnitude.numel() > 1 and not _axis_fits(magnitude, made):
            return f"has a dora_scale {tuple(magnitude.shape)} that does not fit its weight {made}"
        return ""

    def rank(self, factors: Factors) -> int:
        """Of the inner type."""
        return self.inner.rank(factors)

    def shape(self, factors: Factors) -> tuple[int, ...]:
        """Of the inner type."""
        return self.inner.shape(factors)

    def fit(self, factors: Factors, shape: tuple[int, ...]) -> dict[str, torch.Tensor] | None:
        """The inner type's factors fitted, and a magnitude with as many axes as the weight."""
        fitted, magnitude = self.inner.fit(factors, shape), factors[MAGNITUDE]
        if fitted is None or (magnitude.numel() > 1 and not _axis_fits(magnitude, shape)):
            return None
        sizes = [1] * len(shape)
        sizes[_axis(magnitude)] = magnitude.numel()
        return {**fitted, MAGNITUDE: magnitude.reshape(sizes)}

    def prepare(self, factors: Factors, scale: float, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """Adds the gains, float32, and takes alpha / r into the inner factors, as W' - W is not linear in it."""
        first = _linear_part(factors)
        prepared = {**factors, first: factors[first] * scale}
        on_cpu = {name: factor.cpu() for name, factor in prepared.items()}  # Apple's GPUs have no float64
        prepared[GAIN] = self._gain(on_cpu, weight.cpu()).float().to(weight.device)
        return prepared, 1.0

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """(W' - W) x = (g - 1) W x + g dW x with prepared factors; a gain g for each input goes to x instead."""
        gain = factors[GAIN]
        on_input = _axis(gain) == 1
        shape = (-1, 1, 1) if gain.dim() == 4 else (-1,)
        gain, less = gain.reshape(shape).to(x.dtype), (gain - 1).reshape(shape).to(x.dtype)
        if on_input:
            return scaled(_without_bias(frozen, x * less) + self.inner.forward(frozen, x * gain, factors, 1.0), scale)
        return scaled(_without_bias(frozen, x) * less + self.inner.forward(frozen, x, factors, 1.0) * gain, scale)

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """W' - W in float64. Raises ValueError without the frozen weight."""
        if weight is None:
            raise ValueError("What a DoRA changes depends on the weight that it changes.")
        first = _linear_part(factors)
        folded = {**factors, first: factors[first].double() * scale}
        frozen = weight.double()
        return self._gain(folded, weight) * (frozen + self._inner_delta(folded, weight)) - frozen

    def norm(self, factors: Factors, scale: float) -> None:
        """It depends on the frozen weight."""
        return None

    def _inner_delta(self, factors: Factors, weight: torch.Tensor) -> torch.Tensor:
        own = {name: factor for name, factor in factors.items() if name in self.inner.parts}
        return self.inner.delta(own, 1.0).reshape(weight.shape)

    def _gain(self, factors: Factors, weight: torch.Tensor) -> torch.Tensor:
        """m / ||W + dW|| in float64, of m's shape; m where the norm is zero, as nothing is then multiplied by it."""
        magnitude: torch.Tensor = factors[MAGNITUDE].double()
        axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
        whole = weight.double() + self._inner_delta(factors, weight)
        norm = whole.pow(2).sum(axes, keepdim=True).sqrt() if axes else whole.abs()
        gain: torch.Tensor = magnitude / norm.where(norm > 0, 1.0)
        return gain


class TrainedDora:
    """See base.Trained: down and up as LoRA's, and dora_scale m (out, 1[, 1, 1]), which starts as the rows' norms ||W||.

    The norm of W + s B A takes no part in the gradient, as in the paper's section 4.3 and in peft. Its square is formed from
    three small products and never from the matrix: ||W||^2 + 2 s B . (W A^T) + s^2 (B A A^T) . B, row by row.
    """

    exact = (MAGNITUDE,)
    """In 16 bits a gain near 1 would hardly ever move."""

    def factor_shapes(self, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Those of LoRA, and one magnitude for each output."""
        return {**LORA.factor_shapes(weight, rank), MAGNITUDE: (weight[0], *(1 for _ in weight[1:]))}

    def start(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """A LoRA's start beside m = ||W||. `scale` belongs to the inner LoRA, as W' - W is not linear in it."""
        import torch

        squares = weight().double().flatten(1).pow(2).sum(1)
        magnitude = squares.float().sqrt().reshape(self.factor_shapes(shape, rank)[MAGNITUDE])
        inner = LORA.start(shape, rank, scale, generator, weight).factors
        constants = {SQUARES: squares, INNER: torch.tensor(scale, dtype=torch.float64)}
        return Started({**inner, MAGNITUDE: magnitude}, 1.0, constants)

    def forward(self, frozen: Any, x: torch.Tensor, factors: Factors, scale: float | torch.Tensor) -> torch.Tensor:
        """(W' - W) x = (g - 1) W x + g s B A x."""
        gain, plain = self._gain(frozen, factors), _without_bias(frozen, x)
        shape = (-1, 1, 1) if factors[MAGNITUDE].dim() == 4 else (-1,)
        learnt = LORA.forward(frozen, x, factors, 1.0) * factors[INNER]
        wide_gain = gain.reshape(shape)
        return scaled(plain * (wide_gain - 1).to(x.dtype) + learnt * wide_gain.to(x.dtype), scale)

    def delta(self, factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """W' - W in float64. Raises ValueError without the frozen weight."""
        _, own, inner = self.exported(factors, scale)
        return DORA.delta(own, inner, weight)

    def exported(self, factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """A DoRA as files have it; `scale` is the inner LoRA's."""
        own = {name: factor for name, factor in factors.items() if name in DORA.parts}
        return "dora", own, float(factors[INNER]) if INNER in factors else scale

    def file_rank(self, rank: int) -> None:
        """The delta has the weight's own rank."""
        return None

    def _gain(self, frozen: Any, factors: Factors) -> torch.Tensor:
        """m / ||W + s B A|| (out,), float32 or wider; 1 where W is its own start, to the bit."""
        import torch

        magnitude, scale = factors[MAGNITUDE].flatten(), factors[INNER]
        least = torch.promote_types(torch.float32, magnitude.dtype)
        magnitude = magnitude.to(least)
        with torch.no_grad():
            up, down = (factors[name].to(least).flatten(1) for name in ("up", "down"))
            weight = frozen.weight.to(least).flatten(1)
            cross = (up * (weight @ down.T)).sum(1)
            squared = factors[SQUARES].to(least) + 2 * scale * cross + scale**2 * ((up @ (down @ down.T)) * up).sum(1)
            norm = squared.clamp_min(0).sqrt()
        gain: torch.Tensor = magnitude / norm.where(norm > 0, 1.0)
        return gain


def _axis(magnitude: torch.Tensor) -> int:
    """The axis of the weight that a magnitude belongs to: 0 for outputs (also of a plain list of numbers), 1 for inputs."""
    return 1 if magnitude.dim() > 1 and magnitude.shape[1] > 1 else 0


def _axis_fits(magnitude: torch.Tensor, shape: tuple[int, ...]) -> bool:
    axis = _axis(magnitude)
    return magnitude.numel() == magnitude.shape[axis] == shape[axis]


def _linear_part(factors: Factors) -> str:
    """A factor in which the inner delta is linear, to take the scale."""
    return next(part for part in ("up", "w1", "w1_a") if part in factors)


def _without_bias(frozen: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = frozen(x)
    if frozen.bias is None:
        return y
    bias: torch.Tensor = frozen.bias
    return y - (bias.view(-1, 1, 1) if y.dim() == 4 else bias)


DORA, DORA_LOHA, DORA_LOKR = Dora(LORA), Dora(LOHA), Dora(LOKR)
TRAINED_DORA = TrainedDora()
