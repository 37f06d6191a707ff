"""Looks into a LoRA file without any base model: what it is, what is in it, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainers.adapters import ADAPTERS
from trainers.container import Header, open_file, read_header
from trainers.errors import AdapterFileError, Problem
from trainers.formats.hashes import FileHashes, file_hashes
from trainers.formats.keys import KeyGroup, group_keys
from trainers.formats.matching import no_adapter
from trainers.formats.peft import PARTS, PeftScaling, read_scaling
from trainers.formats.ranks import RankSummary, UsedRank, summarise, used_rank
from trainers.formats.reading import read_alpha, read_module
from trainers.formats.recognise import guess_family, input_width, part_of
from trainers.formats.weights import ModuleWeights, check_module
from trainers.tensors import FLOATS, read_tensor
from trainers.text import printable
from trainers.tools.file_problems import metadata_problems, module_problems, name_problems
from trainers.tools.rank_bars import rank_lines


@dataclass(frozen=True)
class ModuleReport:
    """One module of the file. `norm` is that of its weight change at strength 1; None where it cannot be worked out."""

    name: str
    """The key prefix, made printable."""
    part: str
    """unet, text_encoder, text_encoder_2 or other."""
    kind: str
    """lora, locon (a LoRA of a convolution larger than 1x1), another entry of ADAPTERS, oft, or a mixture."""
    dtype: str
    inputs: int | None = None
    """Input width of the layer, a convolution's kernel perhaps folded in."""
    rank: int | None = None
    alpha: float | None = None
    """None where the file does not say: every reader then takes the rank."""
    scale: float | None = None
    norm: float | None = None
    used: UsedRank | None = None
    """How much of the rank it uses; None where that cannot be worked out, or would take long."""
    fault: str = ""
    """Why it could not be read: a misfit, NaN, a part missing."""


@dataclass(frozen=True)
class Inspection:
    """All that is known of a LoRA file without its base. Texts from the file are printable and cut to length."""

    path: Path
    size: int
    family: str
    """sd1, sd2, sdxl, flux, sd3, or unknown."""
    family_reason: str
    schemes: tuple[str, ...]
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]
    modules: tuple[ModuleReport, ...]
    metadata: Mapping[str, str]
    hashes: FileHashes
    problems: tuple[Problem, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Modules in each part, the denoiser's first."""
        counts = Counter(module.part for module in self.modules)
        return {part: counts[part] for part in (*PARTS, "other") if part in counts}

    @property
    def zero_modules(self) -> tuple[str, ...]:
        """Names of modules that change nothing."""
        return tuple(module.name for module in self.modules if module.norm == 0)

    @property
    def used(self) -> RankSummary | None:
        """How much of the ranks the modules use together; None where it is known of none."""
        return summarise(module.used for module in self.modules)

    def part_norm(self, part: str) -> float:
        """Norm of all weight changes of a part taken as one vector."""
        return float(sum(module.norm**2 for module in self.modules if module.part == part and module.norm) ** 0.5)


def inspect_file(path: Path) -> Inspection:
    """Reads the whole file, one module at a time. Raises AdapterFileError for what is no LoRA or not safetensors."""
    with open_file(path) as handle:
        header = read_header(handle, path)
        groups, foreign = group_keys(header.entries)
        if not any(group.kinds for group in groups):
            raise no_adapter(header)
        scaling, problems = _scaling_or_problem(header)
        modules = tuple(_measure(handle, header, group, scaling) for group in groups)
        handle.seek(8)
        first = handle.read(2)
    family, reason = guess_family(groups, header.entries)
    hashes = file_hashes(path, header.data_start)
    problems += module_problems(modules) + name_problems(groups, foreign, header.metadata)
    problems += metadata_problems(header.metadata, hashes, family, first)
    return Inspection(
        path=path,
        size=header.size,
        family=family,
        family_reason=reason,
        schemes=tuple(sorted({scheme for group in groups for scheme in group.schemes})),
        kinds=tuple(sorted({module.kind for module in modules})),
        dtypes=tuple(sorted({module.dtype for module in modules})),
        modules=modules,
        metadata={printable(key, 60): printable(value, 300) for key, value in header.metadata.items()},
        hashes=hashes,
        problems=tuple(sorted(problems, key=lambda problem: ("error", "warning", "note").index(problem.severity))),
    )


def as_json(inspection: Inspection) -> dict[str, Any]:
    """All of the inspection in JSON's types; what is not known, or is no finite number, is null."""
    values = dataclasses.asdict(inspection)
    for module in values["modules"]:
        if module["used"]:
            del module["used"]["squares"]
        module |= {
            key: None for key in ("alpha", "scale", "norm") if module[key] is not None and not math.isfinite(module[key])
        }
    used = inspection.used
    return {**values, "path": str(inspection.path), "used": dataclasses.asdict(used) if used else None}


def describe(inspection: Inspection, every_module: bool = False) -> str:
    """The inspection as lines of plain text for a terminal; print it without markup, as brackets are the file's own."""
    modules = inspection.modules
    parts = ", ".join(f"{count} {part}" for part, count in inspection.parts.items())
    lines = [
        f"{printable(inspection.path.name, 200)}  {inspection.size:,} bytes",
        f"family      {inspection.family} ({inspection.family_reason})",
        f"kind        {', '.join(inspection.kinds)}; {' and '.join(inspection.schemes) or 'unknown'} names",
        f"modules     {len(modules)}: {parts}",
        f"rank        {_values([module.rank for module in modules])}",
        f"alpha       {_values([module.alpha for module in modules])}",
        f"scale       {_values([module.scale for module in modules])}  (alpha / rank, the strength inside the file)",
        f"numbers     {', '.join(inspection.dtypes)}",
        f"hashes      AutoV2 {inspection.hashes.autov2}, AutoV3 {inspection.hashes.autov3}",
    ]
    lines += [f"norm        {part}: {inspection.part_norm(part):.4g}" for part in inspection.parts]
    lines += rank_lines([(m.name, m.used) for m in modules], inspection.used, inspection.family)
    strongest = sorted((m for m in modules if m.norm is not None), key=lambda m: -(m.norm or 0.0))
    for module in modules if every_module else strongest[:3]:
        norm = "?" if module.norm is None else f"{module.norm:.4g}"
        used = f"  uses {module.used.effective:.1f} of {module.used.most}, {module.used.keeps} keep 99 %" if module.used else ""
        lines.append(f"  {norm:>10}  {module.name}{used}")
    if inspection.zero_modules:
        lines.append(f"zero        {len(inspection.zero_modules)} modules change nothing")
    lines += ["metadata"] + [f"  {key}: {value}" for key, value in inspection.metadata.items()]
    lines += [f"{problem.severity:<11} {problem}" for problem in inspection.problems] or ["problems    none found"]
    return "\n".join(lines)


def _values(numbers: list[int | None] | list[float | None]) -> str:
    """'16', or '8 (24 modules), 16 (72 modules)', rarest last; 'not said' for None."""
    counts = Counter("not said" if number is None else f"{number:g}" for number in numbers)
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} ({count} modules)" for value, count in counts.most_common(6)]
    return ", ".join(shown) + (f", {len(counts) - 6} more" if len(counts) > 6 else "")


def _scaling_or_problem(header: Header) -> tuple[dict[str, PeftScaling], list[Problem]]:
    try:
        return read_scaling(header.metadata), []
    except AdapterFileError as error:
        return {}, [Problem("error", error.what, hint=error.hint)]


def _measure(handle: BinaryIO, header: Header, group: KeyGroup, scaling: Mapping[str, PeftScaling]) -> ModuleReport:
    """One module's numbers; a fault becomes text, so that one bad module does not hide the others."""
    name, part = printable(group.prefix, 120), part_of(group.prefix)
    down = header.entries[group.parts["down"]] if "down" in group.parts else None
    dtype = (down or header.entries[next(iter(group.parts.values()))]).dtype
    inputs = input_width(group, header.entries)
    kind = group.kind or "unknown"
    if kind == "lora" and ("mid" in group.parts or (down is not None and max(down.shape[2:], default=1) > 1)):
        kind = "locon"
    if kind == "full":
        norm = _norm_of_all(handle, header, group)
        return ModuleReport(name, part, kind, dtype, inputs, norm=norm, used=_used_of_full(handle, header, group, norm))
    if group.kind not in ADAPTERS:
        return ModuleReport(name, part, kind, dtype, inputs)
    rank = down.shape[0] if down is not None and down.shape else None
    alpha = None
    try:
        weights = read_module(handle, header, group, scaling)
        rank = weights.rank or None
        alpha = read_alpha(handle, header, group, scaling, weights.rank or 1)
        check_module(group.prefix, weights)
    except AdapterFileError as error:
        return ModuleReport(name, part, kind, dtype, inputs, rank, alpha, fault=error.what)
    norm = weights.delta_norm()
    return ModuleReport(name, part, kind, dtype, inputs, rank, alpha, weights.scale, norm, used_rank(weights))


def _norm_of_all(handle: BinaryIO, header: Header, group: KeyGroup) -> float | None:
    """Norm of differences of weights and biases, of layers and of normalisations, taken as one vector."""
    try:
        tensors = [
            read_tensor(handle, header, key, FLOATS) for part, key in group.parts.items() if part not in ("alpha", "scale")
        ]
    except AdapterFileError:
        return None
    return math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in tensors))


def _used_of_full(handle: BinaryIO, header: Header, group: KeyGroup, norm: float | None) -> UsedRank | None:
    """Of the difference of a weight; a bias has no rank, and a normalisation's weight neither."""
    key = group.parts.get("diff")
    if norm is None or not math.isfinite(norm) or key is None or len(header.entries[key].shape) not in (2, 4):
        return None
    return used_rank(ModuleWeights({"diff": read_tensor(handle, header, key, FLOATS)}, 1.0, "full"))
