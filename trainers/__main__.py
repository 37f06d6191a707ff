"""`python -P -m trainers ...`: the same commands without the window, which starts a prepared run by `resume RUN`."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line; returns the exit code."""
    from trainers.cli import cli, run_cli

    return run_cli(cli)


if __name__ == "__main__":
    sys.exit(main())
