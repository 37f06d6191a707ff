"""The `impasto` commands. A contract that other programs use: see README. Heavy imports stand inside the commands."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from trainers.bench.command import bench
from trainers.calibrate_command import calibrate
from trainers.cli_files import base_of_run, convert, merge
from trainers.errors import RunFolderError, TrainingError
from trainers.families.facts import BaseOptions, Prediction

cli = typer.Typer(
    name="impasto",
    help="Turn a folder of pictures into a Stable Diffusion LoRA.",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Images = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES", help="Folder of pictures, with .txt captions beside them if you have any.", show_default=False
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="Base model: pocket, a checkpoint file, a diffusers folder, or a hub id. Default: the preset's, else pocket."
    ),
]
Preset = Annotated[str | None, typer.Option(help="Preset to start from; see `impasto presets`. Default: the base's own.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as adapter.rank=16. May be repeated.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer updates (train.steps).")]
Seed = Annotated[int | None, typer.Option(help="Seed that everything random comes from (train.seed).")]
Trigger = Annotated[str | None, typer.Option(help="Trigger word put in front of every caption (dataset.trigger).")]
Force = Annotated[bool, typer.Option("--force", help="Pass advisory checks; broken input is refused all the same.")]
Vae = Annotated[str, typer.Option(help="A VAE of your own, in place of the base's: a file or a folder.")]
ClipSkip = Annotated[int, typer.Option(min=1, max=12, help="Layer of the text encoder: 1 as the family, 2 one earlier.")]
PredictionType = Annotated[Prediction, typer.Option(help="What the denoiser predicts, where a checkpoint does not say it.")]
ZeroTerminal = Annotated[bool, typer.Option("--zero-terminal-snr", help="Draw from pure noise, as the LoRA was trained.")]
Json = Annotated[bool, typer.Option("--json", help="Print events as JSON lines instead of a progress bar.")]


@cli.command()
def train(
    images: Images,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder to make.", show_default=False)],
    base: Base = None,
    preset: Preset = None,
    steps: Steps = None,
    seed: Seed = None,
    overrides: Overrides = None,
    trigger: Trigger = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and write nothing.")] = False,
    force: Force = False,
    json_lines: Json = False,
) -> None:
    """Train a LoRA on a folder of pictures."""
    from trainers.console import print_plan
    from trainers.files import write_atomically
    from trainers.launch import execute, follow, given_settings, plan_run
    from trainers.run_folder import absolute, await_run, follows, new_run

    if follows() and not dry_run:  # the first process resolves, checks and looks through the pictures for all
        raise typer.Exit(follow(await_run(output)))
    values = given_settings(images, base, steps, seed, trigger)
    plan = plan_run(preset, values, overrides or [], force)
    if dry_run:
        print_plan(plan)
        return
    if absolute(output) == absolute(images):
        raise RunFolderError("The run folder would be the folder of pictures", str(output), "Choose another --output.")
    run = new_run(output)
    with run.lock():
        new_run(output)  # another process may have begun one before the lock was ours
        write_atomically(run.config, plan.toml().encode())
        if not json_lines:
            print_plan(plan, problems=False)
        raise typer.Exit(execute(run, json_lines))


@cli.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of an earlier `train`.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Go on although base, pictures, captions or settings have changed.")
    ] = False,
    json_lines: Json = False,
) -> None:
    """Go on with a run that was stopped, paused or killed."""
    from trainers.launch import execute, follow, last_words
    from trainers.run_folder import follows, open_run

    run = open_run(run_folder)
    finished = last_words(run)
    if finished:
        typer.echo(json.dumps(finished) if json_lines else f"This run is finished: {run.result}")
        return
    if follows():
        raise typer.Exit(follow(run))
    with run.lock():
        raise typer.Exit(execute(run, json_lines, force=force))


@cli.command()
def generate(
    output: Annotated[
        str,  # not a Path, which forgets the slash at the end
        typer.Option("--output", "-o", metavar="PATH", help="FILE.png: one picture or a labelled grid. FOLDER/: one PNG each."),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw. May be repeated.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: pocket, a checkpoint file, a diffusers folder, or a hub id. Default: that of the run in which"
            " the first LoRA lies, read as the run reads it; else pocket."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA file, with its strength after a colon. May be repeated.")
    ] = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="An embedding file. Default: the one trained with a LoRA. May be repeated.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show.")] = "",
    strengths: Annotated[str, typer.Option(help="Strengths to draw, comma-separated; multiplies each LoRA's own.")] = "1",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=200, help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, max=30, help="How hard the prompt is followed.")] = 5.0,
    scheduler: Annotated[str, typer.Option(help="Sampler: dpm++, dpm++-karras, ddim, euler, euler-a, unipc.")] = "dpm++",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the base's own.")] = None,
    vae: Vae = "",
    clip_skip: ClipSkip = 1,
    prediction_type: PredictionType = "auto",
    zero_terminal_snr: ZeroTerminal = False,
) -> None:
    """Draw prompts, at one or several strengths of any number of LoRAs."""
    from trainers.draw import DrawRequest, draw, find_embeddings, parse_lora, parse_size, parse_strengths
    from trainers.run_folder import absolute

    path = absolute(Path(output))
    loras = tuple(parse_lora(text) for text in lora or [])
    options = BaseOptions(vae, clip_skip, prediction_type, zero_terminal_snr)
    if base is None:
        base, options = base_of_run(next(iter([path for path, _ in loras] + (embedding or [])), None), options)
    request = DrawRequest(
        base=base,
        loras=loras,
        prompts=tuple(prompt),
        strengths=parse_strengths(strengths),
        output=path,
        as_folder=output.endswith(("/", "\\")) or path.is_dir() or not path.suffix,
        negative=negative,
        seed=seed,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        size=parse_size(size) if size else None,
        options=options,
        embeddings=find_embeddings(embedding or (), [path for path, _ in loras]),
    )
    for drawn in draw(request):
        typer.echo(drawn)


@cli.command()
def check(
    images: Images,
    base: Base = None,
    preset: Preset = None,
    steps: Steps = None,
    seed: Seed = None,
    overrides: Overrides = None,
    trigger: Trigger = None,
    measure: Annotated[bool, typer.Option(help="Also run two real steps to measure time and memory.")] = True,
) -> None:
    """Say what a run would meet: problems by file, buckets, steps, memory, time. Writes nothing."""
    from trainers.console import print_plan
    from trainers.dataset.prepare import scan_images
    from trainers.launch import given_settings, plan_run
    from trainers.preflight import describe
    from trainers.preflight import measure as measure_run

    look = partial(scan_images, thorough=True)
    plan = plan_run(preset, given_settings(images, base, steps, seed, trigger), overrides or [], force=True, look=look)
    print_plan(plan)
    if measure:
        typer.echo("\n".join(describe(plan.config, plan.data.steps, measure_run(plan.config))))


@cli.command()
def doctor(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder that the report is about.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The zip to write.")] = Path("impasto-report.zip"),
) -> None:
    """Write a report to attach to a question: versions, settings, events, log; paths shortened, no picture."""
    from trainers.doctor import make_report
    from trainers.files import write_atomically
    from trainers.run_folder import open_run

    if output.exists():
        raise RunFolderError("There is such a file already", str(output), "Choose another --output.")
    write_atomically(output, make_report(open_run(run_folder) if run_folder else None))
    typer.echo(f"{output} ({output.stat().st_size} bytes). Look through it before you send it.")


@cli.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA file (.safetensors).", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Load it in diffusers and here, and compare with what was trained.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base model for --verify. Default: that of the run the file lies in.")
    ] = None,
    vae: Vae = "",
    clip_skip: ClipSkip = 1,
    prediction_type: PredictionType = "auto",
    zero_terminal_snr: ZeroTerminal = False,
    modules: Annotated[bool, typer.Option("--modules", help="Name every module, not only the three strongest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, with every module.")] = False,
) -> None:
    """Tell what is in a LoRA file: family, type, modules, rank and how much of it is used, norms, metadata, problems."""
    from trainers.tools import inspect_file as tool

    inspection = tool.inspect_file(file)
    typer.echo(json.dumps(tool.as_json(inspection), indent=1) if as_json else tool.describe(inspection, modules))
    wrong = any(problem.severity == "error" for problem in inspection.problems)
    if verify:
        from trainers.tools.verify_file import verify_file
        from trainers.verify import describe as describe_proof

        proof = verify_file(file, base, BaseOptions(vae, clip_skip, prediction_type, zero_terminal_snr))
        typer.echo("\n".join(describe_proof(proof)), err=as_json)
        wrong = wrong or not proof.ok
    if wrong:
        raise typer.Exit(1)


cli.command()(convert)
cli.command()(merge)
cli.command()(calibrate)
cli.command()(bench)


@cli.command()
def presets(name: Annotated[str | None, typer.Argument(help="Show this preset.", show_default=False)] = None) -> None:
    """List the presets, or show one."""
    from trainers.presets import list_presets, preset_summary, preset_text

    if name:
        typer.echo(preset_text(name).rstrip())
        return
    for preset in list_presets():
        typer.echo(f"{preset:18} {preset_summary(preset)[0].removeprefix('For whom: ')}")


@cli.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run and the picture.")] = Path("demo"),
) -> None:
    """The whole journey on what ships: sample pictures -> LoRA -> a picture of what its strength does."""
    from trainers.demo import run_demo

    raise typer.Exit(run_demo(output))


def run_cli(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Runs a typer app and returns the exit code: 0 done, 1 failed, 2 wrong use, 3 stopped with everything saved."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a file name may hold what this terminal cannot show
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="impasto")
        return 0
    except SystemExit as end:  # typer's own way out: wrong options have been shown, with exit code 2
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code != 130:
            return code
        typer.secho("impasto: interrupted; nothing is lost.", err=True)  # before training began; there it ends the step
        return 1
    except TrainingError as error:
        typer.secho(f"impasto: {error}", err=True, fg="red")
        return error.exit_code
    except OSError as error:
        typer.secho(f"impasto: {error.strerror or error} ({error.filename or 'no file named'}).", err=True, fg="red")
        return 1
