"""The table of adapter types, as a program of its own: `python -P -m trainers.bench.family IMAGES TRUTH OUT ...`.

Every entry is trained on pocket at several learning rates, each run in a process of its own, and draws concepts of which TRUTH
holds true pictures in the same style that were never trained on, and prompts without the trigger. What is done lies in OUT and
is not done again, so that hours of it may be cut off; `--table` prints what there is, and `--sheet` shows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from trainers.bench.apart import Ran, run_to_end
from trainers.cells import Cell, LoraUse, RenderRequest
from trainers.dataset.captions import shared_words
from trainers.dataset.folder import scan_folder
from trainers.dataset.pictures import load_pixels
from trainers.draw_cells import answer
from trainers.families import recognise_base
from trainers.families.facts import BaseOptions
from trainers.families.settings import BaseSettings
from trainers.measures.likeness import describe_all, drift_of, set_distance, spread_of
from trainers.page import label_grid
from trainers.presets import resolve
from trainers.warm import Warm

LORA_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
_RATES_OF_FEW = LORA_RATES[1:]  # what has few numbers learns best at the higher ones
_QUIET = ("samples.every=0", "checkpoints.every=0", "output.verify=false", "dataset.holdout=0.1")
# None of the preset's own prior prompts, of which a run learns pictures.
_PLAIN = (
    "a guitar, noto style", "a red car, noto style", "a castle, twemoji style", "a penguin, twemoji style",
    "a cactus, fluent flat style", "a mushroom, fluent flat style", "a rocket, fluent 3d style", "a pear, fluent 3d style",
)  # fmt: skip
_CONCEPTS = 24
_SHOWN = 6
_PACE_STEPS = 30
SEED = 7


@dataclass(frozen=True)
class Entry:
    """One line of the table: settings over the preset's (another type takes none of its adapter's), and the rates to try."""

    name: str
    settings: tuple[str, ...]
    rates: tuple[float, ...] = LORA_RATES
    text_share: float | None = None
    """The text encoder's rate, of this one; None: the preset's, which suits a LoRA."""

    def at(self, rate: float) -> tuple[str, ...]:
        """All settings of a run at this learning rate."""
        text = () if self.text_share is None else (f"text_encoder.learning_rate={self.text_share * rate:g}",)
        return (*self.settings, f"optimizer.learning_rate={rate:g}", *text)


def _type(name: str, *settings: str, rates: tuple[float, ...] = LORA_RATES, text_share: float | None = None) -> Entry:
    kept = ("output.kind=native",) if name in ("dora", "loha", "lokr", "full", "random_projection", "restart") else ()
    return Entry(name, (f"adapter.type={name}", 'adapter.targets=["attention"]', *settings, *kept), rates, text_share)


def _only(name: str, rank: int, *projections: str) -> Entry:
    chosen = ",".join(f'"{one}"' for one in projections)
    return Entry(name, (f"adapter.rank={rank}", 'adapter.targets=["attention"]', f"adapter.projections=[{chosen}]"))


ENTRIES = (
    Entry("lora", ()),
    *(Entry(f"lora, {init}", (f"adapter.init={init}",)) for init in ("symmetric", "pissa", "olora")),
    _type("dora"),
    _type("loha"),
    _type("lokr", rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    _type("additive"),
    _type("random_projection", "adapter.every=25", rates=(3e-4, 1e-3, 3e-3)),
    _type("restart", "adapter.every=50", "adapter.warmup=10"),
    Entry("lora, grow", ("adapter.rank_schedule=grow", "adapter.grow_every=25"), _RATES_OF_FEW),
    _type("pivotal", "dataset.trigger=blackcut"),
    _type("full", rates=(5e-5, 1.5e-4, 5e-4), text_share=0.3),
    *(Entry(f"lora, rank {rank}", (f"adapter.rank={rank}",), _RATES_OF_FEW) for rank in (1, 2, 4, 8)),
    Entry("lora, rank 64", ("adapter.rank=64",)),
    _only("q, k, v, out, rank 16", 16, "q", "k", "v", "out"),
    _only("q, v, rank 32", 32, "q", "v"),
)


@dataclass(frozen=True)
class Measured:
    """What one run came to. `similarity` and `drift` as in trainers.calibrate, against the true pictures."""

    name: str
    rate: float
    held_out_loss: float
    similarity: float
    drift: float
    seconds_per_step: float
    peak_bytes: int
    file_bytes: int


def main(arguments: Sequence[str]) -> int:
    """Measures what is missing. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -P -m trainers.bench.family", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("images", type=Path, help="the sample's folder, with captions that end with the trigger")
    parser.add_argument("truth", type=Path, help="true pictures in its style, named LABEL-OF-THE-CONCEPT.png")
    parser.add_argument("out", type=Path, help="folder for runs, pictures and results")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[], help="names of entries")
    parser.add_argument("--pace", action="store_true", help="only a short run of each entry, for the time and memory of a step")
    parser.add_argument("--table", action="store_true", help="print the table of what is done")
    parser.add_argument("--sheet", type=Path, help="write a picture of what the adapters draw to this file")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(read_results(options.out)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [entry for entry in ENTRIES if entry.name in (options.only or [entry.name])]
    if options.sheet:
        sheet({entry.name for entry in chosen}, options).save(options.sheet)
        return 0
    if options.pace:
        for entry in chosen:
            _measure_pace(entry, options)
        return 0
    for place in (1, 2, 0, 3):  # the middle rates first, so that what is cut off tells something
        for entry in chosen:
            for rate in entry.rates[place : place + 1]:
                _measure(entry, rate, options)
    return 0


def _measure(entry: Entry, rate: float, options: Any) -> None:
    """One run, its pictures and their figures, unless they are there."""
    run = _run_of(entry.name, rate, options)
    result = options.out / f"{run.name}.json"
    if result.exists():
        return
    settings = (*entry.at(rate), f"prior.folder={_prior(options)}")
    ran = _train(run, options.steps, settings, options)
    steps = [event for event in ran.events if event["type"] == "step"]
    losses = [event["held_out_loss"] for event in steps if event["held_out_loss"] is not None]
    (file,) = run.glob("*.safetensors")
    pictures = _draw(file, options)
    similarity, drift = _judge(pictures, _draw(None, options), options)
    pace = median(step["seconds_per_step"] for step in steps)
    found = Measured(entry.name, rate, losses[-1], similarity, drift, pace, ran.peak_bytes, file.stat().st_size)
    result.write_text(json.dumps(asdict(found)), encoding="utf-8")
    print(result.read_text(encoding="utf-8"), flush=True)


def _train(run: Path, steps: int, settings: Sequence[str], options: Any) -> Ran:
    words = ["-m", "trainers", "train", str(options.images), "-o", str(run), "--preset", "pocket", "--steps", str(steps)]
    words += ["--force"]  # rank 64 is not small against pocket's narrowest layers
    words += [word for setting in (*_QUIET, *settings) for word in ("--set", setting)]
    return run_to_end([*words, "--json"], options.out / "home")


def _prior(options: Any) -> Path:
    """The preset's prior pictures with their captions, drawn once for all runs."""
    folder: Path = options.out / "prior"
    if not folder.exists():
        run = options.out / "runs" / "prior"
        _train(run, 1, (), options)
        for number, prompt in enumerate(resolve("pocket", {}).prior.prompts):
            (run / "prior" / f"{number:03}.txt").write_text(prompt, encoding="utf-8")
        (run / "prior").rename(folder)
    return folder


def _measure_pace(entry: Entry, options: Any) -> None:
    """Seconds for each step and the most memory, of a short run with the machine to itself."""
    result = options.out / "pace" / f"{_file_name(entry.name)}.json"
    if result.exists():
        return
    result.parent.mkdir(exist_ok=True)
    run = options.out / "runs" / f"pace-{result.stem}"
    settings = (*entry.at(entry.rates[0]), f"prior.folder={_prior(options)}")
    ran = _train(run, _PACE_STEPS, settings, options)
    paces = [event["seconds_per_step"] for event in ran.events if event["type"] == "step"]
    result.write_text(json.dumps({"seconds_per_step": paces[-1], "peak_bytes": ran.peak_bytes}), encoding="utf-8")


def _draw(lora: Path | None, options: Any) -> list[Image.Image]:
    """The concepts' pictures and then the plain ones, at strength 1 of a LoRA or without any; files stay in OUT."""
    side = recognise_base("pocket", BaseOptions()).resolution
    use = (LoraUse(path=str(lora), unet=1.0, text=1.0),) if lora else ()
    prompts = _prompts(options.images, _concepts(options.truth))
    cells = [Cell(prompt=prompt, seed=SEED, loras=use) for prompt in (*prompts, *_PLAIN)]
    folder = options.out / "pictures"
    folder.mkdir(exist_ok=True)
    request = RenderRequest.model_validate({
        "id": 1, "base": BaseSettings(model="pocket"), "cells": cells, "width": side, "height": side, "guidance": 3.0,
        "folder": str(folder),
    })  # fmt: skip
    drawn: dict[int, Image.Image] = {}

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "picture":
            with Image.open(event["path"]) as image:
                drawn[event["cell"]] = image.convert("RGB")

    answer(request, _warm(), tell, lambda: None)
    return [drawn[number] for number in range(len(cells))]


def _judge(drawn: list[Image.Image], base: list[Image.Image], options: Any) -> tuple[float, float]:
    concepts = _concepts(options.truth)
    truth = describe_all([load_pixels(path) for _, path in concepts])
    mine, before = (describe_all(images[: len(concepts)]) for images in (drawn, base))
    spread = spread_of(before, truth)
    similarity = 1 - set_distance(mine, truth, spread) / set_distance(before, truth, spread)
    return similarity, drift_of(drawn[len(concepts) :], base[len(concepts) :])


@cache
def _warm() -> Warm:
    """The base, loaded once for all entries."""
    return Warm()


def _concepts(truth: Path) -> list[tuple[str, Path]]:
    """(label, file) of the true pictures, evenly spread over them."""
    paths = sorted(truth.glob("*.png"))
    chosen = [paths[round(at)] for at in np.linspace(0, len(paths) - 1, min(_CONCEPTS, len(paths)))]
    return [(path.stem.replace("-", " "), path) for path in chosen]


def _prompts(images: Path, concepts: Sequence[tuple[str, Path]]) -> list[str]:
    trigger = shared_words([example.caption for example in scan_folder(images).examples])
    return [f"{'an' if label[0] in 'aeiou' else 'a'} {label}, {trigger}" for label, _ in concepts]


def _run_of(name: str, rate: float, options: Any) -> Path:
    return Path(options.out, "runs", f"{_file_name(name)}-{rate:g}")


def _file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def read_results(folder: Path) -> list[Measured]:
    """What is done, in the order of the entries; time and memory from the entry's short run, where there is one."""
    order = [entry.name for entry in ENTRIES]
    found = []
    for path in folder.glob("*.json"):
        one = json.loads(path.read_text(encoding="utf-8"))
        pace = folder / "pace" / f"{_file_name(one['name'])}.json"
        found.append(Measured(**one | (json.loads(pace.read_text(encoding="utf-8")) if pace.exists() else {})))
    return sorted(found, key=lambda one: (order.index(one.name), one.rate))


def best_of(results: Sequence[Measured]) -> dict[str, Measured]:
    """Each entry at the rate with the lowest held-out loss, by its name."""
    best: dict[str, Measured] = {}
    for one in results:
        if one.name not in best or one.held_out_loss < best[one.name].held_out_loss:
            best[one.name] = one
    return best


def table(results: Sequence[Measured]) -> str:
    """Each entry at its best rate, as Markdown."""
    tried: dict[str, list[float]] = {}
    for one in results:
        tried.setdefault(one.name, []).append(one.rate)
    lines = [
        "| adapter | rate (of those tried) | held-out loss | similarity | drift | s/step | peak MB | file MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in best_of(results).items():
        rates = ", ".join(f"{rate:g}" for rate in tried[name])
        lines.append(
            f"| {name} | {one.rate:g} ({rates}) | {one.held_out_loss:.4f} | {one.similarity:.3f} | {one.drift:.3f} |"
            f" {one.seconds_per_step:.3f} | {one.peak_bytes / 1e6:.0f} | {one.file_bytes / 1e6:.2f} |"
        )
    return "\n".join(lines)


def sheet(names: Collection[str], options: Any) -> Image.Image:
    """What the base and each of these entries, at its best rate, draws of some concepts and of a plain prompt; one row each."""
    concepts = _concepts(options.truth)
    shown = [*(round(at) for at in np.linspace(0, len(concepts) - 1, _SHOWN)), len(concepts)]
    best = [one for one in best_of(read_results(options.out)).values() if one.name in names]
    files = [next(_run_of(one.name, one.rate, options).glob("*.safetensors")) for one in best]
    rows = [[drawn[number] for number in shown] for drawn in (_draw(file, options) for file in (None, *files))]
    labels = ["the base", *(f"{one.name}, learning rate {one.rate:g}" for one in best)]
    return label_grid(rows, labels, [*(concepts[number][0] for number in shown[:-1]), _PLAIN[0]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
