"""Counts that are the same on every machine: operations of a step, its floating-point operations, and what it keeps.

An operation is a call that the dispatcher hands to a device: views and other calls that only describe memory (also
allocations) are left out, those inside custom autograd functions are counted. FLOPs are those of matrix products,
convolutions and attention, two for each multiplication with its addition. Saved activations are the bytes that autograd
keeps from the forward pass, each storage once, without what had been there before the step: weights, packed or not.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry


@dataclass(frozen=True)
class Counts:
    """Of one step. `by_operation`: name -> calls, the commonest first."""

    operations: int
    flops: int
    saved_bytes: int
    by_operation: dict[str, int]


def count(step: Callable[[], object]) -> Counts:
    """Runs a step, counting. It must have run before, so that what is made once is not counted."""
    counter, saved = _Calls(), _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor), counter:
        step()
    return Counts(sum(counter.calls.values()), counter.flops, sum(saved.sizes.values()), dict(counter.calls.most_common()))


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        if not _only_describes(func):
            name = str(func.overloadpacket)
            self.calls[name] += 1
            if name in _FLOPS:
                self.flops += _FLOPS[name](args, answer)
            elif func.overloadpacket in flop_registry:
                self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=answer)
        return answer


_DESCRIBE = {
    "aten._unsafe_view", "aten.empty", "aten.empty_like", "aten.new_empty", "aten.new_empty_strided", "aten.empty_strided",
    "aten.lift_fresh", "aten.set_", "aten.resize_", "aten.sym_size", "aten.sym_numel", "aten.sym_stride",
    "aten.sym_storage_offset", "aten._has_compatible_shallow_copy_type", "aten.is_same_size", "aten._version", "prim.device",
    "prim.layout", "aten.record_stream",
}  # fmt: skip


def _only_describes(func: Any) -> bool:
    if str(func.overloadpacket) in _DESCRIBE:
        return True
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


class _Saved:
    def __init__(self) -> None:
        # By type(): isinstance would ask objects that pretend for their class, some of which then load what they stand for.
        before = (found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))
        # Held, so that none of them gives its place to what is saved later.
        self.before = {key: tensor.untyped_storage() for tensor in before if (key := _storage(tensor)) is not None}
        self.sizes: dict[int, int] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _storage(tensor)
        if key is not None and key not in self.before:
            self.sizes[key] = tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: torch.Tensor) -> int | None:
    """Names a tensor's memory; None for one in oneDNN's own layout, which only packed weights have."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Of softmax(Q K^T) V by shapes (B, heads, n, width): 2 n m (width + value's width) for each head."""
    *many, n, width = query
    return 2 * math.prod(many) * n * key[-2] * (width + value[-1])


def _convolution(args: Any, answer: Any) -> int:
    """mkldnn's pointwise convolution X, W, B, padding, stride, dilation, groups: 2 x output x (weights of one output)."""
    return conv_flop_count(list(args[0].shape), list(args[1].shape), list(answer.shape))


def _linear(args: Any, answer: Any) -> int:
    """mkldnn's pointwise linear X (..., in) W -> (..., out): 2 x output x in. W may be packed and say no shape."""
    return 2 * int(answer.numel()) * int(args[0].shape[-1])


def _attention(args: Any, answer: Any) -> int:
    return attention_flops(*(tuple(tensor.shape) for tensor in args[:3]))


def _attention_backward(args: Any, answer: Any) -> int:
    """Four products where the forward pass has two: a gradient of each of V, P, Q and K. That kernels compute the scores
    anew is their own affair: the same step has the same FLOPs on every device."""
    return 2 * attention_flops(*(tuple(tensor.shape) for tensor in args[1:4]))


_ATTENTION_BACKWARD = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_FLOPS: dict[str, Callable[[Any, Any], int]] = {
    "mkldnn._convolution_pointwise": _convolution,
    "mkldnn._convolution_pointwise_": _convolution,
    "mkldnn._linear_pointwise": _linear,
    "mkl._mkl_linear": _linear,
    "aten.mkldnn_convolution": _convolution,
    "aten.mkldnn_linear": _linear,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
} | {f"aten._scaled_dot_product_{name}_backward": _attention_backward for name in _ATTENTION_BACKWARD}
