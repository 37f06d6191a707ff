"""The bench from beginning to end: builds what is measured, runs the parts that are asked for, gathers one dictionary."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainers.bench.agreement import agree
from trainers.bench.cases import FROZEN_RATIO, PICTURES, Case
from trainers.bench.contestants import Group, Plan, build_group, synchroniser
from trainers.bench.progress import Progress
from trainers.bench.report import cores, hardware, judge, versions
from trainers.bench.rounds import Rounds, run_rounds
from trainers.bench.synthetic import synthetic_base, synthetic_pictures
from trainers.run_folder import home_folder

PARTS = ("rounds", "start", "preview")


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
        if "rounds" in parts:
            for precision in precisions or case.precisions:
                _measure_group(plan, precision, rounds, facts, progress)
                gc.collect()
    _conclude(facts)
    return facts


def _measure_group(plan: Plan, precision: str, rounds: int, facts: dict[str, Any], progress: Progress) -> None:
    group = build_group(plan, precision, progress.say)
    reference = group.references[f"reference {precision}"]
    progress.say(f"{precision}: do reference and project agree")
    agreement = agree(group.project, reference, precision)
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


def _add_ratios(case: Case, group: Group, rounds: Rounds, facts: dict[str, Any]) -> None:
    precision, project = group.precision, f"project {group.precision}"
    pairs = [(name, project) for name in group.references]
    pairs += [(project, f"limit {precision}"), (project, f"floor {precision}")]
    pairs += [(f"reference {precision}", f"limit {precision}")]
    pairs += [(f"full {precision}", f"limit {precision}")] if f"full {precision}" in rounds.seconds else []
    for over, under in pairs:
        spread = rounds.ratio(over, under)
        facts["ratios"][f"{over} / {under}"] = judge(f"{over} / {under}", spread.median, case) | spread.facts()
    ours, theirs = group.counts[project], group.counts[f"reference {precision}"]
    for name, ratio in (
        (f"saved activations {precision}, project / reference", ours.saved_bytes / theirs.saved_bytes),
        (f"operations {precision}, project / reference", ours.operations / theirs.operations),
        (f"FLOPs {precision}, project / reference", ours.flops / theirs.flops),
    ):
        facts["ratios"][name] = judge(name, ratio, case)


def _conclude(facts: dict[str, Any]) -> None:
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
