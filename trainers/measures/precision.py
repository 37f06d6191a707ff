"""How far number formats and packed weights move a base: its predictions, and the gradient of a LoRA, against float32.

`python -P -m trainers.measures.precision IMAGES --base BASE` prints a line for each. Every line is computed from the same
pictures, noises and timesteps by the training engine itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainers.config import TrainConfig, build_config
from trainers.errors import TrainingError
from trainers.objective import generator_for
from trainers.run_folder import RunFolder
from trainers.setup import Training, set_up
from trainers.train import fill_gradient

FORMATS = (("fp32", "full"), ("bf16", "full"), ("fp16", "full"), ("fp32", "int8"), ("bf16", "int8"), ("bf16", "nf4"))
DRAWS = 6
"""Timesteps at which each picture is predicted, evenly spread."""


@dataclass(frozen=True)
class Answers:
    """What one format answers: predictions of (draws, C, h, w), one for each picture, and the flat gradient (N,), float64."""

    predictions: list[torch.Tensor]
    gradient: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Row:
    """A format's relative errors against float32, |difference| / |float32's|, and its step's seconds."""

    name: str
    prediction: float
    worst: float
    gradient: float
    seconds: float


def answers_of(config: TrainConfig, folder: Path) -> Answers:
    """Predictions of the base and the gradient of a LoRA that has begun to learn. Raises TrainingError as a run would."""
    folder.mkdir()
    training = set_up(config, RunFolder(folder), lambda _: None)
    predictions = _predictions(training)
    start = torch.empty(training.flat.weights.shape).normal_(0.0, 0.02, generator=generator_for("precision"))
    with torch.no_grad():
        training.flat.weights.copy_(start)
    for _ in range(2):  # the first one also warms up
        tick = time.monotonic()
        fill_gradient(training)
    return Answers(predictions, training.flat.gradient.double().cpu(), time.monotonic() - tick)


@torch.no_grad()
def _predictions(training: Training) -> list[torch.Tensor]:
    """Of the untouched base: a LoRA begins at zero."""
    found = []
    for batch in training.batches.held_out(training.data.training, DRAWS):
        noisy_latents = training.model.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        answer = training.model.predict(noisy_latents, batch.timesteps, training.condition(batch.captions), batch.framing)
        found.append(answer.double().cpu())
    return found


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """|found - reference| / |reference|, by the Euclidean norm over everything."""
    return float((found - reference).norm() / reference.norm())


def compare(name: str, found: Answers, reference: Answers) -> Row:
    """A format's row: the mean error of a prediction, the worst one's, and the gradient's."""
    pairs = zip(found.predictions, reference.predictions, strict=True)
    errors = [relative_error(*rows) for pair in pairs for rows in zip(*pair, strict=True)]
    return Row(name, statistics.mean(errors), max(errors), relative_error(found.gradient, reference.gradient), found.seconds)


def report(options: argparse.Namespace) -> list[Row]:
    """A row for each format that this machine has; the first is float32's own, all zero."""
    reference, rows = None, []
    with tempfile.TemporaryDirectory(prefix="impasto-precision-", ignore_cleanup_errors=True) as folder:
        for precision, weights in FORMATS:
            if weights == "nf4" and not torch.cuda.is_available():
                continue
            train = {"precision": precision, "base_weights": weights, "batch_size": options.batch_size, "steps": 1}
            dataset = {"images": str(options.images), "resolution": options.resolution, "holdout": 0.0}
            config = build_config({"base": {"model": options.base}, "dataset": dataset, "train": train})
            found = answers_of(config, Path(folder, f"{precision}-{weights}"))
            reference = reference or found
            rows.append(compare(precision if weights == "full" else f"{precision}, {weights} weights", found, reference))
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a text table."""
    lines = [f"{'relative error of':20}  prediction  (worst)  gradient  s a step"]
    for row in rows:
        lines.append(f"{row.name:20}  {row.prediction:10.1e}  {row.worst:7.1e}  {row.gradient:8.1e}  {row.seconds:8.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints the report and returns the exit code: 0, or what the error asks for."""
    parser = argparse.ArgumentParser(
        prog="python -P -m trainers.measures.precision", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("images", type=Path, help="folder of pictures with captions")
    parser.add_argument("--base", default="pocket", help="base model, as base.model")
    parser.add_argument("--resolution", type=int, help="as dataset.resolution; the base's own where it is left out")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures in the step whose gradient is compared")
    try:
        rows = report(parser.parse_args(arguments))
    except TrainingError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(format_rows(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
