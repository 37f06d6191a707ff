"""What a request works with: the window's one desk, the run and the project that its address names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from app.calibrations import Calibrations
from app.captioning import Captioning
from app.grids import Grids
from app.inspection import Inspector
from app.preflight import Preflight
from app.projects import Project, read_project
from app.run_queue import RunQueue
from app.runs import Runs
from app.scanning import Scanner
from app.studio_client import Studio
from app.tournaments import Tournaments
from trainers.run_folder import RunFolder


@dataclass(frozen=True)
class Desk:
    """What all requests of one window share."""

    home: Path
    runs: Runs
    scanner: Scanner
    studio: Studio
    preflight: Preflight
    queue: RunQueue
    inspector: Inspector
    captioning: Captioning
    grids: Grids
    tournaments: Tournaments
    calibrations: Calibrations

    def close(self) -> None:
        """Ends the processes that the window alone uses; a training goes on."""
        self.queue.close()
        self.studio.close()
        self.preflight.stop()
        self.inspector.close()
        self.captioning.close()


def make_desk(home: Path) -> Desk:
    """The desk for a home folder. Nothing is read or started."""
    runs, studio, preflight = Runs(home), Studio(home), Preflight(home)
    return Desk(
        home,
        runs,
        Scanner(),
        studio,
        preflight,
        RunQueue(runs, before_start=preflight.stop),
        Inspector(),
        Captioning(home),
        Grids(studio),
        Tournaments(home / "window" / "tournaments"),
        Calibrations(home, studio),
    )


@dataclass(frozen=True)
class Place:
    """What a request about a project works with."""

    project: Project
    desk: Desk


def _desk(request: Request) -> Desk:
    desk: Desk = request.state.desk
    return desk


TheDesk = Annotated[Desk, Depends(_desk)]


def _run(run_id: str, desk: TheDesk) -> RunFolder:
    return desk.runs.find(run_id)


TheRun = Annotated[RunFolder, Depends(_run)]


def _place(project_id: str, desk: TheDesk) -> Place:
    return Place(read_project(desk.home, project_id), desk)


ThePlace = Annotated[Place, Depends(_place)]
