"""The trained adapter as a file: which numbers go in, and what the file tells about itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainers.adapters import ADAPTERS
from trainers.adapters.flat import FlatParameters
from trainers.adapters.inject import find_layers
from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan
from trainers.config import TrainConfig
from trainers.dataset.prepare import TrainingSet
from trainers.families import BaseModelFacts
from trainers.families.base import DiffusionModel
from trainers.formats import ModuleWeights, write_adapter
from trainers.formats.metadata import RunFacts, build_metadata
from trainers.formats.plain import nearest_lora
from trainers.formats.ranks import summarise, used_rank


def file_name(config: TrainConfig, base: BaseModelFacts) -> str:
    """Name of the exported file without ending: the set name, else pictures, base and rank, as in blackcut-pocket-r16."""
    if config.output.name:
        return config.output.name
    folder = Path(config.dataset.images).name.lstrip(".")[:60] or "lora"
    return f"{folder}-{base.name[:40]}-r{config.adapter.rank}"


NEAR = 0.01
"""How near, relative to what was trained, a plain file comes where its rank is not given by the type."""


@dataclass(frozen=True)
class Exported:
    """What goes into a file: `modules` by canonical name, and how far they lie from what was trained, relative to it."""

    modules: dict[str, ModuleWeights]
    error: float = 0.0
    needed: int = 0
    """The rank at which each of them would come as near as NEAR; 0 where that is not the question."""

    @property
    def rank(self) -> int:
        """The highest of its modules."""
        return max((module.rank for module in self.modules.values()), default=0)

    def ranks(self) -> str:
        """How much of its ranks it uses, as a sentence; "" where that is not known or nothing was learnt."""
        found = [used_rank(module) for module in self.modules.values()]
        used, unknown = summarise(found), found.count(None)
        counts = sorted(Counter(module.rank for module in self.modules.values()).items())
        own = f" Its layers have ranks {', '.join(f'{rank} ({count})' for rank, count in counts)}." if len(counts) > 1 else ""
        left = f" {unknown} of its {len(found)} layers are left out, as they are too large to look at." if unknown else ""
        what = "LoRA" if all(module.kind == "lora" for module in self.modules.values()) else "adapter"
        return f"The {what} {used.sentence()}.{left}{own}" if used else ""

    def sentence(self) -> str:
        """What a person should know of a file that is not what was trained; "" where it is."""
        if not self.error:
            return ""
        more = f"; {NEAR:.0%} would take rank {self.needed}" if self.needed > self.rank else ""
        return f"a plain LoRA of rank {self.rank} at the most, {self.error:.1%} away from what was trained{more}"


def export_adapter(path: Path, exported: Exported, config: TrainConfig, metadata: dict[str, str], family: str = "sd1") -> None:
    """Writes what `trained_modules` gave, as the settings say. Raises AdapterFileError if not finite."""
    told = {name: value for name, value in (metadata | _own_facts(exported, config)).items() if value}
    write_adapter(path, exported.modules, told, config.output.dtype, config.output.form, family)


def _own_facts(exported: Exported, config: TrainConfig) -> dict[str, str]:
    """What the file says of its form where that is not the trained LoRA's own, in kohya's and LyCORIS' words.

    Empty where it should say nothing: full differences have no rank and no alpha, and programs divide the one by the other.
    """
    ranks, alphas = ({getattr(module, name) for module in exported.modules.values()} for name in ("rank", "alpha"))
    as_set = all(
        module.rank == (config.adapter.rank if name.startswith("unet.") else config.text_encoder_rank)
        for name, module in exported.modules.items()
    )
    if config.adapter.trained is LORA and as_set and not config.adapter.alpha_pattern:
        return {}
    facts = dict.fromkeys(("ss_network_dim", "ss_network_alpha"), "")
    if ranks != {0}:
        facts["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        facts["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    kinds = {module.kind for module in exported.modules.values()}
    if kinds == {"lora"}:
        return facts
    algorithm = {"algo": "lora", "dora_wd": "True"} if "dora" in kinds else {"algo": kinds.pop()}
    return facts | {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(algorithm)}


def trained_modules(
    flat: FlatParameters, weights: torch.Tensor, plans: list[LayerPlan], config: TrainConfig, model: DiffusionModel
) -> Exported:
    """`weights` (N,), the masters or their running mean, as one module for each plan, float32 on the CPU.

    With `output.kind` plain all are LoRAs: exact where the delta has a low rank, else by its singular values.
    """
    kind, factors = config.adapter.trained, flat.split(weights.detach())
    modules: dict[str, ModuleWeights] = {}
    away, size, needed = 0.0, 0.0, 0
    layers: Any = find_layers(model.parts())
    for plan in plans:
        known = {**factors[plan.name], **flat.constants.get(plan.name, {})}
        name, own, scale = kind.exported({part: tensor.cpu().contiguous() for part, tensor in known.items()}, plan.scale)
        module = ModuleWeights(own, scale * (ADAPTERS[name].rank(own) or 1), name)
        rank = kind.file_rank(plan.rank)
        # What lies in its file as a difference of large parts is factored anew: see adapters/symmetric.py.
        if config.output.kind == "plain" if name != "lora" else module.rank > plan.rank:
            base = layers[plan.name].weight.detach().float().cpu() if module.needs_base else None
            most, within = (rank, 0.0) if rank else (config.output.most_rank, NEAR)
            plain, error, near = nearest_lora(plan.name, module, most, base, within)
            needed = max(needed, 0 if rank else near)
            length = plain.delta_norm() or 0.0
            away, size = away + (0.0 if rank else (error * length) ** 2), size + length**2
            module = plain
        modules[plan.name] = module
    return Exported(modules, math.sqrt(away / size) if away else 0.0, needed)


def describe_run(
    config: TrainConfig,
    base: BaseModelFacts,
    data: TrainingSet,
    step: int,
    started_at: float,
    precision: str,
    hashes: tuple[str, str],
) -> dict[str, str]:
    """The metadata of a file exported after `step` updates. Nothing in it tells of the person's disk.

    `started_at` in seconds since 1970; `precision` is the number format that the base was used in;
    `hashes` are the old and the new one by which other programs name the base's file; empty where they are not known.
    """
    old_hash, new_hash = hashes
    folder = Path(config.dataset.images)
    words = data.caption_parts() if config.output.caption_words else {}
    resolution = config.dataset.resolution or base.resolution
    adapter, learns_text = config.adapter, config.text_encoder_rate > 0
    return build_metadata(
        RunFacts(
            output_name=file_name(config, base),
            base_name=base.name,
            rank=adapter.rank,
            alpha=adapter.scale_of(adapter.effective_alpha, adapter.rank) * adapter.rank,
            resolution=(resolution, resolution),
            started_at=started_at,
            seed=config.train.seed,
            steps=step,
            base_version=base.family.base_version,
            v2=base.family.name == "sd2",
            clip_skip=base.clip_skip if base.clip_skip > 1 else None,
            base_hash_old=old_hash or None,
            base_hash_new=new_hash or None,
            text_encoder_rank=config.text_encoder_rank if learns_text else None,
            text_encoder_alpha=_text_alpha(config) if learns_text else None,
            network_args={"targets": list(adapter.targets), "scaling": adapter.scaling} | _told_of(config),
            buckets=tuple((width, height, count) for (height, width), count in data.bucket_counts().items()),
            dataset_dirs=_dataset_dirs(folder, data),
            tag_frequency={folder.name: words} if words else None,
            learning_rate=config.optimizer.learning_rate,
            text_encoder_learning_rate=config.text_encoder_rate,
            optimizer=config.optimizer.type,
            scheduler=config.schedule.type,
            warmup_steps=config.schedule.warmup,
            planned_steps=data.steps,
            epochs=data.plan.epoch_of(max(0, step - 1)) + 1,
            batch_size=config.train.batch_size,
            accumulation=config.train.accumulation,
            num_images=len(data.own),
            noise_offset=config.train.noise_offset,
            min_snr_gamma=config.train.min_snr_gamma,
            precision=precision,
            trigger=config.dataset.trigger,
            prediction_type=base.prediction_type,
            author=config.output.author,
            description=config.output.description,
            session_id=_session(config),
        )
    )


def _told_of(config: TrainConfig) -> dict[str, Any]:
    """What was trained and how, where it is not as usual."""
    told = (
        "type",
        "init",
        "rank_schedule",
        "projections",
        "rank_pattern",
        "alpha_pattern",
        "loraplus_lr_ratio",
        "dropout",
        "rank_dropout",
        "module_dropout",
    )
    return config.adapter.model_dump(mode="json", include=set(told), exclude_defaults=True) | (
        {"type": config.adapter.type} if config.adapter.type != "lora" else {}
    )


def _dataset_dirs(folder: Path, data: TrainingSet) -> dict[str, tuple[int, int]]:
    """Name of each folder of pictures -> (repeats, pictures)."""
    groups: dict[str, list[int]] = {}
    for prepared in (*data.own, *data.held_out):
        groups.setdefault(Path(prepared.example.name).parent.name or folder.name, []).append(prepared.example.repeats)
    return {name: (max(repeats), len(repeats)) for name, repeats in sorted(groups.items())}


def _session(config: TrainConfig) -> str:
    """Names the run by its settings; where pictures, edits, prior, base and a LoRA to start from lie is left out."""
    places: Any = {"dataset": {"images", "edits"}, "prior": {"folder"}}
    settings = config.model_dump_json(exclude=places | {"base": {"model", "vae"}, "adapter": {"start_from"}})
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _text_alpha(config: TrainConfig) -> float:
    return config.adapter.scale_of(config.text_encoder_alpha, config.text_encoder_rank) * config.text_encoder_rank
