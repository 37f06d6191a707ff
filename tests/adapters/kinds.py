"""One example of every kind of adapter, of a Linear (12, 8) or a 3x3 convolution (12, 8, 3, 3), in numbers easily made anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LINEAR, CONVOLUTION = (12, 8), (12, 8, 3, 3)


def numbers(shape: tuple[int, ...], start: float) -> torch.Tensor:
    """0.5 * sin(start), 0.5 * sin(start + 0.7), ...: float64."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + start).sin().mul(0.5).reshape(shape)


def frozen_weight(shape: tuple[int, ...]) -> torch.Tensor:
    """The base's weight beside the examples."""
    return numbers(shape, 9.0)


@dataclass(frozen=True)
class Example:
    """Key endings with shapes, in kohya's and LyCORIS' names, and what LyCORIS makes of them.

    `golden`: norm of the delta, its sum weighted by cos(0, 0.3, 0.6, ...), and its entry 5, by lycoris-lora 4.1.3
    (lycoris.functional: locon, loha, lokr, weight_decompose), which is not installed here. It takes the wrong axis for
    the rank of a LoKr with a core, 4 instead of 2, which was set right; ComfyUI, like us, takes the rows of w2_b.
    """

    kind: str
    shape: tuple[int, ...]
    alpha: float
    parts: dict[str, tuple[int, ...]]
    golden: tuple[float, float, float]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Key ending -> float64 tensor; alpha too."""
        made = {part: numbers(shape, float(number)) for number, (part, shape) in enumerate(self.parts.items())}
        if "dora_scale" in made:
            made["dora_scale"] = made["dora_scale"].abs() + 1
        return made | {"alpha": torch.tensor(self.alpha, dtype=torch.float64)}


def _lora(*more: tuple[str, tuple[int, ...]], kernel: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    ones = tuple(1 for _ in kernel)
    return {"lora_down.weight": (3, 8, *kernel), "lora_up.weight": (12, 3, *ones), **dict(more)}


_LOHA = {"hada_w1_a": (12, 3), "hada_w1_b": (3, 8), "hada_w2_a": (12, 3), "hada_w2_b": (3, 8)}
_LOHA_CONVOLUTION = {"hada_w1_a": (12, 3), "hada_w1_b": (3, 72), "hada_w2_a": (12, 3), "hada_w2_b": (3, 72)}
_LOHA_TUCKER = {
    "hada_t1": (3, 3, 3, 3), "hada_w1_a": (3, 12), "hada_w1_b": (3, 8),
    "hada_t2": (3, 3, 3, 3), "hada_w2_a": (3, 12), "hada_w2_b": (3, 8),
}  # fmt: skip
_TUCKER = {"lora_down.weight": (3, 8, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_up.weight": (12, 3, 1, 1)}
_LOKR_WHOLE = {"lokr_w1": (3, 2), "lokr_w2": (4, 4)}
_LOKR_BOTH = {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
_LOKR_TUCKER = {"lokr_w1": (3, 2), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 4)}
_BY_OUTPUT, _BY_INPUT = ("dora_scale", (12, 1)), ("dora_scale", (1, 8))

EXAMPLES = {
    "lora": Example("lora", LINEAR, 2.0, _lora(), (1.82023571904, -2.24412228248, 0.0987559255769)),
    "locon": Example("lora", CONVOLUTION, 2.0, _lora(kernel=(3, 3)), (6.16462799732, 1.36590263693, -0.193497107429)),
    "tucker": Example("lora", CONVOLUTION, 2.0, _TUCKER, (5.27626194859, -0.558862665444, 0.142598598404)),
    "loha": Example("loha", LINEAR, 2.0, _LOHA, (0.433432201572, 0.316651321306, -0.00389306730545)),
    "loha convolution": Example(
        "loha", CONVOLUTION, 2.0, _LOHA_CONVOLUTION, (1.39085219545, 0.0776629504295, -0.015134090613)
    ),
    "loha tucker": Example(
        "loha", CONVOLUTION, 2.0, _LOHA_TUCKER, (0.00383208013286, 4.54707746878e-05, -0.000398393233595)
    ),
    "lokr whole": Example("lokr", LINEAR, 2.0, _LOKR_WHOLE, (1.13816543873, -1.74799485433, 0.159712002676)),
    "lokr factored": Example(
        "lokr", LINEAR, 2.0, {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
        (0.74469193933, -0.0383581500906, 0.0579196423558),
    ),
    "lokr both factored": Example("lokr", LINEAR, 3.0, _LOKR_BOTH, (0.265928329268, -0.0243209752955, -0.000978999536006)),
    "lokr convolution": Example(
        "lokr", CONVOLUTION, 3.0, {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 36)},
        (3.46033933385, -0.328129941406, 0.0),
    ),
    "lokr whole convolution": Example(
        "lokr", CONVOLUTION, 3.0, {"lokr_w1": (3, 2), "lokr_w2": (4, 4, 3, 3)}, (3.26332713703, 0.351828818928, 0.0)
    ),
    "lokr tucker": Example("lokr", CONVOLUTION, 3.0, _LOKR_TUCKER, (0.0753741109312, 0.00318492954862, 0.0)),
    "dora": Example("dora", LINEAR, 2.0, _lora(_BY_OUTPUT), (1.96363972768, -2.12930015258, 0.318212103356)),
    "dora by input": Example("dora", LINEAR, 2.0, _lora(_BY_INPUT), (1.76793843464, -2.21973361314, 0.101806962781)),
    "dora convolution": Example(
        "dora", CONVOLUTION, 2.0, _lora(("dora_scale", (12, 1, 1, 1)), kernel=(3, 3)),
        (6.80563856695, 1.41837156502, -0.176517727908),
    ),
    "dora and loha": Example(
        "dora and loha", LINEAR, 2.0, _LOHA | dict([_BY_OUTPUT]), (1.45950998308, 0.375578923286, -0.0184766940508)
    ),
    "dora and lokr": Example(
        "dora and lokr", LINEAR, 2.0, _LOKR_WHOLE | dict([_BY_OUTPUT]), (1.67567731736, -2.58631533086, 0.222348990588)
    ),
    "full": Example("full", LINEAR, 1.0, {"diff": (12, 8)}, (3.44123392916, 0.211896618619, -0.175391613845)),
}  # fmt: skip
