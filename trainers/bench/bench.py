"""The bench from beginning to end: builds what is measured, runs the parts that are asked for, gathers one dictionary."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainers.bench.agreement import agree
from trainers.bench.apart import Start, middle, script_command, start, train_command
from trainers.bench.cases import FROZEN_RATIO, PICTURES, Case
from trainers.bench.contestants import Group, Plan, build_group, synchroniser
from trainers.bench.growth import measure_growth
from trainers.bench.preview import FUSES, measure_preview
from trainers.bench.progress import Progress
from trainers.bench.report import cores, hardware, judge, versions
from trainers.bench.rounds import Rounds, Spread, run_rounds
from trainers.bench.synthetic import synthetic_base, synthetic_pictures
from trainers.run_folder import home_folder

PARTS = ("rounds", "start", "preview")
STARTS = 2
"""How often each process of its own is started, after one that does not count."""


def run_bench(
    case: Case,
    *,
    batch: int = 1,
    rank: int = 16,
    rounds: int = 5,
    precisions: Sequence[str] = (),
    full: bool = False,
    parts: Sequence[str] = PARTS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All figures of a case as one dictionary, fit for JSON. Raises TrainingError where the engine cannot run it."""
    progress = progress or Progress()
    cache = home_folder() / "cache" / "bench"
    progress.say(f"the base {case.base} and {PICTURES} pictures")
    base = synthetic_base(case.base, cache)
    images = synthetic_pictures(cache / f"pictures-{case.resolution}", PICTURES, case.resolution)
    facts: dict[str, Any] = {
        "case": case.name, "resolution": case.resolution, "batch": batch, "rank": rank, "rounds": rounds, "groups": {},
        "ratios": {}, "counts": {}, "agreement": {}, "remarks": [], "doubts": [], "hardware": hardware(),
        "versions": versions(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="impasto-bench-", ignore_cleanup_errors=True) as work:
        plan = Plan(case, base, images, Path(work), batch, rank, full)
        if "start" in parts:  # first: while this process is small
            _measure_starts(plan, precisions or case.precisions, facts, progress)
        if "rounds" in parts:
            for precision in precisions or case.precisions:
                _measure_group(plan, precision, rounds, facts, progress)
                gc.collect()
        if "preview" in parts:
            _measure_preview(plan, rounds, facts, progress)
            gc.collect()
        if "growth" in parts:
            growing = (precisions or case.precisions)[0]
            facts["growth"] = measure_growth(
                plan, growing, rounds, lambda name, spread: _add(facts, case, name, spread), progress
            )
    conclude(facts)
    return facts


def _measure_group(plan: Plan, precision: str, rounds: int, facts: dict[str, Any], progress: Progress) -> None:
    group = build_group(plan, precision, progress)
    reference = group.references[f"reference {precision}"]
    told = progress.counter(f"{precision}: steps in which reference and project are compared")
    agreement = agree(group.project, reference, precision, told)
    facts["agreement"][precision] = asdict(agreement) | {"holds": agreement.holds}
    facts["counts"] |= {name: asdict(counts) for name, counts in group.counts.items()}
    wait = synchroniser(group.project.device.device)
    found = run_rounds(group.steps, rounds, progress.counter(f"{precision}: rounds"), wait)
    facts["groups"][precision] = {
        "seconds": {name: seconds.facts() for name, seconds in found.seconds.items()},
        "loads": list(found.loads),
        "matmul_flops_per_second": sorted(group.floor.rates)[len(group.floor.rates) // 2],
    }
    facts["doubts"] += [f"{precision}: {doubt}" for doubt in found.doubts(cores())]
    _add_ratios(plan.case, group, found, facts)


def _measure_starts(plan: Plan, precisions: Sequence[str], facts: dict[str, Any], progress: Progress) -> None:
    """The trainer and the script in turn; a first start of each only warms the disk's cache up."""
    commands = {}
    for name, make, formats in (
        ("project", train_command, precisions), ("reference", script_command, dict.fromkeys(("fp32", *precisions))),
    ):  # fmt: skip
        for precision in formats:
            if plan.case.against_fp32 or precision in precisions:
                made = make(plan.case, plan.base, plan.images, plan.work, precision, plan.batch, plan.rank)
                commands[f"{name} {precision}"] = made
    told = progress.counter("starts in processes of their own")
    found: dict[str, list[Start]] = {name: [] for name in commands}
    for number in range(1 + STARTS):
        for place, (name, command) in enumerate(commands.items()):
            begun = start(command)
            found[name] += [begun] if number else []
            told(number * len(commands) + place + 1, (1 + STARTS) * len(commands))
    facts["starts"] = {name: middle(starts) for name, starts in found.items()}
    for project in (name for name in found if name.startswith("project")):
        for reference in (name for name in found if name.startswith("reference")):
            pairs = list(zip(found[project], found[reference], strict=True))
            name = f"start to end of first step, {project} / {reference}"
            _add(facts, plan.case, name, Spread(tuple(a.seconds / b.seconds for a, b in pairs)))
            name = f"peak memory, {project} / {reference}"
            _add(facts, plan.case, name, Spread(tuple(a.peak_bytes / b.peak_bytes for a, b in pairs)))


def _measure_preview(plan: Plan, rounds: int, facts: dict[str, Any], progress: Progress) -> None:
    progress.say("preview: the studio's model and diffusers' load")
    found = measure_preview(plan, rounds, progress.counter("preview: rounds"))
    facts["preview"] = {
        "seconds": {name: seconds.facts() for name, seconds in found.rounds.seconds.items()},
        "exact_at_zero": found.exact_at_zero, "drift": found.drift,
    }  # fmt: skip
    _add(
        facts,
        plan.case,
        "strength, project / fuse + unfuse",
        found.rounds.ratio("strength, project", "strength, fuse + unfuse"),
    )
    _add(facts, plan.case, "swap, project / load_lora_adapter", found.rounds.ratio("swap, project", "swap, load_lora_adapter"))
    _add(facts, plan.case, "drawing, LoRA / base", found.rounds.ratio("drawing, LoRA", "drawing, base"))
    word = "is the base bit for bit" if found.exact_at_zero else "IS NOT THE BASE"
    facts["remarks"].append(
        f"strength 0 {word}; after {FUSES} rounds of fuse and unfuse {found.drift:.2%} of the adapted weights differ"
    )


def _add(facts: dict[str, Any], case: Case, name: str, spread: Spread) -> None:
    """A ratio of several rounds. One whose spread holds its goal within it can say nothing about it."""
    facts["ratios"][name] = judge(name, spread.median, case) | spread.facts()
    must = facts["ratios"][name].get("must")
    if must is not None and min(spread.values) < must < max(spread.values):
        facts["doubts"].append(f"{name} lies on both sides of its goal")


def _add_ratios(case: Case, group: Group, rounds: Rounds, facts: dict[str, Any]) -> None:
    precision, project = group.precision, f"project {group.precision}"
    pairs = [(name, project) for name in group.references]
    pairs += [(project, f"limit {precision}"), (project, f"floor {precision}")]
    pairs += [(f"reference {precision}", f"limit {precision}")]
    pairs += [(f"full {precision}", f"limit {precision}")] if f"full {precision}" in rounds.seconds else []
    for over, under in pairs:
        _add(facts, case, f"{over} / {under}", rounds.ratio(over, under))
    reference = f"reference {precision}"
    ours, theirs, in_place = (group.counts[name] for name in (project, reference, f"{reference}, gradients in place"))
    for name, ratio in (
        (f"saved activations {precision}, project / reference", ours.saved_bytes / theirs.saved_bytes),
        (f"operations {precision}, project / reference", ours.operations / theirs.operations),
        # As the published count of 3,255 was made.
        (f"operations {precision}, project / reference, gradients in place", ours.operations / in_place.operations),
        (f"FLOPs {precision}, project / reference", ours.flops / theirs.flops),
    ):
        facts["ratios"][name] = judge(name, ratio, case)


def conclude(facts: dict[str, Any]) -> None:
    """Remarks in words, and the verdict: None where the machine was too restless, else whether all that must be is."""
    for precision, found in facts["agreement"].items():
        word = "agree" if found["holds"] else "DO NOT AGREE"
        steps = len(found["project"])
        facts["remarks"].append(
            f"{precision}: losses of reference and project {word} over {steps} steps: {found['worst']:.1e} apart at the most,"
            f" {found['tolerance']:.0e} allowed"
        )
    ratio = facts["ratios"].get("reference fp32 / limit fp32")
    lowest, highest = FROZEN_RATIO.get(facts["case"], (0.0, float("inf")))
    if ratio is not None and not lowest <= ratio["ratio"] <= highest:
        facts["remarks"].append(
            f"The reference is off: it takes {ratio['ratio']:.2f} times the frozen limit in fp32, where the usual loop takes"
            f" {lowest} to {highest} times."
        )
    facts["remarks"] += [f"no verdict: {doubt}" for doubt in facts["doubts"]]
    judged = [found["must_met"] for found in facts["ratios"].values() if "must_met" in found]
    holds = all(judged) and all(found["holds"] for found in facts["agreement"].values())
    facts["verdict"] = None if facts["doubts"] else holds
