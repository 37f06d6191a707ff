"""`impasto demo`: the whole journey on what ships. Sample pictures -> LoRA -> a picture of what its strength does."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from trainers.console import time_in_words
from trainers.draw import DrawRequest, draw
from trainers.families import ASSETS
from trainers.files import write_atomically
from trainers.launch import execute, given_settings, last_words, plan_run
from trainers.run_folder import RunFolder, new_run, open_run

# None of these is in the sample folder.
PROMPTS = (
    "a red heart, blackcut style",
    "a wolf, blackcut style",
    "a light bulb, blackcut style",
    "a trophy, blackcut style",
)
STRENGTHS = (0.0, 0.5, 1.0, 1.5)


def run_demo(output: Path) -> int:
    """Trains on the blackcut sample with the pocket base into `output`, draws the strength strip; returns the exit code.

    An unfinished demo is gone on with; a finished one stays, and the next gets a number.
    """
    begun = time.monotonic()
    run, fresh = _next_run(output)
    typer.echo(f"{'training on' if fresh else 'going on with'} the blackcut sample, 24 pictures, into {run.path}")
    with run.lock():
        if fresh:
            samples = [f"samples.prompts={list(PROMPTS[:2])!r}".replace("'", '"')]
            plan = plan_run(
                "pocket", given_settings(ASSETS / "samples" / "blackcut", "pocket", None, None, None), samples, False
            )
            typer.echo(plan.arithmetic)
            write_atomically(run.config, plan.toml().encode())
        code = 0 if last_words(run) else execute(run, title="training")
    if code or not run.result:
        return code
    strip = run.path / "strip.png"
    typer.echo(f"drawing {len(PROMPTS)} prompts that were not among the pictures, at strengths {STRENGTHS}")
    request = DrawRequest("pocket", ((run.result, 1.0),), PROMPTS, STRENGTHS, strip, as_folder=False, guidance=3.0)
    draw(request, lambda done, total: typer.echo(f"  picture {done} of {total}") if done % 4 == 0 else None)
    typer.echo(f"the LoRA:            {run.result}")
    typer.echo(f"what its strength does: {strip}")
    typer.echo(f"all in {time_in_words(time.monotonic() - begun)}. Your own pictures: impasto train FOLDER --output RUN")
    return 0


def _next_run(output: Path) -> tuple[RunFolder, bool]:
    """The demo's run folder, and whether it is a new one."""
    number = 1
    while True:
        path = output / ("blackcut" if number == 1 else f"blackcut-{number}")
        if not (path / "config.toml").exists():
            return new_run(path), True
        run = open_run(path)
        if not (run.path / "strip.png").exists():
            return run, False
        number += 1
