"""The `impasto` command: the trainer's commands, and `ui` for the window. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainers.cli import cli, run_cli


@cli.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Turn a folder of pictures into a Stable Diffusion LoRA."""
    if context.invoked_subcommand is None:
        ui()


@cli.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 7860,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
    home: Annotated[Path | None, typer.Option(help="Folder for projects and runs.")] = None,
) -> None:
    """Open the window (in a later version; today this says what there is)."""
    typer.echo("The window comes in a later version. What works today, on the command line:")
    typer.echo("  impasto demo                             sample pictures -> LoRA -> a picture of its strength")
    typer.echo("  impasto check  FOLDER                    what a run on your pictures would meet")
    typer.echo("  impasto train  FOLDER --output RUN       train a LoRA; Ctrl-C stops and keeps everything")
    typer.echo("  impasto resume RUN                       go on with a stopped run")
    typer.echo('  impasto generate --lora FILE --prompt "..." --strengths 0,0.5,1 --output strip.png')
    typer.echo("  impasto inspect FILE.safetensors         what is in a LoRA file")
    typer.echo("  impasto presets                          what to start from")


def main() -> None:
    """Entry point of the `impasto` command."""
    sys.exit(run_cli(cli))


if __name__ == "__main__":
    main()
