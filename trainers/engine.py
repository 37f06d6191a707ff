"""Makes a frozen base fast for training, and plain again: frozen layers, fused nodes, attention by the quicker kernel.

The base's modules stay diffusers' and transformers' own; leaf layers are replaced and attention processors set. Adapters
go in before or after: they hold whatever layer they were put beside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainers.attention import Attend, attends_plainly, share_rows, side_by_side
from trainers.blocked import BlockedLayer, can_be_blocked
from trainers.frozen import FrozenLayer, KeptLayer, plain_layer
from trainers.fused import Gated, NormSilu, SiluOfVectors
from trainers.kernels import Kernels
from trainers.quantised import PackedLayer
from trainers.upsampled import Upsampled, can_be_upsampled

Undo = list[Callable[[], None]]


@torch.no_grad()
def make_fast(parts: Mapping[str, nn.Module], kernels: Kernels) -> Undo:
    """Replaces what is replaced by faster equals, in place. Returns how to put everything back; see `make_plain`."""
    undo: Undo = []

    def keep(layer: nn.Linear | nn.Conv2d) -> FrozenLayer:
        wanted = kernels.matrices if isinstance(layer, nn.Linear) else kernels.blocked
        return BlockedLayer(layer) if wanted and can_be_blocked(layer) else KeptLayer(layer)

    silu = SiluOfVectors()
    for part in parts.values():
        for module in list(part.modules()):
            _fuse(module, silu, undo)
            if attends_plainly(module):
                _set_processor(module, Attend(kernels.products), undo)
                if names := side_by_side(module):
                    share_rows(module, names, keep)
        for parent, leaf, layer in list(_frozen_leaves(part)):
            setattr(parent, leaf, keep(layer))
    return undo


def compile_blocks(parts: Mapping[str, Any], folder: Path, undo: Undo, backend: str = "inductor") -> None:
    """Has torch.compile compile the blocks that a part names as its repeated ones, when they are first computed.

    What it makes is kept in `folder`, so that the next start takes seconds. Adds to `undo` how they become plain again.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    for part in parts.values():
        for module in part.modules():
            if type(module).__name__ in (getattr(part, "_repeated_blocks", None) or ()):
                module.compile(backend=backend)
                undo.append(lambda block=module: setattr(block, "_compiled_call_impl", None))  # type: ignore[misc]


@torch.no_grad()
def make_plain(parts: Mapping[str, nn.Module], undo: Undo) -> None:
    """The base as it was loaded, to the bit, but for weights kept in few bits. Adapters must have been taken out."""
    for step in reversed(undo):
        step()
    undo.clear()
    for part in parts.values():
        for path in [path for path, layer in part.named_modules() if _is_replaced(layer)]:  # no list that keeps the layers
            parent, _, leaf = path.rpartition(".")
            layer: Any = part.get_submodule(path)
            setattr(part.get_submodule(parent), leaf, plain_layer(layer, layer.weight))


def _is_replaced(layer: nn.Module) -> bool:
    return isinstance(layer, FrozenLayer) and not isinstance(layer, PackedLayer)


def _frozen_leaves(part: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """(parent, name there, layer) of every Linear and plain Conv2d, those beside which adapters stand included."""
    for parent in list(part.modules()):
        for leaf, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) or (
                isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
            ):
                yield parent, leaf, layer


def _replace(parent: nn.Module, leaf: str, new: nn.Module, undo: Undo) -> None:
    old = getattr(parent, leaf)
    setattr(parent, leaf, new)
    undo.append(lambda: setattr(parent, leaf, old))


def _fuse(module: Any, silu: SiluOfVectors, undo: Undo) -> None:
    """A GroupNorm with the SiLU after it, a gated unit, an upsampler with its convolution: by diffusers' names."""
    name = type(module).__name__
    if name == "ResnetBlock2D" and isinstance(module.nonlinearity, nn.SiLU) and module.time_embedding_norm == "default":
        for norm in ("norm1", "norm2"):
            _replace(module, norm, NormSilu(getattr(module, norm)), undo)
        _replace(module, "nonlinearity", silu, undo)
    elif (
        name == "UNet2DConditionModel"
        and isinstance(module.conv_norm_out, nn.GroupNorm)
        and isinstance(module.conv_act, nn.SiLU)
    ):
        _replace(module, "conv_norm_out", NormSilu(module.conv_norm_out), undo)
        _replace(module, "conv_act", nn.Identity(), undo)
    elif name == "Transformer2DModel" and isinstance(module.norm, nn.GroupNorm) and module.norm.weight.is_cuda:
        _replace(module, "norm", NormSilu(module.norm, silu=False), undo)
    elif name == "FeedForward" and type(module.net[0]).__name__ == "GEGLU":
        _stand_in(module.net, "0", Gated(module.net[0].proj), "proj", undo)
    elif name == "UpBlock2D" or name == "CrossAttnUpBlock2D":
        for number, upsampler in enumerate(module.upsamplers or ()):
            if _repeats_pixels(upsampler):
                _stand_in(module.upsamplers, str(number), Upsampled(upsampler.conv), "conv", undo)


def _stand_in(parent: nn.Module, leaf: str, new: nn.Module, inner: str, undo: Undo) -> None:
    """Replaces a module that holds the layer `inner`; what has become of that layer meanwhile goes back with it."""
    old = getattr(parent, leaf)
    setattr(old, inner, None)  # or the plain weight would lie beside its other form
    setattr(parent, leaf, new)

    def put_back() -> None:
        setattr(old, inner, getattr(new, inner))
        setattr(parent, leaf, old)

    undo.append(put_back)


def _repeats_pixels(upsampler: Any) -> bool:
    """Whether it is diffusers' Upsample2D that repeats pixels and then convolves."""
    plain = upsampler.use_conv and not upsampler.use_conv_transpose and upsampler.norm is None and upsampler.interpolate
    return bool(plain) and upsampler.name == "conv" and can_be_upsampled(upsampler.conv)


def _set_processor(module: Any, processor: Attend, undo: Undo) -> None:
    old = module.processor
    module.set_processor(processor)
    undo.append(lambda: module.set_processor(old))
