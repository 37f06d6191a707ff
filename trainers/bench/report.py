"""The figures as a text table: times, ratios with their goals, counts, and what they were taken on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainers.bench.cases import Case

PACKAGES = ("impasto", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def cores() -> int:
    """Processor cores of the machine, to which its load belongs."""
    return os.cpu_count() or 1


def own_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores()


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(), "cores": cores(), "own_cores": own_cores(), "threads": torch.get_num_threads(), "gpu": gpu,
        "capability": torch.backends.cpu.get_cpu_capability(), "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(), "python": platform.python_version(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that decide the figures."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def judge(name: str, value: float, case: Case) -> dict[str, Any]:
    """A ratio beside its goal, where the case has one for it."""
    if name not in case.goals:
        return {"ratio": value}
    sign, must, aim = case.goals[name]
    met = [value >= goal if sign == ">=" else value <= goal for goal in (must, aim)]
    return {"ratio": value, "sign": sign, "must": must, "aim": aim, "must_met": met[0], "aim_met": met[1]}


def format_report(facts: Mapping[str, Any]) -> str:
    """The whole report as lines."""
    machine = facts["hardware"]
    lines = [
        f"case {facts['case']}: {facts['resolution']} px, batch {facts['batch']}, rank {facts['rank']},"
        f" {facts['rounds']} rounds",
        f"{machine['processor']}, {machine['own_cores']} of {machine['cores']} cores, {machine['threads']} threads"
        + (f", {machine['gpu']}" if machine["gpu"] else ""),
        ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
    ]
    for name, found in facts.get("starts", {}).items():
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in found["parts"].items())
        peaks = f"{found['peak_bytes'] / 1e9:.2f} GB, {found['whole_peak_bytes'] / 1e9:.2f} to the end"
        lines.append(f"start of {name}: {found['seconds']:.2f} s ({parts}); {peaks}")
    for group in facts.get("groups", {}).values():
        lines += ["", f"{'seconds a step':28}   median      min      max  spread"]
        lines += [_times_line(name, found) for name, found in group["seconds"].items()]
    if "preview" in facts:
        lines += ["", f"{'seconds of a preview':28}   median      min      max  spread"]
        lines += [_times_line(name, found) for name, found in facts["preview"]["seconds"].items()]
    if facts["ratios"]:
        lines += ["", f"{'ratio':56}    value  (min - max)        goal"]
        lines += [_ratio_line(name, found) for name, found in facts["ratios"].items()]
    if facts.get("counts"):
        lines += ["", f"{'counts of one step':56} operations     GFLOP  saved MB"]
        for name, found in facts["counts"].items():
            saved = found["saved_bytes"] / 1e6
            lines.append(f"{name:56} {found['operations']:10} {found['flops'] / 1e9:9.2f} {saved:9.2f}")
    lines += ["", *facts["remarks"]]
    verdict = {None: "none: the machine was too restless", True: "all that must be is", False: "not all that must be is"}
    lines.append(f"verdict: {verdict[facts['verdict']]}")
    return "\n".join(lines)


def _times_line(name: str, found: Mapping[str, Any]) -> str:
    return f"{name:28} {found['median']:8.4f} {found['min']:8.4f} {found['max']:8.4f} {found['spread']:7.0%}"


def _ratio_line(name: str, found: Mapping[str, Any]) -> str:
    spread = f"({found['min']:.3g} - {found['max']:.3g})" if "min" in found else ""
    goal = ""
    if "must" in found:
        state = "reached" if found["aim_met"] else "met" if found["must_met"] else "MISSED"
        goal = f"{found['sign']} {found['must']:.3g}, go for {found['aim']:.3g}: {state}"
    return f"{name:56} {found['ratio']:8.4g}  {spread:18} {goal}"
