"""Which layers of a base get an adapter, and how large it is: known from settings and weight files' headers alone."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainers.adapters.dora import MAGNITUDE
from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan, canonical_name, fitting, length_of
from trainers.adapters.settings import LowRankSettings
from trainers.config import TrainConfig
from trainers.errors import Problem
from trainers.families import BaseModelFacts, stored_tensors
from trainers.families.targets import trainable_paths, without_projections
from trainers.text import name_list, printable

_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_METADATA = 4000
"""Bytes of metadata that a file has beside its weights, about; captions' words, where asked for, come on top."""
_ENTRY = 110
"""Bytes that one tensor takes in a file's header, about."""


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is: trained layers, trainable numbers, and about how many bytes its file will have."""

    layers: int
    parameters: int
    file_bytes: int
    weight_bytes: int
    """Of these those of its numbers: exact but where the singular values or the run itself tell the rank, and then the most."""
    ranks: str
    """How many layers learn at which rank, in words."""


def plan_layers(config: TrainConfig, parts: Sequence[str], find: Callable[[str, Sequence[str]], list[str]]) -> list[LayerPlan]:
    """Which layers get an adapter, with rank and scale: the denoiser's, then the text encoder's unless its rate is 0.

    `find(part, targets)` gives the paths inside a part of the layers that groups of targets name.
    """
    adapter, text = config.adapter, config.text_encoder
    plans = []
    for part in parts if adapter.changes_layers else ():
        denoiser = part == "unet"
        if not denoiser and not config.text_encoder_rate:
            continue
        rank = adapter.rank if denoiser else config.text_encoder_rank
        alpha = adapter.alpha if denoiser or text.alpha is None else text.alpha
        group = "unet" if denoiser else "text_encoder"
        paths = without_projections(find(part, adapter.targets if denoiser else text.targets), adapter.projections)
        plans += [_plan(adapter, canonical_name(part, path), rank, alpha, group) for path in paths]
    return plans


def _plan(adapter: LowRankSettings, name: str, rank: int, alpha: float | None, group: str) -> LayerPlan:
    """One layer, with the rank and alpha of the patterns where they say otherwise; an unset alpha is the layer's rank."""
    own_rank, own_alpha = (fitting(given, name) for given in (adapter.rank_pattern, adapter.alpha_pattern))
    rank = adapter.rank_pattern[own_rank[0]] if own_rank else rank
    alpha = adapter.alpha_pattern[own_alpha[0]] if own_alpha else alpha
    return LayerPlan(name, rank, adapter.scale_of(float(rank) if alpha is None else alpha, rank), group)


def ranks_in_words(plans: Sequence[LayerPlan]) -> str:
    """How many layers learn at which rank, as in: 96 layers at rank 16, 32 at rank 4."""
    counts = sorted(Counter(plan.rank for plan in plans).items(), reverse=True)
    return ", ".join(f"{count}{' layers' * (number == 0)} at rank {rank}" for number, (rank, count) in enumerate(counts))


def check_patterns(config: TrainConfig, base: BaseModelFacts) -> list[Problem]:
    """Patterns of rank and alpha that no layer goes by, or of which none goes first, and ranks that a layer cannot use.

    Raises BaseModelError.
    """
    adapter = config.adapter
    given: dict[str, Mapping[str, float]] = {"rank_pattern": adapter.rank_pattern, "alpha_pattern": adapter.alpha_pattern}
    if not any(given.values()):
        return []
    plans, problems = planned_layers(config, base), []
    names = [plan.name for plan in plans]
    pieces = {piece for name in names for piece in name.split(".") if not piece.isdecimal()}
    for setting, patterns in given.items():
        found = [fitting(patterns, name) for name in names]
        problems += _ties(f"adapter.{setting}", patterns, found)
        used = {pattern for own in found for pattern in own if length_of(pattern) == length_of(own[0])}
        for pattern in sorted(patterns.keys() - used):
            if any(pattern in own for own in found):
                what, hint = "is never used: longer ones fit all its layers", "Take it out, or name more of the layers' names."
            else:
                what = f"fits none of the {len(names)} layers that learn"
                hint = _near(pattern, pieces, names)
            problems.append(Problem("error", f"The pattern {printable(pattern)!r} {what}", f"adapter.{setting}", hint))
    if adapter.rank_pattern and not problems:
        problems += _ranks_over_width(plans, layer_shapes(base))
    return problems


def _ties(setting: str, patterns: Mapping[str, float], found: Sequence[list[str]]) -> list[Problem]:
    """The patterns of the same length that say different things of a layer and of which one would have to count."""
    pairs = {
        (first, other)
        for first, *others in filter(None, found)
        for other in others
        if length_of(other) == length_of(first) and patterns[other] != patterns[first]
    }
    hint = "Name more of the layers' names in one of them: the longer one counts."
    return [
        Problem(
            "error",
            f"The patterns {printable(first)!r} and {printable(other)!r} are of the same length and fit the same layers",
            setting,
            hint,
        )
        for first, other in sorted(pairs)
    ]


def _near(pattern: str, pieces: Iterable[str], names: Sequence[str]) -> str:
    """What may have been meant: parts of names that look like the pattern's, else a whole name."""
    if not names:
        return "Take it out: no layer gets an adapter with these settings."
    near = [one for piece in pattern.split(".") for one in difflib.get_close_matches(piece, sorted(pieces), n=2, cutoff=0.5)]
    near += [piece for piece in sorted(pieces) if pattern in piece and piece not in near]
    meant = f"Near it are {name_list(near, 6)}; a" if near else "A"
    return f"{meant} pattern is whole parts of a name, as of {names[0]}, with * for anything."


def _ranks_over_width(plans: Sequence[LayerPlan], shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    width = {plan.name: min(shapes[plan.name][0], math.prod(shapes[plan.name][1:])) for plan in plans}
    over = [plan for plan in plans if plan.rank > width[plan.name]]
    if not over:
        return []
    what = (
        f"{len(over)} layers have a rank above their width, for example {over[0].name}: {over[0].rank} of {width[over[0].name]}"
    )
    return [Problem("advice", what, "adapter.rank_pattern", "A lower rank can do the same there.")]


def adapter_size(config: TrainConfig, base: BaseModelFacts) -> AdapterSize:
    """How large the adapter of these settings is on this base. Raises BaseModelError for a damaged weight file."""
    plans, named, kind = planned_layers(config, base), layer_shapes(base), config.adapter.trained
    parameters = _numbers(kind.factor_shapes(named[plan.name], plan.rank) for plan in plans)
    widths = [base.configs[part]["hidden_size"] for part in base.family.text_encoders]
    parameters += config.adapter.trigger_vectors * sum(widths)
    native = config.output.kind == "native"
    own = getattr(kind, "native_shapes", kind.factor_shapes)
    factors = [
        own(named[plan.name], plan.rank) if native else _plain_shapes(config, named[plan.name], plan.rank) for plan in plans
    ]
    # A full difference alone has no alpha, and in peft form no module has a tensor for it.
    alphas = sum("diff" not in shapes for shapes in factors) if config.output.form == "kohya" else 0
    header = (sum(map(len, factors)) + alphas) * _ENTRY + _METADATA
    weights = parameters * _BYTES["fp32"]  # an embedding alone
    if plans:
        weights = _bytes(factors, _BYTES[config.output.dtype]) + alphas * _BYTES["fp32"]
    return AdapterSize(len(plans), parameters, weights + header, weights, ranks_in_words(plans))


def _plain_shapes(config: TrainConfig, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Of a plain LoRA: as it was trained, or the nearest to what was trained, which is cut to what the weight can have."""
    made = config.adapter.trained.file_rank(rank) or config.output.most_rank
    return LORA.factor_shapes(weight, rank if made == rank else min(made, weight[0], math.prod(weight[1:])))


def _bytes(layers: Iterable[Mapping[str, tuple[int, ...]]], each: int) -> int:
    """Of factors in a file's number format, `each` bytes a number; a DoRA's magnitudes are float32 in every file."""
    found = (item for shapes in layers for item in shapes.items())
    return sum(math.prod(shape) * (_BYTES["fp32"] if name == MAGNITUDE else each) for name, shape in found)


def _numbers(layers: Iterable[Mapping[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for shapes in layers for shape in shapes.values())


def planned_layers(config: TrainConfig, base: BaseModelFacts) -> list[LayerPlan]:
    """What `plan_layers` will say of the loaded base, known from headers. Raises BaseModelError for a damaged weight file."""
    paths = {part: _weight_shapes(base, part) for part in base.family.parts}
    return plan_layers(config, base.family.parts, lambda part, targets: trainable_paths(base, part, targets, paths[part]))


def layer_shapes(base: BaseModelFacts) -> dict[str, tuple[int, ...]]:
    """Canonical name -> weight shape, as it is stored, of every Linear and convolution that an adapter may change.

    Raises BaseModelError for a damaged weight file.
    """
    return {
        canonical_name(part, path): shape
        for part in base.family.parts
        for path, shape in _weight_shapes(base, part).items()
        if len(shape) in (2, 4) and _is_layer(part, path)
    }


def _is_layer(part: str, path: str) -> bool:
    """Tables of a text encoder are looked up and not multiplied; only the second encoder's projection is ever read."""
    return not path.startswith("embeddings.") and (part == "text_encoder_2" or path != "text_projection")


def _weight_shapes(base: BaseModelFacts, part: str) -> dict[str, tuple[int, ...]]:
    """Path -> shape of its weight, in the order of the files; norms and tables among them."""
    stored = stored_tensors(base, part)
    return {name.removesuffix(".weight"): tensor.shape for name, tensor in stored.items() if name.endswith(".weight")}
