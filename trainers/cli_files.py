"""The `impasto` commands about finished files. Heavy imports stand inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Adapter = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA file (.safetensors).", show_default=False)]
Form = Annotated[
    Literal["kohya", "peft"],
    typer.Option("--to", help="kohya: what every program reads. peft: diffusers' own.", show_default=False),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The .safetensors to write.", show_default=False)]
Dtype = Annotated[Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Number format. Default: the file's own.")]
PlainRank = Annotated[
    int | None,
    typer.Option("--plain-lora", metavar="RANK", min=1, max=4096, help="Make all modules plain LoRA, of this rank at most."),
]
Family = Annotated[
    Literal["sd1", "sd2", "sdxl"] | None, typer.Option(help="The base's family, where the file does not tell it.")
]


def convert(
    file: Adapter, to: Form, output: Output, dtype: Dtype = None, plain_lora: PlainRank = None, family: Family = None
) -> None:
    """Write a LoRA file in another form, number format or kind; the file itself stays as it is."""
    from trainers.tools.convert import convert as convert_file

    done = convert_file(file, output, to, dtype, plain_lora, family, lambda remark: typer.echo(remark, err=True))
    typer.echo(f"{done}: {output}")
