"""A recording as a CUDA graph makes it, on a CPU: the operations of a work, on the memory they were recorded on.

As there, only what an operation reads from memory can differ when it is done again: Python is not asked any more. As there,
a work cannot be recorded that reads a number back (`.item()`), or that makes a tensor of numbers on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from trainers.graph import Work

REFUSED = ("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh", "aten.equal")


class Operations(TorchDispatchMode):
    """Writes down every operation, forward and backward, with its arguments and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(str(func).startswith(name) for name in REFUSED):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out


def recorder(gradient: torch.Tensor) -> Any:
    """What Graphed calls: the work's operations, done again at each call. Recording leaves `gradient` as it was."""

    def record(work: Work) -> Work:
        before = gradient.clone()
        try:
            with Operations() as operations:
                loss = work()
        finally:
            with torch.no_grad():
                gradient.copy_(before)

        @torch.no_grad()
        def again() -> torch.Tensor:
            made: dict[int, torch.Tensor] = {}

            def now(value: Any) -> Any:
                return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

            for func, args, kwargs, out in operations.done:
                fresh = func(*tree_map(now, args), **tree_map(now, kwargs))
                for old, new in zip(tree_flatten(out)[0], tree_flatten(fresh)[0], strict=True):
                    if isinstance(old, torch.Tensor):
                        made[id(old)] = new
            return made[id(loss)] if id(loss) in made else made[id(operations.done[-1][3])]

        return again

    return record
