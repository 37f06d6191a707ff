"""`impasto merge --base`: LoRA files at strengths into a base model's own weights, or a base from one layout into the other.

No model is built: each tensor is read, changed in float64, rounded once and written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.adapters.plan import Strengths, block_of, strength_at
from trainers.errors import BaseModelError
from trainers.families import BaseModelFacts
from trainers.formats import AdapterFile, FileDtype, read_adapter
from trainers.layers import layer_shapes
from trainers.text import printable
from trainers.tools.convert import tell_embedding
from trainers.tools.merge import Inputs, Terms, exact_delta, spelled, title_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MergedBase:
    """What was done, for a person."""

    base: str
    layout: str
    """single file or diffusers folder."""
    files: tuple[tuple[str, float | Strengths, int, int], ...]
    """Each file's name, strength, modules merged, and modules in it."""
    rounding: float
    """Norm of what rounding to the stored dtype took, against that of all that the files change."""

    def __str__(self) -> str:
        merged = [
            f"{done} of {total} modules of {name} at {spelled(strength)}" for name, strength, done, total in self.files
        ]  # fmt: skip
        into = f" into {self.base}" if merged else self.base
        return f"{', '.join(merged)}{into}, as a {self.layout}"


def merge_into_base(
    inputs: Inputs,
    base: BaseModelFacts,
    output: Path,
    dtype: FileDtype | None = None,
    tell: Callable[[str], object] = lambda remark: None,
) -> MergedBase:
    """Writes `base` with `inputs` added to its weights: a single file where `output` ends in .safetensors, else a folder.

    dtype: None keeps each tensor's own. Any type of adapter is taken. Without inputs the base only changes its layout.
    `tell` gets a sentence about what does not fit, and about rounding. Raises BaseModelError, AdapterFileError, OSError,
    with nothing written.
    """
    from trainers.formats.base_file import write_base

    if output.exists() or output.is_symlink():
        raise BaseModelError("There is such a file or folder already", str(output), "Choose another --output.")
    if output.suffix.lower() in (".ckpt", ".pt", ".bin", ".pth"):
        raise BaseModelError("A base is written as .safetensors, or as a folder", str(output), "Choose another --output.")
    shapes = layer_shapes(base)
    files = {path: read_adapter(path, shapes, shapes, base.family.name) for path, _ in inputs}
    sums: dict[str, Terms] = {}
    for path, strength in inputs:
        for name, weights in files[path].modules.items():
            sums.setdefault(name, []).append((strength_at(strength, block_of(name)), weights))
    for path, file in files.items():
        tell_embedding(path, file, tell)
        if file.unmatched:
            example = printable(file.unmatched[0])
            tell(f"{len(file.unmatched)} of {_total(file)} modules of {path.name} are not in this base, for example {example}.")
    merging = _Merging(sums, dtype)
    write_base(base, output, merging.change if sums else None, dtype, _told(base, inputs, files, output))
    if merging.rounded_to and merging.rounding > 0:
        what = f"The weights are stored in {' and '.join(sorted(merging.rounded_to))}, which rounds the merged ones"
        tell(f"{what}: by {merging.rounding:.1%} of what was merged. With --dtype fp32 nothing of it is lost.")
    counts = tuple(
        (path.name, strength, len(merging.done & files[path].modules.keys()), _total(files[path])) for path, strength in inputs
    )
    layout = "single file" if output.suffix == ".safetensors" else "diffusers folder"
    return MergedBase(base.name, layout, counts, merging.rounding)


def _total(file: AdapterFile) -> int:
    return len(file.modules) + len(file.unmatched)


@dataclass
class _Merging:
    """The change of each tensor as the writer asks for it, and a record of what was lost by rounding."""

    sums: Mapping[str, Terms]
    dtype: FileDtype | None
    done: set[str] = field(default_factory=set)
    rounded_to: set[str] = field(default_factory=set)
    changed: float = 0.0
    lost: float = 0.0

    @property
    def rounding(self) -> float:
        return math.sqrt(self.lost / self.changed) if self.changed else 0.0

    def change(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name` as it is to be written. Raises BaseModelError for what is not finite."""
        from trainers.device import DTYPES

        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.sums:
            return weight
        delta = exact_delta(self.sums[layer], weight)
        exact = weight.double() + delta
        made = exact.to(DTYPES[self.dtype] if self.dtype else weight.dtype)
        if not bool(made.isfinite().all()):
            what = f"{name} would hold numbers that are NaN, infinite, or too large for its number format"
            raise BaseModelError(what, hint="Lower the strengths, or write --dtype fp32.")
        self.done.add(layer)
        self.changed += float(delta.pow(2).sum())
        if made.element_size() < 4:
            words = {dtype: word for word, dtype in DTYPES.items()}
            self.rounded_to.add(words.get(made.dtype, str(made.dtype).removeprefix("torch.")))
            self.lost += float((made.double() - exact).pow(2).sum())
        return made


def _told(base: BaseModelFacts, inputs: Inputs, files: Mapping[Path, AdapterFile], output: Path) -> dict[str, str]:
    """What a single file says of where it comes from; a base that only changed its layout says what it said."""
    if not inputs:
        return {}
    titles = [title_of(path, files[path]) for path, _ in inputs]
    described = [f"{title} at {spelled(strength)}" for title, (_, strength) in zip(titles, inputs, strict=True)]
    return {
        "modelspec.title": output.stem,
        "modelspec.description": f"{base.name} with {', '.join(described)}.",
        "modelspec.merged_from": ", ".join([base.name, *titles]),
    }
