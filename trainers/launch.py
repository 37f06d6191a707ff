"""From a typed command to a running process: resolve the settings, check them, run, and turn every ending into an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import events
from trainers.checks import check_pictures, check_settings, count_steps, refuse
from trainers.config import TrainConfig, build_config, parse_override, write_config
from trainers.console import make_display
from trainers.dataset.folder import Scan
from trainers.dataset.pictures import Picture
from trainers.dataset.prepare import TrainingSet, planned_prior, prepare, render_side, scan_images
from trainers.endings import in_words, stop_signals
from trainers.errors import ChangedError, DivergedError, LostProcessError, Problem, SettingError, TrainingError
from trainers.families import BaseModelFacts, recognise_base
from trainers.files import sweep_aside, write_atomically
from trainers.formats.metadata import source_date
from trainers.peers import Peers
from trainers.presets import default_preset, resolve
from trainers.process_id import place
from trainers.run_folder import RunFolder, absolute
from trainers.settings import merge
from trainers.start_from import check_start

DONE, FAILED, STOPPED = 0, 1, 3
_RESERVE = 64 * 1024  # bytes


@dataclass(frozen=True)
class RunPlan:
    """What a run would be, known before any weight is read."""

    config: TrainConfig
    preset: str
    base: BaseModelFacts
    data: TrainingSet
    problems: tuple[Problem, ...]

    @property
    def arithmetic(self) -> str:
        """Pictures x repeats x epochs / batch = steps."""
        return count_steps(self.config, self.data)

    def toml(self) -> str:
        """config.toml of the run: complete and resolved, itself a valid preset."""
        return write_config(self.config)


def given_settings(images: Path, base: str | None, steps: int | None, seed: int | None, trigger: str | None) -> dict[str, Any]:
    """The settings that have options of their own, as nested values; unset ones left out."""
    values: dict[str, Any] = {"base": {}, "dataset": {"images": str(absolute(images))}, "train": {}}
    if base is not None:
        values["base"]["model"] = base
    if steps is not None:
        values["train"]["steps"] = steps
    if seed is not None:
        values["train"]["seed"] = seed
    if trigger is not None:
        values["dataset"]["trigger"] = trigger
    return values


def plan_run(
    preset: str | None,
    given: dict[str, Any],
    overrides: Sequence[str],
    force: bool,
    look: Callable[[TrainConfig], Scan] = scan_images,
    read: Callable[[Path], Picture] | None = None,
) -> RunPlan:
    """Resolves and checks everything that can be known without weights, in the order of what is cheapest to find out.

    `look` scans the pictures; the window has its own, which does not decode a picture again; and its own
    `read` of the prior folder's. Raises TrainingError for the first thing that may not pass.
    """
    source_date()  # wrong, it would end the run only when its file is written
    own: dict[str, Any] = given
    for text in overrides:
        own = merge(own, parse_override(text))
    # Without a preset the base says which one; else preset, option and --set say which base, the last one first.
    name = preset or default_preset(recognise_given(own["base"]))
    config = _with_absolute_paths(resolve(name, given, overrides))
    base = recognise_base(config.base.model, config.base.options)
    problems = check_settings(config, base) + check_start(config, base)
    refuse(problems, force)
    scan = look(config)
    prior = planned_prior(config, Path("prior"), render_side(config, base), read)
    data = prepare(config, base, scan.examples, prior)
    problems += check_pictures(config, base, scan, data)
    refuse(problems, force)
    plan = RunPlan(config, name, base, data, tuple(problems))
    try:
        plan.toml().encode()
    except UnicodeEncodeError as error:
        hint = "Rename the folder, or the setting that holds it."
        raise SettingError("A name is not valid text, so it cannot be written into config.toml", "", hint) from error
    return plan


def recognise_given(values: Mapping[str, Any]) -> BaseModelFacts:
    """The base that a recipe's settings under `base` name, else pocket. Raises TrainingError."""
    base = build_config({"base": dict(values)}).base
    return recognise_base(base.model, base.options)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Base and VAE, where they lie here, edits and the LoRA to start from as absolute paths, for any working folder."""
    changes = {}
    path = absolute(Path(config.base.model))
    if config.base.model != "pocket" and path.exists():
        changes["model"] = str(path)
    if config.base.vae:
        changes["vae"] = str(absolute(Path(config.base.vae)))
    config = config.model_copy(update={"base": config.base.model_copy(update=changes)})
    if config.dataset.edits:
        edits = str(absolute(Path(config.dataset.edits)))
        config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"edits": edits})})
    if config.prior.folder:
        prior = str(absolute(Path(config.prior.folder)))
        config = config.model_copy(update={"prior": config.prior.model_copy(update={"folder": prior})})
    if config.adapter.start_from:
        start = str(absolute(Path(config.adapter.start_from)))
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"start_from": start})})
    return config


def last_words(run: RunFolder) -> dict[str, Any] | None:
    """The event `finished` of a run that has its LoRA or embedding, else None."""
    told, _ = events.read_since(run.events)
    return next((event for event in told if event["type"] == "finished" and (run.result or run.embedding)), None)


def execute(run: RunFolder, json_lines: bool = False, title: str = "", force: bool = False) -> int:
    """Trains in this process, writing events.jsonl and trainer.log. The one place that turns an error into `failed`."""
    with _logged(run), make_display(run, json_lines, title) as show, stop_signals() as stop:
        told = _Told()
        shown = [show]

        def emit(event: events.Event) -> None:
            if told.is_new(event.type, vars(event)):
                events.append(run.events, event)
            logging.getLogger("impasto").info(event.to_json())
            try:
                shown[0](event)
            except OSError:  # whoever looked on has gone; the files go on telling
                shown[0] = lambda _: None

        def fail(message: str, changed: bool = False) -> None:
            run.reserve.unlink(missing_ok=True)  # room for these words
            event = events.Failed(message=message, changed=changed)
            try:
                events.continue_file(run.events)  # a line that did not fit is cut off
                emit(event)
            except OSError:  # no room all the same: whoever looks on is told, and the log
                shown[0](event)

        try:
            sweep_aside(run.path)
            for event in events.continue_file(run.events):
                told.is_new(event["type"], event)
            write_atomically(run.reserve, bytes(_RESERVE), fsync=False)
            from trainers.train import train

            with Peers(run.path, *place(), fail).watching(stop.is_set):
                done = train(run, emit, stop.is_set, force)
            run.reserve.unlink(missing_ok=True)
            return DONE if done else STOPPED
        except TrainingError as error:
            fail(str(error), isinstance(error, ChangedError))
        except KeyboardInterrupt:
            if run.take_flag("stop"):  # while the base drew prior pictures, which stay
                emit(events.Paused(step=0))
                return STOPPED
            fail("Interrupted at once. `impasto resume` goes on from what is saved.")
        except Exception as error:
            run.reserve.unlink(missing_ok=True)
            logging.getLogger("impasto").exception("unexpected error")
            fail(in_words(error, run))
        return FAILED


class _Told:
    """What a run's events have told already: steps after the last training state are done again, alike, and told once."""

    def __init__(self) -> None:
        self._step = 0
        self._paths: set[tuple[str, str]] = set()
        self._attempts = 0

    def is_new(self, kind: str, values: Mapping[str, Any]) -> bool:
        """Whether an event says something new; from then on it does not."""
        if kind == "step":
            new = bool(values["step"] > self._step)
            self._step = max(self._step, values["step"])
            return new
        if kind == "recovered":  # what follows differs from what was told
            new = bool(values["attempt"] > self._attempts)
            if new:
                self._attempts, self._step = values["attempt"], values["step"]
                self._paths.clear()
            return new
        if kind not in ("sample", "checkpoint"):
            return True
        new = (kind, values["path"]) not in self._paths
        self._paths.add((kind, values["path"]))
        return new


def follow(run: RunFolder) -> int:
    """The part of every process but the first of several: computes its share and writes nothing, but why it failed.

    Raises what ended it, where that is not a stop.
    """
    from trainers.train import train

    def end(message: str) -> None:
        print(f"impasto: {message}", file=sys.stderr, flush=True)

    peers = Peers(run.path, *place(), end)
    with stop_signals() as stop, peers.watching(stop.is_set):
        try:
            done = train(run, lambda event: None, stop.is_set)
        except LostProcessError:
            raise
        except DivergedError:  # of the sum over all processes, so the first one tells it
            peers.await_first()
            raise
        except Exception as error:
            peers.fail(in_words(error, run, "what that process has printed"))
            raise
        if not done:
            peers.await_first()
        return DONE if done else STOPPED


class _LogFile(logging.FileHandler):
    """A log that cannot be written is no reason to end anything, nor to print about it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Does nothing."""


@contextmanager
def _logged(run: RunFolder) -> Iterator[None]:
    """Everything logged or warned goes into trainer.log, for the curious and for bug reports."""
    handler = _LogFile(run.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("impasto")
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
