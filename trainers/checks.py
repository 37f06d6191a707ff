"""All that can be known before weights load: settings against base and pictures, and how long a run will be."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence

from trainers.config import TrainConfig
from trainers.dataset.folder import Scan
from trainers.dataset.prepare import TrainingSet
from trainers.errors import Problem, SettingError
from trainers.families import BaseModelFacts
from trainers.samplers import check_sampler


def count_steps(config: TrainConfig, data: TrainingSet) -> str:
    """A run's length in words: pictures x repeats, prior pictures, epochs / batch = steps, and how often each is seen."""
    own = data.own
    shown = sum(prepared.example.repeats for prepared in own)
    repeats = shown / max(1, len(own))
    looks = sum(prepared.example.repeats for prepared in data.training)
    epochs = data.steps * config.examples_per_step / max(1, looks)
    beside = f" + {looks - shown} prior" if looks > shown else ""
    return (
        f"{len(own)} pictures x {repeats:.3g} repeats{beside} = {looks} an epoch, x {epochs:.3g} epochs"
        f" / {config.examples_per_step} a step = {data.steps} steps; each picture is seen {epochs * repeats:.3g} times"
    )


def check_settings(config: TrainConfig, base: BaseModelFacts) -> list[Problem]:
    """Settings against the base. `error` can never pass, `advice` passes with --force."""
    problems = []
    wanted = config.base.family
    if wanted not in ("auto", base.family.name):
        problems.append(
            Problem(
                "error",
                f"The preset is meant for {wanted}, the base {base.name} is {base.family.title}",
                "base.family",
                "Choose a preset without sdxl_ in its name." if wanted == "sdxl" else "Choose another preset or base.",
            )
        )
    if not base.family.trainable:
        what = f"The base {base.name} is {base.family.title}, which this version cannot train"
        problems.append(Problem("error", what, "base.model", "Use a Stable Diffusion 1.x base or `pocket`."))
    if base.prediction_type not in ("epsilon", "v_prediction"):
        problems.append(
            Problem("error", f"The base predicts {base.prediction_type!r}, which cannot be trained here", base.name)
        )
    resolution = config.dataset.resolution or base.resolution
    if resolution < base.step:
        problems.append(
            Problem("error", f"A resolution of {resolution} is below the smallest, {base.step}", "dataset.resolution")
        )
    if resolution > 2 * base.resolution:
        problems.append(
            Problem(
                "advice",
                f"{resolution} px is more than twice what this base was made for ({base.resolution} px): it will draw doubles",
                "dataset.resolution",
                f"Set dataset.resolution={base.resolution}.",
            )
        )
    try:
        check_sampler(config.samples.scheduler)
    except SettingError as error:
        problems.append(Problem("error", error.what, "samples.scheduler", error.hint))
    return problems + _check_packages(config) + _check_adapter(config, base) + _check_rates(config)


def _check_packages(config: TrainConfig) -> list[Problem]:
    """The optional packages that settings need."""
    wanted: list[tuple[str, str, str, str]] = []
    if config.optimizer.package:
        wanted.append((config.optimizer.package, config.optimizer.type, "optimizer.type", "adamw"))
    if config.train.base_weights == "nf4":
        wanted.append(("bitsandbytes", "nf4", "train.base_weights", "int8"))
    return [
        Problem(
            "error",
            f"{value} needs the package {package}",
            setting,
            f"Run `pip install {package}` in the program's environment, or use {setting}={other}.",
        )
        for package, value, setting, other in wanted
        if not importlib.util.find_spec(package)
    ]


def _check_adapter(config: TrainConfig, base: BaseModelFacts) -> list[Problem]:
    unet = json.loads((base.folder / "unet" / "config.json").read_text(encoding="utf-8"))
    width = min(unet["block_out_channels"])
    if config.adapter.rank * 2 <= width:
        return []
    what = f"Rank {config.adapter.rank} is not small against this base's narrowest layer ({width})"
    return [Problem("advice", what, "adapter.rank", f"Use at most {width // 2}.")]


def _check_rates(config: TrainConfig) -> list[Problem]:
    if config.optimizer.type == "prodigy":
        return []
    problems = []
    scale = config.adapter.scale_of(config.adapter.effective_alpha, config.adapter.rank)
    rate = config.optimizer.learning_rate
    if rate < 1e-6:
        problems.append(
            Problem(
                "advice",
                f"A learning rate of {rate:g} is a full fine-tune's; a LoRA hardly moves with it",
                "optimizer.learning_rate",
                "1e-4 is a usual start.",
            )
        )
    if scale < 0.1:
        problems.append(
            Problem(
                "warning",
                f"alpha / rank scales the update by {scale:.3g}, so {rate:g} learns like {rate * scale:.2g} at scale 1",
                "adapter.alpha",
                "Raise alpha towards the rank, or the learning rate.",
            )
        )
    return problems


def check_pictures(config: TrainConfig, base: BaseModelFacts, scan: Scan, data: TrainingSet) -> list[Problem]:
    """What the folder and the plan tell: everything the scan found, enlarged pictures, a run shorter than its folder."""
    problems = list(scan.problems)
    enlarged = [prepared for prepared in (*data.training, *data.held_out) if prepared.placement.enlarged > 1.5]
    if enlarged:
        worst = max(enlarged, key=lambda prepared: prepared.placement.enlarged)
        problems.append(
            Problem(
                "warning",
                f"{len(enlarged)} pictures are enlarged to reach the resolution (most: {worst.placement.enlarged:.1f} times)",
                worst.example.name,
                "Use larger pictures, or a lower dataset.resolution.",
            )
        )
    if not data.training:
        problems.append(Problem("error", "No picture is left to train on", config.dataset.images, "Lower dataset.holdout."))
    elif data.steps * config.examples_per_step < len(data.training):
        problems.append(
            Problem("warning", f"{data.steps} steps do not even show every picture once", "train.steps", "Raise train.steps.")
        )
    return problems


def refuse(problems: Sequence[Problem], force: bool) -> None:
    """Raises SettingError for the first problem that may not pass: errors always, advice unless `force`."""
    for problem in problems:
        if problem.severity == "error":
            raise SettingError(problem.what, problem.where, problem.hint)
    for problem in problems:
        if problem.severity == "advice" and not force:
            raise SettingError(problem.what, problem.where, f"{problem.hint} Or pass --force.")
