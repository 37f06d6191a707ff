"""All that can be known before weights load: settings against base and pictures, and how long a run will be."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from trainers.adapters.pivotal import NO_TRIGGER
from trainers.config import TrainConfig
from trainers.dataset.captions import clean_caption
from trainers.dataset.folder import Scan
from trainers.dataset.prepare import TrainingSet
from trainers.errors import Problem, SettingError
from trainers.families import FAMILIES, BaseModelFacts
from trainers.families.configuration import read_json
from trainers.families.vocabulary import WORDS_FILE, number_words, only_merges, read_merges
from trainers.layers import check_patterns
from trainers.run_folder import is_of_step
from trainers.samplers import check_sampler
from trainers.text import printable

_COMMON = 20_000
"""Words of CLIP's vocabulary stand in it about as often as they are written: the first so many are common."""

_NOT_IN_PEFT = {
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full difference",
    "restart": "full difference",
    "random_projection": "full difference",
}
"""What the types are in a file of their own form, where peft's form cannot hold it."""


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
    if wanted not in ("auto", base.family.name) and not (wanted == "sd" and base.family.name in ("sd1", "sd2")):
        meant = "Stable Diffusion 1.x and 2.x" if wanted == "sd" else FAMILIES[wanted].title
        what = f"The base {base.name} is a {base.family.title} model, and these settings are for {meant}"
        other = "with sdxl_ in its name, as sdxl_style" if base.family.name == "sdxl" else "without sdxl_ in its name, as style"
        hint = f"Switch to a preset {other}; or to another base."
        problems.append(Problem("error", what, "base.family", hint))
    if config.output.form == "peft":
        what = "A file in peft form is for diffusers: A1111, Forge and kohya's scripts load nothing of it, ComfyUI a part"
        problems.append(Problem("warning", what, "output.form", "Set output.form=kohya for a file that every program reads."))
        if config.output.kind == "native" and config.adapter.type in _NOT_IN_PEFT:
            name = _NOT_IN_PEFT[config.adapter.type]
            hint = "Set output.form=kohya, or output.kind=plain for a LoRA."
            problems.append(Problem("error", f"A file in peft form holds no {name}", "output.kind", hint))
    if base.guessed:
        problems.append(
            Problem("warning", base.guessed.partition(". ")[0], "base.prediction_type", base.guessed.partition(". ")[2])
        )
    for part in base.family.text_encoders if config.text_encoder_rate else ():
        unread = base.configs[part]["num_hidden_layers"] - base.layers_read(part)
        if unread:
            what = f"Nothing reads the last {unread} of the {part.replace('_', ' ')}'s layers, so no adapter goes there"
            problems.append(Problem("note", what.replace("last 1 of", "last of"), base.name))
    if base.prediction_type not in ("epsilon", "v_prediction"):
        problems.append(
            Problem("error", f"The base predicts {base.prediction_type!r}, which cannot be trained here", base.name)
        )
    if base.zero_terminal_snr and base.prediction_type == "v_prediction" and config.train.min_snr_gamma:
        what = "Min-SNR gives the last timestep, pure noise, a weight of 0: what zero-terminal SNR is for is not learnt"
        problems.append(Problem("warning", what, "train.min_snr_gamma", "Set train.min_snr_gamma=0."))
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
    problems += _check_packages(config) + _check_trigger(config, base)
    return problems + _check_adapter(config, base) + check_patterns(config, base) + _check_rates(config)


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


def _check_trigger(config: TrainConfig, base: BaseModelFacts) -> list[Problem]:
    """The trigger word where it has vectors of its own: it names their file, and so the word in other programs."""
    if not config.adapter.trigger_vectors:
        return []
    where, trigger = "dataset.trigger", clean_caption(config.dataset.trigger)
    if not trigger:
        return [Problem("error", *NO_TRIGGER)]
    if set(trigger) & set('/\\:*?"<>|,') or trigger.startswith(".") or len(trigger.encode()) > 100:
        what = f"The trigger word {printable(trigger)} cannot name a file, and other programs call an embedding by its file"
        return [Problem("error", what, where, "Take letters and digits, as zwx.")]
    if is_of_step(Path(f"{trigger}.safetensors")):
        what = f"The trigger word {printable(trigger)} ends as the embedding of a checkpoint does, with - and its step"
        return [Problem("error", what, where, "Take letters and digits, as zwx.")]
    if _known_words(base.folder / "tokenizer").get(f"{trigger.lower()}</w>", _COMMON) < _COMMON:
        what = f"{trigger} is a common word, and will mean what is learnt wherever the embedding is used"
        return [Problem("warning", what, where, "Take a word that nobody writes, as zwx.")]
    return []


def _known_words(tokenizer: Path) -> dict[str, int]:
    """Each word of a tokenizer's vocabulary with its number; empty where neither tells it."""
    if only_merges(tokenizer):
        try:
            return number_words(read_merges(tokenizer))
        except (OSError, ValueError):  # told when the base is loaded
            return {}
    return read_json(tokenizer, WORDS_FILE) if (tokenizer / WORDS_FILE).is_file() else {}


def _check_adapter(config: TrainConfig, base: BaseModelFacts) -> list[Problem]:
    width = min(base.configs["unet"]["block_out_channels"])
    if config.adapter.rank * 2 <= width or not config.adapter.has_rank:
        return []
    what = f"Rank {config.adapter.rank} is not small against this base's narrowest layer ({width})"
    return [Problem("advice", what, "adapter.rank", f"Use at most {width // 2}.")]


def _check_rates(config: TrainConfig) -> list[Problem]:
    if config.optimizer.type == "prodigy" or not config.adapter.has_rank:
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
    parts = data.caption_parts() if config.output.caption_words else {}
    if parts:
        shown = ", ".join(f"{part} ({count})" for part, count in list(parts.items())[:20])
        more = f" and {len(parts) - 20} more" if len(parts) > 20 else ""
        what = f"The file will tell everyone these words of your captions: {shown}{more}"
        problems.append(Problem("note", what, "output.caption_words", "Set output.caption_words=false to keep them."))
    every = getattr(config.adapter.trained, "every", 0)
    if every >= data.steps > 0:
        what = f"The run has {data.steps} steps: it ends before the first period of {every} is over"
        setting = "adapter.every" if hasattr(config.adapter, "every") else "adapter.grow_every"
        problems.append(Problem("warning", what, setting, f"Lower {setting}, or raise train.steps."))
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
