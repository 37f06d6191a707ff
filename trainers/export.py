"""The trained adapter as a file: which numbers go in, and what the file tells about itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from trainers.adapters import ADAPTERS
from trainers.adapters.inject import FlatParameters
from trainers.adapters.plan import LayerPlan
from trainers.config import TrainConfig
from trainers.dataset.prepare import TrainingSet
from trainers.families import BaseModelFacts
from trainers.formats import ModuleWeights, write_adapter
from trainers.formats.metadata import RunFacts, build_metadata


def file_name(config: TrainConfig, base: BaseModelFacts) -> str:
    """Name of the exported file without ending: the set name, else pictures, base and rank, as in blackcut-pocket-r16."""
    if config.output.name:
        return config.output.name
    folder = Path(config.dataset.images).name.lstrip(".")[:60] or "lora"
    return f"{folder}-{base.name[:40]}-r{config.adapter.rank}"


def export_adapter(
    path: Path,
    flat: FlatParameters,
    weights: torch.Tensor,
    plans: list[LayerPlan],
    config: TrainConfig,
    metadata: dict[str, str],
    family: str = "sd1",
) -> None:
    """Writes `weights` (N,), the masters or their running mean, as the settings say. Raises AdapterFileError if not finite."""
    modules = trained_modules(flat, weights, plans, config)
    write_adapter(path, modules, metadata, config.output.dtype, config.output.form, family)


def trained_modules(
    flat: FlatParameters, weights: torch.Tensor, plans: list[LayerPlan], config: TrainConfig
) -> dict[str, ModuleWeights]:
    """`weights` (N,) as one module for each plan, by canonical name, float32 on the CPU."""
    kind = ADAPTERS[config.adapter.type]
    factors = flat.split(weights.detach())
    return {
        plan.name: ModuleWeights(
            {name: tensor.cpu().contiguous() for name, tensor in factors[plan.name].items()},
            kind.export_alpha(plan.scale, plan.rank),
            config.adapter.type,
        )
        for plan in plans
    }


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
            network_args={"targets": list(adapter.targets), "scaling": adapter.scaling},
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


def _dataset_dirs(folder: Path, data: TrainingSet) -> dict[str, tuple[int, int]]:
    """Name of each folder of pictures -> (repeats, pictures)."""
    groups: dict[str, list[int]] = {}
    for prepared in (*data.own, *data.held_out):
        groups.setdefault(Path(prepared.example.name).parent.name or folder.name, []).append(prepared.example.repeats)
    return {name: (max(repeats), len(repeats)) for name, repeats in sorted(groups.items())}


def _session(config: TrainConfig) -> str:
    """Names the run by its settings; where pictures, base and a LoRA to start from lie on the disk is left out."""
    settings = config.model_dump_json(exclude={"dataset": {"images"}, "base": {"model", "vae"}, "adapter": {"start_from"}})
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _text_alpha(config: TrainConfig) -> float:
    return config.adapter.scale_of(config.text_encoder_alpha, config.text_encoder_rank) * config.text_encoder_rank
