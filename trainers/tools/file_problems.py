"""What can be wrong with a LoRA file, each as a sentence that says which programs would go wrong how. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from trainers.adapters import ADAPTERS
from trainers.errors import Problem
from trainers.formats.hashes import FileHashes
from trainers.formats.keys import KeyGroup
from trainers.formats.kohya import read_kohya_prefix
from trainers.formats.peft import METADATA_KEY
from trainers.text import name_list, printable

if TYPE_CHECKING:
    from trainers.tools.inspect_file import ModuleReport

# modelspec.architecture and ss_base_model_version begin so.
_CLAIMS = {
    "stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl",
    "sd_v1": "sd1", "sd_v2": "sd2", "sdxl_": "sdxl",
}  # fmt: skip
_FAULTS_SHOWN = 5
_WITH_ALPHA = {*ADAPTERS, "locon"} - {"full"}
_LOADABLE = {*ADAPTERS, "locon"}
# What other programs do with kinds that are loaded here.
_ELSEWHERE = {
    "dora": "diffusers and kohya's scripts leave the magnitudes out, A1111 and InvokeAI take them along the other axis",
    "loha": "diffusers refuses such a file, and kohya's scripts change nothing",
    "lokr": "diffusers refuses such a file, and kohya's scripts change nothing",
    "full": "diffusers refuses such a file, and kohya's scripts change nothing",
}


def module_problems(modules: tuple[ModuleReport, ...]) -> list[Problem]:
    """Modules that cannot be read, cannot be loaded here, change nothing, or look swapped."""
    faulty = [module for module in modules if module.fault]
    problems = [Problem("error", module.fault) for module in faulty[:_FAULTS_SHOWN]]
    if len(faulty) > _FAULTS_SHOWN:
        problems.append(Problem("error", f"{len(faulty) - _FAULTS_SHOWN} more modules cannot be read"))
    for kind in sorted({module.kind for module in modules} - _LOADABLE):
        names = [module.name for module in modules if module.kind == kind]
        problems.append(Problem("warning", f"{len(names)} modules are of kind {kind}, which cannot be loaded here", names[0]))
    problems += kind_notes([module.kind for module in modules])
    problems += _zero_problems(modules) + _alpha_problems(modules)
    unsaid = [module.name for module in modules if module.kind in _WITH_ALPHA and module.alpha is None and not module.fault]
    if unsaid:
        what = f"{len(unsaid)} modules store no alpha; every program then takes scale 1"
        problems.append(Problem("note", what, name_list(unsaid)))
    wide = [module.name for module in modules if module.rank and module.inputs and module.rank > module.inputs]
    if wide:
        what = f"{len(wide)} modules have a rank above their input width; up and down may be swapped"
        problems.append(Problem("warning", what, name_list(wide)))
    return problems


def kind_notes(kinds: Iterable[str]) -> list[Problem]:
    """What other programs make of modules of these kinds, one entry for each module, where they go wrong."""
    words = Counter(word for kind in kinds for word in kind.split(" and "))
    hint = "`impasto convert --plain-lora RANK` makes a LoRA of all but DoRA."
    return [
        Problem("note", f"{words[word]} modules are of kind {word}: {fate}", hint=hint)
        for word, fate in _ELSEWHERE.items()
        if words[word]
    ]


def _alpha_problems(modules: tuple[ModuleReport, ...]) -> list[Problem]:
    problems = []
    for part in dict.fromkeys(module.part for module in modules):
        alphas = {m.alpha for m in modules if m.part == part and m.alpha is not None}
        if len(alphas) > 1:
            what = f"The {part} has {len(alphas)} alphas: diffusers gives all attention layers the commonest one"
            problems.append(Problem("warning", what, hint="Export it again; one alpha for each part is then written."))
    return problems


def _zero_problems(modules: tuple[ModuleReport, ...]) -> list[Problem]:
    problems = []
    for part in dict.fromkeys(module.part for module in modules):
        mine = [module for module in modules if module.part == part]
        zero = [module.name for module in mine if module.norm == 0]
        if zero and len(zero) == len(mine):
            problems.append(
                Problem("warning", f"All {len(mine)} modules of the {part} change nothing", hint="Train it longer.")
            )
        elif zero:
            what = f"{len(zero)} of {len(mine)} modules of the {part} change nothing"
            problems.append(Problem("warning", what, name_list(zero)))
    return problems


def name_problems(groups: list[KeyGroup], foreign: list[str], metadata: Mapping[str, str]) -> list[Problem]:
    """Names that some programs skip in silence."""
    problems = []
    schemes = {scheme for group in groups for scheme in group.schemes}
    prefixes = [group.prefix for group in groups]
    if schemes - {"kohya"}:
        words = "Names of two schemes are mixed" if len(schemes) > 1 else "The names are those of diffusers, not kohya's"
        what = f"{words}: A1111, Forge and kohya's scripts load nothing of it, ComfyUI a part"
        problems.append(Problem("warning", what, hint="Export it in kohya form."))
    elif METADATA_KEY in metadata:
        what = f"A file in kohya form carries {METADATA_KEY}: diffusers refuses it"
        problems.append(Problem("warning", what, hint="Export the file again."))
    text = [prefix for prefix in prefixes if prefix.startswith(("lora_te_", "lora_te1_", "lora_te2_"))]
    lost = [prefix for prefix in text if "_text_model_" not in prefix]
    if lost:
        what = f"{len(lost)} text-encoder names lack text_model: A1111, ComfyUI, kohya and InvokeAI skip them"
        problems.append(Problem("warning", what, name_list(lost), "Export the file again."))
    numbered = [prefix for prefix in text if prefix.startswith("lora_te1_")]
    if numbered and not any(prefix.startswith("lora_te2_") for prefix in text):
        what = f"{len(numbered)} names begin with lora_te1_ in a file with one text encoder: kohya and InvokeAI skip them"
        problems.append(Problem("warning", what, name_list(numbered), "Export the file again."))
    problems += [Problem("error", "One module stands in the file twice", name_list(list(twins))) for twins in _twins(groups)]
    if foreign:
        what = f"{len(foreign)} tensors belong to no adapter that is known here"
        problems.append(Problem("warning", what, name_list(foreign)))
    return problems


def _twins(groups: Iterable[KeyGroup]) -> list[tuple[str, ...]]:
    """Spellings of one module that stand side by side: programs take the last one or the sum."""
    spellings: dict[tuple[str, str], list[str]] = {}
    repeated = []
    for group in groups:
        flat = read_kohya_prefix(group.prefix)
        if flat is not None:
            spellings.setdefault(flat, []).append(group.prefix)
        if group.twins:
            repeated.append(tuple(group.twins))
    return repeated + [tuple(names) for names in spellings.values() if len(names) > 1]


def metadata_problems(metadata: Mapping[str, str], hashes: FileHashes, family: str, first: bytes) -> list[Problem]:
    """Metadata that are missing, unreadable for A1111, or contradict the tensors. `first`: the header's first two bytes."""
    if not metadata:
        return [Problem("note", "The file says nothing about itself", hint="Galleries will show an unknown base model.")]
    problems = []
    if first != b'{"':
        problems.append(Problem("warning", 'The header does not begin with {": A1111 shows no metadata'))
    for key in ("sshs_model_hash", "modelspec.hash_sha256"):
        said = metadata.get(key, "").removeprefix("0x").lower()
        if said and said != hashes.data:
            what = f"{key} is {printable(said, 12)} and the tensors give {hashes.data[:9]}..."
            problems.append(Problem("warning", what, hint="The tensors were changed afterwards; galleries will not find it."))
    for key in ("modelspec.architecture", "ss_base_model_version"):
        said = metadata.get(key, "")
        claim = next((claim for start, claim in _CLAIMS.items() if said.startswith(start)), "")
        if claim and family != "unknown" and claim != family:
            what = f"{key} says {printable(said, 40)}, the tensors are those of {family}"
            problems.append(Problem("warning", what, hint="A1111 may hide it."))
    return problems
