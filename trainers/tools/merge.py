"""`impasto merge`: LoRA files at strengths into one file, exactly by joining ranks, or by singular values to a lower rank."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.adapters import ADAPTERS
from trainers.adapters.plan import Strengths, block_of, strength_at
from trainers.container import open_file, read_header
from trainers.errors import AdapterFileError
from trainers.families import FAMILIES
from trainers.formats import AdapterFile, FileDtype, FileForm, ModuleWeights, read_without_base, write_adapter
from trainers.formats.metadata import ARCHITECTURES, source_date
from trainers.formats.peft import PARTS
from trainers.text import printable
from trainers.tools.convert import SPELLED, tell_embedding, tell_unread, unfold

if TYPE_CHECKING:
    import torch

Inputs = Sequence[tuple[Path, float | Strengths]]
"""Files and the strength of each, which may differ by part and block."""
Terms = list[tuple[float, ModuleWeights]]
"""What is added up on one layer: strength times adapter."""
# What stays true of a sum, as far as the files agree on it. Everything else told of one training.
_SHARED = (
    "ss_v2", "ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_clip_skip",
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.resolution",
    "modelspec.prediction_type", "modelspec.encoder_layer", "modelspec.usage_hint", "modelspec.author", "modelspec.license",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Merged:
    """What was done, for a person.

    The errors are Frobenius norms of what the file lacks against those of the exact sum, as measured on the file that was
    written: the worst module's, and that of all modules taken as one vector.
    """

    family: str
    form: FileForm
    dtype: FileDtype
    files: int
    parts: Mapping[str, int]
    ranks: tuple[int, int]
    worst_error: float
    overall_error: float

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {part}" for part, count in self.parts.items())
        low, high = self.ranks
        return (
            f"{sum(self.parts.values())} modules ({parts}) of {self.family} out of {self.files} file{'s' * (self.files > 1)}, "
            f"in {self.form} form, {self.dtype}, rank {low}{f' to {high}' if high > low else ''}; "
            f"relative error {self.overall_error:.2g} over all, at most {self.worst_error:.2g} in a module"
        )


def merge_adapters(
    inputs: Inputs,
    output: Path,
    rank: int | None = None,
    dtype: FileDtype | None = None,
    form: FileForm = "kohya",
    family: str | None = None,
    tell: Callable[[str], object] = lambda remark: None,
) -> Merged:
    """Writes the sum of strength times file, which at strength 1 does what `inputs` do together at theirs.

    rank: None joins the ranks, which is exact but for the number format and takes LoRA only; a number cuts each module
    to that rank, and takes every type whose change does not depend on the base. dtype: None is the files' own, the widest.
    family: where the files do not tell. `tell` gets a sentence about what could not be taken along. Raises
    AdapterFileError, with nothing written.
    """
    from trainers.formats.writing import with_common_alpha

    if output.exists() or output.is_symlink():
        raise AdapterFileError("There is such a file already", str(output), "Choose another --output.")
    files = {path: read_without_base(path, family) for path, _ in inputs}
    made_for = _common_family(files)
    for path, file in files.items():
        tell_unread(path, file, tell)
        tell_embedding(path, file, tell)
        _check_kinds(path, file, rank)
    sums = _add_up([(path, files[path], strength) for path, strength in inputs])
    if not sums:
        raise AdapterFileError("At these strengths nothing is left to merge", hint="Give one that is not 0.")
    modules = {name: joined(terms) if rank is None else reduced(name, terms, rank) for name, terms in sums.items()}
    if form == "kohya":
        modules = with_common_alpha(modules)
    chosen: FileDtype = dtype or _widest_dtype(list(files))
    metadata = _describe(inputs, files, modules, output.stem)
    write_adapter(output, modules, metadata, chosen, form, made_for)
    worst, overall = _errors(read_without_base(output, made_for), sums)
    counts = Counter(name.partition(".")[0] for name in modules)
    parts = {part: counts[part] for part in PARTS if part in counts}
    ranks = [weights.rank for weights in modules.values()]
    return Merged(made_for, form, chosen, len(inputs), parts, (min(ranks), max(ranks)), worst, overall)


def _common_family(files: Mapping[Path, AdapterFile]) -> str:
    (first, one), *others = files.items()
    for path, other in others:
        if other.family != one.family:
            what = f"{first.name} was made for {FAMILIES[one.family].title}, {path.name} for {FAMILIES[other.family].title}"
            raise AdapterFileError(what, hint="Only LoRAs of one family can be added up.")
    return one.family


def _check_kinds(path: Path, file: AdapterFile, rank: int | None) -> None:
    """Raises AdapterFileError for what cannot be added up without a base, or not without a rank."""
    for name, weights in file.modules.items():
        if weights.needs_base:
            what = f"{printable(name, 120)} is a DoRA: what it changes depends on the base model's weight"
            raise AdapterFileError(what, str(path), "Merge it into a base with --base.")
        if weights.kind != "lora" and rank is None:
            what = f"{printable(name, 120)} is a {weights.kind}, and only LoRAs are joined without loss"
            hint = "Give --rank N, or make it a plain LoRA first: impasto convert --plain-lora N."
            raise AdapterFileError(what, str(path), hint)


def _add_up(files: Sequence[tuple[Path, AdapterFile, float | Strengths]]) -> dict[str, Terms]:
    """Module -> its terms, all in the form of the first, without those at 0.

    Raises AdapterFileError where two files mean different layers.
    """
    sums: dict[str, Terms] = {}
    for path, file, whole in files:
        for name, weights in file.modules.items():
            strength = strength_at(whole, block_of(name))
            if strength == 0.0:
                continue
            weights = unfold(name, weights, file.family)
            terms = sums.setdefault(name, [])
            if terms and weights.shape != terms[0][1].shape:
                factors = ADAPTERS[weights.kind].fit(weights.factors, terms[0][1].shape)
                if factors is None:
                    what = f"{printable(name, 120)} is {weights.shape} here and {terms[0][1].shape} in a file before"
                    raise AdapterFileError(what, str(path), "The files were made for different base models.")
                weights = dataclasses.replace(weights, factors=factors)
            terms.append((strength, weights))
    return sums


def joined(terms: Terms) -> ModuleWeights:
    """The sum of LoRAs as one LoRA of their ranks' sum: [s1 up1, s2 up2] @ [down1; down2], with strength and scale in `up`.

    Rounded once, to float32; alpha is the rank, the scale 1.
    """
    import torch

    down = torch.cat([weights.factors["down"] for _, weights in terms])
    up = torch.cat([weights.factors["up"].double() * (strength * weights.scale) for strength, weights in terms], dim=1)
    return ModuleWeights({"down": down, "up": up.float()}, float(down.shape[0]))


def reduced(name: str, terms: Terms, rank: int) -> ModuleWeights:
    """The sum as a LoRA of at most `rank`: the best one (Eckart and Young 1936). Raises AdapterFileError for NaN."""
    import torch

    from trainers.formats.plain import to_lora

    if all(weights.kind == "lora" for _, weights in terms):
        whole = joined(terms)
        if whole.rank <= rank:
            return whole
    else:
        whole = ModuleWeights({"diff": exact_delta(terms)}, 1.0, "full")
    present = sum(abs(strength) * (weights.delta_norm() or 0.0) for strength, weights in terms)
    if (whole.delta_norm() or 0.0) <= 1e-7 * present:  # they cancel: what is left is rounding, without any direction
        out, *inner = whole.shape
        ones = (1,) * (len(inner) - 1)
        return ModuleWeights({"down": torch.zeros(1, *inner), "up": torch.zeros(out, 1, *ones)}, 1.0)
    return to_lora(name, whole, rank)[0]


def exact_delta(terms: Terms, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of strength times delta in float64; a DoRA's depends on the frozen `weight`."""
    total = terms[0][0] * terms[0][1].delta(weight)
    for strength, weights in terms[1:]:
        total += strength * weights.delta(weight)
    return total


def _errors(written: AdapterFile, sums: Mapping[str, Terms]) -> tuple[float, float]:
    """(worst module's, overall) relative Frobenius error of a file against the exact sums."""
    worst, lost, whole = 0.0, 0.0, 0.0
    for name, terms in sums.items():
        exact = exact_delta(terms)
        size = float(exact.norm())
        error = float((written.modules[name].delta().reshape(exact.shape) - exact).norm())
        worst = max(worst, error / size if size else 0.0)
        lost, whole = lost + error**2, whole + size**2
    return worst, math.sqrt(lost / whole) if whole else 0.0


def _widest_dtype(paths: Sequence[Path]) -> FileDtype:
    """Of the factors; alpha is float32 in every file."""
    found = set()
    for path in paths:
        with open_file(path) as handle:
            found |= {entry.dtype for entry in read_header(handle, path).entries.values() if len(entry.shape) > 1}
    return next((SPELLED[word] for word in ("F32", "F64", "BF16", "F16") if word in found), "fp16")


def _describe(
    inputs: Inputs, files: Mapping[Path, AdapterFile], modules: Mapping[str, ModuleWeights], name: str
) -> dict[str, str]:
    """The metadata of the sum: what the files agree on, their names without folders, and their triggers."""
    told = [files[path].metadata for path, _ in inputs]
    agreed = {}
    for key in _SHARED if len(inputs) > 1 else told[0]:
        values = {metadata[key] for metadata in told if key in metadata}
        if len(values) == 1:
            agreed[key] = values.pop()
    agreed.pop("ss_network_args", None)
    titles = [title_of(path, files[path]) for path, _ in inputs]
    with_strengths = [f"{title} at {spelled(strength)}" for title, (_, strength) in zip(titles, inputs, strict=True)]
    ranks = {weights.rank for weights in modules.values()}
    triggers = ", ".join(dict.fromkeys(filter(None, (metadata.get("modelspec.trigger_phrase") for metadata in told))))
    alphas = {weights.alpha for weights in modules.values()}
    made, date = FAMILIES[files[inputs[0][0]].family], source_date()
    known = {"ss_v2": str(made.name == "sd2"), "ss_base_model_version": made.base_version}
    if made.name != "sd2":  # whose architecture is another one for each prediction type
        known["modelspec.architecture"] = ARCHITECTURES[made.base_version]
    stamp = datetime.fromtimestamp(time.time() if date is None else date, UTC)
    return (
        known
        | agreed
        | {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
            "ss_output_name": name,
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": name,
            "modelspec.date": stamp.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "modelspec.description": f"Merged from {', '.join(with_strengths)}.",
            "modelspec.merged_from": ", ".join(titles),
            **({"modelspec.trigger_phrase": triggers} if triggers else {}),
        }
    )


def spelled(strength: float | Strengths) -> str:
    """A strength for people: 0.8, or 0.8 (text 0.5) mid x 0."""
    return str(strength) if isinstance(strength, Strengths) else f"{strength:g}"


def title_of(path: Path, file: AdapterFile) -> str:
    """What a file calls itself, else its name; never a path."""
    told = file.metadata.get("modelspec.title") or file.metadata.get("ss_output_name") or path.stem
    return printable(told.replace("\\", "/").rpartition("/")[2] or path.stem, 80)
