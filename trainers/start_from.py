"""Training on from a LoRA file (`adapter.start_from`): what of it fits the run, told by its header, and its factors. No torch.

A run reads the file only at its first step. Its first training state holds the weights, so that a resume does without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.adapters.plan import LayerPlan
from trainers.checks import refuse
from trainers.config import TrainConfig
from trainers.container import Entry, open_file, read_header
from trainers.errors import AdapterFileError, Problem
from trainers.families import BaseModelFacts
from trainers.formats import read_adapter
from trainers.formats.hashes import file_hashes
from trainers.formats.keys import KeyGroup, group_keys
from trainers.formats.matching import match_groups, no_adapter, spellings
from trainers.formats.recognise import refuse_other_family
from trainers.layers import layer_shapes, planned_layers
from trainers.run_folder import absolute
from trainers.text import name_list, printable

if TYPE_CHECKING:
    import torch

_SETTING = "adapter.start_from"


@dataclass(frozen=True)
class Start:
    """What a run starts from: a file by its content, factors and scale by layer, and what a person should know of it."""

    sha256: str
    given: Mapping[str, tuple[Mapping[str, torch.Tensor], float]]
    problems: Sequence[Problem]


def check_start(config: TrainConfig, base: BaseModelFacts) -> list[Problem]:
    """The file against the run, as far as its header tells; nothing where a run starts from nothing."""
    if not config.adapter.start_from:
        return []
    path = absolute(Path(config.adapter.start_from))
    try:
        with open_file(path) as handle:
            header = read_header(handle, path)
        groups, foreign = group_keys(header.entries)
        if not any(group.kinds for group in groups):
            raise no_adapter(header)
        refuse_other_family(groups, header.entries, base.family.name, path)
        shapes = layer_shapes(base)
        matched, strange = match_groups(groups, spellings(shapes, base.family.name), base.family.name, path)
    except AdapterFileError as error:
        return [Problem("error", error.what, f"{_SETTING}: {error.where}", error.hint)]
    plans = {plan.name: plan for plan in planned_layers(config, base)}
    used = {name: group for name, group in matched.items() if name in plans}
    lost = [group.prefix for name, group in matched.items() if name not in plans] + strange + foreign
    total = len(used) + len(lost)
    if not used:
        what = f"None of the {total} modules of {path.name} is one that this run trains ({name_list(lost)})"
        return [Problem("error", what, _SETTING, _otherwise(lost))]
    errors = _kind_problems(used, path) or _rank_problems(used, plans, header.entries, path)
    errors = errors or _shape_problems(used, shapes, header.entries)
    if errors:
        return errors
    fresh = len(plans) - len(used)
    what = f"{len(used)} layers start from {path.name}" + (
        f", {fresh} from nothing, as it has no module for them" * (fresh > 0)
    )
    problems = [Problem("note", what, _SETTING)]
    if lost:
        what = f"{len(lost)} of {total} modules of {path.name} are not trained by this run and will be lost, for example"
        problems.append(Problem("warning", f"{what} {printable(lost[0])}", _SETTING, _otherwise(lost)))
    return problems


def read_start(config: TrainConfig, base: BaseModelFacts) -> Start | None:
    """The file's factors for the run; None where a run starts from nothing. Raises SettingError, AdapterFileError."""
    if not config.adapter.start_from:
        return None
    problems = check_start(config, base)
    refuse(problems, force=True)
    path, shapes = absolute(Path(config.adapter.start_from)), layer_shapes(base)
    planned = [plan.name for plan in planned_layers(config, base)]
    file = read_adapter(path, planned, shapes, base.family.name)
    return Start(
        file_hashes(path).whole, {name: (weights.factors, weights.scale) for name, weights in file.modules.items()}, problems
    )


def _otherwise(lost: Sequence[str]) -> str:
    text = any(name.startswith(("lora_te", "text_encoder")) for name in lost)
    return "Train those layers too: adapter.targets" + (", text_encoder.learning_rate." if text else ".")


def _kind_problems(used: Mapping[str, KeyGroup], path: Path) -> list[Problem]:
    others = [group for group in used.values() if group.kind != "lora"]
    if not others:
        return []
    what = f"{path.name} holds {others[0].kind or 'no factors'} ({printable(others[0].prefix)}), and only a LoRA is trained on"
    return [Problem("error", what, _SETTING, f"Make it one: impasto convert {path.name} --to kohya --plain-lora RANK")]


def _rank_problems(
    used: Mapping[str, KeyGroup], plans: Mapping[str, LayerPlan], entries: Mapping[str, Entry], path: Path
) -> list[Problem]:
    ranks = {name: _rank(group, entries) for name, group in used.items()}
    over = [name for name, rank in ranks.items() if rank > plans[name].rank]
    if not over:
        return []
    most = max(ranks[name] for name in over)
    least = min(plans[name].rank for name in over)
    what = f"{path.name} has rank {most}, and the run trains rank {least} ({len(over)} of {len(used)} modules are too large)"
    setting = "adapter.rank" if any(name.startswith("unet.") for name in over) else "text_encoder.rank"
    hint = f"Set {setting}={most}, or cut the file: impasto merge {path.name} --rank {least} --output SMALLER.safetensors"
    return [Problem("error", what, _SETTING, hint)]


def _rank(group: KeyGroup, entries: Mapping[str, Entry]) -> int:
    """A Tucker core's is that of the LoRA that it is read as."""
    key = group.parts.get("mid") or group.parts.get("down", "")
    return next(iter(entries[key].shape), 0) if key else 0


def _shape_problems(
    used: Mapping[str, KeyGroup], shapes: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]
) -> list[Problem]:
    for name, group in used.items():
        if "mid" in group.parts or not {"up", "down"} <= group.parts.keys():
            continue  # told when the file is read
        up, down = (entries[group.parts[part]].shape for part in ("up", "down"))
        made, wanted = (up[0] if up else 0, math.prod(down[1:])), (shapes[name][0], math.prod(shapes[name][1:]))
        if made != wanted:
            what = f"{name}: the file's layer is {made[0]} x {made[1]}, the base model's {wanted[0]} x {wanted[1]}"
            return [Problem("error", what, _SETTING, "It was made for another kind of base model.")]
    return []
