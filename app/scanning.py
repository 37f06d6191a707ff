"""What the window knows of a project's pictures: the trainer's own scan, remembering files that have not changed."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from app.masks import mask_setting
from app.projects import Project, load_edits
from app.refusals import NOT_FOUND, Refusal
from trainers.config import TrainConfig
from trainers.dataset.edits import Edits
from trainers.dataset.folder import Example, Scan, scan_folder
from trainers.dataset.pictures import Picture, read_picture
from trainers.errors import DatasetError, Problem
from trainers.run_folder import absolute

_REMEMBERED = 50_000
"""Files whose facts are kept; about 30 MB."""


@dataclass(frozen=True)
class Look:
    """A project's pictures as they are now: a scan in which excluded pictures still stand, and the edits."""

    scan: Scan
    edits: Edits

    @property
    def examples(self) -> dict[str, Example]:
        """The pictures by name. Their captions are without trigger word."""
        return {example.name: example for example in self.scan.examples}


class Scanner:
    """Scans folders for all requests. A file is read again only after its size or time has changed."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, int, int], Picture | Problem] = {}
        self._paths: dict[Path, dict[str, Path]] = {}
        self._scanning = threading.Lock()

    def look(self, project: Project) -> Look:
        """The pictures of a project. An empty or missing folder, or one without a usable picture, is a Look with problems.

        Raises DatasetError only for a damaged file of edits.
        """
        edits = load_edits(project)
        with self._scanning:  # two at once would read the same files twice
            try:
                masks = mask_setting(project)
                scan = scan_folder(project.images, edits=Edits(edits.captions, crops=edits.crops), read=self._read, masks=masks)
            except DatasetError as error:
                scan = Scan(project.images, (), (*self._unreadable(project), _said(error)))
        self._paths[project.images] = {example.name: example.path for example in scan.examples}
        return Look(scan, edits)

    def scan_for_run(self, config: TrainConfig, edits: Edits) -> Scan:
        """The scan that a run with this configuration and these edits will begin with. Raises DatasetError."""
        settings = config.dataset
        with self._scanning:
            return scan_folder(
                Path(settings.images),
                trigger=settings.trigger,
                repeats=settings.repeats,
                edits=edits,
                read=self._read,
                masks=settings.masks,
            )

    def beside(self, project: Project) -> dict[str, str]:
        """The captions in files beside the pictures, by name, whatever was edited since."""
        with self._scanning:
            try:
                scan = scan_folder(project.images, read=self._read)
            except DatasetError:
                return {}
        return {example.name: example.caption for example in scan.examples if example.caption_source == "file"}

    def find_picture(self, project: Project, name: str) -> Path:
        """The file of a picture by its name in the scan: what a request names is looked up, never joined to a folder.

        Raises Refusal when there is no such picture.
        """
        path = self._paths.get(project.images, {}).get(name)
        if path is None:
            example = self.look(project).examples.get(name)
            path = example.path if example else None
        if path is None or not path.is_file():
            raise Refusal("There is no such picture in this project", name[:200], "Load the page again.", status=NOT_FOUND)
        return path

    def read(self, path: Path) -> Picture:
        """The facts about a picture beside a project's own, as one of a prior folder, remembered too. Raises DatasetError."""
        with self._scanning:
            return self._read(path)

    def _read(self, path: Path) -> Picture:
        """The facts about a picture, from its header where its end is whole. Raises DatasetError."""
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        known = self._facts.get(key)
        if known is None:
            try:
                known = read_picture(path, decode=False)
            except DatasetError as error:
                known = _said(error)
            if len(self._facts) >= _REMEMBERED:
                self._facts.clear()
            self._facts[key] = known
        if isinstance(known, Problem):
            raise DatasetError(known.what, known.where, known.hint)
        return known

    def _unreadable(self, project: Project) -> list[Problem]:
        """Files of a folder without any usable picture, each by name: the scan's own error names the first three."""
        images = absolute(project.images)
        found = [(Path(key[0]), fact) for key, fact in self._facts.items() if isinstance(fact, Problem)]
        return [
            Problem("note", f"{fact.what}; left out", path.relative_to(images).as_posix(), fact.hint)
            for path, fact in found
            if path.is_relative_to(images) and path.is_file()
        ]


def _said(error: DatasetError) -> Problem:
    return Problem("error", error.what, error.where, error.hint)
