"""Which kernels a CPU computes a base with: measured once for each machine and base, and kept.

A choice changes the last bits of a result, so it is never made again: it lies in the home folder for later runs, in a run's
manifest, and in its training state, by which a resumed run goes on alike on the same machine or another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainers.blocked import BlockedLayer, can_be_blocked
from trainers.files import write_atomically
from trainers.fused import attend

LARGEST = 1 << 22
"""Scores of one head above which products are never tried: they would take the memory that the kernel saves."""
CLEARLY = 0.97
"""Share of the usual kernel's time below which another is taken."""


@dataclass(frozen=True)
class Kernels:
    """`blocked`: frozen convolutions in oneDNN's blocks; `matrices`: Linear layers too, which is no longer chosen.
    `products`: attention by plain products up to so many scores of a head."""

    blocked: bool = False
    matrices: bool = False
    products: int = 0


FOR_SMALL = Kernels(blocked=True)
"""Of a base whose layers are so small that a measurement would say more about the moment than about the kernels."""


@dataclass(frozen=True)
class Shapes:
    """What is measured: `levels` of (tokens, channels, heads) of the denoiser's attention, and channels of its convolutions."""

    levels: tuple[tuple[int, int, int], ...]
    convolution: tuple[int, int]  # channels, side


def choose_kernels(shapes: Shapes, dtype: torch.dtype, device: torch.device, folder: Path | None) -> Kernels:
    """The choice kept in `folder` for this machine, number of threads and these shapes, else measured and kept there."""
    if device.type != "cpu":
        return Kernels()
    processor = torch.backends.cpu.get_cpu_capability()
    key = repr((processor, _processor_name(), torch.__version__, torch.get_num_threads(), str(dtype), shapes))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json" if folder else None
    if path is not None and path.is_file():
        try:
            return Kernels(**json.loads(path.read_text(encoding="utf-8"))["chosen"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damaged: measured again
    chosen = measure_kernels(shapes, dtype)
    if path is not None:
        with contextlib.suppress(OSError):  # a full disk costs the memory of it, not the run
            write_atomically(path, json.dumps({"for": key, "chosen": asdict(chosen)}, indent=1).encode())
    return chosen


def measure_kernels(shapes: Shapes, dtype: torch.dtype) -> Kernels:
    """A second at the most for Stable Diffusion at 512 pixels: each choice by the median of a few rounds."""
    products = 0
    for tokens, channels, heads in sorted(shapes.levels):
        if tokens * tokens > LARGEST or not _products_win(tokens, channels, heads, dtype):
            break
        products = tokens * tokens
    channels, side = shapes.convolution
    kernel = nn.Conv2d(channels, channels, 3, padding=1)
    # Linear layers stay plain: blocks save a few per cent there, and cost a second copy of every weight, where one serves
    # both directions.
    return Kernels(_blocks_win(kernel, (1, channels, side, side), dtype, CLEARLY), products=products)


def _products_win(tokens: int, channels: int, heads: int, dtype: torch.dtype) -> bool:
    query, key, value = (torch.randn(1, tokens, channels).to(dtype).requires_grad_() for _ in range(3))

    def work(by_products: bool) -> Callable[[], object]:
        return lambda: _backward(attend((query, key, value), heads, by_products))

    return _wins(work(True), work(False))


def _blocks_win(plain: nn.Linear | nn.Conv2d, shape: tuple[int, ...], dtype: torch.dtype, below: float) -> bool:
    plain = plain.to(dtype).requires_grad_(False)
    if not can_be_blocked(plain):
        return False
    x = torch.randn(shape).to(dtype).requires_grad_()
    blocked = BlockedLayer(plain)
    return _wins(lambda: _backward(blocked(x)), lambda: _backward(plain(x)), below)


def _backward(answer: torch.Tensor) -> None:
    answer.backward(torch.ones_like(answer))  # type: ignore[no-untyped-call]


def _wins(other: Callable[[], object], usual: Callable[[], object], below: float = CLEARLY, rounds: int = 5) -> bool:
    ratios = []
    for _ in range(rounds + 1):  # the first one warms up
        took = []
        for work in (other, usual):
            tick = time.perf_counter()
            work()
            took.append(time.perf_counter() - tick)
        ratios.append(took[0] / took[1])
    return statistics.median(ratios[1:]) < below


def _processor_name() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def shapes_of(config: Mapping[str, Any], side: int) -> Shapes:
    """Of a UNet's configuration and latents of `side` by `side`."""
    widths = config["block_out_channels"]
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    counts = heads if isinstance(heads, list | tuple) else [heads] * len(widths)
    sides = [max(1, side >> level) for level in range(len(widths))]
    levels = [(side * side, width, count) for side, width, count in zip(sides, widths, counts, strict=False)]
    kinds = config.get("down_block_types", ["CrossAttnDownBlock2D"] * len(levels))
    attended = [level for level, kind in zip(levels, kinds, strict=False) if "Attn" in kind]
    return Shapes(tuple(attended), (widths[-1], sides[-1]))
