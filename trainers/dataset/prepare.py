"""From a folder of pictures to what a run trains on: kept and held-out examples in buckets, and the order of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainers.config import TrainConfig
from trainers.dataset.buckets import Placement, assign_buckets
from trainers.dataset.edits import read_edits
from trainers.dataset.folder import Example, Scan, decode_picture, scan_folder
from trainers.dataset.pictures import Picture
from trainers.dataset.plan import StepPlan, split_holdout
from trainers.dataset.versions import name_version, version_of
from trainers.families import BaseModelFacts
from trainers.run_folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """An example with its place in a bucket and the weight of its loss."""

    example: Example
    placement: Placement
    weight: float
    prior: bool = False


@dataclass(frozen=True)
class TrainingSet:
    """What a run trains on. `steps` is the number of optimizer updates of the whole run."""

    training: tuple[Prepared, ...]
    held_out: tuple[Prepared, ...]
    plan: StepPlan
    steps: int

    @property
    def own(self) -> tuple[Prepared, ...]:
        """The person's own pictures among `training`, without those that the base drew."""
        return tuple(prepared for prepared in self.training if not prepared.prior)

    def bucket_counts(self) -> dict[tuple[int, int], int]:
        """(height, width) -> pictures in that bucket."""
        return dict(sorted(Counter(prepared.placement.bucket for prepared in self.training).items()))

    def caption_parts(self) -> dict[str, int]:
        """Comma-separated part of the captions -> how many training pictures have it, the commonest first."""
        captions = (prepared.example.caption for prepared in self.training)
        parts = Counter(part.strip() for caption in captions for part in caption.split(",") if part.strip())
        return dict(sorted(parts.items(), key=lambda item: (-item[1], item[0])))


def scan_images(config: TrainConfig, thorough: bool = False) -> Scan:
    """Scans the run's folder of pictures; `thorough` decodes every picture also of a large folder.

    Raises DatasetError when nothing in it, or the file of edits, can be used.
    """
    settings = config.dataset
    edits = read_edits(Path(settings.edits)) if settings.edits else None
    read = decode_picture if thorough else None
    return scan_folder(
        Path(settings.images),
        trigger=settings.trigger,
        repeats=settings.repeats,
        edits=edits,
        read=read,
        masks=settings.masks,
    )


def dataset_version(config: TrainConfig, scan: Scan, run: RunFolder) -> str:
    """The name of the version of the dataset that a run trains on: the one pinned for it, else the scanned folder as it is."""
    if run.dataset.is_file():
        return name_version(run.dataset.read_bytes())
    return name_version(version_of(scan, read_edits(Path(config.dataset.edits)) if config.dataset.edits else None))


def render_side(config: TrainConfig, base: BaseModelFacts) -> int:
    """Side in pixels of the square samples and prior pictures of a run: its resolution in whole `base.step`, one at least."""
    resolution = config.dataset.resolution or base.resolution
    return max(base.step, resolution - resolution % base.step)


def planned_prior(config: TrainConfig, folder: Path, side: int, read: Callable[[Path], Picture] | None = None) -> list[Example]:
    """The prior pictures: those of `prior.folder`, else those that a run will draw, or has drawn, into `folder`.

    Drawn ones are not looked at yet and have no hash. `read` as in `scan_folder`. Raises DatasetError when nothing in
    `prior.folder` can be used.
    """
    if config.prior.folder:
        given = scan_folder(Path(config.prior.folder), repeats=config.prior.repeats, read=read).examples
        usual = " ".join(config.prior.caption.split())
        captions = [example.caption if example.caption_source == "file" else usual or example.caption for example in given]
        return [
            replace(example, name=f"prior/{example.name}", caption=caption)
            for example, caption in zip(given, captions, strict=True)
        ]
    prompts = [prompt for prompt in config.prior.prompts for _ in range(config.prior.images)]
    return [
        Example(
            path=folder / f"{number:03d}.png",
            name=f"prior/{number:03d}.png",
            caption=prompt,
            caption_source="file",
            width=side,
            height=side,
            repeats=config.prior.repeats,
            sha256="",
        )
        for number, prompt in enumerate(prompts)
    ]


def place_examples(config: TrainConfig, base: BaseModelFacts, examples: Sequence[Example]) -> list[Placement]:
    """How each picture comes into its bucket, in the same order: what a run does, and what the window draws."""
    return assign_buckets(
        [(example.height, example.width) for example in examples],
        config.dataset.resolution or base.resolution,
        base.step,
        enabled=config.dataset.buckets,
        crops=[example.crop for example in examples],
    )


def prepare(config: TrainConfig, base: BaseModelFacts, examples: Sequence[Example], prior: Sequence[Example]) -> TrainingSet:
    """Splits off the held-out part of `examples`, assigns buckets, and plans the steps over the rest and the prior."""
    seed, per_step = config.train.seed, config.examples_per_step
    kept, aside = split_holdout([example.sha256 for example in examples], config.dataset.holdout, seed)

    def placed(chosen: Sequence[Example], weight: float, prior: bool) -> list[Prepared]:
        places = place_examples(config, base, chosen)
        return [Prepared(example, place, weight, prior) for example, place in zip(chosen, places, strict=True)]

    training = placed([examples[index] for index in kept], 1.0, False) + placed(prior, config.prior.weight, True)
    plan = StepPlan(
        buckets=tuple(prepared.placement.bucket for prepared in training),
        repeats=tuple(prepared.example.repeats for prepared in training),
        per_step=per_step,
        seed=seed,
    )
    steps = config.train.steps or plan.steps_per_epoch * config.train.epochs
    return TrainingSet(tuple(training), tuple(placed([examples[index] for index in aside], 1.0, False)), plan, steps)
