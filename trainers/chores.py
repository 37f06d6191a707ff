"""What the render worker does beside drawing, as it has torch and the base at hand: weighing a LoRA, exporting a blend."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainers.adapters.plan import BLOCKS, block_of
from trainers.attach import find
from trainers.cells import ExportRequest, WeighRequest
from trainers.families import recognise_base
from trainers.files import write_atomically
from trainers.formats import read_for
from trainers.tools.merge import merge_adapters
from trainers.warm import Tell, Warm, base_marks, lora_mark

_WEIGHED_BY = 1  # to be raised when the same file weighs otherwise


def do_chore(request: WeighRequest | ExportRequest, warm: Warm, tell: Tell) -> None:
    """Does it and tells one `answer`. Raises TrainingError, OSError."""
    answer = weigh(request, warm, tell) if isinstance(request, WeighRequest) else export(request, tell)
    tell({"event": "answer", "answer": answer})


def export(request: ExportRequest, tell: Tell) -> dict[str, Any]:
    """Writes a blend as one LoRA, exact by joined ranks unless a rank is asked for. Raises AdapterFileError."""
    remarks: list[str] = []
    inputs = [(Path(lora.path), lora.strengths) for lora in request.loras]
    output = Path(request.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = merge_adapters(inputs, output, request.rank, None, "kohya", request.family, remarks.append)
    errors = {"overall_error": done.overall_error, "worst_error": done.worst_error}
    return {"path": request.output, "told": str(done), "remarks": remarks, **errors}


def weigh(request: WeighRequest, warm: Warm, tell: Tell) -> dict[str, Any]:
    """Where a LoRA's weight lies: by block, the norm of its update and that of the base's weights that it changes.

    Both Frobenius, of all layers of the block taken as one vector; the update's without its matrix being formed, but for a
    DoRA's. Remembered in the folder by the marks of file and base. Raises TrainingError.
    """
    base = recognise_base(request.base.model, request.base.options)
    marks = [_WEIGHED_BY, lora_mark(request.path), base_marks(base)]
    known = Path(request.folder) / f"{hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:40]}.json"
    if known.is_file():
        told: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return told
    layers = find(warm.model(base, tell))
    file = read_for(Path(request.path), layers.read_as)
    updates: dict[str, list[float]] = {}
    frozen: dict[str, list[float]] = {}
    for name, weights in file.modules.items():
        weight: Any = layers.by_name[name].weight
        norm = weights.delta_norm()
        if norm is None:
            norm = float(weights.delta(weight.detach()).norm())
        updates.setdefault(block_of(name), []).append(norm)
        frozen.setdefault(block_of(name), []).append(float(weight.detach().double().norm()))
    listed = [
        {"block": block, "layers": len(updates[block]), "norm": _whole(updates[block]), "base": _whole(frozen[block])}
        for block in BLOCKS
        if block in updates
    ]
    answer = {"blocks": listed}
    write_atomically(known, json.dumps(answer).encode())
    return answer


def _whole(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
