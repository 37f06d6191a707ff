"""One micro-batch's work, forward and backward, recorded once for each shape and done again as a whole.

On a GPU it is recorded as a CUDA graph, on a CPU, for small bases, as a list of operations (tape.py).

A step of Stable Diffusion is thousands of small operations, and issuing them from Python takes a fast GPU longer than
computing them. A recorded step is issued at once. It reads its inputs where they lay when it was recorded, so each shape
has buffers of its own that a batch is copied into, and it adds to the same flat gradient. Everything that changes from
step to step is therefore a tensor: latents, noise, timesteps, weights, framing, tokens or text states, and the loss scale.

The first batches of a shape are computed as usual, beside the main stream: libraries choose and set up their kernels then,
which a recording does not allow. What cannot be recorded is computed as usual throughout, and why is told.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from trainers import tape
from trainers.condition import Condition
from trainers.dataset.batches import Batch

WARM_UP = 2
"""Batches of a shape that are computed before it is recorded."""
ON_CPU = 8
"""The same on a CPU, where recording takes as long as some twenty steps save."""
LATENTS_ON_CPU = 1 << 16
"""Numbers in a batch's latents up to which it is recorded there: while it is, all that a step computes lies in memory."""
MOST = 16
"""Shapes that are recorded at the most: each recording holds some megabytes for its thousands of kernels."""

Learn = Callable[[Batch, Condition, torch.Tensor], torch.Tensor]
"""(batch, condition, loss scale ()) -> loss (), the gradient added to the flat buffer."""
Work = Callable[[], torch.Tensor]


class Runner(Protocol):
    """How the work on a micro-batch is issued."""

    def __call__(self, learn: Learn, batch: Batch, condition: Condition, factor: torch.Tensor) -> torch.Tensor:
        """`learn` on the batch. Returns its loss (); the caller may keep it."""

    def forget(self) -> None:
        """Gives back the memory of all that was recorded. It is recorded again when it is needed."""


class Eager:
    """Operation by operation."""

    def __call__(self, learn: Learn, batch: Batch, condition: Condition, factor: torch.Tensor) -> torch.Tensor:
        """See Runner."""
        return learn(batch, condition, factor)

    def forget(self) -> None:
        """Nothing was recorded."""


class Graphed:
    """By recordings. `record` gives for a work what does it again on the same memory and returns its loss.

    It may not leave the work done. `beside` is where works are done that warm it up, `warm_up` how many of a shape.
    """

    def __init__(
        self,
        record: Callable[[Work], Work],
        warn: Callable[[str], None],
        beside: Callable[[], AbstractContextManager[None]] = nullcontext,
        warm_up: int = WARM_UP,
        largest: float = math.inf,
    ) -> None:
        self._largest = largest
        self._record, self._warn, self._beside, self._warm_up = record, warn, beside, warm_up
        self._seen: Counter[object] = Counter()
        self._recorded: dict[object, tuple[dict[str, torch.Tensor], Work]] = {}
        self._given_up = False

    def __call__(self, learn: Learn, batch: Batch, condition: Condition, factor: torch.Tensor) -> torch.Tensor:
        """See Runner."""
        if self._given_up or batch.latents.numel() > self._largest:
            return learn(batch, condition, factor)
        text = condition.read(batch.captions)
        given = _tensors(batch, factor) | {f"text {name}": tensor for name, tensor in text.items()}
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in given.items())
        if shape not in self._recorded:
            self._seen[shape] += 1
            if self._seen[shape] <= self._warm_up or len(self._recorded) == MOST:
                with self._beside():
                    return _work(learn, batch, condition, given)()
            try:
                held = {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in given.items()}
                self._recorded[shape] = held, self._record(_work(learn, batch, condition, held))
            except RuntimeError as error:  # also of too little memory, where the usual way may still do
                self._give_up(str(error) or type(error).__name__)
        if self._given_up:  # out of the handler, whose traceback keeps the attempt's memory
            return learn(batch, condition, factor)
        held, again = self._recorded[shape]
        for name, tensor in given.items():
            held[name].copy_(tensor, non_blocking=True)
        return again()

    def forget(self) -> None:
        """See Runner."""
        self._recorded.clear()
        self._seen.clear()

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self.forget()
        logging.getLogger("impasto").info("the step cannot be recorded: %s", reason.splitlines()[0][:200])
        self._warn("The step is computed operation by operation, as it cannot be recorded: the same result, somewhat slower.")


def _tensors(batch: Batch, factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """All of a batch but its captions."""
    given = {"mask": batch.mask, "keys": batch.keys}
    return {name: tensor for name, tensor in given.items() if tensor is not None} | {
        "latents": batch.latents,
        "noise": batch.noise,
        "timesteps": batch.timesteps,
        "weights": batch.weights,
        "framing": batch.framing,
        "factor": factor,
    }


def _work(learn: Learn, batch: Batch, condition: Condition, held: dict[str, torch.Tensor]) -> Work:
    """`learn` on the tensors in `held`, whatever they hold when it is done."""
    numbers = {name: tensor for name, tensor in held.items() if name != "factor" and not name.startswith("text ")}
    text = {name.removeprefix("text "): tensor for name, tensor in held.items() if name.startswith("text ")}
    there = Condition(lambda captions: text, condition.finish)
    return lambda: learn(Batch(captions=batch.captions, **numbers), there, held["factor"])


def choose_runner(setting: str, device: torch.device, small: bool, warn: Callable[[str], None]) -> Runner:
    """Recordings on an NVIDIA GPU, and of a small base on a CPU, unless `train.recording` is off; else one by one."""
    if setting == "off":
        return Eager()
    if device.type == "cuda":
        cuda = _Cuda(device)
        return Graphed(cuda.record, warn, cuda.beside)
    # Elsewhere it pays where layers are small; a recording is made once a run has proved to be longer than a trial.
    return Graphed(tape.record, warn, warm_up=ON_CPU, largest=LATENTS_ON_CPU) if small and device.type == "cpu" else Eager()


class _Cuda:
    """Recording by CUDA graphs. They share one pool of memory, as one is done after the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On a stream of its own, as what was first done on the main one cannot be recorded."""
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Raises RuntimeError, with nothing done, for a work that waits for the GPU or copies from pageable memory."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: what is hashed or written in the background.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            loss = work()

        def again() -> torch.Tensor:
            graph.replay()
            return loss.clone()  # its memory is another recording's too

        return again
