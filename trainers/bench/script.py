"""The usual script from its start to its last step, as a program of its own: `python -P -m trainers.bench.script ...`.

It imports what such scripts import, loads, trains, and tells as JSON lines in the form of the trainer's own events when
each part was done.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = ("accelerate", "diffusers", "diffusers.optimization", "peft", "transformers")


def main(arguments: Sequence[str]) -> int:
    """Runs it. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -P -m trainers.bench.script", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument("--images", type=Path, required=True, help="folder of PNGs with captions")
    parser.add_argument("--dtype", default="float32", help="torch dtype of the frozen weights")
    for name, kind in (("resolution", int), ("batch", int), ("rank", int), ("rate", float), ("steps", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    options = parser.parse_args(arguments)
    for name in LIBRARIES:
        importlib.import_module(name)
    # Scripts name it, to draw with at the end; diffusers loads a name only then.
    getattr(importlib.import_module("diffusers"), "StableDiffusionPipeline")  # noqa: B009
    import torch

    from trainers.bench.reference import Reference, load_parts, read_recipe

    tell("stage", name="scan")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = load_parts(options.base, getattr(torch, options.dtype), device)
    recipe = read_recipe(options.images, options.resolution, options.batch, options.rank, options.rate)
    reference = Reference(parts, recipe)
    tell("started")
    tell("stage", name="train")
    for number in range(options.steps):
        reference.step(number)
        tell("step", step=number + 1)
    return 0


def tell(kind: str, **values: object) -> None:
    """One event as a line."""
    print(json.dumps({"type": kind, "time": time.time(), **values}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
