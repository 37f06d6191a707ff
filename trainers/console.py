"""What a person sees in the terminal: the plan of a run, its progress with the time left, or JSON lines for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from trainers import events
from trainers.adapters.lora import LoraSettings
from trainers.events import Event
from trainers.layers import planned_layers, ranks_in_words
from trainers.run_folder import RunFolder

if TYPE_CHECKING:
    from trainers.launch import RunPlan

Show = Callable[[Event], None]


@contextmanager
def make_display(run: RunFolder, json_lines: bool, title: str = "") -> Iterator[Show]:
    """How events are shown while a run goes on: JSON lines, a progress bar, or plain lines where there is no terminal."""
    if json_lines:
        yield lambda event: print(event.to_json(), flush=True)
        return
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        yield PlainLines(run, console).show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.fields[text]}"))
    with Progress(*columns, console=console, transient=False) as progress:
        yield Bar(run, progress, title or "training").show


class PlainLines:
    """About one line every five seconds, for logs and terminals without a cursor."""

    def __init__(self, run: RunFolder, console: Console) -> None:
        self._run, self._console, self._last = run, console, 0.0

    def show(self, event: Event) -> None:
        """Prints what is worth a line."""
        if isinstance(event, events.Step):
            ends = event.step == event.steps
            if event.time - self._last >= 5 or event.held_out_loss is not None or ends:
                self._last = event.time
                self._console.print(f"step {event.step}/{event.steps}  {_progress(event)}", soft_wrap=True)
            return
        text = in_words(event, self._run)
        if text:
            self._console.print(text, soft_wrap=True, markup=False)


class Bar:
    """A progress bar with loss and time left; what else happens scrolls by above it."""

    def __init__(self, run: RunFolder, progress: Progress, title: str) -> None:
        self._run, self._progress, self._title = run, progress, title
        self._task = progress.add_task("starting", total=None, text="")
        self._held_out = ""

    def show(self, event: Event) -> None:
        """Moves the bar or prints a line."""
        if isinstance(event, events.Step):
            if event.held_out_loss is not None:
                self._held_out = f"  held-out {event.held_out_loss:.4f}"
            text = _progress(event) + ("" if event.held_out_loss is not None else self._held_out)
            self._progress.update(self._task, description=self._title, completed=event.step, total=event.steps, text=text)
        elif isinstance(event, events.Stage):
            total = event.total or None
            self._progress.update(self._task, description=event.name, completed=event.done, total=total, text=event.detail)
        else:
            text = in_words(event, self._run)
            if text:
                self._progress.console.print(text, soft_wrap=True, markup=False)


def _progress(event: events.Step) -> str:
    held = f"  held-out {event.held_out_loss:.4f}" if event.held_out_loss is not None else ""
    return f"loss {event.loss:.4f}{held}  {event.seconds_per_step:.2f} s/step  {time_in_words(event.seconds_left)} left"


def in_words(event: Event, run: RunFolder) -> str:
    """One line about an event, or nothing where it is not worth one."""
    match event:
        case events.Started():
            learnt = f"{event.images} pictures" + (f", {event.held_out} kept aside" if event.held_out else "")
            learnt += f", {event.prior} that keep it from forgetting" if event.prior else ""
            return f"{learnt}, {event.parameters / 1e6:.2f} M trainable numbers, {event.device}"
        case events.Stage(name="train"):
            return f"training from step {event.done} to {event.total}" if event.done else ""
        case events.Stage():
            counted = f" {event.done}/{event.total}" if event.total else ""
            return f"{event.name}{counted}" + (f": {event.detail}" if event.detail else "")
        case events.Sample():
            return f"sample {run.path / event.path}"
        case events.Checkpoint():
            return f"checkpoint {run.path / event.path}"
        case events.Warned():
            return f"note: {event.message}"
        case events.Stopped() | events.Paused():
            return f"stopped at step {event.step}, everything is saved. Go on with: impasto resume {_quoted(run)}"
        case events.Finished():
            share = samples_share(event.seconds, event.sample_seconds)
            done = f"done in {time_in_words(event.seconds)}{share and f' ({share})'}: {run.path / event.path}"
            return "\n".join(filter(None, (done, event.ranks, event.proof)))
        case events.Failed():
            return f"failed: {event.message}"
    return ""


def _quoted(run: RunFolder) -> str:
    text = str(run.path)
    return f'"{text}"' if " " in text else text


def samples_share(seconds: float, sample_seconds: float) -> str:
    """ "samples took 12 % of the time", or nothing where it was under half a percent."""
    share = round(100 * sample_seconds / seconds) if seconds > 0 else 0
    return f"samples took {min(share, 100)} % of the time" if share else ""


def time_in_words(seconds: float) -> str:
    """3 s, 2 min 05 s, 1 h 20 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_plan(plan: RunPlan, problems: bool = True) -> None:
    """Everything `check` and `--dry-run` can say without weights; `train` leaves the problems to its events."""
    console = Console(highlight=False, emoji=False)
    config = plan.config

    def line(name: str, text: str) -> None:
        console.print(f"{name:12}{text}", soft_wrap=True, markup=False)

    line("base", f"{plan.base.name} ({plan.base.family.title}, {plan.base.prediction_type}), preset {plan.preset}")
    line("pictures", f"{len(plan.data.own)} to train on, {len(plan.data.held_out)} kept aside for the held-out loss")
    line("buckets", ", ".join(f"{w}x{h}: {n}" for (h, w), n in plan.data.bucket_counts().items()))
    line("steps", plan.arithmetic)
    adapter = config.adapter
    scale = adapter.scale_of(adapter.effective_alpha, adapter.rank)
    first = f"{adapter.grow_from} to " if isinstance(adapter, LoraSettings) and adapter.rank_schedule == "grow" else ""
    layers = f"rank {first}{adapter.rank}, effective scale {scale:g}, on {', '.join(adapter.targets)}"
    line("adapter", f"{adapter.type}, {layers if adapter.changes_layers else 'without a LoRA'}")
    if adapter.changes_layers:
        line("layers", ranks_in_words(planned_layers(config, plan.base)))
    if adapter.trigger_vectors:
        rate = f"rate {config.rate_of('vectors'):g}"
        line("trigger", f"{config.dataset.trigger}, {adapter.trigger_vectors} vectors in each text encoder, {rate}")
    if config.text_encoder_rate:
        text_scale = adapter.scale_of(config.text_encoder_alpha, config.text_encoder_rank)
        line("text", f"rank {config.text_encoder_rank}, effective scale {text_scale:g}, rate {config.text_encoder_rate:g}")
    else:
        line("text", "the text encoder stays as it is")
    line("optimizer", f"{config.optimizer.type}, rate {config.optimizer.learning_rate:g}, {config.schedule.type}")
    for problem in plan.problems if problems else ():
        where = f"{problem.where}: " if problem.where else ""
        line(problem.severity, f"{where}{problem.what}." + (f" {problem.hint}" if problem.hint else ""))
