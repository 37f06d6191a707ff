"""The `impasto` command: the trainer's commands, and `ui` for the window. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainers.cli import cli, run_cli

Port = Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine; the next free one if it is taken.")]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Only print the address.")]
Window = Annotated[bool, typer.Option("--window", help="Open it as a window of its own, in Chrome or Edge.")]
Home = Annotated[Path | None, typer.Option(help="Folder for projects and runs.")]
Listen = Annotated[str, typer.Option(help="Address to listen at; another than this machine's wants a password.")]
Password = Annotated[str | None, typer.Option(help="Password that the window asks for, once.")]


@cli.callback(invoke_without_command=True)
@cli.command("ui", help="Open the window: drop a folder in, watch it learn, take the file home.")
def open_window(
    context: typer.Context,
    port: Port = 7860,
    no_browser: NoBrowser = False,
    window: Window = False,
    home: Home = None,
    listen: Listen = "127.0.0.1",
    password: Password = None,
) -> None:
    """Turn a folder of pictures into a Stable Diffusion LoRA. Without a command: open the window."""
    if context.invoked_subcommand is not None:
        return
    from app.server import serve
    from trainers.run_folder import home_folder

    serve(home or home_folder(), port, listen, "none" if no_browser else "window" if window else "tab", password)


def main() -> None:
    """Entry point of the `impasto` command."""
    sys.exit(run_cli(cli))


if __name__ == "__main__":
    main()
