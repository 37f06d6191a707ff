"""Proof that a LoRA file says what was trained: read back through diffusers and through our own reader.

Both are asked for the change of every layer's weight, which is compared in float64 with what was trained (or, where that
is not known any more, with each other), and both draw one picture from the same noise.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainers.adapters.flat import lay_out
from trainers.adapters.inject import find_layers, start_of
from trainers.config import TrainConfig
from trainers.container import open_file, read_header
from trainers.embeddings import plan_vectors, table_of
from trainers.errors import AdapterFileError, TrainingError
from trainers.export import trained_modules
from trainers.families.base import DiffusionModel
from trainers.files import write_atomically
from trainers.formats import ModuleWeights, read_adapter
from trainers.formats.hashes import file_hashes
from trainers.formats.weights import relative_error
from trainers.generate import image_of
from trainers.layers import plan_layers
from trainers.read_back import drawn_here, read_by_diffusers
from trainers.run_folder import RunFolder
from trainers.tensors import FLOATS
from trainers.text import name_list
from trainers.training_state import load_state

LIMITS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative error of a module that a number format explains: the file's, or that in which a reader keeps it."""
PIXELS = 3
"""Largest difference of a pixel, of 255, between two readers in float32; sums in another order explain so much."""


@dataclass(frozen=True)
class Proof:
    """What a verification found. Counts are of modules. `worst_error` (relative, Frobenius norm) is nearest to its limit."""

    file: str
    modules: int
    """That were trained; of a file whose training is not known, that are in it."""
    read_here: int
    read_by_diffusers: int
    parts: Mapping[str, int]
    """Modules in each part, as diffusers has read them, or this program where diffusers has no such form."""
    against: str
    """What they were compared with."""
    worst_error: float | None
    worst_module: str
    pixel_difference: int | None
    """Of 255; None where no picture was drawn."""
    picture_error: float | None
    """The same difference as a share of the LoRA's effect, the picture's distance from the base's (2-norms of all pixels)."""
    zero: Mapping[str, int]
    """Modules of each part that change nothing."""
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every reader gets what was trained."""
        return not self.problems

    @property
    def sentence(self) -> str:
        """What a person should know of a proof that holds."""
        if not self.read_by_diffusers:
            return f"Read back here: all {self.modules} modules as they were trained. diffusers does not read this form."
        largest = self.pixel_difference
        pixels = "" if largest is None else f", and draws the same picture (a pixel differs by {largest} of 255 at the most)"
        return f"Read back: diffusers loads all {self.modules} modules as they were trained{pixels}."


def describe(proof: Proof) -> list[str]:
    """The proof as lines for a terminal."""
    parts = ", ".join(f"{count} {part}" for part, count in proof.parts.items())
    error = "not known" if proof.worst_error is None else f"{proof.worst_error:.1e} ({proof.worst_module})"
    pixels = "no picture was drawn"
    if proof.pixel_difference is not None:
        share = "" if proof.picture_error is None else f"; all together {proof.picture_error:.1e} of the LoRA's effect"
        pixels = f"{proof.pixel_difference} of 255{share}"
    zero = ", ".join(f"{count} of {part}" for part, count in proof.zero.items() if count)
    lines = [
        f"loaded      {proof.read_by_diffusers} of {proof.modules} modules in diffusers ({parts or 'none'}),"
        f" {proof.read_here} here",
        f"error       {error}, of a module against {proof.against}, the nearest to its limit",
        f"picture     largest difference of a pixel: {pixels}",
        f"zero        {f'{zero} change nothing' if zero else 'none: every module changes its layer'}",
    ]
    return (
        lines
        + [f"FAILED      {problem}" for problem in proof.problems]
        + ([] if proof.problems else ["verified    all is as it should be"])
    )


def write_proof(proof: Proof, path: Path) -> None:
    """The proof as JSON."""
    write_atomically(path, (json.dumps({**dataclasses.asdict(proof), "ok": proof.ok}, indent=1) + "\n").encode())


@torch.no_grad()
def verify(model: DiffusionModel, path: Path, trained: Mapping[str, ModuleWeights] | None = None, prompt: str = "") -> Proof:
    """Reads `path` back into `model`, whose layers must be free of adapters and are so again afterwards.

    `trained` is what the file should hold, by canonical name; None where that is not known. Never raises for what is
    wrong with the file: that stands in the proof's problems.
    """
    problems = _faults_of_the_file(path)
    layers = find_layers(model.parts())
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}  # type: ignore[arg-type]
    try:
        file = read_adapter(path, list(layers), shapes, model.facts.family.name)
        ours, unmatched = file.modules, file.unmatched
    except AdapterFileError as error:
        ours, unmatched = {}, ()
        problems.append(str(error))
    if unmatched:
        problems.append(f"{len(unmatched)} of the file's modules are not in the base ({name_list(list(unmatched))})")
    expected = ours if trained is None else trained
    drawn = drawn_here(model, path, prompt) if ours else None
    # What was written in a form of its own on request is not held against diffusers, which has no such form, or, of a DoRA,
    # leaves out the magnitudes (0.42).
    alone = trained is not None and any(module.kind != "lora" for module in trained.values())
    theirs, their_picture = (ours, None) if alone else read_by_diffusers(model, path, prompt, problems)
    readers = {"this program": ours} if alone else {"this program": ours, "diffusers": theirs}
    for reader, names in readers.items():
        missing = [name for name in expected if name not in names]
        if missing:
            problems.append(f"{len(missing)} of {len(expected)} modules are not read by {reader} ({name_list(missing)})")
    if extra := [name for name in ours if name not in expected]:
        problems.append(f"{len(extra)} modules in it were not trained ({name_list(extra)})")
    worst, worst_name, limit = _worst_error(expected, ours, theirs, layers, _limit_of(path))
    if worst > limit:
        problems.append(
            f"{worst_name} changes its layer otherwise than it was trained (relative error {worst:.1e}, at most {limit:g})"
        )
    pixels = _pixels_apart(drawn[1], their_picture) if drawn else None
    if pixels is not None and pixels > PIXELS and _computes_in_float32(model):
        problems.append(f"diffusers draws another picture than this program: a pixel differs by {pixels} of 255")
    parts = dict(Counter(name.partition(".")[0] for name in theirs))
    still = Counter(name.partition(".")[0] for name, module in theirs.items() if module.delta_norm() == 0)
    zero = {part: still[part] for part in parts}
    against = "what this program reads" if trained is None else "what was trained"
    return Proof(
        path.name,
        len(expected),
        len(ours),
        0 if alone else len(theirs),
        parts,
        against,
        worst if expected and (ours or theirs) and math.isfinite(worst) else None,
        worst_name,
        pixels,
        _share_of_the_effect(*drawn, their_picture) if drawn else None,
        zero,
        tuple(problems),
    )


def read_trained(
    run: RunFolder, config: TrainConfig, model: DiffusionModel, step: int | None
) -> dict[str, ModuleWeights] | None:
    """What a run had trained at `step` (None: its last), out of its training state; None where that state is gone."""
    try:
        state = load_state(run)
    except TrainingError:
        return None
    if state is None or (step is not None and state.step != step):
        return None
    plans = plan_layers(config, list(model.parts()), model.find_targets)
    layers: Any = find_layers(model.parts())
    kind = config.adapter.trained
    vectors = plan_vectors(config, model)
    tables = {plan.name: table_of(model.parts()[plan.name.partition(".")[0]]) for plan in vectors}
    flat = lay_out(plans, {**layers, **tables}, kind, torch.device("cpu"), config.adapter.apart, vectors)
    weights = state.weights if state.mean is None else state.mean
    if weights.numel() != flat.weights.numel():
        return None
    for plan in plans:
        started = start_of(plan, kind, config.train.seed, layers[plan.name])
        flat.constants[plan.name] = started.constants | state.constants.get(plan.name, {})
    return trained_modules(flat, weights, plans, config, model).modules


def _faults_of_the_file(path: Path) -> list[str]:
    """What neither reader minds: a hash that tells of changes made afterwards, and names that other programs skip."""
    problems = []
    try:
        with open_file(path) as handle:
            header = read_header(handle, path)
        lost = {key.partition(".")[0] for key in header.entries if key.startswith("lora_te") and "_text_" not in key}
        if lost:
            names = name_list(sorted(lost))
            problems.append(f"{len(lost)} names lack text_model: A1111, ComfyUI, kohya and InvokeAI skip them ({names})")
        said = header.metadata.get("sshs_model_hash", "")
        if said and said != file_hashes(path, header.data_start).data:
            problems.append("The tensors are not those that were exported: their hash has changed")
    except AdapterFileError:
        pass  # told by the reader itself
    return problems


def _limit_of(path: Path) -> float:
    try:
        with open_file(path) as handle:
            entries = read_header(handle, path).entries
    except AdapterFileError:
        return LIMITS[torch.float32]
    known = (FLOATS.get(entry.dtype) for name, entry in entries.items() if not name.endswith(".alpha"))
    return max((LIMITS.get(dtype, 0.0) for dtype in known if dtype), default=LIMITS[torch.float32])


def _worst_error(
    expected: Mapping[str, ModuleWeights],
    ours: Mapping[str, ModuleWeights],
    theirs: Mapping[str, ModuleWeights],
    layers: Mapping[str, Any],
    limit: float,
) -> tuple[float, str, float]:
    """(relative error of the module nearest to or furthest over its limit, its name, that limit), over both readers.

    diffusers keeps the factors in the base's number format: bf16 explains more than the file's fp16.
    """
    worst, worst_name, its_limit = 0.0, "none differs", limit
    for name, module in expected.items():
        weight = layers[name].weight.detach().cpu() if module.needs_base and name in layers else None
        for other in (read[name] for read in (theirs, ours) if name in read and read[name] is not module):
            allowed = max(limit, *(LIMITS.get(factor.dtype, 0.0) for factor in other.factors.values()))
            error = relative_error(other, module, weight)
            if error / allowed > worst / its_limit:
                worst, worst_name, its_limit = error, name, allowed
    return worst, worst_name, its_limit


def _pixels_apart(one: torch.Tensor, other: torch.Tensor | None) -> int | None:
    if other is None:
        return None
    return max(abs(a - b) for a, b in zip(image_of(one).tobytes(), image_of(other).tobytes(), strict=True))


def _share_of_the_effect(base: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor | None) -> float | None:
    if theirs is None:
        return None
    share = float((ours - theirs).norm() / (ours - base).norm())
    return share if math.isfinite(share) else None  # without an effect, or where a base in fp16 draws no numbers


def _computes_in_float32(model: DiffusionModel) -> bool:
    return next(model.parts()["unet"].parameters()).dtype == torch.float32
