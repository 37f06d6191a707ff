"""What a run leaves behind while it goes on: events, sample images, checkpoints, and the LoRA at the end."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch

from trainers import events
from trainers.adapters.inject import TRAINED
from trainers.background import in_background
from trainers.dataset.prepare import render_side
from trainers.errors import AdapterFileError, BaseModelError
from trainers.export import Exported, describe_run, export_adapter, file_name, trained_modules
from trainers.families import BaseModelFacts, weight_files
from trainers.files import write_atomically
from trainers.formats.hashes import base_file_hashes
from trainers.generate import Picture, RenderSettings, render
from trainers.memory import memory_used, parts_in_words
from trainers.process_id import made_at
from trainers.run_folder import RunFolder
from trainers.setup import Training
from trainers.verify import verify, write_proof

BATCH_PIXELS = 4 * 512 * 512
"""Samples of at most so many pixels are drawn at once: as much memory as a single one of SDXL takes."""


class Outputs:
    """Writes into one run folder for one `Training`; silent in all processes but the first."""

    def __init__(self, run: RunFolder, training: Training, emit: events.Emit, started_at: float) -> None:
        self._run, self._training, self._started_at = run, training, started_at
        self._emit: events.Emit = emit if training.device.is_main else (lambda _: None)
        self._name = file_name(training.config, training.model.facts)
        own = tuple(dict.fromkeys(prepared.example.caption for prepared in training.data.own))
        self._prompts = training.config.samples.prompts or own[:2]
        self.sample_seconds = 0.0
        """Seconds that the last samples took."""
        self._exported_at = -1
        self._base_hashes: Future[tuple[str, str]] | None = None
        """Of the base's file, begun after the first step: before, it would take a core from it, and a step waits for both."""

    def start(self) -> None:
        """A process has taken the run up, at its first step or where it was left."""
        training = self._training
        numbers = training.flat.weights.numel()
        self._emit(
            events.Started(
                step=training.step,
                steps=training.data.steps,
                images=len(training.data.own),
                prior=len(training.data.training) - len(training.data.own),
                held_out=len(training.data.held_out),
                parameters=numbers,
                device="; ".join(filter(None, (training.device.reason, training.device.sent_per_step(numbers)))),
                process=os.getpid(),
                made=made_at(os.getpid()) or 0.0,
            )
        )

    def begin_training(self) -> None:
        """All is prepared: the steps follow."""
        training, held = self._training, parts_in_words(self._training)
        self._emit(events.Stage(name="train", detail=held, done=training.step, total=training.data.steps))

    def tell_recovery(self, what: str, broke: int) -> None:
        """The run went back to where it stands now, as the batch after `broke` steps gave no finite number."""
        training, recovery = self._training, self._training.recovery
        self._exported_at = -1
        times = f"{recovery.attempts} of {training.config.train.recoveries} times"
        message = f"{what} at step {broke + 1}: back to step {training.step}, at {recovery.rate:g} of the rate ({times})."
        self._emit(
            events.Recovered(step=training.step, broke=broke, attempt=recovery.attempts, rate=recovery.rate, message=message)
        )

    def tell(self, loss: float, norm: float, factor: float, held_out: float | None) -> None:
        """The event of the step just done."""
        training = self._training
        if training.device.is_main:
            training.check_manifest()  # of a new run: by its first step all is hashed
        pace = training.median
        left = training.data.steps - training.step
        every = training.config.samples.every
        samples_left = left // every if every else 1
        to_encode = training.batches.seconds_to_encode(left * training.config.examples_per_step)
        self._emit(
            events.Step(
                step=training.step,
                steps=training.data.steps,
                loss=loss,
                held_out_loss=held_out,
                learning_rates={group: training.config.rate_of(group) * factor for group in training.flat.groups},
                gradient_norm=norm,
                seconds_per_step=pace,
                seconds_left=left * pace + samples_left * self.sample_seconds + to_encode,
                memory=memory_used(training.device.device),
            )
        )
        if training.device.is_main:
            self._hash_base()

    def _hash_base(self) -> Future[tuple[str, str]]:
        """The hashes of the base's file, of which galleries know it; begun at the first call, beside what goes on."""
        if self._base_hashes is None:
            base = self._training.model.facts
            self._base_hashes = in_background({"base": lambda: _hashes_of(base)})["base"]
        return self._base_hashes

    def sample(self) -> None:
        """Draws the sample prompts, some in a batch, which the settings alone decide: the same again after a resume."""
        training, settings = self._training, self._training.config.samples
        if not training.device.is_main:
            return
        begun = time.monotonic()
        side = render_side(training.config, training.model.facts)
        how = RenderSettings(side, side, settings.steps, settings.guidance, settings.negative, settings.scheduler)
        pictures = [Picture(prompt, settings.seed, {TRAINED: settings.strength}) for prompt in self._prompts]
        at_once = max(1, BATCH_PIXELS // (side * side))
        for first in range(0, len(pictures), at_once):
            batch, tick = pictures[first : first + at_once], time.monotonic()
            with exported_weights(training):
                images = render(training.model, batch, how)
            for number, (picture, image) in enumerate(zip(batch, images, strict=True), first):
                path = self._sample_path(number)
                data = io.BytesIO()
                image.save(data, "PNG")
                write_atomically(path, data.getvalue())
                self._emit(
                    events.Sample(
                        step=training.step,
                        path=path.relative_to(self._run.path).as_posix(),
                        prompt=picture.prompt,
                        seed=settings.seed,
                        strength=settings.strength,
                        seconds=(time.monotonic() - tick) / len(batch),
                    )
                )
        self.sample_seconds = time.monotonic() - begun

    def sample_is_due(self) -> bool:
        """Whether this step's samples are asked for: every so many steps, and at the end."""
        every, step = self._training.config.samples.every, self._training.step
        return every > 0 and (step % every == 0 or step == self._training.data.steps)

    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint of this step is asked for."""
        every, step = self._training.config.checkpoints.every, self._training.step
        return every > 0 and step > 0 and step % every == 0

    def make_up(self) -> None:
        """What this step should have left and did not: the samples of step 0, or what a kill after its state has prevented.

        A file whose event is missing is made again, too: the kill came between the two.
        """
        told = {event.get("path") for event in events.read_since(self._run.events)[0]}

        def is_left(path: Path) -> bool:
            return path.exists() and path.relative_to(self._run.path).as_posix() in told

        if self.sample_is_due() and not all(is_left(self._sample_path(number)) for number in range(len(self._prompts))):
            self.sample()
        if self.checkpoint_is_due() and not is_left(self._checkpoint_path()):
            self.checkpoint()

    def _checkpoint_path(self) -> Path:
        return self._run.checkpoints / f"{self._name}-{self._training.step:08d}.safetensors"

    def _sample_path(self, number: int) -> Path:
        return self._run.samples / f"{self._training.step:08d}_{number:02d}.png"

    def checkpoint(self) -> str:
        """Exports the adapter as it stands, keeps the newest few, and returns the path inside the run folder."""
        training = self._training
        path = self._checkpoint_path()
        relative = path.relative_to(self._run.path).as_posix()
        if self._exported_at == training.step:  # a stop at a step that has a checkpoint anyway
            return relative
        self._exported_at = training.step
        if training.device.is_main:
            self._export(path.parent, path.name)
            kept = sorted(self._run.checkpoints.glob("*.safetensors"))
            for old in kept[: -training.config.checkpoints.keep]:
                old.unlink(missing_ok=True)
        self._emit(events.Checkpoint(step=training.step, path=relative))
        return relative

    def stop(self, asked: str) -> None:
        """The run ends early with everything saved."""
        path = self.checkpoint()
        self._run.take_flag("stop")
        step = self._training.step
        self._emit(events.Paused(step=step) if asked == "pause" else events.Stopped(step=step, path=path))

    def finish(self, seconds: float) -> None:
        """The run is complete: the LoRA appears at the top of the run folder, by rename."""
        name = f"{self._name}.safetensors"
        self._emit(events.Stage(name="export", detail=name))
        proof = ""
        if self._training.device.is_main:
            exported = self._export(self._run.path, name)
            if exported.sentence():
                self._emit(events.Stage(name="export", detail=f"{name}: {exported.sentence()}"))
            if self._training.config.output.verify:
                proof = self._verify(self._run.path / name, exported)
        self._run.take_flag("stop")
        drawn = [event for event in events.read_since(self._run.events)[0] if event.get("type") == "sample"]
        drawing = sum(float(event.get("seconds") or 0.0) for event in drawn)
        self._emit(events.Finished(step=self._training.step, path=name, seconds=seconds, sample_seconds=drawing, proof=proof))

    def _verify(self, path: Path, exported: Exported) -> str:
        """Reads the finished file back; the training's own adapters are taken out for it. Raises AdapterFileError."""
        training = self._training
        self._emit(events.Stage(name="verify", detail="as diffusers and as this program reads it"))
        training.take_out()
        training.optimizer.state.clear()  # saved, and room for the picture
        proof = verify(training.model, path, exported.modules, next(iter(self._prompts), ""))
        write_proof(proof, self._run.proof)
        if not proof.ok:
            what = f"The LoRA is written, but would not be read as it was trained: {proof.problems[0]}"
            raise AdapterFileError(what, str(path), f"All that was found stands in {self._run.proof.name}.")
        return proof.sentence

    def _export(self, folder: Path, name: str) -> Exported:
        training = self._training
        folder.mkdir(parents=True, exist_ok=True)
        base, step = training.model.facts, training.step
        how = (self._started_at, training.device.dtype_name, self._hash_base().result())
        metadata = describe_run(training.config, base, training.data, step, *how)
        exported = trained_modules(training.flat, training.exported, training.plans, training.config, training.model)
        export_adapter(folder / name, exported, training.config, metadata, base.family.name)
        return exported


def _hashes_of(base: BaseModelFacts) -> tuple[str, str]:
    """The hashes of a base's file; empty ones of a file that vanished or changed meanwhile."""
    try:
        file = weight_files(base, "unet")[0]
        before = file.stat()
        hashes = base_file_hashes(file)
        after = file.stat()
    except (AdapterFileError, BaseModelError, OSError):
        return "", ""
    return hashes if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) else ("", "")


@contextmanager
def exported_weights(training: Training) -> Iterator[None]:
    """While held, the layers compute with the weights that would be exported (the running mean, where there is one)."""
    if training.mean is None:
        yield
        return
    masters = training.flat.weights.clone()
    with torch.no_grad():
        training.flat.weights.copy_(training.mean)
    try:
        yield
    finally:
        with torch.no_grad():
            training.flat.weights.copy_(masters)
