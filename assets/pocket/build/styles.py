"""Changes drawn over the pictures: the VAE learns what no set of the base shows, the denoiser that style is separable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional

GROUND = 0.97
"""A pixel whose darkest channel (0..1) is above this belongs to the white ground, or to a white part of the object."""


BORDERS, INNER = (0, 2, 2, 3, 3, 4, 5, 6), (0, 0, 1, 1, 1, 2, 2, 3)
"""Widths in pixels (at 128) that drawn borders and colour edges are given, each as often as it stands here."""


def grow(mask: Tensor, reach: int) -> Tensor:
    """(N, 1, H, W) of 0 and 1, grown by `reach` pixels in a nearly round shape; reach 0 changes nothing."""
    for index in range(reach):  # a cross and a square by turns: an octagon
        across = functional.max_pool2d(mask, (1, 3), 1, (0, 1)).maximum(functional.max_pool2d(mask, (3, 1), 1, (1, 0)))
        mask = functional.max_pool2d(mask, 3, 1, 1) if index % 2 else across
    return mask


def object_mask(planes: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 on white -> (N, 1, H, W) of 0 and 1."""
    return (planes.amin(1, keepdim=True) < GROUND).to(planes.dtype)


def colour_edges(planes: Tensor, threshold: float = 0.25) -> Tensor:
    """(N, 1, H, W) of 0 and 1: where a channel changes by more than `threshold` (0..1) between neighbours 2 pixels apart."""
    across = functional.pad((planes[..., 2:] - planes[..., :-2]).abs().amax(1, keepdim=True), (1, 1, 0, 0))
    down = functional.pad((planes[..., 2:, :] - planes[..., :-2, :]).abs().amax(1, keepdim=True), (0, 0, 1, 1))
    return (across.maximum(down) > threshold).to(planes.dtype)


def draw_outline(planes: Tensor, border: int, inner: int, ink: Tensor) -> Tensor:
    """The pictures with the object's border `border` pixels wide and its colour edges `inner` pixels, in ink (N, 3, 1, 1).

    The border lies half outside the object. A width of 0 draws nothing.
    """
    line = torch.zeros_like(planes[:, :1])
    if border:
        inside = object_mask(planes)
        line = grow(inside, border - border // 2) * grow(1 - inside, border // 2 + 1)
    if inner:
        line = line.maximum(grow(colour_edges(planes), inner - 1))
    return planes * (1 - line) + ink * line


def shift(planes: Tensor, generator: Generator, reach: int) -> Tensor:
    """All pictures moved by one random offset of up to `reach` pixels; white comes in."""
    down, right = (int(value) for value in torch.randint(-reach, reach + 1, (2,), generator=generator))
    moved = functional.pad(planes, (reach, reach, reach, reach), value=1.0)
    height, width = planes.shape[-2:]
    return moved[..., reach - down : reach - down + height, reach - right : reach - right + width]


def luma(planes: Tensor) -> Tensor:
    """(N, 1, H, W) brightness of (N, 3, H, W) (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=planes.dtype, device=planes.device).view(1, 3, 1, 1)
    return (planes * weights).sum(1, keepdim=True)


def uniform(count: int, low: float, high: float, generator: Generator, channels: int = 3) -> Tensor:
    """(count, channels, 1, 1) drawn evenly from low..high."""
    return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)


def vary(planes: Tensor, generator: Generator) -> Tensor:
    """The second and later quarters of a batch made unlike the set, so that a VAE learns to keep what it never draws itself.

    (N, 3, 128, 128) in 0..1. The first quarter stays. Of the others, 70 % get dark outlines, mostly as thin as half to two
    pixels of the finished picture; some are washed out towards white before, some get other colours, grounds, inversion.
    """
    count = len(planes)
    planes = planes.clone()
    first = count // 4
    for index in range(first, count):
        one, kind = planes[index : index + 1], float(torch.rand(1, generator=generator))
        if torch.rand(1, generator=generator) < 0.5:
            one = one.flip(-1)
        one = shift(one, generator, 6)
        if kind < 0.35:
            one = one[:, torch.randperm(3, generator=generator)]
        if 0.3 < kind < 0.55:  # flat inks: washed out, then outlined below
            one = 1 - (1 - one) * uniform(1, 0.0, 0.8, generator, 1)
        if torch.rand(1, generator=generator) < 0.7:
            border, inner = (int(place) for place in torch.randint(8, (2,), generator=generator))
            one = draw_outline(one, BORDERS[border], INNER[inner], uniform(1, 0.0, 0.25, generator))
        if 0.55 < kind < 0.7:
            ground = object_mask(one)
            one = one * ground + (1 - ground) * uniform(1, 0.0, 1.0, generator)
        elif 0.7 < kind < 0.78:
            one = 1 - one
        elif 0.78 < kind < 0.86:
            one = ((luma(one) - 0.5) * 3 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        planes[index] = one[0]
    return planes


INK = (0.05, 0.04, 0.1)


def outlined(planes: Tensor) -> Tensor:
    """A dark line of 4 pixels around the object and thin ones along its colour edges."""
    return draw_outline(planes, 4, 1, torch.tensor(INK).view(1, 3, 1, 1).expand(len(planes), -1, -1, -1))


def sketch(planes: Tensor) -> Tensor:
    """Grey lines on white: border and colour edges, nothing filled."""
    inside = object_mask(planes)
    border = grow(inside, 1) * grow(1 - inside, 2)
    return 1 - 0.75 * border.maximum(colour_edges(planes)).expand(-1, 3, -1, -1)


def greyscale(planes: Tensor) -> Tensor:
    """Brightness alone."""
    return luma(planes).expand(-1, 3, -1, -1)


def pastel(planes: Tensor) -> Tensor:
    """Half way to white."""
    return 1 - (1 - planes) * 0.5


def two_tone(planes: Tensor) -> Tensor:
    """Two blues: brightness over 0.55 of the object light, the rest dark, on white."""
    inside = object_mask(planes)
    bright = (luma(planes) > 0.55).to(planes.dtype)
    light, dark = (torch.tensor(tone).view(1, 3, 1, 1) for tone in ((0.55, 0.78, 0.95), (0.1, 0.25, 0.55)))
    return (1 - inside) + inside * (bright * light + (1 - bright) * dark)


def night(planes: Tensor) -> Tensor:
    """The object on a near-black blue ground."""
    inside = object_mask(planes)
    return planes * inside + (1 - inside) * torch.tensor((0.08, 0.09, 0.2)).view(1, 3, 1, 1)


DRAWN_STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "outlined": outlined,
    "sketch": sketch,
    "greyscale": greyscale,
    "pastel": pastel,
    "two tone": two_tone,
    "night": night,
}
"""Style words that no set has: each changes (N, 3, 128, 128) in 0..1 by a rule."""
