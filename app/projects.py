"""A project as a folder: its name, where its pictures are, trigger word, recipe, edited captions, and the runs it led to."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from app.refusals import NOT_FOUND, Refusal
from trainers.dataset.edits import Edits, read_edits, write_edits
from trainers.dataset.files import walk_folder
from trainers.files import write_atomically
from trainers.presets import resolve
from trainers.run_folder import absolute

OWN = "own"
"""Source of a project whose pictures lie in its own folder."""
MAX_NAME = 80
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
# Requests run in threads: what is read, changed and written must not cross.
_writing = threading.RLock()


class Project(BaseModel):
    """What project.toml says, and the places around it. Frozen: `change_project` gives the next one."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    folder: Path
    name: str
    created: float
    """Seconds since 1970."""
    source: str = OWN
    """"own", or the folder that the person named; that one is never written to."""
    trigger: str = ""
    preset: str = ""
    """The preset that the recipe starts from. Empty: the base model's own."""
    runs: tuple[str, ...] = ()
    """Ids of the runs, oldest first."""

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def is_own(self) -> bool:
        """Whether the pictures were copied into the project."""
        return self.source == OWN

    @property
    def images(self) -> Path:
        """The folder with the pictures."""
        return self.folder / "images" if self.is_own else Path(self.source)

    @property
    def edits_file(self) -> Path:
        """Edited captions, excluded pictures and crops of the present source."""
        return self.folder / "captions.json"

    @property
    def recipe_file(self) -> Path:
        """The settings that the person chose, as a partial TrainConfig."""
        return self.folder / "recipe.toml"

    @property
    def thumbs(self) -> Path:
        """The cache of thumbnails."""
        return self.folder / "thumbs"


def projects_folder(home: Path) -> Path:
    """Where the projects are."""
    return home / "projects"


def make_slug(text: str, fallback: str, length: int = 40) -> str:
    """A name as [a-z0-9-], at most `length` long: "Süße Katze!" -> "susse-katze"."""
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:length].strip("-") or fallback


def list_projects(home: Path) -> list[Project]:
    """All projects that can be read, the newest first."""
    found = []
    try:
        names = os.listdir(projects_folder(home))
    except FileNotFoundError:
        return []
    for name in names:
        try:
            found.append(read_project(home, name))
        except Refusal:  # a stray file or a folder that is being made or deleted
            continue
    return sorted(found, key=lambda project: (-project.created, project.id))


def read_project(home: Path, project_id: str) -> Project:
    """The project of this id. Raises Refusal when there is none, or when its file is damaged."""
    path = projects_folder(home) / project_id / "project.toml"
    if not _ID.fullmatch(project_id) or not path.is_file():
        raise Refusal("There is no such project", project_id[:80], "Go back to the list of projects.", status=NOT_FOUND)
    try:
        return Project(**{**tomllib.loads(path.read_text(encoding="utf-8")), "folder": path.parent})
    except (OSError, ValueError, TypeError, ValidationError) as error:
        hint = "Correct that file, or make a new project."
        raise Refusal(f"The project's file is damaged: {_first_line(error)}", str(path), hint) from error


def create_project(home: Path, name: str) -> Project:
    """A new, empty project. Raises Refusal for a name that is none, OSError when the disk refuses."""
    name = _checked_name(name)
    slug = make_slug(name, "project")
    projects_folder(home).mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = projects_folder(home) / (slug if number == 1 else f"{slug}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    project = Project(folder=folder, name=name, created=time.time())
    (folder / "images").mkdir()
    _write(project)
    return project


def change_project(project: Project, **changes: Any) -> Project:
    """Writes name, trigger, preset or source anew. Raises Refusal for a value that cannot be."""
    if "name" in changes:
        changes["name"] = _checked_name(changes["name"])
    if "trigger" in changes:
        changes["trigger"] = " ".join(str(changes["trigger"]).split())
        if len(changes["trigger"]) > MAX_NAME:
            raise Refusal(f"A trigger word has at most {MAX_NAME} characters", "dataset.trigger", "One made-up word is best.")
    with _writing:
        changed = _now(project).model_copy(update=changes)
        _write(changed)
    return changed


def add_run(project: Project, run_id: str) -> Project:
    """Notes a run of the project."""
    with _writing:
        return change_project(project, runs=(*_now(project).runs, run_id))


def drop_run(project: Project, run_id: str) -> Project:
    """Notes that a run of the project has gone."""
    with _writing:
        return change_project(project, runs=tuple(one for one in _now(project).runs if one != run_id))


def delete_project(project: Project) -> None:
    """Removes the project's folder with the pictures copied into it; a folder that the person named, and runs, stay."""
    with _writing:
        (project.folder / "project.toml").unlink(missing_ok=True)  # from here on it is gone, whatever happens to the rest
        shutil.rmtree(project.folder)


def set_source(project: Project, folder: str) -> Project:
    """Takes the pictures from a folder of the person's, or, for "" or "own", from the project itself.

    Edits belong to a source: those of another one are kept aside, and come back with it. Raises Refusal or DatasetError.
    """
    source = OWN
    if folder.strip() not in ("", OWN):
        path = Path(os.path.expanduser(folder.strip().strip("\"'")))
        if not path.is_absolute():
            raise Refusal("Type the whole path of the folder", folder[:200], "For example ~/pictures or C:\\pictures.")
        path = absolute(path)
        if path == path.parent or path == Path.home():
            raise Refusal("This is not a folder of pictures but all there is", str(path), "Name the folder with the pictures.")
        walk_folder(path)  # says in words why it cannot be listed
        source = str(path)
    with _writing:
        project = _now(project)
        if source == project.source:
            return project
        if project.edits_file.exists():
            os.replace(project.edits_file, _edits_aside(project, project.source))
        aside = _edits_aside(project, source)
        if aside.exists():
            os.replace(aside, project.edits_file)
        return change_project(project, source=source)


def _edits_aside(project: Project, source: str) -> Path:
    return project.folder / f"captions-{hashlib.sha256(source.encode('utf-8', 'replace')).hexdigest()[:12]}.json"


def load_edits(project: Project) -> Edits:
    """The project's edits; none yet is none. Raises DatasetError when the file is damaged."""
    return read_edits(project.edits_file) if project.edits_file.exists() else Edits()


def change_edits(
    project: Project,
    captions: dict[str, str | None],
    excluded: dict[str, bool],
    crops: dict[str, tuple[float, float] | None] | None = None,
) -> Edits:
    """Lays captions, exclusions and crops over what there is; None takes one back. Names must be those of a scan."""
    with _writing:
        edits = load_edits(project)
        texts = {**edits.captions, **captions}
        left_out = edits.excluded - {name for name, out in excluded.items() if not out}
        left_out |= {name for name, out in excluded.items() if out}
        places = {**edits.crops, **(crops or {})}
        changed = Edits(
            {name: text for name, text in texts.items() if text is not None},
            left_out,
            {name: place for name, place in places.items() if place is not None},
        )
        if changed != edits:
            write_atomically(project.edits_file, write_edits(changed))
    return changed


def read_recipe(project: Project) -> dict[str, Any]:
    """The settings that the person chose, as nested values. Raises Refusal when the file is no TOML."""
    try:
        return tomllib.loads(recipe_text(project))
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"The recipe is not readable as TOML: {error}", "recipe.toml", "Correct that line.") from error


def recipe_text(project: Project) -> str:
    """The recipe as TOML; empty when nothing was chosen yet."""
    try:
        return project.recipe_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise Refusal("The recipe is no UTF-8 text", "recipe.toml", "Save it as UTF-8.") from error


def write_recipe(project: Project, recipe: dict[str, Any] | str) -> dict[str, Any]:
    """Stores a recipe, given as nested values (None unsets one) or as TOML text, which keeps its comments.

    Raises Refusal or SettingError, with nothing written, when it is not valid over the project's preset.
    """
    import tomlkit

    text = recipe if isinstance(recipe, str) else tomlkit.dumps(_without_none(recipe))
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"The recipe is not readable as TOML: {error}", "recipe.toml", "Correct that line.") from error
    resolve(project.preset or "pocket", values)
    write_atomically(project.recipe_file, text.encode("utf-8", "replace"))
    return values


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_none(v) if isinstance(v, dict) else v for key, v in values.items() if v is not None}


def _checked_name(name: str) -> str:
    name = " ".join(name.split())
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise Refusal(f"A project's name has 1 to {MAX_NAME} printable characters", "name", "Choose another name.")
    return name


def _now(project: Project) -> Project:
    return read_project(project.folder.parent.parent, project.id)


def _write(project: Project) -> None:
    import tomlkit

    values = project.model_dump(mode="json", exclude={"folder"})
    write_atomically(project.folder / "project.toml", tomlkit.dumps(values).encode("utf-8", "replace"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
