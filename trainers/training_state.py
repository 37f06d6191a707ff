"""Everything a resume needs, in one file: the adapter's float32 masters, the optimizer, the running mean, the step.

The file is a .safetensors; what is not a tensor stands as JSON in its metadata, with a checksum over both. It is written
aside, flushed and renamed; the two newest are kept, and a damaged one falls back to the one before. Beside them lies the
state that the run would go back to if its numbers broke, so that a resumed run goes back as far as an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trainers.errors import RunFolderError
from trainers.files import write_atomically
from trainers.run_folder import RunFolder

GENERATIONS = 2


@dataclass(frozen=True)
class Recovery:
    """How often a run went back, by which factor its learning rates are lower since, and whose steps are passed over."""

    attempts: int = 0
    rate: float = 1.0
    skipped: tuple[int, ...] = ()

    def again(self, step: int) -> Recovery:
        """One more, after the batch of `step` gave no finite number."""
        return Recovery(self.attempts + 1, self.rate / 2, (*self.skipped, step))

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Recovery:
        """From the JSON of its fields."""
        return cls(facts["attempts"], facts["rate"], tuple(facts["skipped"]))


@dataclass(frozen=True)
class TrainingState:
    """`step` optimizer updates are done. `optimizer` is a torch optimizer's state_dict; `mean` is the EMA or None."""

    step: int
    weights: torch.Tensor
    mean: torch.Tensor | None
    optimizer: dict[str, Any]
    facts: dict[str, Any]  # what must be set again to go on alike: kernels, seconds trained, loss scale, how often it went back
    constants: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # by layer, what its type keeps beside factors


def save_state(run: RunFolder, state: TrainingState, good: TrainingState | None = None) -> None:
    """Writes one generation, and `good` where it is not there yet; removes what is older than two generations.

    States of later steps are from before the run went back, and are removed too. Raises OSError, with all as it was.
    """
    if good is not None and not _path(run, "good", good.step).exists():
        _write(_path(run, "good", good.step), good)
    _write(_path(run, "step", state.step), state)
    past = [path for path in _newest_first(run) if _step_of(path) <= state.step]
    for path in {*_newest_first(run)} - {*past[:GENERATIONS]}:
        path.unlink(missing_ok=True)
    for path in _newest_first(run, "good")[GENERATIONS:]:
        path.unlink(missing_ok=True)


def _path(run: RunFolder, kind: str, step: int) -> Path:
    return run.state / f"{kind}-{step:08d}.safetensors"


def _step_of(path: Path) -> int:
    match = re.search(r"-(\d+)$", path.stem)
    return int(match[1]) if match else -1


def _write(path: Path, state: TrainingState) -> None:
    tensors = {"weights": state.weights}
    if state.mean is not None:
        tensors["mean"] = state.mean
    plain = _take_tensors("optimizer", state.optimizer, tensors)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    constants = _take_tensors("constants", state.constants, tensors)
    values = json.dumps({"step": state.step, "optimizer": plain, "constants": constants, "facts": state.facts})
    metadata = {"state": values, "sha256": _checksum(values, tensors)}
    write_atomically(path, save(tensors, metadata))


def load_state(run: RunFolder) -> TrainingState | None:
    """The newest undamaged state, or None when there is none yet. Raises RunFolderError when all are damaged."""
    paths = _newest_first(run)
    for path in paths:
        state = _read(path)
        if state is not None:
            return state
    if paths:
        raise RunFolderError("Every training state of this run is damaged", str(run.state), "Train into a new folder.")
    return None


def load_good(run: RunFolder, step: int) -> TrainingState | None:
    """The state of `step` that a run goes back to when its numbers break; None when it is missing or damaged."""
    return _read(_path(run, "good", step))


def _newest_first(run: RunFolder, kind: str = "step") -> list[Path]:
    return sorted(run.state.glob(f"{kind}-*.safetensors"), key=_step_of, reverse=True)


def _read(path: Path) -> TrainingState | None:
    try:
        # Cloned, as Windows replaces and deletes no file that is still mapped.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError):
        return None
    # All that follows reads only what has its checksum, so what this program wrote.
    if metadata.get("sha256") != _checksum(metadata.get("state", ""), tensors):
        return None
    values = json.loads(metadata["state"])
    return TrainingState(
        values["step"],
        tensors["weights"],
        tensors.get("mean"),
        _put_tensors(values["optimizer"], tensors),
        values["facts"],
        _put_tensors(values["constants"], tensors) if "constants" in values else {},
    )


def _checksum(values: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(values.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take_tensors(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, its tensors moved into `tensors` and replaced by their names. Whole-number keys are kept apart."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value if value.dim() else value[None]
        return {"tensor": name, "scalar": value.dim() == 0}
    if isinstance(value, dict):
        return {"pairs": [[key, _take_tensors(f"{name}.{key}", inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        items = [_take_tensors(f"{name}.{index}", inner, tensors) for index, inner in enumerate(value)]
        return {"list": items, "tuple": isinstance(value, tuple)}
    return {"value": value}


def _put_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor[0] if value["scalar"] else tensor
    if "pairs" in value:
        return {key: _put_tensors(inner, tensors) for key, inner in value["pairs"]}
    if "list" in value:
        items = [_put_tensors(inner, tensors) for inner in value["list"]]
        return tuple(items) if value["tuple"] else items
    return value["value"]
