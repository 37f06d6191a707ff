"""The bodies and answers of the REST API: what the window itself uses, and what other programs may."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.progress import State
from trainers.config import SampleSettings
from trainers.samplers import SAMPLERS

ShortText = Annotated[str, Field(max_length=4096)]


class Body(BaseModel):
    """Base of what is sent in: unknown names are refused, so that a misspelt one is not lost silently."""

    model_config = ConfigDict(extra="forbid")


class NewProject(Body):
    """POST /api/projects."""

    name: ShortText


class ProjectChange(Body):
    """PATCH /api/projects/{id}: what is left out stays. `recipe` takes the place of the whole recipe; null unsets a setting."""

    name: ShortText | None = None
    trigger: ShortText | None = None
    preset: ShortText | None = None
    recipe: dict[str, Any] | None = None


class SourceChange(Body):
    """PUT /api/projects/{id}/source. An empty folder, or "own", means the pictures copied into the project."""

    folder: ShortText


class RunStart(Body):
    """POST /api/projects/{id}/runs and .../check: settings over the project's recipe, as {"adapter": {"rank": 8}}."""

    settings: dict[str, Any] = {}
    preset: ShortText | None = None
    force: bool = False
    """Pass what is only not advisable; what cannot be is refused all the same."""


class ProblemAnswer(BaseModel):
    """One thing that is wrong or worth knowing. `where` is a setting's dotted name, or a file."""

    severity: Literal["error", "advice", "warning", "note"]
    what: str
    where: str = ""
    hint: str = ""


class SettingsAnswer(BaseModel):
    """422 of a start: the first problem in words, and all of them, each with its setting in `where`."""

    what: str
    where: str = ""
    hint: str = ""
    problems: list[ProblemAnswer] = []


class FileAnswer(BaseModel):
    """A LoRA file of a run; `step` is null for the finished one. `size` in bytes."""

    step: int | None
    name: str
    size: int
    url: str


class EmbeddingAnswer(BaseModel):
    """The finished vectors of a run's trigger word: a file that other programs call by its name. `size` in bytes."""

    name: str
    size: int
    url: str


class RunAnswer(BaseModel):
    """Where a run stands. Times in seconds, memory in bytes; null is not known (yet)."""

    id: str
    project: str
    state: State
    sentence: str
    """What it does, or how it ended."""
    phase: str
    """scan, load, prior, train, export; empty before the first."""
    phase_words: str
    detail: str
    done: int
    total: int
    step: int
    steps: int
    seconds_left: float | None
    seconds_per_step: float | None
    loss: float | None
    held_out_loss: float | None
    memory: int | None
    device: str
    asked: Literal["stop", "pause"] | None
    can: list[str]
    """What may be asked of it now: stop, pause, resume, sample-now, save-now."""
    saved_step: int
    warnings: list[str]
    sample: str
    """Address of the newest sample; empty before the first."""
    files: list[FileAnswer]
    embedding: EmbeddingAnswer | None


class RunsAnswer(BaseModel):
    """GET /api/runs, the newest first."""

    runs: list[RunAnswer]


class StatusAnswer(RunAnswer):
    """GET /api/runs/{id}/status: where it stands, and the events after byte `since` as events.jsonl has them."""

    events: list[dict[str, Any]]
    next: int
    """The `since` to ask with next."""
    more: bool
    """There are more events already: ask at once."""


class ProjectAnswer(BaseModel):
    """A project."""

    id: str
    name: str
    created: float
    source: str
    """"own", or the folder that the person named."""
    trigger: str
    preset: str
    recipe: dict[str, Any]
    runs: list[str]
    """Ids, oldest first; of those that are still there."""
    latest: RunAnswer | None
    cover: str
    """Address of the newest sample of any of its runs; empty without one."""


class ProjectsAnswer(BaseModel):
    """GET /api/projects, the newest first."""

    projects: list[ProjectAnswer]


class ImageAnswer(BaseModel):
    """A picture. `caption` is what the person wrote; `fallback` is used where that is empty."""

    rel: str
    width: int
    height: int
    caption: str
    fallback: str
    edited: bool
    """The caption stands in the project and not beside the picture."""
    tokens: int
    """With the trigger word, without the marks of begin and end; 75 are read."""
    cut: int | None
    """Where, in UTF-16 units of the caption (or the fallback), the text encoder stops reading; null when it reads all."""
    excluded: bool
    repeats: int
    problems: list[ProblemAnswer]
    thumb: str


class HealthAnswer(BaseModel):
    """The folder at a glance."""

    count: int
    """Pictures that a run would use."""
    excluded: int
    smallest: str
    """Name of the picture with the smallest side."""
    smallest_side: int
    """In pixels; 0 without pictures."""
    no_caption: list[str]
    too_long: list[str]
    """Captions of which the end is not read."""
    unreadable: list[ProblemAnswer]
    """Files left out, by name, with the reason."""
    problems: list[ProblemAnswer]
    """What else there is to say."""


class ImagesAnswer(BaseModel):
    """GET /api/projects/{id}/images."""

    source: str
    images: list[ImageAnswer]
    health: HealthAnswer


class SavedAnswer(BaseModel):
    """What was saved, as it is now, and the folder's health with it."""

    images: list[ImageAnswer]
    health: HealthAnswer


class CheckAnswer(BaseModel):
    """POST /api/projects/{id}/check: what a run would be. With `ok` false `problems` says why, and only settings are known."""

    ok: bool
    problems: list[ProblemAnswer]
    arithmetic: str = ""
    """Pictures x repeats x epochs / batch = steps, in words."""
    steps: int = 0
    pictures: int = 0
    held_out: int = 0
    base: str = ""
    family: str = ""
    """The base's, so that the presets for it come first; empty where it is unknown."""
    preset: str = ""
    scale: float = 0.0
    """alpha / rank, as the adapter type counts it."""
    layers: int = 0
    ranks: str = ""
    """How many of them learn at which rank, in words."""
    parameters: int = 0
    """Numbers that learn."""
    file_bytes: int = 0
    """Of the LoRA's file, about."""
    is_quick: bool = False
    """The base is so small that it can be measured without being asked."""
    settings: dict[str, Any] = {}
    """Complete and resolved."""


class MeasureAnswer(BaseModel):
    """POST /api/projects/{id}/measure: what two real steps of such a run took; asked again until it is no longer measuring.

    Times in seconds, memory in bytes. `hints`: what to change when it does not fit.
    """

    state: Literal["measuring", "done", "failed", "busy"]
    what: str = ""
    hints: list[str] = []
    seconds: float = 0.0
    """To finish, from Start to the file."""
    seconds_per_step: float = 0.0
    memory: int = 0
    memory_free: int = 0
    fits: bool = True
    device: str = ""


class MetadataAnswer(BaseModel):
    """What is inside a LoRA file. Hashes as galleries know them; `sha256` of the whole file."""

    name: str
    size: int
    step: int | None
    sha256: str
    autov3: str
    metadata: dict[str, str]


class LogAnswer(BaseModel):
    """The last lines that the process said."""

    lines: list[str]


class DrawingDefaults(BaseModel):
    """How a screen that draws begins. Sizes in pixels."""

    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str
    schedulers: list[str]


def begin_with(samples: SampleSettings, side: int) -> dict[str, Any]:
    """The fields of DrawingDefaults but the prompt, out of a run's settings for its samples."""
    how = samples.model_dump(include={"negative", "seed", "steps", "guidance", "scheduler"})
    return {**how, "width": side, "height": side, "schedulers": list(SAMPLERS)}
