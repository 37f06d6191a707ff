"""Everything between a configuration and the first step: base model, pictures, adapter, optimizer."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from trainers import events
from trainers.adapters.flat import VECTORS_GROUP, FlatParameters
from trainers.adapters.inject import inject_trainable, restore_layers
from trainers.adapters.plan import LayerPlan
from trainers.checks import check_pictures, check_settings
from trainers.condition import Condition, choose_condition
from trainers.config import TrainConfig
from trainers.dataset.batches import BatchMaker
from trainers.dataset.cache import ContentCache, prune
from trainers.dataset.prepare import TrainingSet, dataset_version, prepare, render_side, scan_images
from trainers.device import SMALL, Device, check_device, choose_device, other_kernels
from trainers.embeddings import learn_words
from trainers.engine import Undo, compile_blocks, make_fast, make_plain
from trainers.families import BaseModelFacts, denoiser_bytes, load_family, recognise_base
from trainers.families.base import DiffusionModel
from trainers.fit import Fit
from trainers.graph import Eager, Runner, choose_runner
from trainers.kernels import FOR_SMALL, choose_kernels, shapes_of
from trainers.layers import plan_layers
from trainers.loss_scale import LossScale
from trainers.manifest import make_manifest
from trainers.prior import prior_examples
from trainers.quantised import check_can_pack, quantise
from trainers.run_folder import RunFolder, home_folder
from trainers.start_from import Start, read_start
from trainers.training_state import Recovery, TrainingState


@dataclass
class Training:
    """A run in progress: what is fixed, and what moves (flat.weights, optimizer, mean, step, turned, recovery, loss_scale)."""

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
    turned: int = 0  # turns that the adapter's type has taken: turns.py
    recovery: Recovery = field(default_factory=Recovery)
    loss_scale: LossScale = field(default_factory=LossScale)
    fit: Fit = field(default_factory=Fit)
    """What was changed beside the settings so that a step fits into memory."""
    runner: Runner = field(default_factory=Eager)
    """How the work on a micro-batch is issued: operation by operation, or recorded once and done again."""
    undo: Undo = field(default_factory=list)
    """How the base's modules become plain again, for whoever takes the adapters out."""
    good: TrainingState | None = None
    """What to go back to when the numbers break."""
    wish: Callable[[], int] = lambda: 0
    """What this process is asked for while it trains, as train.listen has it."""
    asked: int = 0
    """The sum of all processes' wishes at the last step, where there are several."""
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=30))
    check_manifest: Callable[[], None] = lambda: None
    """Holds the run's manifest against what goes into it, once; of a new run it writes it, by the first step."""

    @property
    def median(self) -> float:
        """Seconds that a step takes, by the last ones; 0 before the first."""
        return statistics.median(self.durations) if self.durations else 0.0

    def take_out(self) -> None:
        """Leaves the denoiser and the text encoders as they were loaded, without the adapter; no step can follow."""
        self.runner.forget()
        restore_layers(self.model.parts())
        self.model.words.clear()
        make_plain(self.model.parts(), self.undo)

    @property
    def exported(self) -> torch.Tensor:
        """The weights that samples and files are made of: the running mean where there is one."""
        return self.flat.weights if self.mean is None else self.mean


def set_up(
    config: TrainConfig,
    run: RunFolder,
    emit: events.Emit,
    interrupted: Callable[[], bool] = lambda: False,
    cache_folder: Path | None = None,
    before: TrainingState | None = None,
    force: bool = False,
) -> Training:
    """All stages before the first step. Raises TrainingError when base, pictures or settings do not fit together.

    `cache_folder` holds the latents from run to run; None keeps them in memory. `before` is the state that the run goes
    on from: it will compute as it did; with `force` also where base, pictures or settings have changed since. Raises
    KeyboardInterrupt when `interrupted` while the base draws prior pictures.
    """
    emit(events.Stage(name="scan", detail=f"reading {config.dataset.images}"))
    base = recognise_base(config.base.model, config.base.options)
    scan = scan_images(config)
    start = read_start(config, base) if before is None else None  # a state has the weights, and the file may be gone
    emit(events.Stage(name="load", detail=f"base model {base.name}"))
    device = _device_for(config, base, before, emit)
    fit = Fit.of(before.facts.get("fit") if before else None)
    given, config = config, fit.applied(config)
    model = _load(config, base, device, emit)
    manifest = partial(make_manifest, given, scan, model, device, start, dataset_version(config, scan, run))
    check_manifest = cache(partial(_check_manifest, run, manifest, emit, force))
    if device.is_main and run.manifest.exists():
        check_manifest()
    learning = {name: part for name, part in model.parts().items() if name == "unet" or config.learns_text}
    undo = _make_fast(config, learning, device)
    data = prepare(config, base, scan.examples, prior_examples(model, config, run.prior, device, emit, interrupted))
    checked = [*check_device(device), *check_settings(config, base), *(start.problems if start else ())]
    warn = partial(_warn, emit)
    for problem in checked + check_pictures(config, base, scan, data):
        warn(str(problem))
    # The text states are cached only while nothing about the text encoder learns; both facts are settled here.
    plans = plan_layers(config, list(model.parts()), model.find_targets)
    flat = _inject(config, model, plans, start, device)
    if config.train.checkpointing:
        model.enable_checkpointing()
    if cache_folder and device.is_main:
        prune(cache_folder)
    return Training(
        config=config,
        model=model,
        device=device,
        data=data,
        batches=BatchMaker(model, config, data.training, data.plan, ContentCache(cache_folder), device, warn, fit.at_once),
        condition=choose_condition(model, device.device, learns=config.learns_text),
        plans=plans,
        flat=flat,
        optimizer=config.optimizer.build(_parameter_groups(config, flat)),
        mean=flat.weights.clone() if config.train.ema else None,
        loss_scale=LossScale.of(device.dtype_name),
        undo=undo,
        fit=fit,
        runner=choose_runner(config.train.recording, device.device, _is_small(config, base), warn),
        check_manifest=check_manifest,
    )


def _inject(
    config: TrainConfig, model: DiffusionModel, plans: list[LayerPlan], start: Start | None, device: Device
) -> FlatParameters:
    own = config.adapter
    more = (start.given if start else None, own.apart, own.dropouts, learn_words(config, model))
    return inject_trainable(model.parts(), plans, own.trained, config.train.seed, device.device, *more)


def _make_fast(config: TrainConfig, learning: dict[str, torch.nn.Module], device: Device) -> Undo:
    undo = make_fast(learning, device.fast)
    if config.train.compile == "on":
        compile_blocks(learning, home_folder() / "cache" / "compiled", undo)
    return undo


def _check_manifest(run: RunFolder, make: Callable[[], dict[str, Any]], emit: events.Emit, force: bool) -> None:
    for change in run.check_manifest(make(), force):
        _warn(emit, f"Since this run began, {change}; it goes on all the same.")


def _is_small(config: TrainConfig, base: BaseModelFacts) -> bool:
    """Whether a CPU gains by a recording: a compiled block cannot go into one, and what is recomputed would be held by it."""
    return denoiser_bytes(base) <= SMALL and config.train.compile == "off" and not config.train.checkpointing


def _warn(emit: events.Emit, message: str) -> None:
    emit(events.Warned(message=message))


def _parameter_groups(config: TrainConfig, flat: FlatParameters) -> list[dict[str, Any]]:
    """What the optimizer gets: each group of what learns with its rate. A word's vectors are no difference that may decay."""
    return [
        {"params": flat.parameters(group, config.optimizer.views), "lr": rate, "initial_lr": rate}
        | ({"weight_decay": 0.0} if group == VECTORS_GROUP else {})
        for group, rate in ((group, config.rate_of(group)) for group in flat.groups)
    ]


def _device_for(config: TrainConfig, base: BaseModelFacts, before: TrainingState | None, emit: events.Emit) -> Device:
    """The device and its kernels, computing as the run did before; what cannot be as it was is told."""
    computed = before.facts.get("kernels") if before else None
    device = choose_device(config.train.precision, denoiser_bytes(base), computed)
    if computed is None:
        return _with_kernels(config, base, device)
    if others := other_kernels(computed, device.kernels()):
        what = f"This run goes on under other conditions ({'; '.join(others)})"
        emit(events.Warned(message=f"{what}: its result may differ in the last digits from an unbroken run's."))
    return device


def _with_kernels(config: TrainConfig, base: BaseModelFacts, device: Device) -> Device:
    """The device with the kernels that compute this base fastest on it; the first process of a machine measures."""
    if device.device.type != "cpu":
        return device
    if denoiser_bytes(base) <= SMALL:
        return replace(device, fast=FOR_SMALL)
    shapes = shapes_of(base.configs["unet"], render_side(config, base) // base.pixels_per_latent)
    folder = home_folder() / "cache" / "kernels"
    if not device.is_main:
        device.wait_for_all()
    chosen = choose_kernels(shapes, device.dtype, device.device, folder)
    if device.is_main:
        device.wait_for_all()
    return replace(device, fast=chosen)


def _load(config: TrainConfig, base: BaseModelFacts, device: Device, emit: events.Emit) -> DiffusionModel:
    """The base on its device, its weights kept as `train.base_weights` says. Raises SettingError where that cannot be."""
    kind = config.train.base_weights
    if kind == "full":
        return load_family(base, device.dtype, device.device)
    check_can_pack(kind, device.device)
    # Read into the machine's memory and packed layer by layer: a GPU for which this is done may not hold it in full.
    model = load_family(base, device.dtype, torch.device("cpu"))
    parts = model.parts()
    sizes = [quantise(part, kind, device.device) for part in parts.values()]
    for module in (*parts.values(), model.vae):
        module.to(device.device)
    model.objective = model.objective.to(device.device)
    before, after = (sum(size) / 1e9 for size in zip(*sizes, strict=True))
    emit(events.Stage(name="load", detail=f"base weights in {kind}: {after:.2f} GB in place of {before:.2f} GB"))
    return model
