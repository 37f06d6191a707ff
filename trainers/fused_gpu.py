"""The fused nodes' kernels for an NVIDIA GPU, in Triton, which comes with PyTorch there. Imported where they are used only.

GroupNorm (arXiv 1803.08494) in channels-last form, which PyTorch's own kernel refuses: around it everything would be
turned twice, and on a small picture one processor of the GPU would sum up a whole group. Here a group is cut into tiles of
pixels: one kernel sums the tiles up, a second one adds their sums, always in the same order, and applies them to its tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 8192
"""Numbers in a tile, which one program of the grid holds in its registers."""
BLOCK = 1024
"""The same of a gated unit's row."""


@triton.jit
def _tile(group, tile, row, pixels, channels, width, PADDED: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets (ROWS, PADDED) of a tile's numbers, which of them there are, and the numbers of their channels."""
    column = tl.arange(0, PADDED)
    pixel = tile * ROWS + tl.arange(0, ROWS)
    inside = (pixel < pixels)[:, None] & (column < width)[None, :]
    place = (row.to(tl.int64) * pixels + pixel)[:, None] * channels + (group * width + column)[None, :]
    return place, inside, group * width + column, column < width


@triton.jit
def _sum_tiles(sums, group, row, groups, tiles, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both sums of a group over all its tiles."""
    number = tl.arange(0, TILES)
    place = sums + ((row * groups + group) * tiles + number) * 2
    first = tl.sum(tl.load(place, number < tiles, other=0.0))
    return first, tl.sum(tl.load(place + 1, number < tiles, other=0.0))


@triton.jit
def _first_of(x, group, row, pixels, channels, width):  # type: ignore[no-untyped-def]
    """A group's first number. Sums of differences to it lose no digits where a mean is much larger than a deviation."""
    return tl.load(x + row.to(tl.int64) * pixels * channels + group * width).to(tl.float32)


@triton.jit
def _sum_forward(x, sums, pixels, channels, width, PADDED: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    group, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place, inside, _, _ = _tile(group, tile, row, pixels, channels, width, PADDED, ROWS)
    value = tl.load(x + place, inside, other=0.0).to(tl.float32) - _first_of(x, group, row, pixels, channels, width)
    value = tl.where(inside, value, 0.0)
    to = sums + ((row * tl.num_programs(0) + group) * tl.num_programs(1) + tile) * 2
    tl.store(to, tl.sum(value))
    tl.store(to + 1, tl.sum(value * value))


@triton.jit
def _apply_forward(  # type: ignore[no-untyped-def]
    x, y, sums, weight, bias, mean, rstd, pixels, channels, width, eps,
    SILU: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    group, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place, inside, channel, there = _tile(group, tile, row, pixels, channels, width, PADDED, ROWS)
    first, second = _sum_tiles(sums, group, row, tl.num_programs(0), tl.num_programs(1), TILES)
    count = pixels * width
    offset = first / count
    r = 1.0 / tl.sqrt(tl.maximum(second / count - offset * offset, 0.0) + eps)
    m = offset + _first_of(x, group, row, pixels, channels, width)
    if tile == 0:
        tl.store(mean + row * tl.num_programs(0) + group, m)
        tl.store(rstd + row * tl.num_programs(0) + group, r)
    w, b = tl.load(weight + channel, there, other=0.0).to(tl.float32), tl.load(bias + channel, there, other=0.0).to(tl.float32)
    z = (tl.load(x + place, inside, other=0.0).to(tl.float32) - m) * r * w[None, :] + b[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + place, z.to(y.dtype.element_ty), inside)


@triton.jit
def _to_normed(  # type: ignore[no-untyped-def]
    gradient, x, weight, bias, mean, rstd, group, tile, row, groups, pixels, channels, width,
    SILU: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a tile: the normed numbers n = (x - mean) rstd, the gradient to them, rstd, the place, and which there are."""
    place, inside, channel, there = _tile(group, tile, row, pixels, channels, width, PADDED, ROWS)
    m, r = tl.load(mean + row * groups + group), tl.load(rstd + row * groups + group)
    w = tl.load(weight + channel, there, other=0.0).to(tl.float32)
    n = (tl.load(x + place, inside, other=0.0).to(tl.float32) - m) * r
    to = tl.load(gradient + place, inside, other=0.0).to(tl.float32)
    if SILU:
        b = tl.load(bias + channel, there, other=0.0).to(tl.float32)
        z = n * w[None, :] + b[None, :]
        s = tl.sigmoid(z)
        to = to * s * (1.0 + z * (1.0 - s))
    return n, to * w[None, :], r, place, inside


@triton.jit
def _sum_backward(  # type: ignore[no-untyped-def]
    gradient, x, sums, weight, bias, mean, rstd, pixels, channels, width,
    SILU: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    group, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, to, _, _, _ = _to_normed(
        gradient, x, weight, bias, mean, rstd, group, tile, row, tl.num_programs(0), pixels, channels, width, SILU, PADDED, ROWS
    )
    into = sums + ((row * tl.num_programs(0) + group) * tl.num_programs(1) + tile) * 2
    tl.store(into, tl.sum(to))  # where nothing lies, the gradient is zero
    tl.store(into + 1, tl.sum(to * n))


@triton.jit
def _apply_backward(  # type: ignore[no-untyped-def]
    gradient, x, to_x, sums, weight, bias, mean, rstd, pixels, channels, width,
    SILU: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    group, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, to, r, place, inside = _to_normed(
        gradient, x, weight, bias, mean, rstd, group, tile, row, tl.num_programs(0), pixels, channels, width, SILU, PADDED, ROWS
    )
    first, second = _sum_tiles(sums, group, row, tl.num_programs(0), tl.num_programs(1), TILES)
    count = pixels * width
    to = r * (to - first / count - n * (second / count))
    tl.store(to_x + place, to.to(to_x.dtype.element_ty), inside)


@triton.jit
def _gate(both, y, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(both + row * 2 * width + column, inside, other=0.0).to(tl.float32)
    gate = tl.load(both + row * 2 * width + width + column, inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * width + column, (value * gelu).to(y.dtype.element_ty), inside)


@triton.jit
def _gate_backward(gradient, both, to_both, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(both + row * 2 * width + column, inside, other=0.0).to(tl.float32)
    gate = tl.load(both + row * 2 * width + width + column, inside, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * width + column, inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # the normal distribution up to the gate
    slope = below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    kind = to_both.dtype.element_ty
    tl.store(to_both + row * 2 * width + column, (given * gate * below).to(kind), inside)
    tl.store(to_both + row * 2 * width + width + column, (given * value * slope).to(kind), inside)


def _sizes(x: torch.Tensor, groups: int) -> tuple[tuple[int, int, int], tuple[int, int, int], dict[str, int], int]:
    """The grid; pixels, channels and a group's width; the tile's two sides; and the number of tiles as a power of two."""
    batch, channels, height, width = x.shape
    padded = triton.next_power_of_2(channels // groups)
    rows = max(1, min(TILE // padded, triton.next_power_of_2(height * width)))
    tiles = triton.cdiv(height * width, rows)
    sides = {"PADDED": padded, "ROWS": rows, "num_warps": 8}
    return (groups, tiles, batch), (height * width, channels, channels // groups), sides, triton.next_power_of_2(tiles)


def normalise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GroupNorm of x (B, C, H, W), then SiLU if wanted -> the same in channels-last form; mean, 1 / deviation (B, groups)."""
    x = x.contiguous(memory_format=torch.channels_last)
    grid, sizes, sides, tiles = _sizes(x, groups)
    y = torch.empty_like(x)
    sums, (mean, rstd) = _sums(x, grid), x.new_empty((2, x.shape[0], groups), dtype=torch.float32)
    _sum_forward[grid](x, sums, *sizes, **sides)
    _apply_forward[grid](x, y, sums, weight, bias, mean, rstd, *sizes, eps, SILU=silu, TILES=tiles, **sides)
    return y, mean, rstd


def normalise_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
) -> torch.Tensor:
    """dL/dx from dL/dy and what `normalise` was given and has found."""
    x, gradient = (states.contiguous(memory_format=torch.channels_last) for states in (x, gradient))
    grid, sizes, sides, tiles = _sizes(x, mean.shape[1])
    to_x, sums = torch.empty_like(x), _sums(x, grid)
    _sum_backward[grid](gradient, x, sums, weight, bias, mean, rstd, *sizes, SILU=silu, **sides)
    _apply_backward[grid](gradient, x, to_x, sums, weight, bias, mean, rstd, *sizes, SILU=silu, TILES=tiles, **sides)
    return to_x


def _sums(x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return x.new_empty((grid[2], grid[0], grid[1], 2), dtype=torch.float32)


def gate(both: torch.Tensor) -> torch.Tensor:
    """value * gelu(gate), exact (erf): (..., 2 n) -> (..., n)."""
    both = both.contiguous()
    width = both.shape[-1] // 2
    y = both.new_empty((*both.shape[:-1], width))
    _gate[(y.numel() // width, triton.cdiv(width, BLOCK))](both, y, width, BLOCK=BLOCK)
    return y


def gate_backward(gradient: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """dL/dboth of `gate`, (..., 2 n)."""
    gradient, both = gradient.contiguous(), both.contiguous()
    width, to_both = gradient.shape[-1], torch.empty_like(both)
    _gate_backward[(gradient.numel() // width, triton.cdiv(width, BLOCK))](gradient, both, to_both, width, BLOCK=BLOCK)
    return to_both
