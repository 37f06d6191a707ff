"""The `impasto` commands about finished files. Heavy imports stand inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainers.adapters.plan import Strengths
from trainers.families.facts import BaseOptions

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


def base_of_run(file: Path | None, options: BaseOptions) -> tuple[str, BaseOptions]:
    """(base, how it is read) of the run in which a LoRA file lies, unless `options` say how; else pocket."""
    from trainers.config import read_config
    from trainers.run_folder import run_of

    run = run_of(file) if file else None
    if run is None:
        return "pocket", options
    base = read_config(run.config).base
    typer.echo(f"Base: {base.model}, on which this LoRA was trained.", err=True)
    return base.model, base.options if options == BaseOptions() else options


def convert(
    file: Adapter, to: Form, output: Output, dtype: Dtype = None, plain_lora: PlainRank = None, family: Family = None
) -> None:
    """Write a LoRA file in another form, number format or kind; the file itself stays as it is."""
    from trainers.tools.convert import convert as convert_file

    done = convert_file(file, output, to, dtype, plain_lora, family, lambda remark: typer.echo(remark, err=True))
    typer.echo(f"{done}: {output}")


def _blended(blend: str) -> list[tuple[Path, Strengths]]:
    """The LoRAs of a blend, given by its name or as a file. Raises SettingError."""
    from trainers.blend import blend_file, read_blend
    from trainers.run_folder import home_folder

    if not blend:
        return []
    home = home_folder()
    file = Path(blend) if blend.endswith(".toml") else blend_file(home, blend)
    return [(Path(lora.path), lora.strengths) for lora in read_blend(file, home).loras]


def merge(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="OUT.safetensors; with --base also a folder to make.", show_default=False)
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE[:STRENGTH]]...", help="LoRA files, each with its strength.", show_default=False),
    ] = None,
    blend: Annotated[
        str, typer.Option(help="A blend saved in the window, by its name, or a blend's .toml.", show_default=False)
    ] = "",
    base: Annotated[
        str | None,
        typer.Option(help="Put them into this base model. Without any FILE it only changes its layout.", show_default=False),
    ] = None,
    vae: Annotated[str, typer.Option(help="With --base: a VAE to write in place of the base's.")] = "",
    prediction_type: Annotated[
        Literal["auto", "epsilon", "v_prediction"], typer.Option(help="With --base: where a checkpoint does not say it.")
    ] = "auto",
    rank: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Cut each module to this rank. Default: ranks add up, exactly.")
    ] = None,
    dtype: Dtype = None,
    to: Annotated[Literal["kohya", "peft"], typer.Option(help="Form of a merged LoRA.")] = "kohya",
    family: Family = None,
) -> None:
    """Merge LoRA files, each at its strength, into one file; or, with --base, into a base model.

    One file alone is baked, or one blend: its strengths become 1. With --base, OUT.safetensors is a single file as other
    programs read it, and any other name a folder in diffusers layout.
    """
    from trainers.draw import parse_lora
    from trainers.errors import SettingError
    from trainers.families import BaseOptions, recognise_base
    from trainers.tools.merge import merge_adapters
    from trainers.tools.merge_base import merge_into_base

    def tell(remark: str) -> None:
        typer.echo(remark, err=True)

    inputs: list[tuple[Path, float | Strengths]] = [*map(parse_lora, files or []), *_blended(blend)]
    if base is None:
        if not inputs or vae or prediction_type != "auto":
            raise SettingError(
                "There is nothing to merge" if not inputs else "A VAE is a base's", hint="Give FILEs, or --base."
            )
        typer.echo(f"{merge_adapters(inputs, output, rank, dtype, to, family, tell)}: {output}")
        return
    if rank is not None or to != "kohya" or family is not None:
        raise SettingError("--rank, --to and --family are for a merged LoRA, not for a base", hint="Leave them out, or --base.")
    facts = recognise_base(base, BaseOptions(vae, prediction_type=prediction_type))
    if facts.guessed:
        tell(facts.guessed.replace("base.prediction_type=", "--prediction-type "))
    typer.echo(f"{merge_into_base(inputs, facts, output, dtype, tell)}: {output}")
