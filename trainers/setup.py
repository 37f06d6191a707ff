"""Everything between a configuration and the first step: base model, pictures, adapter, optimizer."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trainers import events
from trainers.adapters import ADAPTERS
from trainers.adapters.inject import FlatParameters, LayerPlan, canonical_name, inject_trainable
from trainers.config import TrainConfig
from trainers.dataset.batches import BatchMaker
from trainers.dataset.cache import ContentCache
from trainers.dataset.folder import Scan, hash_file
from trainers.dataset.prepare import TrainingSet, planned_prior, prepare, scan_images
from trainers.device import Device, choose_device
from trainers.families import load_family, recognise_base
from trainers.families.base import Conditioning, DiffusionModel
from trainers.prior import draw_prior
from trainers.run_folder import RunFolder, home_folder

Condition = Callable[[tuple[str, ...]], Conditioning]


@dataclass
class Training:
    """A run in progress: what is fixed, and the few things that move (flat.weights, optimizer, mean, step)."""

    config: TrainConfig
    model: DiffusionModel
    device: Device
    data: TrainingSet
    batches: BatchMaker
    condition: Condition
    plans: list[LayerPlan]
    flat: FlatParameters
    optimizer: torch.optim.Optimizer
    mean: torch.Tensor | None
    step: int = 0
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=30))

    @property
    def exported(self) -> torch.Tensor:
        """The weights that samples and files are made of: the running mean where there is one."""
        return self.flat.weights if self.mean is None else self.mean


def set_up(config: TrainConfig, run: RunFolder, emit: events.Emit) -> Training:
    """All stages before the first step. Raises TrainingError when base, pictures or settings do not fit together."""
    emit(events.Stage(name="scan", detail=f"reading {config.dataset.images}"))
    base = recognise_base(config.base.model)
    scan = scan_images(config)
    for problem in scan.problems:
        emit(events.Warned(message=str(problem)))
    emit(events.Stage(name="load", detail=f"base model {base.name}"))
    size = sum(file.stat().st_size for file in (base.folder / "unet").glob("*.safetensors"))
    device = choose_device(config.train.precision, size)
    model = load_family(base, device.dtype, device.device)
    if device.is_main:
        run.check_manifest(make_manifest(config, scan, model))
    prior = planned_prior(config, run.prior, config.dataset.resolution or base.resolution)
    if prior:
        emit(events.Stage(name="prior", detail="the base draws pictures that keep it from forgetting", total=len(prior)))
        if device.is_main:
            draw_prior(model, config, prior, lambda done: emit(events.Stage(name="prior", done=done, total=len(prior))))
        device.wait_for_all()
        prior = [replace(example, sha256=hash_file(example.path)) for example in prior]
    data = prepare(config, base, scan.examples, prior)
    # The text states are cached only while nothing about the text encoder learns; both facts are settled here.
    plans = plan_layers(config, model)
    model.fingerprint("vae")  # of the frozen weights, before anything is injected
    flat = inject_trainable(model.parts(), plans, ADAPTERS[config.adapter.type], config.train.seed, device.device)
    if config.train.checkpointing:
        model.enable_checkpointing()
    rates = {"unet": config.optimizer.learning_rate, "text_encoder": config.text_encoder_rate}
    groups: list[dict[str, Any]] = [
        {"params": flat.parameters(group, config.optimizer.views), "lr": rates[group], "initial_lr": rates[group]}
        for group in flat.groups
    ]
    cache = ContentCache(home_folder() / "cache" / "latents")
    return Training(
        config=config,
        model=model,
        device=device,
        data=data,
        batches=BatchMaker(model, config, data.training, data.plan, cache, device),
        condition=choose_condition(model, learns=config.text_encoder_rate > 0),
        plans=plans,
        flat=flat,
        optimizer=config.optimizer.build(groups),
        mean=flat.weights.clone() if config.train.ema else None,
    )


def plan_layers(config: TrainConfig, model: DiffusionModel) -> list[LayerPlan]:
    """Which layers get an adapter, with rank and scale: the denoiser's, then the text encoder's unless its rate is 0."""
    adapter, text = config.adapter, config.text_encoder
    plans = []
    for part in model.parts():
        denoiser = part == "unet"
        if not denoiser and not config.text_encoder_rate:
            continue
        rank = adapter.rank if denoiser else config.text_encoder_rank
        alpha = adapter.effective_alpha if denoiser else config.text_encoder_alpha
        scale = adapter.scale_of(alpha, rank)
        paths = model.find_targets(part, adapter.targets if denoiser else text.targets)
        group = "unet" if denoiser else "text_encoder"
        plans += [LayerPlan(canonical_name(part, path), rank, scale, group) for path in paths]
    return plans


def choose_condition(model: DiffusionModel, learns: bool) -> Condition:
    """Captions -> Conditioning: encoded in the step while the text encoder learns, else once for each caption."""
    if learns:
        return model.encode_captions
    cache = ContentCache(folder=None)

    def encode(caption: str) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            row = model.encode_captions([caption])
        return {"hidden_states": row.hidden_states, **row.extras}

    def condition(captions: tuple[str, ...]) -> Conditioning:
        rows = []
        for caption in captions:
            entry = dict(cache.get(caption, lambda caption=caption: encode(caption)))  # type: ignore[misc]
            rows.append(Conditioning(entry.pop("hidden_states"), entry))
        joined = Conditioning.join(rows)
        device = model.objective.alphas_cumprod.device
        return Conditioning(joined.hidden_states.to(device), {name: value.to(device) for name, value in joined.extras.items()})

    return condition


def make_manifest(config: TrainConfig, scan: Scan, model: DiffusionModel) -> dict[str, Any]:
    """Content hashes of all that goes into a run."""
    settings = config.model_dump(mode="json")
    return {
        "images": {example.name: example.sha256 for example in scan.examples},
        "captions": {example.name: hashlib.sha256(example.caption.encode()).hexdigest() for example in scan.examples},
        "repeats": {example.name: example.repeats for example in scan.examples},
        "base": {part: model.fingerprint(part) for part in (*model.parts(), "vae")},
        "settings": hashlib.sha256(repr(settings).encode()).hexdigest(),
        "versions": {name: _version(name) for name in ("impasto", "torch", "diffusers", "transformers", "safetensors")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
