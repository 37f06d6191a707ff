"""The `impasto bench` command. Heavy imports stand inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

_CASES = "pocket, tiny, sd15-256, sd15-512 or sdxl"


def bench(
    case: Annotated[str, typer.Option(help=f"What is measured: {_CASES}.")] = "pocket",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Pictures in one step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Rank of the adapters.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds that count, after two that warm up.")] = 5,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16 or fp16. May be repeated. Default: the case's own.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="rounds, start, preview or growth. May be repeated. Default: all but growth.")
    ] = None,
    growth: Annotated[bool, typer.Option("--growth", help="Also: ranks, batches, forms of adapters, many pictures.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Also full fine-tuning, which needs much memory.")] = False,
) -> None:
    """Measure a training step here, against the usual loop and against what the machine can do."""
    from trainers.bench.bench import PARTS, run_bench
    from trainers.bench.cases import find_case
    from trainers.bench.progress import to_stderr
    from trainers.bench.report import format_report
    from trainers.device import DTYPES
    from trainers.errors import SettingError
    from trainers.files import write_atomically

    chosen = find_case(case)
    parts = [*(part or PARTS), *(["growth"] if growth else [])]
    for option, given, known in (("--part", parts, (*PARTS, "growth")), ("--precision", precision or [], tuple(DTYPES))):
        for name in given:
            if name not in known:
                raise SettingError(f"There is no {name!r}", option, f"One of {', '.join(known)}.")
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise SettingError(f"No file can be written there ({json_file})", "--json", "Name a file in a folder that is there.")
    facts = run_bench(
        chosen, batch=batch, rank=rank, rounds=rounds, precisions=precision or (), full=full, parts=parts, progress=to_stderr()
    )
    typer.echo(format_report(facts))
    if json_file is not None:
        write_atomically(json_file, (json.dumps(facts, indent=1) + "\n").encode())
