"""The check before a run: two real steps and a short drawing, and from them time to finish and memory. Torch only when run.

`python -P -m trainers.preflight CONFIG` measures for a complete config.toml and prints one JSON line: the fields of
`Measured`, or `what`, `where` and `hint` of what stood in the way.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config import TrainConfig, read_config
from trainers.console import time_in_words
from trainers.errors import TrainingError, is_out_of_memory

if TYPE_CHECKING:
    from trainers.setup import Training


@dataclass(frozen=True)
class Measured:
    """What two steps and a short drawing took on this machine. Times in seconds, memory in bytes."""

    step_seconds: float
    """One step at the largest bucket, the pictures encoded already."""
    load_seconds: float
    """Everything before it: the base is read, the pictures of one step are encoded."""
    sampling_seconds: float
    """One sampling step of one picture."""
    picture_seconds: float
    """The rest of a picture: its prompt, and the decoder."""
    memory: int
    """The most that was held."""
    memory_free: int
    """The most that can be held: what is held at the end, and what is free beside it."""
    device: str

    @property
    def fits(self) -> bool:
        """Whether a tenth is left for what two steps have not shown."""
        return self.memory <= 0.9 * self.memory_free


def time_to_finish(config: TrainConfig, steps: int, measured: Measured) -> float:
    """Seconds that a run of `steps` takes, by what was measured: loading, the prior's pictures, steps, and samples."""

    def picture(sampling_steps: int) -> float:
        return measured.picture_seconds + sampling_steps * measured.sampling_seconds

    every, prior = config.samples.every, 0 if config.prior.folder else len(config.prior.prompts) * config.prior.images
    draws = 1 + -(-steps // every) if every else 0
    samples = draws * (len(config.samples.prompts) or 2)
    drawing = prior * picture(config.prior.steps) + samples * picture(config.samples.steps)
    return measured.load_seconds + steps * measured.step_seconds + drawing


def memory_hints(config: TrainConfig) -> list[str]:
    """What to change when it does not fit, that which costs least first."""
    hints = []
    if not config.train.checkpointing:
        hints.append("Turn train.checkpointing on: slower, the same result.")
    if config.train.batch_size > 1:
        hints.append("Lower train.batch_size, and raise train.accumulation by as much.")
    if config.train.base_weights == "full":
        hints.append("Set train.base_weights=int8: half of a 16-bit base's memory, slower, slightly other numbers.")
    if config.text_encoder_rate:
        hints.append("Set the text encoder's learning rate to 0.")
    hints.append("Lower dataset.resolution.")
    return hints


def describe(config: TrainConfig, steps: int, measured: Measured) -> list[str]:
    """What was measured, as lines for a terminal."""
    total = time_in_words(time_to_finish(config, steps, measured))
    lines = [f"{'time':12}about {total} in all; {measured.step_seconds:.2f} s a step at the largest bucket"]
    memory = f"{measured.memory / 1e9:.1f} GB of {measured.memory_free / 1e9:.1f} GB by two real steps"
    lines.append(f"{'memory':12}{memory}" + ("" if measured.fits else ", which is too much"))
    return lines + [f"{'':12}{hint}" for hint in ([] if measured.fits else memory_hints(config))]


def measure(config: TrainConfig) -> Measured:
    """Loads the base and takes two real steps in a throw-away run folder. Raises TrainingError as a run would."""
    import tempfile

    from trainers.memory import memory_peak
    from trainers.run_folder import RunFolder
    from trainers.setup import set_up
    from trainers.train import update

    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="impasto-check-", ignore_cleanup_errors=True) as folder:
        values = config.model_dump()
        values["prior"]["prompts"] = ()  # they take long to draw, and are learnt as all others are
        training = set_up(TrainConfig.model_validate(values), RunFolder(Path(folder)), lambda _: None)
        step = _largest_step(training)
        for _ in range(2):  # the first one also encodes the pictures and warms up
            training.step = step
            tick = time.monotonic()
            update(training)
        seconds = time.monotonic() - tick
        loaded = tick - begun - seconds
        sampling, picture = _time_drawing(training)
        return Measured(seconds, loaded, sampling, picture, *memory_peak(training.device.device), training.device.reason)


def _largest_step(training: Training) -> int:
    """A step of the first epoch whose batch has the largest pictures."""
    sizes = [prepared.placement.bucket for prepared in training.data.training]
    largest = max(sizes, key=lambda size: size[0] * size[1])
    plan = training.data.plan
    return next(step for step in range(plan.steps_per_epoch) if sizes[plan.indices(step)[0]] == largest)


def _time_drawing(training: Training) -> tuple[float, float]:
    """Seconds of one sampling step, and of the rest of a picture, by drawing one in three steps."""
    from trainers.adapters.inject import TRAINED
    from trainers.dataset.prepare import render_side
    from trainers.generate import Picture, RenderSettings, render

    samples, side = training.config.samples, render_side(training.config, training.model.facts)
    how = RenderSettings(side, side, 3, samples.guidance, samples.negative, samples.scheduler)
    ticks = [time.monotonic()]
    render(training.model, [Picture("", 0, {TRAINED: 1.0})], how, lambda: ticks.append(time.monotonic()))
    ticks.append(time.monotonic())
    sampling = (ticks[-2] - ticks[1]) / 2  # the first step also warms up, and some samplers look twice in one
    return sampling, ticks[-1] - ticks[-2] + max(0.0, ticks[1] - ticks[0] - sampling)


def main(arguments: list[str]) -> int:
    """Measures for the config.toml that is named, and prints what came out as one JSON line. Returns the exit code."""
    answer: dict[str, Any]
    config = read_config(Path(arguments[0]))
    try:
        answer = asdict(measure(config))
    except TrainingError as error:
        answer = {"what": error.what, "where": error.where, "hint": error.hint}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer = {"what": "Out of memory", "where": "two steps", "hint": " ".join(memory_hints(config))}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
