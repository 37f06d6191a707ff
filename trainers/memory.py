"""How much memory a run holds: part by part before its first step, what a step adds, and the most there was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trainers.blocked import BlockedLayer
from trainers.frozen import SharedRows

if TYPE_CHECKING:
    from trainers.setup import Training


def parts_in_words(training: Training) -> str:
    """What the base, the adapter and its optimizer hold. Second copies of weights, for the way back, are not there yet."""
    modules = (*training.model.parts().values(), training.model.vae)
    base = bytes_of(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    # These keep their weights elsewhere than among a module's parameters.
    apart = [layer for module in modules for layer in module.modules() if isinstance(layer, BlockedLayer | SharedRows)]
    base += sum(layer.shape.numel() * layer.dtype.itemsize for layer in apart)
    flat = training.flat
    state = [tensor for state in training.optimizer.state.values() for tensor in state.values()]
    # The optimizer's state is there from the first step on; before, it is told as the two moments that most keep.
    moments = bytes_of(state) or 2 * flat.weights.nbytes
    mean = 0 if training.mean is None else training.mean.nbytes
    constants = bytes_of(tensor for own in flat.constants.values() for tensor in own.values())
    adapter = flat.weights.nbytes + flat.gradient.nbytes + mean + moments + constants
    return f"memory: base {base / 1e6:.1f} MB, adapter with gradient and optimizer {adapter / 1e6:.1f} MB"


def bytes_of(values: Iterable[Any]) -> int:
    """Bytes of the tensors among `values`, memory that several share counted once."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@contextmanager
def step_in_log(training: Training) -> Iterator[None]:
    """Writes into the log how much more is held at the most than before, if it is the first step of this process."""
    if training.durations:
        yield
        return
    device = training.device.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory_now(device)
    yield
    peak = memory_peak(device)[0]
    what = "the first step took %.1f MB at its peak, beside the %.1f MB held before it"
    logging.getLogger("impasto").info("memory: " + what, max(0, peak - before) / 1e6, before / 1e6)


def memory_now(device: torch.device) -> int:
    """Bytes that are held at the moment: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def memory_used(device: torch.device) -> int:
    """Bytes that the process holds: on the GPU the most it ever allocated, else its resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def memory_peak(device: torch.device) -> tuple[int, int]:
    """(bytes that this process held at the most, bytes that it can hold: what it holds now and what is free) on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(torch.cuda.max_memory_allocated()), int(free + torch.cuda.memory_reserved())
    import psutil

    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", 0) or _resident_peak() or info.rss
    return int(peak), int(psutil.virtual_memory().available + info.rss)


def _resident_peak() -> int:
    """The most resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
