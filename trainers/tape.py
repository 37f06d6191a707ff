"""A micro-batch's work as one flat list of operations, for bases so small that Python and autograd take longer than computing.

The work is done once under a recorder that sees every operation as it reaches the device, those of the backward pass too.
Done again, the same operations run one after the other on the same memory: no modules, no graph, no backward pass to walk.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Work = Callable[[], torch.Tensor]


def record(work: Work) -> Work:
    """Gives what does `work` again, whatever the tensors that it reads then hold, and returns its answer.

    `work` is done for it, and undone: tensors from before that it changed in place hold what they held. Raises RuntimeError
    for a work whose operations depend on numbers that only a run knows, or that draws random numbers.
    """
    tape = _Tape()
    try:
        with tape:
            answer = work()
    finally:
        tape.undo()
    module = tape.program(answer)

    def again() -> torch.Tensor:
        with torch.no_grad():
            return module()  # type: ignore[no-any-return]

    return again


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down operations. Tensors are known by their Python objects, which it holds as long as it writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._held: list[torch.Tensor] = []
        self._given: dict[str, torch.Tensor] = {}  # tensors from before, by their names in the program
        self._storages: set[int] = set()  # of tensors that the work has made
        self._outside: set[int] = set()  # of tensors from before
        self._made: dict[object, fx.Node] = {}  # by place and form in memory
        self._changed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if func is torch.ops.aten._local_scalar_dense.default or _draws(func, given):
            raise RuntimeError(f"{func} gives what a recording cannot know")
        self._keep_changed(func, given)
        node = self._graph.call_function(func, *tree_map(self._node_of, (args, kwargs)))
        answer = func(*args, **kwargs)
        self._write(answer, node)
        return answer

    def _keep_changed(self, func: Any, given: dict[str, Any]) -> None:
        """Copies what an operation is about to change, if it was there before."""
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, torch.Tensor) and _storage(value) not in self._storages:
                self._changed.append((value, value.detach().clone()))

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._nodes:
            if _storage(value) in self._storages:  # autograd kept it, and hands it out as another object
                if _layout(value) not in self._made:
                    raise RuntimeError("a piece of memory is read in a form that no operation has given")
                return self._made[_layout(value)]
            name = f"given_{len(self._given)}"
            self._given[name] = value
            self._outside.add(_storage(value))
            self._know(value, self._graph.get_attr(name))
        return self._nodes[id(value)]

    def _write(self, answer: Any, node: fx.Node) -> None:
        if isinstance(answer, torch.Tensor):
            if id(answer) not in self._nodes:  # an operation in place answers with what it was given
                self._know(answer, node)
                if _storage(answer) not in self._outside:
                    self._storages.add(_storage(answer))
                    self._made[_layout(answer)] = node
        elif isinstance(answer, list | tuple):
            for number, part in enumerate(answer):
                if isinstance(part, torch.Tensor):
                    self._write(part, self._graph.call_function(operator.getitem, (node, number)))

    def _know(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._held.append(tensor)

    def undo(self) -> None:
        """Puts back what was changed in place, the last change first."""
        for tensor, before in reversed(self._changed):
            tensor.copy_(before)

    def program(self, answer: torch.Tensor) -> fx.GraphModule:
        """What was written down, as Python's own code that lets go of each tensor after its last use."""
        self._graph.output(self._node_of(answer))
        holder = torch.nn.Module()
        for name, tensor in self._given.items():
            holder.__dict__[name] = tensor
        return fx.GraphModule(holder, self._graph)


def _draws(func: Any, given: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers; attention does only for its dropout."""
    may = torch.Tag.nondeterministic_seeded in func.tags
    return may and not (
        "dropout_p" in {argument.name for argument in func._schema.arguments} and not given.get("dropout_p", 0.0)
    )


def _layout(tensor: torch.Tensor) -> object:
    """Place and form in memory: two tensors of the same are one to whoever reads or writes them."""
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _storage(tensor: torch.Tensor) -> int:
    """Names a tensor's memory; a packed weight, which nothing changes, by itself."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)
