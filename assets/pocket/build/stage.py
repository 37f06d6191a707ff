"""One training stage of the pocket base: a budget, a loss, checkpoints that a killed build goes on from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CHECKPOINT_SECONDS = 600.0
LOG_SECONDS = 20.0


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: until `steps` updates or `minutes` of training time are spent, whichever comes first."""

    steps: int = 10**9
    minutes: float = math.inf

    def progress(self, step: int, seconds: float) -> float:
        """Share 0..1 of the budget spent after `step` updates and `seconds` of training time, resumed parts included."""
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))


@dataclass(frozen=True)
class Pace:
    """Learning rate of a stage: linear warm-up, then cosine over the budget down to `floor` of the peak."""

    learning_rate: float
    warmup: int = 100
    floor: float = 0.03
    ema: float = 0.999
    """Decay per update of the averaged weights, which are what a stage hands on; it rises from 0.1 with the first updates."""

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of update `step` (from 0) when `progress` (0..1) of the budget is spent."""
        cosine = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * cosine * min(1.0, (step + 1) / self.warmup)

    def decay(self, step: int) -> float:
        """Decay of the average at update `step`, so that early averages are not held up by the start weights."""
        return min(self.ema, (1 + step) / (10 + step))


def pick_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 matrix products and convolutions over float32 weights: 1.3 to 1.5 times faster on CPUs that have the type."""
    return torch.autocast(pick_device().type, torch.bfloat16)


def randomness(seed: int, step: int) -> torch.Generator:
    """Generator (CPU) of update `step`: what a resumed stage draws does not depend on where it was cut.

    Of a seed, torch's CPU generator uses the low 32 bits alone.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def write_tensors(path: Path, content: object) -> None:
    """Saves with torch.save, written aside and renamed: a killed build keeps the checkpoint before."""
    aside = path.with_suffix(".part")
    torch.save(content, aside)
    os.replace(aside, path)


def train(
    folder: Path,
    module: nn.Module,
    pace: Pace,
    budget: Budget,
    loss: Callable[[int, float], tuple[Tensor, dict[str, float]]],
    sheet: Callable[[nn.Module, Path], None] | None = None,
) -> nn.Module:
    """Trains `module` in place and leaves the averaged weights in it; returns it.

    loss(step, progress) returns the loss of one batch and figures for the log. Checkpoints every 10 minutes and at the
    end, in folder/checkpoint.pt; the log is folder/log.jsonl, a line every 20 s. sheet(module, path) draws a picture with
    the averaged weights at each checkpoint. A folder that holds a checkpoint is gone on with; one that is finished returns
    at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    weights = [module.get_parameter(name) for name in names]
    average = [weight.detach().clone() for weight in weights]
    fused = weights[0].device.type == "cuda" or torch.backends.mkldnn.is_available()
    optimizer = torch.optim.AdamW(weights, lr=pace.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    step, seconds = restore(folder / "checkpoint.pt", weights, average, optimizer)
    saved = logged = time.perf_counter()
    figures: dict[str, list[float]] = {}
    while (progress := budget.progress(step, seconds)) < 1:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = pace.rate(step, progress)
        total, told = loss(step, progress)
        total.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(weights, 1.0))
        if math.isfinite(norm):
            optimizer.step()
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - pace.decay(step))
        optimizer.zero_grad(set_to_none=True)
        step, now = step + 1, time.perf_counter()
        seconds += now - began
        for name, value in {"loss": float(total.detach()), "norm": norm, **told}.items():
            figures.setdefault(name, []).append(value)
        if now - logged > LOG_SECONDS:
            logged = now
            tell(folder / "log.jsonl", step, seconds, pace.rate(step, progress), figures)
        if now - saved > CHECKPOINT_SECONDS:
            saved = now
            save(folder / "checkpoint.pt", weights, average, optimizer, step, seconds)
            draw(module, weights, average, sheet, folder / f"sheet-{step:06d}.png")
    save(folder / "checkpoint.pt", weights, average, optimizer, step, seconds)
    exchange(weights, average)
    if sheet:
        sheet(module, folder / "sheet-final.png")
    return module


def restore(
    path: Path, weights: list[nn.Parameter], average: list[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Reads a checkpoint into weights, average and optimizer; returns the step and the seconds trained, (0, 0) without one."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for target, source in zip([*weights, *average], [*state["weights"], *state["average"]], strict=True):
            target.copy_(source)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])


def save(
    path: Path, weights: list[nn.Parameter], average: list[Tensor], optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Writes all that restore() reads."""
    masters = [weight.detach() for weight in weights]
    content = {"weights": masters, "average": average, "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    write_tensors(path, content)


def tell(path: Path, step: int, seconds: float, rate: float, figures: dict[str, list[float]]) -> None:
    """Adds one line of means since the last line to the log, prints it, and empties the figures."""
    means = {name: round(sum(values) / len(values), 5) for name, values in figures.items()}
    figures.clear()
    line = {"step": step, "minutes": round(seconds / 60, 2), "rate": float(f"{rate:.3g}"), **means}
    print(json.dumps(line), flush=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def exchange(weights: Iterable[nn.Parameter], average: Iterable[Tensor]) -> None:
    """Swaps the weights with their average; a second call swaps them back."""
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            held = weight.detach().clone()
            weight.copy_(mean)
            mean.copy_(held)


def draw(
    module: nn.Module,
    weights: list[nn.Parameter],
    average: list[Tensor],
    sheet: Callable[[nn.Module, Path], None] | None,
    path: Path,
) -> None:
    """Draws the sheet, if there is one to draw, with the averaged weights."""
    if sheet is None:
        return
    exchange(weights, average)
    try:
        sheet(module, path)
    finally:
        exchange(weights, average)
