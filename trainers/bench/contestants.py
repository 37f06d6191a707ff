"""Who is measured, on the same base, pictures, layers and seed: built group by group, so that each group fits in memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainers.bench.cases import LEARNING_RATE, Case, recipe
from trainers.bench.counts import Counts, count
from trainers.bench.limit import Floor, Full, Limit
from trainers.bench.progress import Progress
from trainers.bench.reference import Inputs, Parts, Recipe, Reference, load_parts, read_recipe, share
from trainers.bench.rounds import Step, Took
from trainers.dataset.batches import Batch
from trainers.device import DTYPES
from trainers.families import locate_base
from trainers.graph import Eager
from trainers.run_folder import RunFolder
from trainers.setup import Training, set_up
from trainers.train import fill_gradient, update

Told = Callable[[int, int], None]
"""Hears how many of how many are done."""


@dataclass(frozen=True)
class Plan:
    """What is measured: a case with its base and pictures on the disk, and where runs may write (a temporary folder)."""

    case: Case
    base: str
    images: Path
    work: Path
    batch: int = 1
    rank: int = 16
    full: bool = False

    @property
    def folder(self) -> Path:
        """Where the base lies."""
        return locate_base(self.base)


def start_project(
    plan: Plan, precision: str, name: str, changes: Mapping[str, Any] | None = None, told: Told = lambda done, total: None
) -> Training:
    """The real engine, ready for its first step, with what it caches in place. Raises TrainingError as a run would."""
    own = {"adapter": {"rank": plan.rank}, "train": {"batch_size": plan.batch}}
    config = recipe(plan.case, plan.base, plan.images, precision, own | dict(changes or {}))
    folder = plan.work / name
    folder.mkdir(parents=True)
    training = set_up(config, RunFolder(folder), lambda event: None, cache_folder=plan.work / "latents")
    steps = training.data.plan.steps_per_epoch
    for step in range(steps):
        for batch in training.batches.step(step):
            training.condition(batch.captions)
        told(step + 1, steps)
    return training


def project_step(training: Training) -> Step:
    """One optimizer update of the real engine."""
    return lambda number: update(training)


def reference_for(plan: Plan, parts: Parts, cached: bool = False) -> Reference:
    """The usual loop on the same pictures."""
    given = read_recipe(plan.images, plan.case.resolution, plan.batch, plan.rank, LEARNING_RATE)
    return Reference(parts, given, cached)


def inputs_of(batch: Batch, reference: Reference) -> Inputs:
    """The very numbers of one of the project's batches, with the reference's own text states for its captions."""
    text, extras = reference.encode_captions(batch.captions)
    return Inputs(batch.latents, batch.noise, batch.timesteps, text, extras)


def first_layer(training: Training) -> str:
    """Path inside the UNet of the first layer that has an adapter."""
    return training.plans[0].name.removeprefix("unet.")


@dataclass
class Group:
    """One interleaved set: the project in one precision, and what it is compared with. `steps` by contestant's name."""

    precision: str
    project: Training
    references: dict[str, Reference]
    limit: Limit
    floor: Floor
    counts: dict[str, Counts]
    steps: dict[str, Step]


def build_group(plan: Plan, precision: str, progress: Progress) -> Group:
    """Loads the contestants of one precision: the project, the reference in fp32 and in this precision, limit and floor."""
    say = progress.say
    say(f"{precision}: the project sets up")
    project = start_project(plan, precision, f"project-{precision}", told=progress.counter(f"{precision}: pictures encoded"))
    device = project.device.device
    references: dict[str, Reference] = {}
    for dtype in dict.fromkeys(("fp32", precision) if plan.case.against_fp32 else (precision,)):
        say(f"{precision}: the reference in {dtype} loads")
        parts = load_parts(plan.folder, DTYPES[dtype], device)
        references[f"reference {dtype}"] = reference_for(plan, parts)
    cached = reference_for(plan, parts, cached=True)
    pictures, told = len(cached.recipe.pictures), progress.counter(f"{precision}: pictures encoded by reference-cached")
    for index in range(pictures):
        cached.keep(index)
        told(index + 1, pictures)
    reference = references[f"reference {precision}"]
    (batch,) = project.batches.step(0)
    inputs = inputs_of(batch, reference)
    limit = Limit(parts, first_layer(project), inputs)
    say(f"{precision}: counting operations")
    limit.step()
    counts = {f"limit {precision}": count(limit.step)}
    counts |= count_on_meta(parts, first_layer(project), inputs, reference.recipe, precision)
    # What must be computed: on a device, attention's kernel also forms gradients of the text states that nobody asks for.
    floor = Floor(counts[f"limit {precision}, on no device"].flops, DTYPES[precision], device)
    steps: dict[str, Step] = {f"project {precision}": project_step(project)}
    steps |= {name: one.step for name, one in references.items()}
    steps[f"reference-cached {precision}"] = cached.step
    steps[f"limit {precision}"] = limit.step
    steps[f"floor {precision}"] = _floor_step(floor, device)
    if plan.full:
        steps[f"full {precision}"] = Full(parts, inputs).step
    counts |= count_project(project, precision) | count_reference(reference, inputs, precision)
    return Group(precision, project, references | {f"reference-cached {precision}": cached}, limit, floor, counts, steps)


def count_project(training: Training, precision: str) -> dict[str, Counts]:
    """Of forward and backward, and of the whole update, on the first step's batch."""
    fill_gradient(training)
    # A recording keeps nothing for a backward pass, and would tell nothing of the engine's own.
    kept, training.runner = training.runner, Eager()
    found = {f"project {precision}": count(lambda: fill_gradient(training))}
    found |= {f"project {precision}, whole step": count(lambda: update(training))}
    training.runner = kept
    return found


def count_reference(reference: Reference, inputs: Inputs, precision: str) -> dict[str, Counts]:
    """Of forward and backward, with gradients dropped before as the loop does and with gradients added in place."""

    def backward() -> None:
        reference.loss(inputs).backward()  # type: ignore[no-untyped-call]

    backward()
    in_place = count(backward)
    reference.optimizer.zero_grad()
    dropped = count(backward)
    reference.optimizer.zero_grad()
    whole = count(lambda: reference.update(inputs))
    name = f"reference {precision}"
    return {name: dropped, f"{name}, gradients in place": in_place, f"{name}, whole step without encoding": whole}


def count_on_meta(parts: Parts, first: str, inputs: Inputs, recipe: Recipe, precision: str) -> dict[str, Counts]:
    """Limit and reference on the meta device, which has no kernels of its own: attention is counted in its single products.

    Gradients are added in place. This is how the published counts were made: 1,732 and 3,255 for Stable Diffusion 1.5.
    """
    latents, noise, timesteps, text = (one.to("meta") for one in (inputs.latents, inputs.noise, inputs.timesteps, inputs.text))
    there = Inputs(latents, noise, timesteps, text, {name: one.to("meta") for name, one in inputs.extras.items()})
    # A scheduler moves its table to where it is asked: this one keeps to itself.
    described = replace(parts, unet=share(parts.unet, "meta"), scheduler=copy.deepcopy(parts.scheduler))
    limit, reference = Limit(described, first, there), Reference(described, recipe)

    def backward() -> None:
        reference.loss(there).backward()  # type: ignore[no-untyped-call]

    limit.step()
    backward()
    return {
        f"limit {precision}, on no device": count(limit.step),
        f"reference {precision}, gradients in place, on no device": count(backward),
    }


def synchroniser(device: torch.device) -> Callable[[], None]:
    """Waits until a GPU has done what it was given; nothing on a CPU."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _floor_step(floor: Floor, device: torch.device) -> Step:
    wait = synchroniser(device)

    def run(number: int) -> Took:
        wait()
        begun = time.perf_counter()
        floor.multiply()
        wait()
        return Took(floor.seconds(time.perf_counter() - begun))

    return run
