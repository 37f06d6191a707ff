"""LoRA (arXiv 2106.09685, section 4.1): y = W0 x + s B A x, with A Gaussian, B zero and s = alpha / rank.

A is called `down` and B `up`, as in the files of the ecosystem. A convolution's `down` has the frozen kernel's size
and its `up` is 1 x 1 (as in loralib and kohya's LoCon).

An Embedding's weight (words, width) is a matrix like any other, of which each word reads a row: s (B A)[word], where B has a
row for each word and starts at zero, as in loralib, which calls B^T A and A^T B. No setting names an Embedding: of the
programs that load LoRA files only diffusers takes one, in peft's form (lora_embedding_A = B^T, lora_embedding_B = A^T) beside
other layers of the same rank, and kohya's form has no key for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from trainers.adapters.base import (
    Decomposed,
    Factors,
    Started,
    Weight,
    apply_weight,
    product,
    same_layer,
    scaled,
    svd_of_product,
    values_of_product,
)
from trainers.adapters.grow import Growing
from trainers.adapters.settings import LowRankSettings
from trainers.adapters.symmetric import Symmetric

if TYPE_CHECKING:
    import torch


class LoraSettings(LowRankSettings):
    """LoRA on the denoiser."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    init: Literal["gaussian", "symmetric", "pissa", "olora"] = "gaussian"
    """How it starts: `gaussian` with the up side zero; `symmetric`, `pissa` and `olora` with both sides non-zero."""
    rank_schedule: Literal["fixed", "grow"] = "fixed"
    """`fixed`: every layer has adapter.rank. `grow`: it starts low, and a layer gets more where it uses all it has."""
    grow_from: int = Field(default=4, ge=1, le=1024)
    """Rank that a growing LoRA starts with, and by which it grows; adapter.rank is the most that a layer gets."""
    grow_every: int = Field(default=50, ge=1, le=1_000_000)
    """Steps from one look at a growing LoRA's layers to the next."""
    grow_above: float = Field(default=0.01, gt=0, lt=1)
    """A layer grows when its weakest singular value holds more than this share of its update's squared norm."""

    @model_validator(mode="after")
    def _grows_from_below(self) -> LoraSettings:
        if self.rank_schedule == "fixed":
            return self
        grow = "adapter.rank_schedule = grow"
        if self.start_from:
            raise ValueError(f"{grow} starts from nothing at a low rank, so adapter.start_from must be empty")
        if self.init != "gaussian":
            raise ValueError(f"{grow} adds ranks that change nothing at first, which adapter.init = {self.init} cannot")
        if self.rank < self.grow_from:
            raise ValueError(
                f"{grow} goes from adapter.grow_from = {self.grow_from} up to adapter.rank = {self.rank}, which is lower"
            )
        return self

    @model_validator(mode="after")
    def _rank_can_be_dropped(self) -> LoraSettings:
        if self.rank_dropout and self.init != "gaussian":
            raise ValueError(f"adapter.rank_dropout must be 0 with adapter.init = {self.init}, or take adapter.dropout")
        return self

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> LoraSettings:
        if self.start_from and self.init != "gaussian":
            raise ValueError(f"adapter.init = {self.init} starts from numbers of its own, so adapter.start_from must be empty")
        return self

    @classmethod
    def drops_ranks(cls) -> bool:
        """See LowRankSettings."""
        return True

    @classmethod
    def ups(cls) -> tuple[str, ...]:
        """See LowRankSettings."""
        return ("up",)

    @classmethod
    def starts_from_files(cls) -> bool:
        """See LowRankSettings."""
        return True

    @property
    def trained(self) -> Any:
        """The mathematics that is trained."""
        if self.rank_schedule == "grow":
            return Growing(LORA, self.grow_from, self.grow_every, self.grow_above)
        return LORA if self.init == "gaussian" else Symmetric(self.init)


class Lora:
    """The mathematics of LoRA on plain tensors; no state. See adapters.base.AdapterKind for the meaning of each method."""

    parts = ("down", "up")
    pairs = (("down", "up"),)

    @staticmethod
    def fault(factors: Factors) -> str:
        """down (r, in[, kh, kw]) and up (out, r[, 1, 1]) must both be there and agree on r."""
        missing = [part for part in ("down", "up") if part not in factors]
        if missing:
            return f"has no {' and no '.join(missing)} factor"
        down, up = factors["down"], factors["up"]
        sound = down.ndim in (2, 4) and up.ndim in (2, 4) and tuple(up.shape[2:]) in ((), (1, 1))
        if not sound or up.shape[1] != down.shape[0]:
            return f"has an up {tuple(up.shape)} and a down {tuple(down.shape)} that do not fit each other; they may be swapped"
        return ""

    @staticmethod
    def rank(factors: Factors) -> int:
        """r: the rows of `down`."""
        return int(factors["down"].shape[0])

    @staticmethod
    def shape(factors: Factors) -> tuple[int, ...]:
        """(out, in[, kh, kw])."""
        return (factors["up"].shape[0], *factors["down"].shape[1:])

    @staticmethod
    def fit(factors: Factors, shape: tuple[int, ...]) -> dict[str, torch.Tensor] | None:
        """2-D factors of a 1x1 convolution become 4-D, or the reverse."""
        down, up = factors["down"], factors["up"]
        if not same_layer(LORA.shape(factors), shape) or up.shape[1] != down.shape[0]:
            return None
        ones = (1,) * (len(shape) - 2)
        return {"down": down.reshape(down.shape[0], *shape[1:]), "up": up.reshape(*up.shape[:2], *ones)}

    @staticmethod
    def prepare(factors: Factors, scale: float, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """As they are."""
        return dict(factors), scale

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
    def start(shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator, weight: Weight) -> Started:
        """See base.Trained."""
        import torch

        factors = {name: torch.empty(size) for name, size in LORA.factor_shapes(shape, rank).items()}
        LORA.initialise(factors, generator)
        return Started(factors, scale)

    @staticmethod
    def exported(factors: Factors, scale: float) -> tuple[str, Factors, float]:
        """As it is."""
        return "lora", factors, scale

    @staticmethod
    def file_rank(rank: int) -> int:
        """Its own."""
        return rank

    @staticmethod
    def continue_from(factors: Mapping[str, torch.Tensor], given: Factors, ratio: float) -> None:
        """Makes the delta of initialised `factors` that of `given` times `ratio`, exact but for the rounding of `ratio`.

        `given` has this rank or a lower one. Its rows of `down` come first, each brought to the size that a new one has by
        a power of two, as files may have balanced it away, and training would go at another pace. The other rows stay as
        they were drawn, and so do those that `given` has as zero; `up` is zero there.
        """
        import torch

        down, up = factors["down"], factors["up"]
        rows = given["down"].reshape(-1, *down.shape[1:])
        columns = given["up"].reshape(up.shape[0], -1)
        sizes = rows.double().flatten(1).pow(2).sum(1).sqrt()  # a new row has about 1
        alive = sizes > 0
        count = int(alive.sum())
        # Written out one by one, as torch's own powers may be off in the last bit.
        powers = torch.tensor([2.0 ** -round(math.log2(size)) for size in sizes[alive].tolist()], dtype=torch.float64)
        up.zero_()
        down[:count] = rows[alive].double().mul(powers.reshape(-1, *(1 for _ in down.shape[1:]))).to(down.dtype)
        up[:, :count] = (columns[:, alive].double() * (ratio / powers)).to(up.dtype).reshape(up.shape[0], count, *up.shape[2:])

    @staticmethod
    def forward(
        frozen: Any,
        x: torch.Tensor,
        factors: Factors,
        scale: float | torch.Tensor,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """s B A x, factored: (B, ..., in) -> (B, ..., out), or (B, in, H, W) -> (B, out, H', W') beside a convolution.

        `frozen` is the Linear or Conv2d beside which it runs, or the Embedding: words (B, n) -> (B, n, width).
        `scale` is a number, or a tensor (B,) with one scale for each row of the batch. Components of the rank that are
        `dropped` (B, r) give nothing.
        """
        import torch.nn.functional as F
        from torch import nn

        down, up = factors["down"], factors["up"]
        if isinstance(frozen, nn.Embedding):
            kind = frozen.weight.dtype
            return scaled(_kept(F.embedding(x, up.to(kind)), dropped, False), scale) @ down.to(kind)
        inner = _kept(scaled(apply_weight(frozen, x, down), scale), dropped, up.dim() == 4)
        return F.conv2d(inner, up.to(x.dtype)) if up.dim() == 4 else F.linear(inner, up.to(x.dtype))

    @staticmethod
    def joined(frozen: Any, x: torch.Tensor, adapters: Sequence[tuple[Factors, float] | int]) -> torch.Tensor | None:
        """frozen(x) and what the adapters add, for one layer or for several side by side: see lora_node.py.

        A layer without an adapter is given by its width, and has one of rank 0. None beside a convolution or an Embedding.
        """
        from trainers.adapters.lora_node import Pair, lora_beside

        def pair_of(one: tuple[Factors, float] | int) -> Pair:
            if isinstance(one, int):
                return x.new_empty((0, x.shape[-1])), x.new_empty((one, 0)), 1.0
            return one[0]["down"].to(x.dtype), one[0]["up"].to(x.dtype), one[1]

        convolutions = any(not isinstance(one, int) and one[0]["down"].dim() != 2 for one in adapters)
        if convolutions or not x.is_floating_point():
            return None
        return lora_beside(frozen, x, [pair_of(one) for one in adapters])

    @staticmethod
    def delta(factors: Factors, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update as a matrix in float64, of the frozen weight's shape."""
        return scale * product(factors["up"].double(), factors["down"].double())

    @staticmethod
    def norm(factors: Factors, scale: float) -> float:
        """From the two (r, r) Gram matrices: the full matrix is never formed."""
        up, down = factors["up"].double().flatten(1), factors["down"].double().flatten(1)
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(scale) * math.sqrt(max(squared, 0.0))

    @staticmethod
    def singular_values(factors: Factors, scale: float) -> torch.Tensor | None:
        """From the factors; None where the whole matrix is smaller than they are."""
        return values_of_product(factors["up"], factors["down"], scale)

    @staticmethod
    def svd(factors: Factors, scale: float, most: int) -> Decomposed | None:
        """From the factors; None where the whole matrix is smaller than they are."""
        return svd_of_product(factors["up"], factors["down"], scale, most)


def _kept(inner: torch.Tensor, dropped: torch.Tensor | None, pictures: bool) -> torch.Tensor:
    """A x (B, ..., r), or (B, r, H, W) of pictures, with zero for the components that are `dropped` (B, r)."""
    if dropped is None:
        return inner
    rows, rank = dropped.shape
    form = (rows, rank, 1, 1) if pictures else (rows, *(1 for _ in inner.shape[1:-1]), rank)
    return inner.masked_fill(dropped.view(form), 0.0)


LORA = Lora()
