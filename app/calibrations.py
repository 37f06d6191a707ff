"""Strength calibrations in the window: asked of the renderer, measured when all is drawn, and baked when asked for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from app.grids import Look
from app.refusals import CONFLICT, NOT_FOUND, Refusal
from app.studio_client import Studio
from trainers.calibrate import Calibration, Plan, calibrate, make_plan
from trainers.cells import Cell
from trainers.config import TrainConfig
from trainers.dataset.pictures import load_pixels
from trainers.dataset.prepare import render_side, scan_images
from trainers.families import recognise_base
from trainers.library import read_facts
from trainers.measures.pixels import MEASURED_SIDE
from trainers.run_folder import embedding_needed

REMEMBERED = 10
_SHOWN = 2
"""How many prompts are shown at strength 1 and at the suggested one."""


@dataclass
class _Job:
    """One calibration; `result` once it is measured."""

    plan: Plan
    lora: Path
    family: str
    how: dict[str, Any]
    look: Look
    """How its drawing stands."""
    result: Calibration | None = None
    shown: Look | None = None
    """How the drawing of what is shown stands."""
    baked: Path | None = None
    """The file that was written for it."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Calibrations:
    """The calibrations of one window, by the number of their request. May be used from any thread."""

    def __init__(self, home: Path, studio: Studio) -> None:
        self.folder = home / "loras"
        """Where baked files are written."""
        self._home, self._studio = home, studio
        self._lock = threading.Lock()
        self._baking = threading.Lock()
        self._jobs: dict[int, _Job] = {}

    def ask(self, config: TrainConfig, lora: Path) -> int:
        """Begins one for a LoRA of a run with these settings; returns its number. Raises TrainingError."""
        read_facts(lora)  # a damaged one is told now, and not after the base's own pictures
        plan = make_plan(scan_images(config).examples, config.dataset.trigger)
        of = config.samples
        base = recognise_base(config.base.model, config.base.options)
        how: dict[str, Any] = {"negative": of.negative, "steps": of.steps, "guidance": of.guidance, "scheduler": of.scheduler}
        side = render_side(config, base)
        how |= {"width": side, "height": side, "base": config.base.model_dump()}
        number = self._draw(how, plan.cells(lora), replaces=True)
        job = _Job(plan, lora, base.family.name, how, self._studio.watch(number))
        with self._lock:
            self._jobs[number] = job
            for old in list(self._jobs)[:-REMEMBERED]:
                del self._jobs[old]
        return number

    def look(self, number: int) -> tuple[dict[str, Any], Plan, Calibration | None, dict[str, list[str]]]:
        """How one stands: the renderer's words, what is drawn, the result, and files at strength 1 and the suggested one.

        The first look after the last picture measures, within about a second. Raises Refusal.
        """
        job = self._find(number)
        found = job.look()
        with job.lock:
            if found["state"] == "done" and job.result is None:
                job.result = _measure(job.plan, found["cells"])
                job.shown = self._studio.watch(self._draw(job.how, self._shown_cells(job), replaces=False))
        shown = job.shown()["cells"] if job.shown else {}
        pairs = {
            "whole": [shown[at] for at in range(_SHOWN) if at in shown],
            "suggested": [shown[at + _SHOWN] for at in range(_SHOWN) if at + _SHOWN in shown],
        }
        return found, job.plan, job.result, pairs

    def bake(self, number: int) -> tuple[Path, str]:
        """Writes the LoRA with the suggested strength made its 1, and says what it needs beside it; the file itself stays.

        Raises Refusal.
        """
        job = self._find(number)
        if job.result is None:
            raise Refusal("It is not measured yet", str(number), "Wait for it.", status=CONFLICT)
        strength = job.result.suggested
        if strength <= 0:
            raise Refusal("Strength 0 is the base alone: there is nothing to bake", hint="Train it for longer.")
        # One at a time, so that no two take the same name.
        with self._baking:
            if job.baked is None or not job.baked.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                output = self._free_path(f"{job.lora.stem}-at-{strength:.2f}")
                self._merge(job, strength, output)
                job.baked = output
            return job.baked, embedding_needed(job.lora)

    def baked(self, number: int) -> Path:
        """The file that `bake` wrote. Raises Refusal."""
        path = self._find(number).baked
        if path is None or not path.is_file():
            raise Refusal("It is not baked, or the file is gone", str(number), "Bake it.", status=NOT_FOUND)
        return path

    def _free_path(self, name: str) -> Path:
        """Another LoRA of the same name, as of another run, keeps its file."""
        paths = (self.folder / f"{name}{'' if number == 1 else f'-{number}'}.safetensors" for number in itertools.count(1))
        return next(path for path in paths if not path.exists())

    def _merge(self, job: _Job, strength: float, output: Path) -> None:
        """In a process of its own: the window has no torch."""
        words = ("merge", f"{job.lora}:{strength:g}", "-o", str(output), "--family", job.family)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainers", *words],
            cwd=self._home,
            env={**os.environ, "IMPASTO_HOME": str(self._home), "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise Refusal(said[-1].removeprefix("impasto: ") if said else "It could not be baked", job.lora.name)

    def _shown_cells(self, job: _Job) -> list[Cell]:
        assert job.result is not None
        chosen = job.plan.prompts[:_SHOWN]
        return [job.plan.cell(job.lora, prompt, strength) for strength in (1.0, job.result.suggested) for prompt in chosen]

    def _find(self, number: int) -> _Job:
        with self._lock:
            if number not in self._jobs:
                raise Refusal("There is no such measurement", str(number), "Measure again.", status=NOT_FOUND)
            return self._jobs[number]

    def _draw(self, how: dict[str, Any], cells: list[Cell], replaces: bool) -> int:
        return self._studio.ask({**how, "cells": [cell.model_dump(mode="json") for cell in cells], "replaces": replaces})


def _measure(plan: Plan, drawn: dict[int, str]) -> Calibration:
    def small(path: str) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB").resize((MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.LANCZOS)

    try:
        pictures = {cell: small(path) for cell, path in drawn.items()}
    except FileNotFoundError as error:
        raise Refusal("A picture is gone", str(error.filename or ""), "Measure again.", status=NOT_FOUND) from error
    return calibrate(plan, pictures, [load_pixels(path) for path in plan.wanted])
