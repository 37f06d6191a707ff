"""The bodies and answers of the REST API's part about the library, blends and routing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from app.answers import Body, DrawingDefaults
from trainers.cells import MOST_LORAS, Strength

Key = Annotated[str, Field(max_length=1024)]
"""A LoRA of the library: its path below the home folder."""
Prompt = Annotated[str, Field(max_length=4096)]


class CardAnswer(BaseModel):
    """A LoRA of the library. `size` in bytes; `picture` is an address, empty without one."""

    key: str
    name: str
    title: str
    run: str
    project: str
    """Name of the project that the run belongs to; empty without one."""
    steps: str
    """So many steps were trained, as the file says; empty where it does not."""
    changed: float
    """When the file was written: seconds since 1970."""
    family: str
    kinds: list[str]
    ranks: list[int]
    words: list[str]
    size: int
    picture: str
    chosen: str
    """Name of the drawn picture that it is shown with; empty where it is shown with its own."""
    strength: float
    """What routing brings it in at."""
    routed: bool
    problem: str
    """Why it cannot be used; empty for one that can."""


class LibraryAnswer(BaseModel):
    """GET /api/library, the newest first; `total` counts those that a search leaves out too."""

    cards: list[CardAnswer]
    total: int


class CardDetails(BaseModel):
    """GET /api/library/card: what is written inside the file, and its hashes."""

    metadata: dict[str, str]
    sha256: str
    autov2: str
    autov3: str


class CardChange(Body):
    """PUT /api/library/card: what is left out stays. The file itself is never changed."""

    file: Key
    strength: Strength | None = None
    words: Prompt | None = None
    """Trigger words parted by commas; a phrase in quotes stays whole."""
    routed: bool | None = None


class CardNamed(Body):
    """Which LoRA it is about."""

    file: Key


class PictureChoice(CardNamed):
    """PUT /api/library/picture: a picture of the studio by its name, or empty for the LoRA's own again."""

    picture: Annotated[str, Field(max_length=100)]


class Removed(BaseModel):
    """What takes a removed file back: POST /api/library/restore."""

    ticket: str


class Restore(Body):
    """POST /api/library/restore."""

    ticket: Annotated[str, Field(max_length=40)]


class Routing(Body):
    """POST /api/projects/{id}/route: which LoRAs a prompt brings in."""

    prompt: Prompt


class RoutedAnswer(BaseModel):
    """A LoRA that a prompt brings in, the word by which it does, and the strength."""

    file: str
    word: str
    strength: float


class RoutingAnswer(BaseModel):
    """In the order of their words in the prompt."""

    loras: list[RoutedAnswer]


class UseBody(Body):
    """A LoRA of the library at strengths; `blocks` are multipliers, of which a missing one is 1."""

    file: Key
    unet: Strength
    text: Strength
    blocks: dict[str, Strength] = Field(default_factory=dict)


Uses = Annotated[list[UseBody], Field(max_length=MOST_LORAS)]


class BlendDraw(Body):
    """POST /api/projects/{id}/blend: one picture of the project's base with LoRAs. Sizes in pixels."""

    prompt: Prompt
    negative: Prompt = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    width: int = Field(ge=32, le=2048, multiple_of=8)
    height: int = Field(ge=32, le=2048, multiple_of=8)
    steps: int = Field(default=20, ge=1, le=200)
    guidance: float = Field(default=5.0, ge=0, le=30, allow_inf_nan=False)
    scheduler: str = "dpm++"
    loras: Uses = Field(default_factory=list)


class BlendDefaults(DrawingDefaults):
    """GET /api/projects/{id}/blend: what the screen begins with, and what there is to choose from."""

    base: str
    family: str
    blocks: list[str]
    blends: list[str]


class BlendState(BaseModel):
    """GET /api/blend/{number}: how a request stands; `picture` is an address, `answer` of what is no drawing."""

    state: str
    done: int
    total: int
    picture: str
    answer: dict[str, Any] | None
    problem: str


class BlendBody(Body):
    """PUT /api/blends/{name}."""

    loras: Annotated[list[UseBody], Field(min_length=1, max_length=MOST_LORAS)]


class BlendAnswer(BaseModel):
    """A blend. `missing` are files that are in it and not in the library."""

    loras: list[UseBody]
    missing: list[str]


class BlendsAnswer(BaseModel):
    """Names of all blends."""

    blends: list[str]


class ExportBody(Body):
    """POST /api/projects/{id}/blend/export: the LoRAs as one file of the library. A rank cuts it; without, it is exact."""

    name: Annotated[str, Field(max_length=80)]
    loras: Annotated[list[UseBody], Field(min_length=1, max_length=MOST_LORAS)]
    rank: int | None = Field(default=None, ge=1, le=4096)
