"""How a step's cost grows: with rank, with the batch, with the form of the adapters, and with the number of pictures."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainers.adapters.inject import TRAINED, set_strength
from trainers.bench.contestants import Plan, first_layer, inputs_of, project_step, reference_for, start_project, synchroniser
from trainers.bench.counts import count
from trainers.bench.forms import FORMS, Adapted
from trainers.bench.limit import begin_at
from trainers.bench.many import measure_many
from trainers.bench.progress import Progress
from trainers.bench.reference import load_parts
from trainers.bench.rounds import Rounds, Spread, Step, run_rounds
from trainers.bench.synthetic import synthetic_pictures
from trainers.device import DTYPES
from trainers.families.targets import match_targets
from trainers.graph import Eager
from trainers.setup import Training
from trainers.train import fill_gradient

RANKS = ((1, 16, 128), (4, 16, 64))
"""In sets that are measured side by side; more at once would not fit in memory."""
BATCHES = (1, 2, 4)
PICTURES = (10, 100, 1_000, 10_000)
_LAYERS = {"attention": ("attention",), "all linears": ("attention", "feed_forward")}

Add = Callable[[str, Spread], None]


def measure_growth(plan: Plan, precision: str, rounds: int, add: Add, progress: Progress) -> dict[str, Any]:
    """All of it, as facts for JSON; ratios go to `add`."""
    found: dict[str, Any] = {"ranks": {}, "batches": {}, "forms": {}, "pictures": {}}
    for ranks in RANKS:
        found["ranks"][" ".join(map(str, ranks))] = _facts(_ranks(plan, precision, ranks, rounds, add, progress))
        gc.collect()
    found["batches"] = _facts(_batches(plan, precision, rounds, add, progress))
    gc.collect()
    found["forms"] = _forms(plan, precision, rounds, add, progress)
    gc.collect()
    found["pictures"] = _pictures(add, progress)
    return found


def _facts(rounds: Rounds) -> dict[str, Any]:
    return {name: seconds.facts() for name, seconds in rounds.seconds.items()}


def _run(steps: dict[str, Step], name: str, rounds: int, training: Training, progress: Progress) -> Rounds:
    return run_rounds(steps, rounds, progress.counter(name), synchroniser(training.device.device))


def _ranks(
    plan: Plan, precision: str, ranks: Sequence[int], rounds: int, add: Add, progress: Progress
) -> Rounds:  # fmt: skip
    progress.say(f"growth: ranks {ranks} set up")
    trainings = {
        rank: start_project(plan, precision, f"ranks-{ranks[0]}-{rank}", {"adapter": {"rank": rank}}) for rank in ranks
    }
    steps: dict[str, Step] = {f"rank {rank}": project_step(training) for rank, training in trainings.items()}
    steps["no adapters"] = without_adapters(trainings[16])
    found = _run(steps, f"growth: ranks {ranks}", rounds, trainings[16], progress)
    lowest, *_, highest = ranks
    add(f"rank {highest} / rank {lowest}", found.ratio(f"rank {highest}", f"rank {lowest}"))
    if lowest == 1:
        add("rank 16 / no adapters", found.ratio("rank 16", "no adapters"))
    return found


def without_adapters(training: Training) -> Step:
    """The engine's own frozen forward and backward, down to where the first adapter would be."""
    parts = training.model.parts()
    begin = parts["unet"].get_submodule(first_layer(training).rpartition(".")[0])

    def step(number: int) -> None:
        training.runner = Eager()  # a recording would not hear of the strength
        set_strength(parts, TRAINED, 0.0)
        hook = begin_at(begin)
        try:
            fill_gradient(training)
        finally:
            hook.remove()
            set_strength(parts, TRAINED, 1.0)

    return step


def _batches(plan: Plan, precision: str, rounds: int, add: Add, progress: Progress) -> Rounds:
    progress.say(f"growth: batches {BATCHES} set up")
    trainings = {
        size: start_project(plan, precision, f"batch-{size}", {"train": {"batch_size": size}}) for size in BATCHES
    }  # fmt: skip
    steps: dict[str, Step] = {f"batch {size}": project_step(training) for size, training in trainings.items()}
    found = _run(steps, "growth: batches", rounds, trainings[1], progress)
    for size in BATCHES[1:]:
        values = found.ratio(f"batch {size}", "batch 1").values
        add(f"batch {size} / batch 1, a picture", Spread(tuple(value / size for value in values)))
    return found


def _forms(plan: Plan, precision: str, rounds: int, add: Add, progress: Progress) -> dict[str, Any]:
    """Factored against materialised adapters in the same eager model, for both sets of layers."""
    progress.say("growth: forms of adapters load")
    training = start_project(plan, precision, "forms")
    device = training.device.device
    parts = load_parts(plan.folder, DTYPES[precision], device)
    (batch,) = training.batches.step(0)
    inputs = inputs_of(batch, reference_for(plan, parts))
    steps: dict[str, Step] = {}
    counts = {}
    for layers, targets in _LAYERS.items():
        paths = match_targets("unet", targets, [path for path, _ in parts.unet.named_modules()])
        for form in FORMS:
            adapted = Adapted(parts, paths, form, plan.rank, inputs)
            adapted.step()
            name = f"{form}, {layers}"
            counts[name], steps[name] = asdict(count(adapted.step)), adapted.step
    found = run_rounds(steps, rounds, progress.counter("growth: forms"), synchroniser(device))
    for layers in _LAYERS:
        over, under = f"materialised, {layers}", f"factored, {layers}"
        add(f"materialised / factored, {layers}", found.ratio(over, under))
        saved = counts[over]["saved_bytes"] / counts[under]["saved_bytes"]
        add(f"materialised / factored, {layers}, saved activations", Spread((saved,)))
    return {"seconds": _facts(found), "counts": counts}


def _pictures(add: Add, progress: Progress) -> dict[str, Any]:
    """Scan, plan and memory by the number of pictures, each in a process of its own, on pocket."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="impasto-bench-", ignore_cleanup_errors=True) as folder:
        for number in PICTURES:
            progress.say(f"growth: {number} pictures")
            found[str(number)] = measure_many(synthetic_pictures(Path(folder, "pictures"), number, 32), Path(folder))
    least, most = found["100"], found[str(PICTURES[-1])]
    add("memory, 10000 pictures / 100", Spread((most["peak_bytes"] / least["peak_bytes"],)))
    add("pictures scanned a second, 10000", Spread((PICTURES[-1] / most["scan_seconds"],)))
    return found
