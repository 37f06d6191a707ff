"""`impasto convert`: an adapter file into another form, number format or kind. The input is only read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from trainers.adapters import ADAPTERS
from trainers.errors import AdapterFileError
from trainers.formats import AdapterFile, FileDtype, FileForm, ModuleWeights, read_without_base, write_adapter
from trainers.formats.names import kernel_of
from trainers.formats.peft import PARTS
from trainers.run_folder import embedding_needed
from trainers.text import name_list
from trainers.tools.file_problems import kind_notes
from trainers.tools.inspect_file import inspect_file

# How the container spells a dtype -> the nearest one that files are written in.
SPELLED: dict[str, FileDtype] = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp32"}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done, for a person. `worst_error` is the largest relative error of a module that became a plain LoRA."""

    family: str
    form: FileForm
    dtype: FileDtype
    parts: Mapping[str, int]
    unmatched: tuple[str, ...]
    converted: int = 0
    worst_error: float = 0.0

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {part}" for part, count in self.parts.items())
        text = f"{sum(self.parts.values())} modules ({parts}) of {self.family} in {self.form} form, {self.dtype}"
        if self.converted:
            text += f"; {self.converted} made anew as plain LoRA, with a relative error of at most {self.worst_error:.2g}"
        return text


def convert(
    path: Path,
    output: Path,
    form: FileForm,
    dtype: FileDtype | None = None,
    plain_rank: int | None = None,
    family: str | None = None,
    tell: Callable[[str], object] = lambda remark: None,
) -> Conversion:
    """Reads `path`, writes `output` and says what it did. `tell` gets a sentence about what could not be taken along.

    dtype: None keeps the file's own, the widest where there are several. plain_rank: every module that is no LoRA, or
    has a higher rank, becomes a LoRA of that rank. family: where the file does not tell. Raises AdapterFileError for a
    file that cannot be read or written so, and for an output that is there already.
    """
    if output.exists() or output.is_symlink():
        raise AdapterFileError("There is such a file already", str(output), "Choose another --output.")
    inspection = inspect_file(path)
    file = read_without_base(path, family)
    tell_unread(path, file, tell)
    modules = {name: unfold(name, weights, file.family) for name, weights in file.modules.items()}
    converted, worst = 0, 0.0
    if plain_rank is not None:
        modules, converted, worst = _as_plain(modules, plain_rank)
    own = [SPELLED[word] for word in ("F32", "F64", "BF16", "F16") if word in inspection.dtypes]
    for note in kind_notes(weights.kind for weights in modules.values()):
        tell(str(note))
    chosen: FileDtype = dtype or (own[0] if own else "fp16")
    metadata = dict(file.metadata)
    if converted and "ss_network_module" in metadata:  # LyCORIS' own would send readers to the wrong code
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    if form == "peft" and "ss_network_alpha" in metadata:  # that form moves alpha / rank into the factors
        metadata["ss_network_alpha"] = metadata.get("ss_network_dim", "Dynamic")
    write_adapter(output, modules, metadata, chosen, form, file.family)
    counts = Counter(name.partition(".")[0] for name in modules)
    parts = {part: counts[part] for part in PARTS if part in counts}
    return Conversion(file.family, form, chosen, parts, file.unmatched, converted, worst)


def tell_unread(path: Path, file: AdapterFile, tell: Callable[[str], object]) -> None:
    """Says what of a file is no module of its family, if anything."""
    if file.unmatched:
        names, total = name_list(list(file.unmatched)), len(file.modules) + len(file.unmatched)
        tell(f"{len(file.unmatched)} of {total} names in {path.name} are not understood and left out: {names}.")


def tell_embedding(path: Path, file: AdapterFile, tell: Callable[[str], object]) -> None:
    """Says which embedding a file draws nothing of its own without, if any: a LoRA holds no words."""
    needed = embedding_needed(path, file.metadata)
    if needed:
        tell(needed)


def unfold(name: str, weights: ModuleWeights, family: str) -> ModuleWeights:
    """Factors with the kernel that the layer of this name has, where a file folds it into their width."""
    kernel = kernel_of(name, family)
    shape = weights.shape
    if not kernel or len(shape) == 4 or shape[1] % (kernel[0] * kernel[1]):
        return weights
    factors = ADAPTERS[weights.kind].fit(weights.factors, (shape[0], shape[1] // (kernel[0] * kernel[1]), *kernel))
    return weights if factors is None else dataclasses.replace(weights, factors=factors)


def _as_plain(modules: Mapping[str, ModuleWeights], rank: int) -> tuple[dict[str, ModuleWeights], int, float]:
    """(modules, how many were changed, their largest relative error)."""
    from trainers.formats.plain import to_lora

    made: dict[str, ModuleWeights] = {}
    errors = []
    for name, weights in modules.items():
        if weights.kind == "lora" and weights.rank <= rank:
            made[name] = weights
            continue
        made[name], error = to_lora(name, weights, rank)
        errors.append(error)
    return made, len(errors), max(errors, default=0.0)
