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
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine; the next free one if it is taken.")] = 7860,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    window: Annotated[bool, typer.Option("--window", help="Open it as a window of its own, in Chrome or Edge.")] = False,
    home: Annotated[Path | None, typer.Option(help="Folder for projects and runs.")] = None,
    listen: Annotated[
        str, typer.Option(help="Address to listen at; another than this machine's wants a password.")
    ] = "127.0.0.1",
    password: Annotated[str | None, typer.Option(help="Password that the window asks for, once.")] = None,
) -> None:
    """Open the window: drop a folder in, watch it learn, take the file home."""
    from app.server import serve
    from trainers.run_folder import home_folder

    serve(home or home_folder(), port, listen, "none" if no_browser else "window" if window else "tab", password)


def main() -> None:
    """Entry point of the `impasto` command."""
    sys.exit(run_cli(cli))


if __name__ == "__main__":
    main()
