"""Captions -> what the denoiser reads of them, in two halves: one on the host, and one of nothing but tensors.

The first half looks captions up, or cuts them into tokens; the second half is all that is computed in the step, so that
it can be recorded there once and done again with other tensors of the same shapes (graph.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trainers.dataset.cache import ContentCache, Entry
from trainers.device import send
from trainers.families.base import Conditioning, DiffusionModel

RESIDENT = 256 * 2**20
"""Bytes of text states that stay on a GPU; the rest lies in the machine's memory. A caption of SDXL takes 0.3 MB."""


@dataclass(frozen=True)
class Condition:
    """`read` gives a batch's captions as tensors on the run's device, `finish` makes the Conditioning of them."""

    read: Callable[[Sequence[str]], Entry]
    finish: Callable[[Entry], Conditioning]

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Both halves."""
        return self.finish(self.read(captions))


def choose_condition(model: DiffusionModel, device: torch.device, learns: bool, resident: int = RESIDENT) -> Condition:
    """Encoded in the step while the text encoder `learns`, else once for each caption.

    Of cached text states up to `resident` bytes stay on `device`, if that has a memory of its own.
    """
    if learns:
        return Condition(
            lambda captions: {part: send(ids, device) for part, ids in model.tokenise(captions).items()}, model.encode_tokens
        )
    cache, held = ContentCache(folder=None), _Held(device, resident)

    def encode(caption: str) -> Entry:
        with torch.no_grad():
            row = model.encode_captions([caption])
        return {"hidden_states": row.hidden_states, **row.extras}

    def read(captions: Sequence[str]) -> Entry:
        rows = [held.get(caption, lambda one=caption: cache.get(one, lambda: encode(one))) for caption in captions]  # type: ignore[misc]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return Condition(read, _as_conditioning)


def _as_conditioning(states: Entry) -> Conditioning:
    extras = {name: state for name, state in states.items() if name != "hidden_states"}
    return Conditioning(states["hidden_states"], extras)


class _Held:
    """Entries on the device, the first ones up to a limit; those that came later are sent at each use."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._left = device, limit if device.type != "cpu" else 0
        self._entries: dict[str, Entry] = {}

    def get(self, key: str, compute: Callable[[], Entry]) -> Entry:
        """The entry of `key` on the device."""
        if key in self._entries:
            return self._entries[key]
        entry = {name: send(tensor, self._device) for name, tensor in compute().items()}
        size = sum(tensor.nbytes for tensor in entry.values())
        if size <= self._left:
            self._entries[key], self._left = entry, self._left - size
        return entry
